"""A folder of goldens: weights, configs and constants, and the arrays of every case.

Every size comes from the files. The format is that of `tests/goldens/tiny-a`: `manifest.json` names
the cases and gives role, shape and tolerance of every array; arrays lie in `CASE.npz`, rules in
`CASE.json`.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import preprocess


@dataclasses.dataclass(frozen=True)
class Golden:
  """A folder of goldens and the dtype that r3jax computes in.

  Attributes:
    folder: the files, see the module.
    dtype: compute dtype of language model, ViT and autoencoder.
    resize_order: of the Pillow with which the folder was recorded, see
      `preprocess.ResizeOrder`.
  """

  folder: pathlib.Path
  dtype: types.DType = jnp.float32
  resize_order: preprocess.ResizeOrder = "width_first"

  @functools.cached_property
  def config(self) -> architecture.BagelConfig:
    """Sizes of the model."""
    return bagel_config.load(self.folder)

  @functools.cached_property
  def constants(self) -> dict:
    """The constants that the reference's scripts set."""
    return json.loads((self.folder / "constants.json").read_text())

  @functools.cached_property
  def manifest(self) -> dict:
    """Case -> summary, file and arrays."""
    return json.loads((self.folder / "manifest.json").read_text())

  @functools.cached_property
  def weights(self) -> dict:
    """The parameters: "policy", "vision" and "autoencoder"."""
    return jax.tree.map(jnp.asarray, bagel_files.load(self.folder, self.config))

  @property
  def policy(self) -> types.Params:
    """The trained parameters."""
    return self.weights["policy"]

  @property
  def frozen(self) -> types.Params:
    """The parameters of both towers."""
    return {name: self.weights[name] for name in ("vision", "autoencoder")}

  @functools.cached_property
  def bagel(self) -> network.Bagel:
    """The language model with its adapters."""
    return network.Bagel(self.config, self.dtype)

  def towers(
    self, size: tuple[int, int] | None = None
  ) -> image_encoders.Towers:
    """Returns the towers for images of a size, that of most cases if None."""
    return image_encoders.Towers(
      self.config,
      tuple(size or self.constants["image_hw"]),
      self.dtype,
      self.resize_order,
    )

  def arrays(self, case: str) -> dict[str, np.ndarray]:
    """Returns every array of a case."""
    return _read_arrays(self.folder / self.manifest[case]["file"])

  def rules(self, case: str) -> dict:
    """Returns the contents of a case that is written in JSON."""
    return json.loads((self.folder / self.manifest[case]["file"]).read_text())

  def outputs(self, case: str) -> Iterator[tuple[str, float | str]]:
    """Yields name and tolerance of the arrays to reproduce; not what the reference gets wrong."""
    for name, array in self.manifest[case].get("arrays", {}).items():
      if array["role"] == "output" and not name.startswith("STATICBUG_"):
        yield name, array["tol"]


@functools.cache
def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)
