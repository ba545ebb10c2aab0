"""The command `r3jax`: finds the sub-command, reads its flags and runs it.

A sub-command is a module of this package. Its docstring is the help text, `define_flags` defines
its flags on `absl.flags`, and `run` reads their values and calls the library. Modules are imported
when their command runs, so that `r3jax --help` does not wait for JAX.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import select
import sys
import types
from typing import IO

from absl import app
from absl import flags
from absl import logging

from r3jax.cli import command_line
from r3jax.cli import help_text
from r3jax.files import disk_errors
from r3jax.files import rules
from r3jax.files import texts
from r3jax.parallel import preemption

# What shells report for a process that SIGPIPE has ended.
_NOBODY_READS = 141
_HELP = ("--help", "-h", "-help", "--helpshort", "--helpfull")


@dataclasses.dataclass(frozen=True)
class Command:
  """What the front door must know of a sub-command before it is imported.

  Attributes:
    summary: what it does, in one line.
    words: the words that it takes beside flags, as the usage line shows them; "" for none.
    config: the config file whose keys its help lists; "" for a command without --config.
    after_end: what can be done after the command was asked to end, see `preemption`.
  """

  summary: str
  words: str = ""
  config: str = ""
  after_end: str = "the same command starts anew"


_CONTINUES = "the same command continues"
COMMANDS = {
  "train": Command(
    "train a model by R3, or resume a run",
    config="r3_geneval",
    after_end=_CONTINUES,
  ),
  "evaluate": Command(
    "evaluate a model on held-out prompts",
    config="r3_geneval",
    after_end=_CONTINUES,
  ),
  "compare": Command("compare finished evaluations", words="A B ..."),
  "rescore": Command(
    "score the images of an evaluation by another reward",
    words="DIR",
    config="r3_geneval",
  ),
  "study": Command(
    "train the arms of a study, and test its claims",
    words="STUDY",
    config="r3_geneval",
    after_end=_CONTINUES,
  ),
  "generate": Command(
    "draw images of prompts", config="r3_geneval", after_end=_CONTINUES
  ),
  "edit": Command("edit an image as told", config="r3_geneval"),
  "ask": Command("ask the model about an image", config="r3_geneval"),
  "sft": Command(
    "train the small model of the embedded world",
    config="sft_shapes",
  ),
  "convert": Command(
    "convert a model between BAGEL's format and Orbax",
    after_end="remove --out, and give the same command again",
  ),
  "compile": Command(
    "compile a run for a TPU slice, without a TPU", config="r3_geneval"
  ),
  "benchmark": Command(
    "measure an iteration with random weights, stage by stage",
    config="benchmark",
  ),
  "serve-reward": Command("serve a reward over HTTP"),
  "check-parity": Command(
    "compare r3jax with recorded numbers of the reference"
  ),
  "replay": Command(
    "find what was not finite in a skipped iteration", words="DIR"
  ),
  "report": Command(
    "print a run's summary and the path of its report", words="DIR"
  ),
}

# The config file whose keys a command takes -> the module with the rules of their values.
RULES = {
  "r3_geneval": "r3jax.run.config_rules",
  "sft_shapes": "r3jax.sft.config_rules",
  "benchmark": "r3jax.benchmark.config_rules",
}


def _overview() -> str:
  """Returns what `r3jax --help` prints."""
  width = max(len(name) for name in COMMANDS)
  commands = [
    f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()
  ]
  lines = [
    "usage: r3jax COMMAND [--FLAG=VALUE ...]",
    "",
    *commands,
    "",
    "`r3jax COMMAND --help` lists the flags of a command, and the keys of its config.",
  ]
  return "\n".join(lines)


def main() -> None:
  """Runs the command that the process was started with."""
  name, *rest = sys.argv[1:] or ["--help"]
  if name in _HELP:
    with _printing():
      print(_overview())
    return
  if name == "--version":
    with _printing():
      print(importlib.import_module("r3jax").__version__)
    return
  if name not in COMMANDS:
    message = (
      f"r3jax: the command must be one of {', '.join(COMMANDS)}; got {name!r}"
    )
    for nearest in difflib.get_close_matches(name, COMMANDS, n=1):
      message += f"; did you mean {nearest}?"
    sys.exit(message)
  run_command(name, rest)


def asks_for_help(arguments: Sequence[str]) -> bool:
  """Returns whether a command line asks for help."""
  return bool(set(arguments) & set(_HELP))


def run_command(name: str, arguments: Sequence[str]) -> None:
  """Runs a sub-command, and exits where it fails.

  A message is not longer than a screen, whatever it repeats of a file or a service.

  Args:
    name: a key of COMMANDS.
    arguments: what stands behind the name on the command line.
  """
  try:
    _run_command(name, arguments)
  except SystemExit as end:
    if isinstance(end.code, str):
      end.code = texts.printable(texts.shorten(end.code))
    raise


def _run_command(name: str, arguments: Sequence[str]) -> None:
  """Runs a sub-command, and exits where it fails; for the arguments see `run_command`."""
  # Before JAX is imported, which takes seconds.
  preemption.ENDING.listen(COMMANDS[name].after_end)
  module = importlib.import_module(f"r3jax.cli.{name.replace('-', '_')}")
  module.define_flags()
  if asks_for_help(arguments):
    with _printing():
      print(_help(name, module, arguments))
    return
  try:
    arguments = command_line.with_homes(arguments)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  # ml_collections looks there for the overrides --config.KEY=VALUE.
  sys.argv = [f"r3jax {name}", *arguments]
  app.run(
    lambda words: _call(module, words),
    argv=sys.argv,
    flags_parser=lambda argv: _parse(name, argv),
  )


def _call(module: types.ModuleType, words: Sequence[str]) -> None:
  """Runs a command, and exits in one line where a disk or its rights are in the way."""
  try:
    with _printing():
      module.run(*words)
  except OSError as error:
    problem = disk_errors.message(error)
    if not problem:
      raise
    logging.debug("traceback", exc_info=True)
    sys.exit(f"r3jax: {problem}")


@contextlib.contextmanager
def _printing() -> Iterator[None]:
  """Ends the process quietly where nobody reads what the block prints, as `head` after a line."""
  try:
    yield
    if sys.stdout is not None:  # nothing was open when the process started
      sys.stdout.flush()
  except BrokenPipeError:
    if not _is_broken(sys.stdout):
      raise  # of another pipe or connection
    # Python writes what is left when it ends, and would report that it cannot.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    sys.exit(_NOBODY_READS)


def _is_broken(stream: IO[str] | None) -> bool:
  """Returns whether nobody reads what is written to a stream any more."""
  if stream is None:
    return False
  try:
    # A pipe without a reader is always ready, with an error; nothing else is asked for.
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))
  except (OSError, ValueError):  # it has no descriptor, or is closed
    return False


def _help(name: str, module: types.ModuleType, arguments: Sequence[str]) -> str:
  """Returns the help of a command, with the keys of the config that was named."""
  command = COMMANDS[name]
  text = help_text.of_command(f"{name} {command.words}".strip(), module.__doc__)
  config_rules = _config_rules(name)
  if config_rules is None:
    return text
  config_name = command_line.flag_value(arguments, "config") or command.config
  try:
    return f"{text}\n\n{help_text.of_config(config_name, config_rules.RULES)}"
  except ValueError as error:
    sys.exit(f"r3jax: {error}")


def _parse(name: str, argv: list[str]) -> list[str]:
  """Parses the flags of a command; returns the words that are left."""
  flags.FLAGS.set_gnu_getopt()  # flags may stand behind words
  try:
    argv = flags.FLAGS.read_flags_from_files(argv)
    _, *words = flags.FLAGS(command_line.resolve_config(argv))
    _check_config(name)
  except (flags.Error, ValueError) as error:
    sys.exit(
      f"r3jax: {_in_one_line(name, argv, str(error))} "
      f"(`r3jax {name} --help` lists the flags)"
    )
  expected = COMMANDS[name].words
  is_any_number = expected.endswith("...")
  if not is_any_number and len(words) != len(expected.split()):
    sys.exit(f"r3jax: {name} takes {expected or 'flags only'}; got {words}")
  return words


def _config_rules(name: str) -> types.ModuleType | None:
  """Returns the module with the rules of a command's config, None without one."""
  module_name = RULES.get(COMMANDS[name].config)
  return importlib.import_module(module_name) if module_name else None


def _check_config(name: str) -> None:
  """Checks every value of the config of a command, where it has one.

  Processes that a coordinator connects check theirs when they have met, so that one that cannot
  start ends all, see `startup.together`.

  Raises:
    ValueError: values break their rules.
  """
  if "coordinator" in flags.FLAGS and flags.FLAGS.coordinator:
    return
  config_rules = _config_rules(name)
  if config_rules and flags.FLAGS.config is not None:
    config_rules.check(flags.FLAGS.config)


def _in_one_line(name: str, argv: Sequence[str], problems: str) -> str:
  """Returns the problems of a command line as people read them.

  Args:
    name: of the command.
    argv: the command line.
    problems: of flags, one a line, as absl words them.
  """
  flag_rules = _flag_rules(name)
  for argument in argv:
    flag, _, value = argument.lstrip("-").partition("=")
    # A text that is no number, and so on, in Python's words.
    is_unreadable = problems.startswith(f"flag --{flag}={value}: ")
    if is_unreadable and flag in flag_rules:
      shown = flag.removeprefix("config.") if "." in flag else f"--{flag}"
      problems = rules.problem(shown, flag_rules[flag], value) or problems
  # Our own messages name the flag and its value.
  return re.sub(r"flags? \S.*?: (?=--)", "", "; ".join(problems.splitlines()))


def _flag_rules(name: str) -> dict[str, rules.Rule]:
  """Returns flag -> rule of a command, with the keys of its config as "config.KEY"."""
  flag_rules = dict(command_line.FLAG_RULES)
  config_rules = _config_rules(name)
  if config_rules:
    for key, rule in config_rules.RULES.items():
      flag_rules[f"config.{key}"] = rule
  return flag_rules


if __name__ == "__main__":
  main()
