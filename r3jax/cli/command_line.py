"""Parses what absl does not: single flags before it runs, required flags, names of configs."""

from collections.abc import Sequence
import functools
import os
import re

from absl import flags
import ml_collections

from r3jax.files import config_files
from r3jax.files import paths
from r3jax.files import rules

# The rules of the flags that have been defined, beside those of absl.
FLAG_RULES: dict[str, rules.Rule] = {}
_TEXT_FLAGS = ("prompt", "instruction", "question")  # "~" means itself there


def flag_value(arguments: Sequence[str], name: str) -> str | None:
  """Returns the last value of a flag, "" where it has none, None where it is not given.

  Args:
    arguments: a command line, `--NAME=VALUE` or `--NAME VALUE` with one or two dashes.
    name: of the flag, without dashes.
  """
  value = None
  for i, argument in enumerate(arguments):
    head, equals, tail = argument.partition("=")
    if head not in (f"-{name}", f"--{name}"):
      continue
    if not equals:  # the value is the next word
      tail = "".join(arguments[i + 1 : i + 2])
    value = tail
  return value


def with_homes(arguments: Sequence[str]) -> list[str]:
  """Returns a command line with the home folder in place of every leading "~" of a value.

  Shells do that for words, and leave `--out=~/folder` as it is. Flags that take a text keep it.

  Raises:
    ValueError: a value begins with the name of a home that does not exist.
  """
  result = []
  follows_text = False
  for argument in arguments:
    head, equals, value = argument.partition("=")
    name = head.lstrip("-")
    if not argument.startswith("-"):
      result.append(argument if follows_text else _with_home(argument))
    elif name in _TEXT_FLAGS or not value.startswith("~"):
      result.append(argument)
    elif name.startswith("config."):
      # It need not be a path; the keys that are refuse another home themselves.
      result.append(f"{head}={os.path.expanduser(value)}")
    else:
      result.append(f"{head}={_with_home(value)}")
    follows_text = name in _TEXT_FLAGS and not equals
  return result


def _with_home(word: str) -> str:
  return str(paths.of_user(word)) if word.startswith("~") else word


def require(**meanings: str) -> None:
  """Makes flags required; an empty or blank text is none.

  Args:
    **meanings: what each flag names, for the message where it is missing.
  """

  def is_given(value: object) -> bool:
    return value is not None and bool(str(value).strip())

  for name, meaning in meanings.items():
    flags.register_validator(name, is_given, f"--{name} must name {meaning}")


def limit(**flag_rules: rules.Rule) -> None:
  """Makes flags keep rules, where they are given.

  Args:
    **flag_rules: the rule of each flag.
  """
  FLAG_RULES.update(flag_rules)
  for name, rule in flag_rules.items():
    flags.register_validator(name, functools.partial(_keep, name, rule))


def _keep(name: str, rule: rules.Rule, value: object) -> bool:
  """Returns True where a flag keeps its rule or is not given.

  Raises:
    flags.ValidationError: it breaks the rule.
  """
  if value is None:
    return True
  problem = rules.problem(f"--{name}", rule, value)
  if problem:
    raise flags.ValidationError(problem)
  return True


def resolve_config(arguments: Sequence[str]) -> list[str]:
  """Returns the command line with the path of its config file in place of a shipped name.

  The config is loaded once here, so that a wrong name, variant or key is one clear message, and its
  folder is made importable for the flag library, which loads it again.

  Raises:
    ValueError: there is no such config file, variant or key.
  """
  name = flag_value(arguments, "config")
  if name is None:
    _check_no_keys(arguments)
    return list(arguments)
  config = config_files.load(name)
  _check_keys(arguments, config)
  path, variant = config_files.find(name)
  resolved = f"{path}:{variant}" if variant else str(path)
  # absl lets the last value of a flag win, so the earlier ones are replaced alike.
  lines = []
  for i, argument in enumerate(arguments):
    follows_flag = i > 0 and arguments[i - 1] in ("-config", "--config")
    if follows_flag:
      lines.append(resolved)
    elif argument.startswith(("-config=", "--config=")):
      lines.append(f"--config={resolved}")
    else:
      lines.append(argument)
  return lines


def _check_no_keys(arguments: Sequence[str]) -> None:
  """Checks that a command line without --config sets no key of one.

  Raises:
    ValueError: it does.
  """
  for argument in arguments:
    if re.match(r"--?config\.", argument):
      raise ValueError(
        "--config must name the config file whose key is set; "
        f"it is not given, but {argument} is"
      )


def _check_keys(
  arguments: Sequence[str], config: ml_collections.ConfigDict
) -> None:
  """Checks that the config has the keys that a command line sets.

  Raises:
    ValueError: it has not; the message names the nearest of each.
  """
  known = set(rules.leaves(config, ()))
  lines = []
  for argument in arguments:
    override = re.match(r"--?config\.([^=\[]+)(.?)", argument)
    if not override:
      continue
    key, behind = override.groups()
    if not _has_key(config, key):
      lines.append(rules.unknown_key(key, known))
    elif behind == "[":
      lines.append(f"{key} must be set as a whole; got {argument}")
  if lines:
    raise ValueError("\n".join(lines))


def _has_key(config: ml_collections.ConfigDict, key: str) -> bool:
  """Returns whether a dotted key is one of the config."""
  value = config
  for name in key.split("."):
    is_section = isinstance(value, ml_collections.ConfigDict)
    if not is_section or name not in value:
      return False
    value = value[name]
  return True
