"""Low-rank adapters as files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

The module of a kernel W is that of BAGEL's released names, whose weight is Wᵀ, [outputs, inputs].
PEFT computes y = x W + (lora_alpha / r) x Aᵀ Bᵀ with `lora_A.weight` = A, [r, inputs], and
`lora_B.weight` = B, [outputs, r]; `low_rank` has their transposes, by layer.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import math
import re

from etils import epath
import flax.traverse_util
import jax
import numpy as np

from r3jax import types
from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import safetensors_files
from r3jax.files import atomic
from r3jax.files import bounded
from r3jax.files import texts
from r3jax.model import architecture
from r3jax.model import low_rank

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LETTERS = 80  # of a value that a message repeats
_KERNEL = re.compile(r"policy/layers/(und|gen)/(\w+)/kernel")
# The keys of PEFT's config that change what is computed, with the values under which an update is
# (lora_alpha / r) B A of a plain linear layer.
_NEEDED = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_dora": (False,),
  "use_rslora": (False,),
  "lora_bias": (False,),
  "fan_in_fan_out": (False,),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "modules_to_save": (None, []),
  "layer_replication": (None, []),
  "trainable_token_indices": (None, []),
  "target_parameters": (None, []),
}


@dataclasses.dataclass(frozen=True)
class _Module:
  """A linear layer of BAGEL that can have an adapter.

  Attributes:
    name: released name of the module.
    expert: "und" or "gen".
    projection: one of `low_rank.PROJECTIONS`.
    kernel: its weight.
  """

  name: str
  expert: str
  projection: str
  kernel: bagel_names.Tensor

  @property
  def outputs(self) -> tuple[int, ...]:
    """Sizes of the kernel's axes that are the module's outputs."""
    return tuple(self.kernel.shape[axis] for axis in self.kernel.layout[0])

  @property
  def inputs(self) -> tuple[int, ...]:
    """Sizes of the kernel's axes that are the module's inputs."""
    return tuple(self.kernel.shape[axis] for axis in self.kernel.layout[1])

  @property
  def names(self) -> tuple[str, str]:
    """Names of A and B in the file."""
    return tuple(f"{_PREFIX}{self.name}.lora_{x}.weight" for x in "AB")


def _modules(sizes: architecture.BagelConfig) -> Iterator[_Module]:
  """Yields the modules that can have adapters, by layer."""
  for tensor in bagel_names.table(sizes):
    match = _KERNEL.fullmatch(tensor.path)
    if match and match[2] in low_rank.PROJECTIONS:
      name = tensor.name.removesuffix(".weight")
      yield _Module(name, match[1], match[2], tensor)


def is_adapter(folder: epath.Path) -> bool:
  """Returns whether a folder holds an adapter of PEFT."""
  return (folder / CONFIG_FILE).is_file()


def write(
  folder: epath.Path,
  adapters: types.Params,
  lora: low_rank.LoRA,
  sizes: architecture.BagelConfig,
  base: str,
) -> None:
  """Writes the two files of an adapter.

  Args:
    folder: is made if it is not there.
    adapters: {"layers": {expert: {projection: {"lora_a", "lora_b"}}}}, stored in their dtypes.
    lora: which projections have adapters, and their scale.
    sizes: of the model.
    base: folder or name of the model that the adapters are for.
  """
  flat = flax.traverse_util.flatten_dict(adapters, sep="/")
  specs = {}
  arrays = []
  targets = []
  for module in _modules(sizes):
    if module.projection not in getattr(lora, module.expert):
      continue
    targets.append(module.name)
    path = f"layers/{module.expert}/{module.projection}"
    a = np.asarray(flat[f"{path}/lora_a"][module.kernel.layer])
    b = np.asarray(flat[f"{path}/lora_b"][module.kernel.layer])
    matrices = (a.reshape(-1, lora.rank).T, b.reshape(lora.rank, -1).T)
    for name, matrix in zip(module.names, matrices, strict=True):
      specs[name] = (matrix.shape, matrix.dtype)
      arrays.append(np.ascontiguousarray(matrix))
  config = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "target_modules": targets,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
  }
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_files.write(folder / WEIGHTS_FILE, specs, arrays)
  # Last, so that a folder with it is whole.
  atomic.write_text(folder / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def read_config(
  folder: epath.Path,
) -> tuple[str, int, float]:
  """Returns the base model's folder or name, the rank and alpha of an adapter.

  Raises:
    ValueError: the file cannot be read, or the adapter is of a kind that is not supported; all keys
      that forbid it are named.
  """
  path = folder / CONFIG_FILE
  config = bounded.read_json_object(path)
  problems = []
  for key, allowed in _NEEDED.items():
    if key in config and config[key] not in allowed:
      problems.append(
        f"{key} must be {allowed[0]!r}; it is {_shown(config[key])}"
      )
  base = config.get("base_model_name_or_path")
  if not isinstance(base, str) or not base:
    problems.append("base_model_name_or_path must name the model's folder")
  rank = config.get("r")
  if type(rank) is not int or not 0 < rank <= 2**16:
    problems.append(f"r must be a whole number from 1 on; it is {_shown(rank)}")
  alpha = config.get("lora_alpha")
  if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
    problems.append(
      f"lora_alpha must be a number above 0; it is {_shown(alpha)}"
    )
  if problems:
    raise ValueError(
      f"{path} must describe plain low-rank adapters: {'; '.join(problems)}"
    )
  return base, rank, float(alpha)


def _shown(value: object) -> str:
  return texts.shorten(texts.printable(repr(value)), _LETTERS)


def read_lora(
  folder: epath.Path, sizes: architecture.BagelConfig
) -> low_rank.LoRA:
  """Returns which projections have adapters; reads the header of the weights.

  Raises:
    ValueError: the files cannot be read, a tensor is of no projection of this model or has another
      shape, or some layers have an adapter and others have none.
  """
  _, rank, alpha = read_config(folder)
  path = folder / WEIGHTS_FILE
  shapes = {
    name: entry.shape
    for name, entry in safetensors_files.read_header(path).items()
  }
  expected = {}
  projections: dict[str, dict[str, None]] = {"und": {}, "gen": {}}
  for module in _modules(sizes):
    if module.names[0] in shapes:
      projections[module.expert][module.projection] = None
  for module in _modules(sizes):
    if module.projection in projections[module.expert]:
      name_a, name_b = module.names
      expected[name_a] = (rank, math.prod(module.inputs))
      expected[name_b] = (math.prod(module.outputs), rank)
  wrong = sorted(
    name
    for name in expected.keys() | shapes.keys()
    if expected.get(name) != shapes.get(name)
  )
  if wrong or not expected:
    first = wrong[0] if wrong else ""
    raise ValueError(
      f"{path} must hold adapters of whole projections of this model, in every layer; "
      f"{len(wrong)} of {len(shapes)} tensors differ: {first}, "
      f"shape {shapes.get(first)}, expected {expected.get(first)}"
    )
  return low_rank.LoRA(
    rank, alpha, tuple(projections["und"]), tuple(projections["gen"])
  )


def read(
  folder: epath.Path,
  sizes: architecture.BagelConfig,
  wanted: types.Params,
) -> types.Params:
  """Reads adapters onto devices; every process reads all of them.

  Args:
    folder: of the adapter.
    sizes: of the model.
    wanted: jax.ShapeDtypeStructs with shardings; the numbers keep their stored dtype.

  Raises:
    ValueError: see `read_lora`; or a tensor has a dtype that is not supported.
  """
  read_lora(folder, sizes)
  entries = safetensors_files.read_header(folder / WEIGHTS_FILE)
  flat: Mapping = flax.traverse_util.flatten_dict(wanted, sep="/")
  layers: dict[str, list[np.ndarray]] = {path: [] for path in flat}
  for module in _modules(sizes):
    prefix = f"layers/{module.expert}/{module.projection}"
    if f"{prefix}/lora_a" not in flat:
      continue
    a, b = (_read_matrix(entries[name]) for name in module.names)
    layers[f"{prefix}/lora_a"].append(a.T.reshape(*module.inputs, -1))
    layers[f"{prefix}/lora_b"].append(b.T.reshape(-1, *module.outputs))
  leaves = {}
  for path, arrays in layers.items():
    stacked = np.stack(arrays)
    leaves[path] = jax.make_array_from_callback(
      stacked.shape, flat[path].sharding, stacked.__getitem__
    )
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _read_matrix(entry: safetensors_files.Entry) -> np.ndarray:
  if entry.dtype not in safetensors_files.DTYPES:
    raise ValueError(
      f"tensors of {entry.path} must be one of {list(safetensors_files.DTYPES)}; "
      f"got {entry.dtype}"
    )
  return safetensors_files.read(entry)
