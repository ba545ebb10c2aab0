"""Writes the help of a command: its flags, and the keys of its config with their comments."""

import ast
from collections.abc import Iterator, Mapping, Sequence
import io
import pathlib
import textwrap
import tokenize

from absl import flags
import ml_collections

from r3jax.files import config_files
from r3jax.files import rules

_COLUMNS = 100
_INDENT = " " * 6


def of_command(usage: str, doc: str) -> str:
  """Returns the help of a command whose flags have been defined.

  Args:
    usage: the command and the words that it takes.
    doc: docstring of its module.
  """
  lines = [
    f"usage: r3jax {usage} [--FLAG=VALUE ...]",
    "",
    doc.strip(),
    "",
    "flags:",
  ]
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if not module.startswith("r3jax.cli."):
      continue  # those of the libraries
    for flag in defined:
      line = f"  --{flag.name}"
      if flag.default not in (None, ""):
        line += f"={flag.default}"
      lines += [line, *_wrapped(flag.help)]
  return "\n".join(lines)


def of_config(name: str, key_rules: Mapping[str, rules.Rule]) -> str:
  """Returns the keys of a config with defaults, the comments of its source, and what they may be.

  Args:
    name: see `config_files.load`.
    key_rules: dotted key -> rule.

  Raises:
    ValueError: there is no such config.
  """
  lines = [f"keys of {name}, set by --config.KEY=VALUE:"]
  for key, value, text in _explained_items(name):
    comment = _wrapped(text)
    if not _is_section(value):
      lines += [f"  --config.{key}={value!r}", *comment]
      if key in key_rules:
        lines += _wrapped(f"Must be {key_rules[key].describe()}.")
    elif comment:
      lines += [f"  {key}:", *comment]
  return "\n".join(lines)


def _explained_items(name: str) -> Iterator[tuple[str, object, str]]:
  """Yields dotted key, value and comment ("" without one) of every key of a config."""
  config = config_files.load(name)
  path, _ = config_files.find(name)
  comments = key_comments([path, *config_files.shipped_files()])
  for key, value in items(config):
    yield key, value, comments.get(key, "")


def as_markdown(name: str, key_rules: Mapping[str, rules.Rule]) -> str:
  """Returns a Markdown table of the keys of a config: default, what they may be, comment.

  Args:
    name: see `config_files.load`.
    key_rules: dotted key -> rule.

  Raises:
    ValueError: there is no such config.
  """
  lines = ["| key | default | must be | meaning |", "| --- | --- | --- | --- |"]
  for key, value, comment in _explained_items(name):
    if _is_section(value):
      if comment:
        lines.append(_markdown_row(f"**{key}**", "", "", comment))
      continue
    rule = key_rules[key].describe() if key in key_rules else ""
    lines.append(_markdown_row(f"`{key}`", f"`{value!r}`", rule, comment))
  return "\n".join(lines)


def _markdown_row(*cells: str) -> str:
  escaped = [cell.replace("|", "\\|") for cell in cells]
  return f"| {' | '.join(escaped)} |"


def _wrapped(text: str) -> list[str]:
  return textwrap.wrap(
    text, _COLUMNS, initial_indent=_INDENT, subsequent_indent=_INDENT
  )


def _is_section(value: object) -> bool:
  return isinstance(value, ml_collections.ConfigDict) and len(value) > 0


def items(
  config: ml_collections.ConfigDict, prefix: str = ""
) -> Iterator[tuple[str, object]]:
  """Yields the dotted keys of a config with their values, and every section before its keys.

  Args:
    config: a config or a section of one.
    prefix: of the keys.
  """
  sections = []
  for key, value in config.items():
    if _is_section(value):
      sections.append(key)
    else:
      yield prefix + key, value
  for key in sections:
    yield prefix + key, config[key]
    yield from items(config[key], f"{prefix}{key}.")


# --- Comments of a config's source -----------------------------------------------------------


def key_comments(paths: Sequence[pathlib.Path]) -> dict[str, str]:
  """Returns the comments of dotted config keys.

  A comment stands behind the line that sets a key, or on lines of its own above it. Keys may be
  set as `config.section.key = value` and as `config.section = ConfigDict(dict(key=value))`. The
  first comment of a key counts.

  Args:
    paths: Python files.
  """
  comments: dict[str, str] = {}
  for path in paths:
    source = path.read_text()
    comment_lines = _comment_lines(source)
    previous_line = 0
    for key, first_line, last_line in _settings(ast.parse(source)):
      if first_line == previous_line:
        continue  # of a section on one line: the comment is the section's
      previous_line = first_line
      comment = _comment_of(comment_lines, first_line, last_line)
      if comment:
        comments.setdefault(key, comment)
  return comments


def _comment_lines(source: str) -> dict[int, tuple[str, bool]]:
  """Returns line number -> (comment, whether it is alone on its line)."""
  comments = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      is_alone = not token.line[: token.start[1]].strip()
      comments[token.start[0]] = (token.string.lstrip("# "), is_alone)
  return comments


def _comment_of(
  comments: dict[int, tuple[str, bool]], first_line: int, last_line: int
) -> str:
  """Returns the comment of the statement on these lines; "" if there is none."""
  trailing, is_alone = comments.get(last_line, ("", True))
  if not is_alone:
    return trailing
  above = []
  line = first_line - 1
  while comments.get(line, ("", False))[1]:
    above.insert(0, comments[line][0])
    line -= 1
  return " ".join(above)


def _settings(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
  """Yields (dotted key, first line, last line) of everything that a config file sets."""
  names = {
    "config": ""
  }  # local names of a config and its sections -> dotted prefix
  for node in ast.walk(tree):
    if not isinstance(node, ast.Assign):
      continue
    keys = [_dotted(target, names) for target in node.targets]
    key = next((key for key in keys if key), None)
    if key is None:
      continue
    for target in node.targets:  # text = config.text = ConfigDict()
      if isinstance(target, ast.Name) and target.id != "config":
        names[target.id] = f"{key}."
    yield key, node.lineno, _line_of_comment(node.value)
    yield from _keywords(node.value, f"{key}.")


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
  """Returns the key that `config.section.key` stands for, None where it is something else."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.insert(0, node.attr)
    node = node.value
  if not parts or not isinstance(node, ast.Name) or node.id not in names:
    return None
  return names[node.id] + ".".join(parts)


def _keywords(node: ast.expr, prefix: str) -> Iterator[tuple[str, int, int]]:
  """Yields the keys of `ConfigDict(dict(key=value))`, of nested dicts too."""
  if not isinstance(node, ast.Call):
    return
  for argument in node.args:
    yield from _keywords(argument, prefix)
  for keyword in node.keywords:
    yield prefix + keyword.arg, keyword.lineno, _line_of_comment(keyword.value)
    yield from _keywords(keyword.value, f"{prefix}{keyword.arg}.")


def _line_of_comment(value: ast.expr) -> int:
  """Returns the line behind which a value's comment stands: of a section, its first."""
  return value.lineno if isinstance(value, ast.Call) else value.end_lineno
