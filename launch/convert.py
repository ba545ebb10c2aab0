"""Converts a model: BAGEL's files to Orbax for fast restarts, and back for PyTorch users.

  python launch/convert.py --source=DIR --out=DIR --format=orbax [--dtype=bfloat16]

The source is a folder in BAGEL's format, one that this command made, or the workdir of the main job
(its last checkpoint), whose low-rank adapters are merged into the weights. Numbers keep their stored
dtype unless --dtype says otherwise; what adapters were merged into is float32.
"""

import sys

from absl import app
from absl import flags
from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import tqdm

from r3jax.checkpoint import pretrained
from r3jax.model import network
from r3jax.parallel import meshes
from r3jax.worlds import registry

_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Folder of the model, or the name of a world whose own model it is: 'shapes'.",
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder to write; must not hold a model yet."
)
_FORMAT = flags.DEFINE_enum(
  "format", None, ["orbax", "bagel"], "Of the weights in --out."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of the weights in --out. Default: as stored.",
)


class Bar:
  """A progress bar over a share of something, up to 1."""

  def __init__(self, title: str):
    self._bar = tqdm.tqdm(
      total=100,
      desc=title,
      bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}",
    )

  def __call__(self, share: float):
    """Moves the bar."""
    self._bar.update(100 * share - self._bar.n)
    if share >= 1:
      self._bar.close()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step
  # weights only pass through the host
  jax.config.update("jax_platforms", "cpu")
  out, dtype = (
    epath.Path(_OUT.value),
    jnp.dtype(_DTYPE.value) if _DTYPE.value else None,
  )
  try:
    pretrained.check_free(out)  # before a large model is read
    of_world = _SOURCE.value in registry.REGISTERED
    source = (
      pretrained.find(registry.OF_WORLD, _SOURCE.value)
      if of_world
      else pretrained.find(_SOURCE.value)
    )
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    placed = pretrained.shardings(network.Bagel(source.sizes), mesh)
    weights = source.weights(placed, dtype, Bar("reading"))
    pretrained.save(weights, source, out, _FORMAT.value, Bar("writing"))
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  print(f"wrote {out}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["source", "out", "format"])
  app.run(main)
