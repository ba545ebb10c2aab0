"""Asks the model a question about an image, and prints the answer.

  r3jax ask --image=FILE --question="what is there ?"

The answer begins with the model's thought in <think> tags.
"""

import sys

from absl import flags
from absl import logging

from r3jax.cli import command_line
from r3jax.cli import model_flags
from r3jax.cli import startup
from r3jax.files import texts
from r3jax.generation import edit


def define_flags() -> None:
  """Defines the flags of the command."""
  model_flags.define_model()
  model_flags.define_seed()
  model_flags.define_temperature()
  flags.DEFINE_string("image", None, "Image file to ask about.")
  flags.DEFINE_string("question", None, "What to ask.")
  command_line.require(image="the image", question="what to ask")


def run() -> None:
  """Asks, and exits with a message where the flags cannot be used."""
  logging.set_verbosity(logging.WARNING)
  values = flags.FLAGS
  try:
    config = model_flags.config()
    programs = startup.keep_stages()
    answer = edit.ask(config, values.image, values.question, programs)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  print(texts.printable(answer))
