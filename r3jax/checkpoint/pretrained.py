"""Loads a model from its folder: sizes and tokenizer that fit each other, weights on a mesh.

Four kinds of folders hold a model: one in BAGEL's format; one that `launch/convert.py` wrote, with
the same JSON files and the weights in Orbax's format; the workdir of a run, whose last checkpoint
holds the trained parameters, and whose config names the folder of the others; and an adapter in
PEFT's format, whose config names the folder of its base.
"""

from collections.abc import Mapping
import dataclasses

from absl import logging
from etils import epath
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from r3jax import types
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_headers
from r3jax.checkpoint import fingerprint
from r3jax.checkpoint import finite_weights
from r3jax.checkpoint import folder_digests
from r3jax.checkpoint import orbax_weights
from r3jax.checkpoint import peft_files
from r3jax.checkpoint import tokenizer_files
from r3jax.checkpoint import training
from r3jax.files import bounded
from r3jax.files import paths
from r3jax.model import architecture
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import sharding
from r3jax.sequence import tokenization
from r3jax.worlds import registry

# Where the leaves of the policy are in the tree of all weights.
_POLICY = "policy/"
# What a folder holds beside its weights.
_SMALL_FILES = (
  *bagel_config.FILES,
  *tokenizer_files.FILES,
  bagel_headers.INDEX_FILE,
  folder_digests.FILE,
)
# How the names of a training state's arrays begin that a model is made of.
_TRAINED_NAMES = "policy."


@dataclasses.dataclass(frozen=True)
class TrainedAdapters:
  """Low-rank adapters of a run, or of PEFT.

  Attributes:
    lora: Ranks and targets of the adapters.
    state: State of the training checkpoint that holds them, or PEFT's folder.
  """

  lora: low_rank.LoRA
  state: epath.Path


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """The folder of a model, read without its weights.

  Attributes:
    folder: Folder with the JSON files, the tokenizer and the weights in BAGEL's or Orbax's format.
    sizes: Sizes of the model.
    tokenizer: Tokenizer that fits the sizes.
    trained: State of a training checkpoint whose policy takes the place of the folder's.
    adapted: Adapters to merge into that policy, in this order.
    und_from: Model that everything that goes with und is of, where a run trained gen alone; None
      where it is of this one.
  """

  folder: epath.Path
  sizes: architecture.BagelConfig
  tokenizer: tokenization.TextTokenizer
  trained: epath.Path | None = None
  adapted: tuple[TrainedAdapters, ...] = ()
  und_from: "Pretrained | None" = None

  def load(
    self,
    bagel: network.Bagel,
    mesh: jax.sharding.Mesh,
    dtype: types.DType = jnp.float32,
    policy_dtype: types.DType | None = None,
  ) -> tuple[types.Params, types.Params]:
    """Reads the sharded policy and the replicated {"vision", "autoencoder"} parameters.

    Args:
      bagel: Model; the policy has no adapters even where the model has.
      mesh: Mesh to shard the parameters over.
      dtype: Dtype of the parameters.
      policy_dtype: Dtype of the policy; None is `dtype`.

    Returns:
      The policy, and the other parameters.

    Raises:
      ValueError: The files are not those of a model of these sizes, or do not split over the mesh;
        or a number is not finite.
    """
    placed = shardings(bagel, mesh)
    if policy_dtype is None:
      weights = self.weights(placed, dtype)
    else:
      policy_leaves, other_leaves = _split_policy(placed)
      weights = self.weights(policy_leaves, policy_dtype)
      weights |= self.weights(other_leaves, dtype)
    finite_weights.check(weights, self.trained or self.folder)
    return weights.pop("policy"), weights

  def weights(
    self,
    placed: Mapping[str, jax.sharding.Sharding],
    dtype: types.DType | None,
    progress: bagel_files.Progress = bagel_files.no_progress,
  ) -> types.Params:
    """Reads weights as the tree {"policy", "vision", "autoencoder"}.

    Args:
      placed: Sharding of every leaf to read by its path, see `shardings`.
      dtype: Dtype of the leaves. None keeps the stored ones; leaves that adapters are merged into
        are then float32 or wider.
      progress: Called with the share that has been read; once, if the files are Orbax's.

    Raises:
      ValueError: The files are not those of a model of these sizes.
    """
    self._verify()
    # Adapters are merged before anything is rounded.
    read_dtype = None if self.adapted else dtype
    from_und = {}
    from_checkpoint = {}
    from_folder = placed
    if self.und_from:
      from_und, from_folder = _split_und(from_folder)
    if self.trained:
      from_checkpoint, from_folder = _split_policy(from_folder)

    weights = {}
    converted = self.folder / orbax_weights.FOLDER
    if from_folder and converted.is_dir():
      weights = self._from_orbax(converted, from_folder, read_dtype)
      progress(1.0)
    elif from_folder:
      weights = bagel_files.load(
        self.folder, self.sizes, from_folder, read_dtype, progress
      )
    if from_checkpoint:
      weights |= self._from_orbax(self.trained, from_checkpoint, read_dtype)
    if from_und:
      und = self.und_from.weights(from_und, read_dtype)["policy"]
      weights["policy"] = low_rank.join(weights.get("policy"), und)

    if "policy" in weights:
      for adapters in self.adapted:
        weights["policy"] = self._merged(weights["policy"], adapters)
    if read_dtype != dtype:
      weights = jax.tree.map(lambda leaf: leaf.astype(dtype), weights)
    return weights

  def _verify(self) -> None:
    """Compares the folder's files of weights with their digests; a process reads its share.

    The state of a run's checkpoint has been compared by `find`.

    Raises:
      ValueError: A file is missing, cut or changed.
    """
    share = (jax.process_index(), jax.process_count())
    is_verified = folder_digests.check_weights_once(
      self.folder, share, paths.file_times(self.folder)
    )
    if not is_verified:
      logging.warning(
        "not verified: %s has no %s", self.folder, folder_digests.FILE
      )

  def _merged(
    self, policy: types.Params, adapters: TrainedAdapters
  ) -> types.Params:
    """Returns a policy, or a part of one, with trained adapters merged into its kernels."""
    shapes = _beside_kernels(self._shapes_of(adapters), policy)
    if not shapes:
      return policy
    mesh = jax.tree.leaves(policy)[0].sharding.mesh
    trained = self._load_adapters(adapters, shapes, mesh)
    return low_rank.merge(policy, trained, adapters.lora.scale)

  def _shapes_of(self, adapters: TrainedAdapters) -> types.Params:
    """Returns the shapes of adapters as a part of a policy."""
    adapted = network.Bagel(self.sizes, lora=adapters.lora)
    return low_rank.adapters(nn.unbox(parameters.boxed(adapted)))

  def _load_adapters(
    self,
    adapters: TrainedAdapters,
    shapes: types.Params,
    mesh: jax.sharding.Mesh,
  ) -> types.Params:
    """Reads adapters of some shapes, in their stored dtype, onto all devices of a mesh."""
    replicated = sharding.replicated(mesh)
    wanted = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=replicated
      ),
      shapes,
    )
    if peft_files.is_adapter(adapters.state):
      return peft_files.read(adapters.state, self.sizes, wanted)
    return orbax_weights.load(adapters.state, {"policy": wanted}, None)[
      "policy"
    ]

  def save_adapter(
    self, folder: epath.Path, dtype: types.DType | None, mesh: jax.sharding.Mesh
  ) -> None:
    """Writes the adapters of a run in PEFT's format.

    Args:
      folder: Folder to write, which holds no weights.
      dtype: Of the written numbers; None keeps the stored one.
      mesh: Devices that they pass through.

    Raises:
      ValueError: There are none, or what they are beside is no folder of a model.
    """
    if len(self.adapted) != 1 or self.trained:
      raise ValueError(
        "the format peft needs the workdir of one run with model.lora.rank above 0 that started "
        f"from a model's folder; this model has {len(self.adapted)} runs with adapters"
        f"{' on top of a run without' if self.trained else ''}. The format bagel merges them"
      )
    (adapters,) = self.adapted
    tree = self._load_adapters(adapters, self._shapes_of(adapters), mesh)
    if dtype is not None:
      tree = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    base = str(paths.absolute(self.folder))
    peft_files.write(folder, tree, adapters.lora, self.sizes, base)

  def fingerprint(self) -> str:
    """Returns 16 hex digits that identify the weights, see `fingerprint.of_files`.

    Only files that are read count, and neither their folders' names nor their places do.
    """
    return fingerprint.of_files(self._weight_files())

  def _weight_files(self) -> list[epath.Path]:
    """Returns the files that hold the weights and are read, in a fixed order."""
    states = [adapters.state for adapters in self.adapted]
    if self.trained:
      states.insert(0, self.trained)
    converted = self.folder / orbax_weights.FOLDER
    files = []
    if converted.is_dir():
      states.insert(0, converted)
    else:
      files += bagel_headers.weight_files(self.folder)
    for folder in states:
      if peft_files.is_adapter(folder):
        files.append(folder / peft_files.WEIGHTS_FILE)
      # Orbax writes a new index with every save.
      files += sorted(folder.glob("[!.]*.ocdbt"))
    if self.und_from:
      earlier = self.und_from._weight_files()
      files += [file for file in earlier if file not in files]
    return files

  def _from_orbax(
    self,
    path: epath.Path,
    placed: Mapping[str, jax.sharding.Sharding],
    dtype: types.DType | None,
  ) -> types.Params:
    """Reads leaves of an Orbax checkpoint, given their shardings by path."""
    shapes = bagel_files.leaf_shapes(self.sizes)
    wanted = {}
    for leaf, leaf_sharding in placed.items():
      wanted[leaf] = jax.ShapeDtypeStruct(
        shapes[leaf], jnp.float32, sharding=leaf_sharding
      )
    tree = flax.traverse_util.unflatten_dict(wanted, sep="/")
    return orbax_weights.load(path, tree, dtype)


def _split_policy(
  placed: Mapping[str, jax.sharding.Sharding],
) -> tuple[dict[str, jax.sharding.Sharding], dict[str, jax.sharding.Sharding]]:
  """Returns the shardings of the policy's leaves, and those of all others."""
  policy = {}
  others = {}
  for path, leaf_sharding in placed.items():
    part = policy if path.startswith(_POLICY) else others
    part[path] = leaf_sharding
  return policy, others


def _split_und(
  placed: Mapping[str, jax.sharding.Sharding],
) -> tuple[dict[str, jax.sharding.Sharding], dict[str, jax.sharding.Sharding]]:
  """Returns the shardings of the policy's leaves that go with und, and those of all others."""
  policy, others = _split_policy(placed)
  und = {}
  for path, leaf_sharding in policy.items():
    names = path.removeprefix(_POLICY).split("/")
    part = und if parameters.expert_of(names) == "und" else others
    part[path] = leaf_sharding
  return und, others


def _beside_kernels(adapters: types.Params, policy: types.Params):
  """Returns the adapters whose kernels a part of a policy has."""
  kernels = flax.traverse_util.flatten_dict(policy).keys()
  beside = {
    path: leaf
    for path, leaf in flax.traverse_util.flatten_dict(adapters).items()
    if (*path[:-1], "kernel") in kernels
  }
  return flax.traverse_util.unflatten_dict(beside)


def find(folder: str, world: str = "") -> Pretrained:
  """Reads the sizes and the tokenizer of a model; reads no weights.

  Args:
    folder: Folder of any of the four kinds, on a disk or in a bucket; "world" is the model that
      comes with the world.
    world: Name of the config's world, "" for none.

  Raises:
    ValueError: There is no such folder, a file is missing or broken, or tokenizer and model differ.
  """
  if not folder:
    raise ValueError(
      "model.folder must name a folder with a model (or be 'world', the model of config.world); "
      "it is empty"
    )
  if folder == registry.OF_WORLD:
    folder = _folder_of_world(world)
  path = paths.of_user(folder)
  if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
    return _trained(path)
  if peft_files.is_adapter(path):
    return _adapted(path)
  for name in _SMALL_FILES:
    if (path / name).is_dir():
      raise ValueError(f"{path / name} must be a file; it is a folder")
  folder_digests.check(path, are_weights=False)
  sizes = bagel_config.load(path)
  tokenizer = tokenizer_files.load(path)
  vocabulary_size = sizes.llm.vocab_size
  if tokenizer.size > vocabulary_size:
    raise ValueError(
      f"the tokenizer's ids ({tokenizer.size}) must fit the model's vocabulary "
      f"({vocabulary_size}): {path}"
    )
  if tokenizer.special_ids != sizes.special_ids:
    raise ValueError(
      f"markers must be {sizes.special_ids} for the model; "
      f"the tokenizer has {tokenizer.special_ids}: {path}"
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
  """Returns the folder and the world of the model that a run started from.

  Runs from before `config.world` existed named the world itself in `model.folder`.
  """
  folder = config["model"]["folder"]
  if "world" not in config and folder in registry.REGISTERED:
    return registry.OF_WORLD, folder
  return folder, config.get("world", "")


def base_of_run(workdir: epath.Path, config: Mapping) -> str:
  """Returns where the model that a run started from is now.

  The folder may have been moved or replaced since, and a relative one is another in another working
  directory: the first place counts in which the weights have the fingerprint of the run's config.

  Args:
    workdir: Workdir of the run.
    config: Its config.json: "weights" is the fingerprint, "model_path" the absolute path of the
      folder. Configs without a fingerprint are from before there were any.

  Raises:
    ValueError: The weights are in none of the places.
  """
  folder, world = model_of_run(config)
  if "weights" not in config:
    return folder
  problems = []
  for place in dict.fromkeys([folder, config.get("model_path", folder)]):
    try:
      actual = find(place, world).fingerprint()
    except ValueError as error:
      problems.append(f"{place}: {error}")
      continue
    if actual == config["weights"]:
      return place
    problems.append(f"{place} has the fingerprint {actual}")
  raise ValueError(
    f"the model of {workdir} needs the model that it was trained from, with the fingerprint "
    f"{config['weights']}; seen: {'; '.join(problems)}. Move that model back, or write where it is "
    f"as model.folder into {workdir / 'config.json'}"
  )


def save(
  weights: types.Params,
  like: Pretrained,
  folder: epath.PathLike,
  form: str,
  progress: bagel_files.Progress = bagel_files.no_progress,
) -> None:
  """Writes a folder that `find` reads.

  Args:
    weights: {"policy", "vision", "autoencoder"}, stored in their dtypes.
    like: Model that the weights are of; its JSON files and tokenizer are copied.
    folder: Folder to write; it is made if missing.
    form: Format of the weights, "bagel" or "orbax".
    progress: Called with the share that has been written; once, for Orbax.

  Raises:
    ValueError: The folder has weights already, or the weights are not those of the model.
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
    source = like.folder / name
    if source.is_file():
      (folder / name).write_text(source.read_text())
  write_digests(folder)


def write_digests(folder: epath.PathLike) -> None:
  """Writes the digests of a model's files, which `find` and `Pretrained.load` compare them with.

  Args:
    folder: Folder in BAGEL's format, or a converted one; all its files are read once.
  """
  folder = epath.Path(folder)
  names = [name for name in _SMALL_FILES if name != folder_digests.FILE]
  if (folder / orbax_weights.FOLDER).is_dir():
    names.append(orbax_weights.FOLDER)
  names += [file.name for file in bagel_headers.weight_files(folder)]
  folder_digests.write(folder, names)


def check_free(folder: epath.Path) -> None:
  """Raises a ValueError if a folder holds weights."""
  if not folder.is_dir():
    return
  # Hidden files are what some file systems put beside every file.
  weights = list(folder.glob("[!.]*.safetensors"))
  converted = folder / orbax_weights.FOLDER
  if converted.exists():
    weights.append(converted)
  if weights:
    names = ", ".join(sorted(path.name for path in weights))
    raise ValueError(
      f"weights are never overwritten: choose another folder than {folder}, which has {names}"
    )


def step_of_run(workdir: epath.Path) -> int | None:
  """Returns the iterations done at the checkpoint that `find` takes a run's model from.

  None stands for a folder without checkpoints. A newer checkpoint that is damaged is passed over;
  no file is changed.

  Raises:
    ValueError: All checkpoints are damaged, or they cannot be read.
  """
  return training.newest_sound(workdir / "checkpoints", _TRAINED_NAMES)


def _trained(workdir: epath.Path) -> Pretrained:
  """Returns the model of the main job's last checkpoint that is not damaged."""
  step = step_of_run(workdir)
  if step is None:
    raise ValueError(
      f"a workdir must hold a complete checkpoint to take a model from; there is none in {workdir}"
    )
  path = workdir / "config.json"
  try:
    config = bounded.read_json_object(path)
    _, world = model_of_run(config)
    lora = low_rank.LoRA(**config["model"].get("lora", {}))
    freezes_und = config.get("optimizer", {}).get("freeze_und", False)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} must be the config of a run, with model.folder: {error!r}"
    ) from error
  start = find(base_of_run(workdir, config), world)
  state = workdir / "checkpoints" / str(step) / "state"
  if lora.rank:
    adapters = TrainedAdapters(lora, state)
    return dataclasses.replace(start, adapted=(*start.adapted, adapters))
  # A run that keeps und trains gen alone, on top of whatever und was before.
  und_from = start if freezes_und else None
  return dataclasses.replace(
    start, trained=state, adapted=(), und_from=und_from
  )


def _adapted(folder: epath.Path) -> Pretrained:
  """Returns the model of an adapter in PEFT's format and its base."""
  base, *_ = peft_files.read_config(folder)
  if peft_files.is_adapter(paths.of_user(base)):
    raise ValueError(
      f"the base of the adapter {folder} must be a model's folder, not {base}: it is an adapter "
      "itself"
    )
  try:
    start = find(base)
  except ValueError as error:
    raise ValueError(
      f"the base of the adapter {folder} must be a model's folder, which base_model_name_or_path "
      f"in its {peft_files.CONFIG_FILE} names: {error}"
    ) from error
  lora = peft_files.read_lora(folder, start.sizes)
  lora.check(start.sizes.llm)
  adapters = TrainedAdapters(lora, folder)
  return dataclasses.replace(start, adapted=(*start.adapted, adapters))


def shardings(
  bagel: network.Bagel, mesh: jax.sharding.Mesh
) -> dict[str, jax.sharding.Sharding]:
  """Returns the sharding of every leaf of the weights by its path; only the policy is sharded."""
  policy = flax.traverse_util.flatten_dict(
    parameters.shardings(bagel, mesh), sep="/"
  )
  replicated = sharding.replicated(mesh)
  placed = {}
  for path in bagel_files.leaf_shapes(bagel.config):
    placed[path] = policy.get(path.removeprefix(_POLICY), replicated)
  return placed
