"""Converts a model: BAGEL's files to Orbax for fast restarts, and back for PyTorch users.

  r3jax convert --source=DIR --out=DIR --format=orbax [--dtype=bfloat16]
  r3jax convert --source=WORKDIR --out=DIR --format=peft

The source is a folder in BAGEL's format, one that this command wrote, an adapter in PEFT's format,
or the workdir of a run (its last checkpoint). Low-rank adapters are merged into the weights, except
with --format=peft, which writes those of a run alone. Numbers keep their stored dtype unless
--dtype is given; weights with merged adapters are float32.
"""

import sys

from absl import flags
from absl import logging
from etils import epath
import jax
import jax.numpy as jnp

from r3jax.checkpoint import convert
from r3jax.cli import command_line
from r3jax.cli import progress


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    "source",
    None,
    "Folder of the model, or the name of a world that comes with a model: 'shapes'.",
  )
  flags.DEFINE_string(
    "out", None, "Folder to write; must not hold a model yet."
  )
  flags.DEFINE_enum(
    "format",
    None,
    ["orbax", "bagel", "peft"],
    "Format of the weights in --out.",
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Dtype of the weights in --out. Default: as stored.",
  )
  command_line.require(
    source="the model to convert",
    out="the folder to write",
    format="the format of the weights",
  )


def run() -> None:
  """Converts, and exits with a message where a folder cannot be used."""
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)  # Orbax logs every step
  # Weights only pass through the host.
  jax.config.update("jax_platforms", "cpu")
  out = epath.Path(values.out)
  dtype = jnp.dtype(values.dtype) if values.dtype else None
  try:
    convert.convert(
      values.source,
      out,
      values.format,
      dtype,
      on_read=progress.ShareBar("reading"),
      on_write=progress.ShareBar("writing"),
    )
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  print(f"wrote {out}")
