r"""Draws, edits or answers: `r3jax generate`, `edit` and `ask`.

  python launch/generate.py --prompt="a photo of a red ring and a blue bow" \
    --out=DIR
  python launch/generate.py --prompts=FILE --out=DIR
  python launch/generate.py --image=FILE --instruction="add a green heart at top" \
    --out=DIR
  python launch/generate.py --image=FILE --question="what is there ?"

`r3jax generate --help`, `r3jax edit --help` and `r3jax ask --help` list the
flags.
"""

import sys

from r3jax.cli import command_line
from r3jax.cli import main

# A flag that must be given -> the command that it stands for.
COMMANDS = {
  "prompt": "generate",
  "prompts": "generate",
  "instruction": "edit",
  "question": "ask",
}

if __name__ == "__main__":
  arguments = sys.argv[1:]
  given = [
    name for name in COMMANDS if command_line.flag_value(arguments, name)
  ]
  if len(given) != 1 and not main.asks_for_help(arguments):
    names = [f"--{name}" for name in given] or "none"
    sys.exit(
      "r3jax: one of --prompt, --prompts, --instruction, --question must be "
      f"given; got {names}"
    )
  command = "generate"
  if given:
    command = COMMANDS[given[0]]
  main.run_command(command, arguments)
