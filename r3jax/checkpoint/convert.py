"""Converts models between BAGEL's format and Orbax, and adapters to PEFT's."""

from collections.abc import Callable

from etils import epath
import jax

from r3jax import types
from r3jax.checkpoint import pretrained
from r3jax.files import config_guard
from r3jax.files import ownership
from r3jax.model import network
from r3jax.parallel import meshes
from r3jax.worlds import registry


@ownership.releasing()
def convert(
  source: str,
  out: epath.Path,
  form: str,
  dtype: types.DType | None,
  on_read: Callable[[float], None],
  on_write: Callable[[float], None],
) -> None:
  """Writes a model's weights in another format; low-rank adapters are merged into them.

  Args:
    source: folder of a model, workdir of a run, adapter in PEFT's format, or the name of a world
      that comes with a model.
    out: folder to write; must not hold a model.
    form: "orbax", for fast restarts, "bagel", or "peft", the adapters of a run alone.
    dtype: of the written weights; None keeps the stored one, except that weights with merged
      adapters are float32.
    on_read: called with the share that has been read, up to 1.
    on_write: called with the share that has been written.

  Raises:
    ValueError: the source cannot be read, or `out` holds a model or cannot be written.
  """
  pretrained.check_free(out)  # before a large model is read
  if source in registry.REGISTERED:
    model = pretrained.find(registry.OF_WORLD, source)
  else:
    model = pretrained.find(source)
  config_guard.check_writable(out, "--out")
  ownership.claim(out)
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  if form == "peft":
    model.save_adapter(out, dtype, mesh)
    on_read(1.0)
    on_write(1.0)
    return
  shardings = pretrained.shardings(network.Bagel(model.sizes), mesh)
  weights = model.weights(shardings, dtype, on_read)
  pretrained.save(weights, model, out, form, on_write)
