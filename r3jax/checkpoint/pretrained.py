"""A model out of its folder: sizes and tokenizer that fit each other, weights on a mesh.

Three kinds of folders hold a model: one in BAGEL's format; one that `launch/convert.py` made, with
the same JSON files and the weights in Orbax's format; and the workdir of the main job, whose last
checkpoint holds the trained parameters and whose config names the folder of the others.
"""

from collections.abc import Mapping
import dataclasses
import json

from etils import epath
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import fingerprint
from r3jax.checkpoint import orbax_weights
from r3jax.checkpoint import tokenizer_files
from r3jax.checkpoint import training
from r3jax.model import architecture
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import sharding
from r3jax.sequence import tokenization
from r3jax.worlds import registry


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model's folder, read but for its weights.

  Attributes:
    folder: with the JSON files and the tokenizer, and the weights in BAGEL's format or in Orbax's.
    sizes: of the model.
    tokenizer: fits the sizes.
    trained: the state of a training checkpoint whose policy takes the place of the folder's.
    adapted: states of training checkpoints whose adapters are merged into that policy, in order.
  """

  folder: epath.Path
  sizes: architecture.BagelConfig
  tokenizer: tokenization.TextTokenizer
  trained: epath.Path | None = None
  adapted: tuple[tuple[low_rank.LoRA, epath.Path], ...] = ()

  def load(
    self,
    bagel: network.Bagel,
    mesh: jax.sharding.Mesh,
    dtype: types.DType = jnp.float32,
    policy_dtype: types.DType | None = None,
  ) -> tuple[types.Params, types.Params]:
    """Returns the sharded policy, without new adapters, and the replicated {"vision", "autoencoder"} parameters.

    Args:
      bagel: the model.
      mesh: to shard them over.
      dtype: of the parameters.
      policy_dtype: of the policy's, where it may be another one.

    Raises:
      ValueError: the files are not those of a model of these sizes, or do not split over the mesh.
    """
    placed, policy = shardings(bagel, mesh), {}
    if policy_dtype is not None:
      of_policy = {
        path: placed.pop(path)
        for path in list(placed)
        if path.startswith("policy/")
      }
      policy = self.weights(of_policy, policy_dtype)
    weights = self.weights(placed, dtype) | policy
    return weights.pop("policy"), weights

  def weights(
    self,
    placed: dict[str, jax.sharding.Sharding],
    dtype: types.DType | None,
    progress: bagel_files.Progress = lambda read: None,
  ) -> types.Params:
    """Returns {"policy", "vision", "autoencoder"}.

    Args:
      placed: the sharding of every leaf by path, see `shardings`.
      dtype: of the leaves; None keeps the stored ones, or makes those float32 (or wider) that
        adapters are merged into.
      progress: called with the share that has been read, up to 1; once, if the files are Orbax's.

    Raises:
      ValueError: the files are not those of a model of these sizes.
    """
    # adapters are merged before anything is rounded
    stored = None if self.adapted else dtype
    trained = {
      path: one
      for path, one in placed.items()
      if self.trained and path.startswith("policy/")
    }
    others = {path: one for path, one in placed.items() if path not in trained}
    if not others:
      found = {}
    elif (self.folder / orbax_weights.FOLDER).is_dir():
      found = self._from_orbax(
        self.folder / orbax_weights.FOLDER, others, stored
      )
      progress(1.0)
    else:
      found = bagel_files.load(
        self.folder, self.sizes, others, stored, progress
      )
    found |= self._from_orbax(self.trained, trained, stored) if trained else {}
    if "policy" in found:
      for lora, state in self.adapted:
        found["policy"] = self._merged(found["policy"], lora, state)
    return (
      jax.tree.map(lambda x: x.astype(dtype), found)
      if stored != dtype
      else found
    )

  def _merged(
    self, policy: types.Params, lora: low_rank.LoRA, state: epath.Path
  ) -> types.Params:
    """Returns a policy with the adapters of a training checkpoint merged into its kernels."""
    shapes = low_rank.adapters(
      nn.unbox(parameters.boxed(network.Bagel(self.sizes, lora=lora)))
    )
    whole = sharding.replicated(jax.tree.leaves(policy)[0].sharding.mesh)
    wanted = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
      shapes,
    )
    found = orbax_weights.load(state, {"policy": wanted}, None)
    return low_rank.merge(policy, found["policy"], lora.scale)

  def fingerprint(self) -> str:
    """Returns 16 hex digits that tell these weights from others, see `fingerprint.of_files`."""
    states = [
      *([self.trained] if self.trained else []),
      *(state for _, state in self.adapted),
    ]
    orbax = [self.folder / orbax_weights.FOLDER, *states]
    # Orbax writes a new index with every save.
    indices = [
      path
      for folder in orbax
      if folder.is_dir()
      for path in folder.iterdir()
      if path.suffix == ".ocdbt"
    ]
    return fingerprint.of_files([*_safetensors(self.folder), *indices])

  def _from_orbax(
    self, path: epath.Path, placed: dict[str, jax.sharding.Sharding], dtype
  ) -> types.Params:
    shapes = bagel_files.leaf_shapes(self.sizes)
    wanted = {
      leaf: jax.ShapeDtypeStruct(shapes[leaf], jnp.float32, sharding=sharding)
      for leaf, sharding in placed.items()
    }
    return orbax_weights.load(
      path, flax.traverse_util.unflatten_dict(wanted, sep="/"), dtype
    )


def _safetensors(folder: epath.Path) -> list[epath.Path]:
  return [path for path in folder.iterdir() if path.suffix == ".safetensors"]


def find(folder: str, world: str = "") -> Pretrained:
  """Reads what a folder says of its model; reads no weights.

  Args:
    folder: of any of the three kinds, on a disk or in a bucket; "world" is the model that comes
      with the world.
    world: name of the config's world, "" for none.

  Raises:
    ValueError: there is no such folder, a file is missing or broken, or tokenizer and model differ.
  """
  if not folder:
    raise ValueError(
      "model.folder must name a folder with a model (or be 'world', the model of config.world); "
      "it is empty"
    )
  path = epath.Path(
    _folder_of_world(world) if folder == registry.OF_WORLD else folder
  )
  if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
    return _trained(path)
  sizes, tokenizer = bagel_config.load(path), tokenizer_files.load(path)
  if tokenizer.size > sizes.llm.vocab_size:
    raise ValueError(
      f"the tokenizer's ids ({tokenizer.size}) must fit the model's vocabulary ({sizes.llm.vocab_size}): {path}"
    )
  if tokenizer.special_ids != sizes.special_ids:
    raise ValueError(
      f"markers must be {sizes.special_ids} for the model; the tokenizer has {tokenizer.special_ids}: {path}"
    )
  return Pretrained(path, sizes, tokenizer)


def _folder_of_world(world_name: str) -> str:
  world = registry.needed(registry.find_if_named(world_name), "model.folder")
  if not world.model_folder:
    raise ValueError(
      f"model.folder is {registry.OF_WORLD!r}, but no model comes with the world {world.name!r}"
    )
  return world.model_folder


def model_of_run(config: Mapping) -> tuple[str, str]:
  """Returns folder and world of the model that a run started from, from its config as JSON gives it.

  Runs from before `config.world` existed named the world itself in `model.folder`.
  """
  folder = config["model"]["folder"]
  if "world" not in config and folder in registry.REGISTERED:
    return registry.OF_WORLD, folder
  return folder, config.get("world", "")


def save(
  weights: types.Params,
  like: Pretrained,
  folder: epath.PathLike,
  form: str,
  progress: bagel_files.Progress = lambda written: None,
) -> None:
  """Writes a folder that `find` reads: weights in their dtypes, and the JSON files and tokenizer of `like`.

  Args:
    weights: {"policy", "vision", "autoencoder"}.
    like: the model that they are weights of.
    folder: to write; made if missing.
    form: of the weights, "bagel" or "orbax".
    progress: called with the share that has been written, up to 1; once, for Orbax.

  Raises:
    ValueError: weights are there already, or are not those of the model.
  """
  folder = epath.Path(folder)
  check_free(folder)
  if form == "bagel":
    bagel_files.save(weights, like.sizes, folder, None, progress)
  elif form == "orbax":
    orbax_weights.save(folder, weights)
    progress(1.0)
  else:
    raise ValueError(f"form must be 'bagel' or 'orbax'; got {form!r}")
  for name in (*bagel_config.FILES, *tokenizer_files.FILES):
    if (like.folder / name).is_file():
      (folder / name).write_text((like.folder / name).read_text())


def check_free(folder: epath.Path) -> None:
  """Raises a ValueError if a folder holds weights."""
  taken = _safetensors(folder) if folder.is_dir() else []
  taken += [path for path in [folder / orbax_weights.FOLDER] if path.exists()]
  if taken:
    names = ", ".join(sorted(path.name for path in taken))
    raise ValueError(
      f"weights are never overwritten: choose another folder than {folder}, which has {names}"
    )


def _trained(workdir: epath.Path) -> Pretrained:
  """Returns the model of the main job's last checkpoint."""
  step = training.latest_step(workdir / "checkpoints")
  if step is None:
    raise ValueError(
      f"a workdir must hold a complete checkpoint to take a model from; there is none in {workdir}"
    )
  path = workdir / "config.json"
  try:
    config = json.loads(path.read_text())
    folder, world = model_of_run(config)
    lora = low_rank.LoRA(**config["model"].get("lora", {}))
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} must be the config of a run, with model.folder: {error!r}"
    ) from error
  start, state = (
    find(folder, world),
    workdir / "checkpoints" / str(step) / "state",
  )
  if lora.rank:
    return dataclasses.replace(start, adapted=(*start.adapted, (lora, state)))
  return dataclasses.replace(start, trained=state, adapted=())


def shardings(
  bagel: network.Bagel, mesh: jax.sharding.Mesh
) -> dict[str, jax.sharding.Sharding]:
  """Returns the sharding of every leaf of the weights by its path; all but the policy is replicated."""
  policy = flax.traverse_util.flatten_dict(
    parameters.shardings(bagel, mesh), sep="/"
  )
  paths = bagel_files.leaf_shapes(bagel.config)
  return {
    path: policy.get(path.removeprefix("policy/"), sharding.replicated(mesh))
    for path in paths
  }
