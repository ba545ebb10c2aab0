"""BAGEL's released files <-> the weights of r3jax.

One table (`table`) says for every released tensor where it lives in the tree, with what shape, and
how the two layouts are related; reading, writing, checking and counting all go through it. Files
are read and written tensor by tensor, so memory holds the tree and one tensor.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
from typing import Iterable, Iterator

import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors

from r3jax import types
from r3jax.models import config as config_lib
from r3jax.models import layers

Shape = tuple[int, ...]
Layout = tuple[tuple[int, ...], ...]  # each released axis as a product of axes of the tree

MODEL_FILES = ("ema.safetensors", "model.safetensors")  # the first that exists is read
AUTOENCODER_FILES = ("ae.safetensors",)
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
LATENT_TABLE = "latent_pos_embed.pos_embed"
VISION_TABLE = "vit_pos_embed.pos_embed"
SELECT_LAYER = -2  # a ViT config counts one layer more than is used
TIME_FEATURES = 256
_SAMPLED_BLOCKS, _BLOCK = 64, 4096  # of a file's fingerprint
EXPERT_SUFFIX = {"und": "", "gen": "_moe_gen"}

VECTOR = ((0,),)
TABLE = ((0,), (1,))
LINEAR = ((1,), (0,))  # [in, out] -> [out, in]
HEADS = ((0, 1),)  # [heads, head dim] -> [out]
INTO_HEADS = ((1, 2), (0,))  # [in, heads, head dim] -> [out, in]
FROM_HEADS = ((2,), (0, 1))  # [heads, head dim, out] -> [out, in]
CONV = ((3,), (2,), (0,), (1,))  # [kernel, kernel, in, out] -> [out, in, kernel, kernel]

_LLM = "language_model.model.layers.{layer}."
_VIT = "vit_model.vision_model."
_VIT_LAYER = _VIT + "encoder.layers.{layer}."
_VIT_EMBED = _VIT + "embeddings."
_EXPERT = "policy/layers/{expert}/"
_VISION = "vision/layers/"
_GRID = "vision/position_embedding/"

# Released name, leaf of the tree, sizes of the tree's axes (see `_sizes`), layout. `{layer}` runs
# over the layers, which the leaf stacks; `{suffix}` and `{expert}` run over the two experts.
PATTERNS = (
    ("language_model.model.embed_tokens.weight", "policy/embed_tokens/embedding", "V D", TABLE),
    (_LLM + "input_layernorm{suffix}.weight", _EXPERT + "input_norm/scale", "D", VECTOR),
    (_LLM + "self_attn.q_proj{suffix}.weight", _EXPERT + "q/kernel", "D H d", INTO_HEADS),
    (_LLM + "self_attn.q_proj{suffix}.bias", _EXPERT + "q/bias", "H d", HEADS),
    (_LLM + "self_attn.k_proj{suffix}.weight", _EXPERT + "k/kernel", "D K d", INTO_HEADS),
    (_LLM + "self_attn.k_proj{suffix}.bias", _EXPERT + "k/bias", "K d", HEADS),
    (_LLM + "self_attn.v_proj{suffix}.weight", _EXPERT + "v/kernel", "D K d", INTO_HEADS),
    (_LLM + "self_attn.v_proj{suffix}.bias", _EXPERT + "v/bias", "K d", HEADS),
    (_LLM + "self_attn.q_norm{suffix}.weight", _EXPERT + "q_norm/scale", "d", VECTOR),
    (_LLM + "self_attn.k_norm{suffix}.weight", _EXPERT + "k_norm/scale", "d", VECTOR),
    (_LLM + "self_attn.o_proj{suffix}.weight", _EXPERT + "o/kernel", "H d D", FROM_HEADS),
    (_LLM + "post_attention_layernorm{suffix}.weight", _EXPERT + "post_norm/scale", "D", VECTOR),
    (_LLM + "mlp{suffix}.gate_proj.weight", _EXPERT + "gate/kernel", "D F", LINEAR),
    (_LLM + "mlp{suffix}.up_proj.weight", _EXPERT + "up/kernel", "D F", LINEAR),
    (_LLM + "mlp{suffix}.down_proj.weight", _EXPERT + "down/kernel", "F D", LINEAR),
    ("language_model.model.norm{suffix}.weight", "policy/norm/{expert}/scale", "D", VECTOR),
    ("language_model.lm_head.weight", "policy/lm_head/kernel", "D V", LINEAR),
    ("connector.fc1.weight", "policy/connector/fc1/kernel", "vD D", LINEAR),
    ("connector.fc1.bias", "policy/connector/fc1/bias", "D", VECTOR),
    ("connector.fc2.weight", "policy/connector/fc2/kernel", "D D", LINEAR),
    ("connector.fc2.bias", "policy/connector/fc2/bias", "D", VECTOR),
    ("vae2llm.weight", "policy/vae2llm/kernel", "C D", LINEAR),
    ("vae2llm.bias", "policy/vae2llm/bias", "D", VECTOR),
    ("llm2vae.weight", "policy/llm2vae/kernel", "D C", LINEAR),
    ("llm2vae.bias", "policy/llm2vae/bias", "C", VECTOR),
    ("time_embedder.mlp.0.weight", "policy/time_embedder/fc1/kernel", "time D", LINEAR),
    ("time_embedder.mlp.0.bias", "policy/time_embedder/fc1/bias", "D", VECTOR),
    ("time_embedder.mlp.2.weight", "policy/time_embedder/fc2/kernel", "D D", LINEAR),
    ("time_embedder.mlp.2.bias", "policy/time_embedder/fc2/bias", "D", VECTOR),
    (_VIT_EMBED + "patch_embedding.weight", "vision/patch_embedding/kernel", "patch vD", LINEAR),
    (_VIT_EMBED + "patch_embedding.bias", "vision/patch_embedding/bias", "vD", VECTOR),
    (_VIT_EMBED + "position_embedding.weight", _GRID + "embedding", "grid vD", TABLE),
    (_VIT_LAYER + "layer_norm1.weight", _VISION + "norm1/scale", "vD", VECTOR),
    (_VIT_LAYER + "layer_norm1.bias", _VISION + "norm1/bias", "vD", VECTOR),
    (_VIT_LAYER + "self_attn.q_proj.weight", _VISION + "q/kernel", "vD vH vd", INTO_HEADS),
    (_VIT_LAYER + "self_attn.q_proj.bias", _VISION + "q/bias", "vH vd", HEADS),
    (_VIT_LAYER + "self_attn.k_proj.weight", _VISION + "k/kernel", "vD vH vd", INTO_HEADS),
    (_VIT_LAYER + "self_attn.k_proj.bias", _VISION + "k/bias", "vH vd", HEADS),
    (_VIT_LAYER + "self_attn.v_proj.weight", _VISION + "v/kernel", "vD vH vd", INTO_HEADS),
    (_VIT_LAYER + "self_attn.v_proj.bias", _VISION + "v/bias", "vH vd", HEADS),
    (_VIT_LAYER + "self_attn.out_proj.weight", _VISION + "out/kernel", "vH vd vD", FROM_HEADS),
    (_VIT_LAYER + "self_attn.out_proj.bias", _VISION + "out/bias", "vD", VECTOR),
    (_VIT_LAYER + "layer_norm2.weight", _VISION + "norm2/scale", "vD", VECTOR),
    (_VIT_LAYER + "layer_norm2.bias", _VISION + "norm2/bias", "vD", VECTOR),
    (_VIT_LAYER + "mlp.fc1.weight", _VISION + "fc1/kernel", "vD vF", LINEAR),
    (_VIT_LAYER + "mlp.fc1.bias", _VISION + "fc1/bias", "vF", VECTOR),
    (_VIT_LAYER + "mlp.fc2.weight", _VISION + "fc2/kernel", "vF vD", LINEAR),
    (_VIT_LAYER + "mlp.fc2.bias", _VISION + "fc2/bias", "vD", VECTOR),
    (_VIT + "post_layernorm.weight", "vision/post_norm/scale", "vD", VECTOR),
    (_VIT + "post_layernorm.bias", "vision/post_norm/bias", "vD", VECTOR),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One released tensor and its place in the tree."""

  name: str  # released name
  path: str  # leaf of the weights, joined by "/"
  shape: Shape  # in the tree, without the layers axis
  layout: Layout  # the released axes in terms of the tree's
  layer: int | None = None  # index in the layers axis of the leaf; None: it has none

  @property
  def released_shape(self) -> Shape:
    """The shape in the file."""
    return tuple(math.prod(self.shape[i] for i in axes) for axes in self.layout)

  def to_tree(self, array: np.ndarray) -> np.ndarray:
    """Brings the released array into the tree's layout."""
    order = sum(self.layout, ())
    return array.reshape([self.shape[i] for i in order]).transpose(np.argsort(order))

  def to_released(self, array: np.ndarray) -> np.ndarray:
    """Brings the tree's array (of one layer) into the released layout."""
    return array.transpose(sum(self.layout, ())).reshape(self.released_shape)


def _sizes(config: config_lib.BagelConfig) -> dict[str, int]:
  llm, vision = config.llm, config.vision
  return {
      "V": llm.vocab_size,
      "D": llm.hidden_size,
      "F": llm.intermediate_size,
      "H": llm.num_heads,
      "K": llm.num_kv_heads,
      "d": llm.head_dim,
      "C": config.latent_dim,
      "time": TIME_FEATURES,
      "vD": vision.hidden_size,
      "vF": vision.intermediate_size,
      "vH": vision.num_heads,
      "vd": vision.hidden_size // vision.num_heads,
      "patch": 3 * vision.patch_size**2,
      "grid": vision.positions_per_side**2,
  }


def _transformer_tensors(config: config_lib.BagelConfig) -> Iterator[Tensor]:
  sizes = _sizes(config)
  for name, path, axes, layout in PATTERNS:
    shape = tuple(sizes[axis] for axis in axes.split())
    num_layers = config.vision.num_layers if name.startswith(_VIT) else config.llm.num_layers
    stacked = range(num_layers) if "{layer}" in name else [None]
    experts = EXPERT_SUFFIX if "{suffix}" in name else ["und"]
    for layer in stacked:
      for expert in experts:
        full_name = name.format(layer=layer, suffix=EXPERT_SUFFIX[expert])
        yield Tensor(full_name, path.format(expert=expert), shape, layout, layer)


def _residual(name: str, before: int, width: int) -> Iterator[tuple[str, Shape]]:
  yield f"{name}.norm1", (before,)
  yield f"{name}.conv1", (3, 3, before, width)
  yield f"{name}.norm2", (width,)
  yield f"{name}.conv2", (3, 3, width, width)
  if before != width:
    yield f"{name}.nin_shortcut", (1, 1, before, width)


def _level(name: str, before: int, width: int, num_blocks: int) -> Iterator[tuple[str, Shape]]:
  for block in range(num_blocks):
    yield from _residual(f"{name}.block.{block}", before if block == 0 else width, width)


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
  yield from _residual(f"{name}.block_1", width, width)
  yield f"{name}.attn_1.norm", (width,)
  for part in ("q", "k", "v", "proj_out"):
    yield f"{name}.attn_1.{part}", (1, 1, width, width)
  yield from _residual(f"{name}.block_2", width, width)


def _ends(name: str, deepest: int, width: int, outputs: int) -> Iterator[tuple[str, Shape]]:
  yield from _middle(f"{name}.mid", deepest)
  yield f"{name}.norm_out", (width,)
  yield f"{name}.conv_out", (3, 3, width, outputs)


def _autoencoder_modules(c: config_lib.AutoencoderConfig) -> Iterator[tuple[str, Shape]]:
  """Yields the released name of every norm and convolution and the shape of its weight."""
  widths = [c.channels * m for m in c.multipliers]
  last = len(widths) - 1
  yield "encoder.conv_in", (3, 3, 3, c.channels)
  yield "decoder.conv_in", (3, 3, c.latent_channels, widths[last])
  for i, width in enumerate(widths):
    before_down = widths[i - 1] if i else c.channels
    yield from _level(f"encoder.down.{i}", before_down, width, c.num_res_blocks)
    yield from _level(f"decoder.up.{i}", widths[min(i + 1, last)], width, c.num_res_blocks + 1)
    if i < last:
      yield f"encoder.down.{i}.downsample.conv", (3, 3, width, width)
    if i > 0:
      yield f"decoder.up.{i}.upsample.conv", (3, 3, width, width)
  yield from _ends("encoder", widths[last], widths[last], 2 * c.latent_channels)
  yield from _ends("decoder", widths[last], widths[0], 3)


def _autoencoder_tensors(config: config_lib.AutoencoderConfig) -> Iterator[Tensor]:
  for name, shape in _autoencoder_modules(config):
    path = "autoencoder/" + re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")
    leaf, layout = ("kernel", CONV) if len(shape) == 4 else ("scale", VECTOR)
    yield Tensor(f"{name}.weight", f"{path}/{leaf}", shape, layout)
    yield Tensor(f"{name}.bias", f"{path}/bias", shape[-1:], VECTOR)


def table(config: config_lib.BagelConfig) -> tuple[Tensor, ...]:
  """Returns every released tensor of a model of these sizes, but for the two sin-cos tables."""
  return (*_transformer_tensors(config), *_autoencoder_tensors(config.autoencoder))


def expected_shapes(config: config_lib.BagelConfig) -> dict[str, Shape]:
  """Returns the released shape of every tensor of both files by name (without sin-cos tables)."""
  return {tensor.name: tensor.released_shape for tensor in table(config)}


def _fixed_tables(config: config_lib.BagelConfig) -> dict[str, tuple[int, int]]:
  """Returns width and side of the two sin-cos tables, which have no parameters in the tree."""
  width = config.llm.hidden_size
  return {
      LATENT_TABLE: (width, config.max_latent_side),
      VISION_TABLE: (width, config.max_patches_per_side),
  }


def count_parameters(config: config_lib.BagelConfig) -> dict[str, int]:
  """Counts parameters by part; keys are the released prefixes (sin-cos tables included)."""
  fixed = _fixed_tables(config)
  counts = {name.split(".")[0]: side**2 * width for name, (width, side) in fixed.items()}
  for name, shape in expected_shapes(config).items():
    part = name.split(".")[0]
    part = "autoencoder" if part in ("encoder", "decoder") else part
    counts[part] = counts.get(part, 0) + math.prod(shape)
  return counts


def _split(config: config_lib.BagelConfig) -> tuple[tuple[tuple[str, ...], list[Tensor]], ...]:
  """Returns the file names and the tensors of the model's and of the autoencoder's file."""
  model, autoencoder = [], []
  for tensor in table(config):
    (autoencoder if tensor.path.startswith("autoencoder/") else model).append(tensor)
  return (MODEL_FILES, model), (AUTOENCODER_FILES, autoencoder)


def _differences(kind: str, expected: dict[str, Shape], seen: dict[str, Shape]) -> Iterator[str]:
  for name, shape in expected.items():
    if name not in seen:
      yield f"missing {kind} {name}: expected shape {shape}"
    elif seen[name] != shape:
      yield f"mis-shaped {kind} {name}: expected shape {shape}, seen {seen[name]}"
  for name in seen.keys() - expected.keys():
    yield f"unexpected {kind} {name}: seen shape {seen[name]}"


def _file_problems(path: pathlib.Path, tensors: list[Tensor]) -> list[str]:
  """Compares a file's header with the table; reads no array."""
  try:
    with safetensors.safe_open(path, "np") as file:
      header = {name: file.get_slice(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    return [f"unreadable file {path}: {error}"]
  for name in (LATENT_TABLE, VISION_TABLE):
    header.pop(name, None)
  seen = {name: tuple(entry.get_shape()) for name, entry in header.items()}
  expected = {tensor.name: tensor.released_shape for tensor in tensors}
  wrong_types = [
      f"wrong dtype of tensor {name}: expected one of {', '.join(DTYPES)}, seen {entry.get_dtype()}"
      for name, entry in header.items()
      if name in expected and entry.get_dtype() not in DTYPES
  ]
  return sorted(_differences("tensor", expected, seen)) + wrong_types


def _refuse(what: str, problems: list[str]) -> None:
  if problems:
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise ValueError(f"{what} must match the config; {len(problems)} problem(s):\n{listed}")


def _read(
    path: pathlib.Path, tensors: list[Tensor], num_layers: dict[str, int]
) -> dict[str, np.ndarray]:
  leaves = {}
  with safetensors.safe_open(path, "np") as file:
    for tensor in tensors:
      if tensor.path not in leaves:
        leaves[tensor.path] = np.empty(_leaf_shape(tensor, num_layers), np.float32)
      place = ... if tensor.layer is None else tensor.layer
      leaves[tensor.path][place] = tensor.to_tree(file.get_tensor(tensor.name))
  return leaves


def _num_layers(config: config_lib.BagelConfig) -> dict[str, int]:
  return {"policy": config.llm.num_layers, "vision": config.vision.num_layers}


def _leaf_shape(tensor: Tensor, num_layers: dict[str, int]) -> Shape:
  if tensor.layer is None:
    return tensor.shape
  return (num_layers[tensor.path.split("/")[0]], *tensor.shape)


def load(folder: str | pathlib.Path, config: config_lib.BagelConfig) -> types.Params:
  """Reads a model in BAGEL's format; headers are checked before any array is read.

  Sin-cos tables in the file are ignored (`layers.sincos_table` recomputes them).

  Args:
    folder: holds `ema.safetensors` (or `model.safetensors`) and `ae.safetensors`; F32, F16 or BF16.
    config: the sizes that the model must have.

  Returns:
    {'policy', 'vision', 'autoencoder'}: nested dicts of numpy float32 arrays.

  Raises:
    ValueError: lists everything that is missing, unexpected, mis-shaped or unreadable.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"a BAGEL folder must be a folder; not found: {folder}")
  problems, found = [], []
  for names, tensors in _split(config):
    paths = [folder / name for name in names if (folder / name).is_file()]
    if paths:
      found.append((paths[0], tensors))
      problems += _file_problems(paths[0], tensors)
    else:
      problems.append(f"missing file {' or '.join(names)}")
  _refuse(f"the BAGEL folder {folder}", problems)
  leaves = {}
  for path, tensors in found:
    leaves |= _read(path, tensors, _num_layers(config))
  return flax.traverse_util.unflatten_dict(leaves, sep="/")


def fingerprint(folder: str | pathlib.Path) -> str:
  """Returns 16 hex digits that tell the weights of a folder from others of the same shapes.

  Of every safetensors file they are made of its size and of 64 blocks spread over it, so that even
  a large model takes no time.
  """
  found = hashlib.sha256()
  for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
    size = path.stat().st_size
    found.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
      for i in range(_SAMPLED_BLOCKS):
        file.seek(max(0, size - _BLOCK) * i // (_SAMPLED_BLOCKS - 1))
        found.update(file.read(_BLOCK))
  return found.hexdigest()[:16]


def _write(
    path: pathlib.Path, shapes: dict[str, Shape], arrays: Iterable[np.ndarray], dtype: np.dtype
) -> None:
  """Writes a safetensors file tensor by tensor, under its name only once it is whole."""
  label = next(label for label, known in DTYPES.items() if dtype == known)
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape in shapes.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  partial = path.with_name(path.name + ".partial")
  with partial.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
      file.write(array.astype(dtype).tobytes())
  partial.replace(path)


def _released(leaves: dict[str, np.ndarray], tensors: list[Tensor]) -> Iterator[np.ndarray]:
  for tensor in tensors:
    leaf = leaves[tensor.path]
    yield tensor.to_released(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]))


def save(
    weights: types.Params,
    config: config_lib.BagelConfig,
    folder: str | pathlib.Path,
    dtype: np.typing.DTypeLike = np.float32,
) -> None:
  """Writes a model in BAGEL's format: both safetensors files and the three JSON configs.

  In float32 `load` gives the same numbers back. The sin-cos tables are written too: other programs
  look for them.

  Args:
    weights: {'policy', 'vision', 'autoencoder'}: nested dicts of arrays (not boxed).
    config: the sizes of the model.
    folder: is made if missing; files in it are replaced.
    dtype: of all tensors; float32, float16 or bfloat16.

  Raises:
    ValueError: the dtype is another one, or the weights are not those of the config (lists all).
  """
  dtype = np.dtype(dtype)
  if dtype not in [np.dtype(known) for known in DTYPES.values()]:
    raise ValueError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
  leaves = flax.traverse_util.flatten_dict(weights, sep="/")
  expected = {t.path: _leaf_shape(t, _num_layers(config)) for t in table(config)}
  seen = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  _refuse("the weights", sorted(_differences("leaf", expected, seen)))
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (_, model), (_, autoencoder) = _split(config)
  fixed = _fixed_tables(config)
  shapes = {t.name: t.released_shape for t in model}
  shapes |= {name: (side**2, width) for name, (width, side) in fixed.items()}
  tables = (layers.sincos_table(width, side) for width, side in fixed.values())
  arrays = itertools.chain(_released(leaves, model), tables)
  _write(folder / MODEL_FILES[0], shapes, arrays, dtype)
  shapes = {t.name: t.released_shape for t in autoencoder}
  _write(folder / AUTOENCODER_FILES[0], shapes, _released(leaves, autoencoder), dtype)
  for name, content in _configs(config).items():
    (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _configs(config: config_lib.BagelConfig) -> dict[str, dict]:
  """Returns the contents of the JSON files; `config.from_folder` reads them back."""
  return {
      "llm_config.json": _llm_json(config),
      "vit_config.json": _vision_json(config.vision),
      "constants.json": _constants_json(config),
  }


def _llm_json(config: config_lib.BagelConfig) -> dict:
  llm, ids = config.llm, config.special_ids
  return {
      "architectures": ["Qwen2ForCausalLM"],
      "model_type": "qwen2",
      "hidden_act": "silu",
      "tie_word_embeddings": False,
      "bos_token_id": ids.text_begin,
      "eos_token_id": ids.text_end,
      "hidden_size": llm.hidden_size,
      "intermediate_size": llm.intermediate_size,
      "num_hidden_layers": llm.num_layers,
      "num_attention_heads": llm.num_heads,
      "num_key_value_heads": llm.num_kv_heads,
      "vocab_size": llm.vocab_size,
      "rope_theta": llm.rope_theta,
      "rms_norm_eps": llm.rms_norm_eps,
  }


def _vision_json(vision: config_lib.VisionConfig) -> dict:
  return {
      "model_type": "siglip_vision_model",
      "hidden_act": "gelu_pytorch_tanh",
      "num_channels": 3,
      "hidden_size": vision.hidden_size,
      "intermediate_size": vision.intermediate_size,
      "num_hidden_layers": vision.num_layers - 1 - SELECT_LAYER,
      "num_attention_heads": vision.num_heads,
      "patch_size": vision.patch_size,
      "image_size": vision.patch_size * vision.positions_per_side,
      "layer_norm_eps": vision.layer_norm_eps,
  }


def _transform_json(transform: config_lib.ImageTransform) -> dict:
  return {"max": transform.max_size, "min": transform.min_size, "stride": transform.stride}


def _constants_json(config: config_lib.BagelConfig) -> dict:
  vae = config.autoencoder
  return {
      "special_ids": dataclasses.asdict(config.special_ids),
      "latent_patch_size": config.latent_patch,
      "vae": {
          "downsample": vae.downsample,
          "in_channels": 3,
          "out_channels": 3,
          "ch": vae.channels,
          "ch_mult": list(vae.multipliers),
          "num_res_blocks": vae.num_res_blocks,
          "z_channels": vae.latent_channels,
          "scale_factor": vae.scale,
          "shift_factor": vae.shift,
      },
      "vit_select_layer": SELECT_LAYER,
      "qk_norm": True,
      "max_latent_size": config.max_latent_side,
      "vit_max_num_patch_per_side": config.max_patches_per_side,
      "vae_transform": _transform_json(config.autoencoder_transform),
      "vit_transform": _transform_json(config.vision_transform),
  }
