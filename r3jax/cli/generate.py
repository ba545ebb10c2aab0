"""Draws images of prompts with the R3 loop: think, draft, look, say what is wrong, edit.

  r3jax generate --prompt="a photo of a red ring and a blue bow" --out=DIR
  r3jax generate --prompts=FILE --out=DIR

A file has a prompt per line, as text or as GenEval's JSON. --out gets a PNG file per round, a JSON
file per image, and index.html. The same command resumes where it was stopped.
"""

import contextlib
import sys

from absl import flags
from absl import logging
from etils import epath

from r3jax.cli import command_line
from r3jax.cli import model_flags
from r3jax.cli import startup
from r3jax.data import records
from r3jax.evaluation import console
from r3jax.files import texts
from r3jax.generation import draw
from r3jax.generation import prompt_file
from r3jax.run import config_rules


def define_flags() -> None:
  """Defines the flags of the command."""
  model_flags.define_model()
  model_flags.define_seed()
  model_flags.define_points()
  model_flags.define_temperature()
  model_flags.define_num_images("images per prompt")
  flags.DEFINE_integer(
    "rounds", None, "Rounds at most, the draft included. Default: 4."
  )
  command_line.limit(rounds=config_rules.ROUNDS)
  flags.DEFINE_string("prompt", None, "What to draw.")
  flags.DEFINE_string(
    "prompts",
    None,
    "File of prompts: lines of text, or of JSON with a key 'prompt'.",
  )
  flags.DEFINE_string("out", None, "Folder to write.")
  command_line.require(out="the folder to write")


def run() -> None:
  """Draws, and exits with a message where the flags cannot be used."""
  logging.set_verbosity(logging.WARNING)
  try:
    page = _draw()
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  print(f"\npage: {page}")


def _draw() -> epath.Path:
  values = flags.FLAGS
  if bool(values.prompt) == bool(values.prompts):
    raise ValueError("either --prompt or --prompts must be given")
  config = model_flags.config()
  if values.prompt:
    prompts = [records.Prompt(tag="", text=values.prompt)]
  else:
    prompts = prompt_file.read(epath.Path(values.prompts))
  callbacks = draw.Progress(
    on_prompt=_print_prompt,
    on_text=_print_text,
    while_drawing=_remind,
  )
  folder = epath.Path(values.out)
  programs = startup.keep_stages()
  return draw.draw(
    config, prompts, values.num_images, folder, callbacks, programs
  )


def _remind() -> contextlib.AbstractContextManager[None]:
  return console.reminders("drawing", console.print_line)


def _print_prompt(prompt: str) -> None:
  print(f"\n{texts.printable(prompt)}")


def _print_text(image: int, turn: int, text: str) -> None:
  round_name = f"round {turn + 1}" if turn else "draft"
  print(f"  image {image + 1}, {round_name}: {texts.printable(text)}")
