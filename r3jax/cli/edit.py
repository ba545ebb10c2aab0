"""Edits an image as told.

  r3jax edit --image=FILE --instruction="add a green heart at top" --out=DIR

--out gets edit_00.png, edit_01.png, ... and edit.json.
"""

import sys

from absl import flags
from absl import logging
from etils import epath

from r3jax.cli import command_line
from r3jax.cli import model_flags
from r3jax.cli import startup
from r3jax.evaluation import console
from r3jax.generation import edit


def define_flags() -> None:
  """Defines the flags of the command."""
  model_flags.define_model()
  model_flags.define_seed()
  model_flags.define_points()
  flags.DEFINE_string("image", None, "Image file to edit.")
  flags.DEFINE_string("instruction", None, "How to edit it.")
  model_flags.define_num_images("edits")
  flags.DEFINE_string("out", None, "Folder to write.")
  command_line.require(
    image="the image to edit",
    instruction="how to edit the image",
    out="the folder to write",
  )


def run() -> None:
  """Edits, and exits with a message where the flags cannot be used."""
  logging.set_verbosity(logging.WARNING)
  values = flags.FLAGS
  try:
    config = model_flags.config()
    programs = startup.keep_stages()
    with console.reminders("drawing", console.print_line):
      paths = edit.edit(
        config,
        values.image,
        values.instruction,
        values.num_images,
        epath.Path(values.out),
        programs,
      )
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  for path in paths:
    print(path)
