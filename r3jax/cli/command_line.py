"""Parses what absl does not: single flags before it runs, required flags, names of configs."""

from collections.abc import Sequence

from absl import flags

from r3jax.files import config_files


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


def require(**meanings: str) -> None:
  """Makes flags required.

  Args:
    **meanings: what each flag names, for the message where it is missing.
  """

  def is_given(value: object) -> bool:
    return value is not None

  for name, meaning in meanings.items():
    flags.register_validator(name, is_given, f"--{name} must name {meaning}")


def resolve_config(arguments: Sequence[str]) -> list[str]:
  """Returns the command line with the path of its config file in place of a shipped name.

  The config is loaded once here, so that a wrong name or variant is one clear message, and its
  folder is made importable for the flag library, which loads it again.

  Raises:
    ValueError: there is no such config file or variant.
  """
  name = flag_value(arguments, "config")
  if name is None:
    return list(arguments)
  config_files.load(name)
  path, _ = config_files.find(name)
  _, colon, variant = name.partition(":")
  resolved = f"{path}{colon}{variant}"
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
