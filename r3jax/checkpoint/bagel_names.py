"""The released tensors of BAGEL and their places in the tree of r3jax's weights.

One table (`table`) gives every released tensor's leaf in the tree, its shape, and how the two
layouts are related. Reading, writing and checking all go through it.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

import numpy as np

from r3jax.model import architecture

Shape = tuple[int, ...]
# Every released axis as a product of axes of the leaf, which it numbers.
Layout = tuple[tuple[int, ...], ...]

# Sin-cos tables: the tree has no leaves for them.
LATENT_TABLE = "latent_pos_embed.pos_embed"
VISION_TABLE = "vit_pos_embed.pos_embed"
TIME_FEATURES = 256
EXPERT_SUFFIX = {"und": "", "gen": "_moe_gen"}

VECTOR = ((0,),)
TABLE = ((0,), (1,))
LINEAR = ((1,), (0,))  # [in, out] -> [out, in]
HEADS = ((0, 1),)  # [heads, head dim] -> [out]
INTO_HEADS = ((1, 2), (0,))  # [in, heads, head dim] -> [out, in]
FROM_HEADS = ((2,), (0, 1))  # [heads, head dim, out] -> [out, in]
# [kernel, kernel, in, out] -> [out, in, kernel, kernel]
CONV = ((3,), (2,), (0,), (1,))

_VISION = "vit_model.vision_model."


@dataclasses.dataclass(frozen=True)
class _Pattern:
  """Released tensors of one kind, and the leaf that holds them.

  `{layer}` stands for the number of a layer; the leaf stacks the layers. `{suffix}` and `{expert}`
  stand for the experts, each of which has a leaf of its own.

  Attributes:
    name: Released name.
    path: Leaf of the weights.
    axes: Sizes of the leaf's axes, without the layers: keys of `_sizes`.
    layout: Released axes in terms of the leaf's.
  """

  name: str
  path: str
  axes: str
  layout: Layout


def _under(
  released_prefix: str,
  path_prefix: str,
  *rows: tuple[str, str, str, Layout],
) -> list[_Pattern]:
  """Returns the patterns of rows (name, path, axes, layout) under a pair of prefixes."""
  patterns = []
  for name, path, axes, layout in rows:
    patterns.append(
      _Pattern(released_prefix + name, path_prefix + path, axes, layout)
    )
  return patterns


# In the order of the written file.
_PATTERNS = (
  *_under(
    "language_model.model.",
    "policy/",
    ("embed_tokens.weight", "embed_tokens/embedding", "V D", TABLE),
  ),
  *_under(
    "language_model.model.layers.{layer}.",
    "policy/layers/{expert}/",
    ("input_layernorm{suffix}.weight", "input_norm/scale", "D", VECTOR),
    ("self_attn.q_proj{suffix}.weight", "q/kernel", "D H d", INTO_HEADS),
    ("self_attn.q_proj{suffix}.bias", "q/bias", "H d", HEADS),
    ("self_attn.k_proj{suffix}.weight", "k/kernel", "D K d", INTO_HEADS),
    ("self_attn.k_proj{suffix}.bias", "k/bias", "K d", HEADS),
    ("self_attn.v_proj{suffix}.weight", "v/kernel", "D K d", INTO_HEADS),
    ("self_attn.v_proj{suffix}.bias", "v/bias", "K d", HEADS),
    ("self_attn.q_norm{suffix}.weight", "q_norm/scale", "d", VECTOR),
    ("self_attn.k_norm{suffix}.weight", "k_norm/scale", "d", VECTOR),
    ("self_attn.o_proj{suffix}.weight", "o/kernel", "H d D", FROM_HEADS),
    ("post_attention_layernorm{suffix}.weight", "post_norm/scale", "D", VECTOR),
    ("mlp{suffix}.gate_proj.weight", "gate/kernel", "D F", LINEAR),
    ("mlp{suffix}.up_proj.weight", "up/kernel", "D F", LINEAR),
    ("mlp{suffix}.down_proj.weight", "down/kernel", "F D", LINEAR),
  ),
  *_under(
    "language_model.",
    "policy/",
    ("model.norm{suffix}.weight", "norm/{expert}/scale", "D", VECTOR),
    ("lm_head.weight", "lm_head/kernel", "D V", LINEAR),
  ),
  *_under(
    "",
    "policy/",
    ("connector.fc1.weight", "connector/fc1/kernel", "vD D", LINEAR),
    ("connector.fc1.bias", "connector/fc1/bias", "D", VECTOR),
    ("connector.fc2.weight", "connector/fc2/kernel", "D D", LINEAR),
    ("connector.fc2.bias", "connector/fc2/bias", "D", VECTOR),
    ("vae2llm.weight", "vae2llm/kernel", "C D", LINEAR),
    ("vae2llm.bias", "vae2llm/bias", "D", VECTOR),
    ("llm2vae.weight", "llm2vae/kernel", "D C", LINEAR),
    ("llm2vae.bias", "llm2vae/bias", "C", VECTOR),
    (
      "time_embedder.mlp.0.weight",
      "time_embedder/fc1/kernel",
      "time D",
      LINEAR,
    ),
    ("time_embedder.mlp.0.bias", "time_embedder/fc1/bias", "D", VECTOR),
    ("time_embedder.mlp.2.weight", "time_embedder/fc2/kernel", "D D", LINEAR),
    ("time_embedder.mlp.2.bias", "time_embedder/fc2/bias", "D", VECTOR),
  ),
  *_under(
    _VISION + "embeddings.",
    "vision/",
    ("patch_embedding.weight", "patch_embedding/kernel", "patch vD", LINEAR),
    ("patch_embedding.bias", "patch_embedding/bias", "vD", VECTOR),
    (
      "position_embedding.weight",
      "position_embedding/embedding",
      "grid vD",
      TABLE,
    ),
  ),
  *_under(
    _VISION + "encoder.layers.{layer}.",
    "vision/layers/",
    ("layer_norm1.weight", "norm1/scale", "vD", VECTOR),
    ("layer_norm1.bias", "norm1/bias", "vD", VECTOR),
    ("self_attn.q_proj.weight", "q/kernel", "vD vH vd", INTO_HEADS),
    ("self_attn.q_proj.bias", "q/bias", "vH vd", HEADS),
    ("self_attn.k_proj.weight", "k/kernel", "vD vH vd", INTO_HEADS),
    ("self_attn.k_proj.bias", "k/bias", "vH vd", HEADS),
    ("self_attn.v_proj.weight", "v/kernel", "vD vH vd", INTO_HEADS),
    ("self_attn.v_proj.bias", "v/bias", "vH vd", HEADS),
    ("self_attn.out_proj.weight", "out/kernel", "vH vd vD", FROM_HEADS),
    ("self_attn.out_proj.bias", "out/bias", "vD", VECTOR),
    ("layer_norm2.weight", "norm2/scale", "vD", VECTOR),
    ("layer_norm2.bias", "norm2/bias", "vD", VECTOR),
    ("mlp.fc1.weight", "fc1/kernel", "vD vF", LINEAR),
    ("mlp.fc1.bias", "fc1/bias", "vF", VECTOR),
    ("mlp.fc2.weight", "fc2/kernel", "vF vD", LINEAR),
    ("mlp.fc2.bias", "fc2/bias", "vD", VECTOR),
  ),
  *_under(
    _VISION,
    "vision/",
    ("post_layernorm.weight", "post_norm/scale", "vD", VECTOR),
    ("post_layernorm.bias", "post_norm/bias", "vD", VECTOR),
  ),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One released tensor and its place in the tree.

  Attributes:
    name: Released name.
    path: Leaf of the weights, joined by "/".
    shape: Shape in the tree, without the layers.
    layout: Released axes in terms of the tree's.
    layer: Index in the first axis of a leaf that stacks layers; None for a leaf that has no such
      axis.
  """

  name: str
  path: str
  shape: Shape
  layout: Layout
  layer: int | None = None

  @property
  def released_shape(self) -> Shape:
    """Shape in the file."""
    shape = []
    for axes in self.layout:
      shape.append(math.prod(self.shape[axis] for axis in axes))
    return tuple(shape)

  @property
  def _released_order(self) -> tuple[int, ...]:
    """Axes of the tree in the order of the file."""
    return sum(self.layout, ())

  def to_tree(
    self, array: np.ndarray, sizes: Mapping[int, int] | None = None
  ) -> np.ndarray:
    """Brings a released array into the tree's layout.

    Args:
      array: Array with the axes of the file.
      sizes: Sizes of those axes of the tree that the array has only a part of.
    """
    shape = list(self.shape)
    for axis, size in (sizes or {}).items():
      shape[axis] = size
    order = self._released_order
    split = array.reshape([shape[axis] for axis in order])
    return split.transpose(np.argsort(order))

  def to_released(self, array: np.ndarray) -> np.ndarray:
    """Brings an array of the tree (of one layer) into the released layout."""
    transposed = array.transpose(self._released_order)
    return transposed.reshape(self.released_shape)


def table(config: architecture.BagelConfig) -> tuple[Tensor, ...]:
  """Returns every released tensor of a model of these sizes, without the two sin-cos tables."""
  return (
    *_transformer_tensors(config),
    *_autoencoder_tensors(config.autoencoder),
  )


def expected_shapes(config: architecture.BagelConfig) -> dict[str, Shape]:
  """Returns the released shape of every tensor of `table` by its name."""
  return {tensor.name: tensor.released_shape for tensor in table(config)}


def fixed_tables(
  config: architecture.BagelConfig,
) -> dict[str, tuple[int, int]]:
  """Returns (width, side) of the two sin-cos tables by their names.

  A table has side² rows of `width` numbers.
  """
  width = config.llm.hidden_size
  return {
    LATENT_TABLE: (width, config.max_latent_side),
    VISION_TABLE: (width, config.max_patches_per_side),
  }


# --- Language model and ViT --------------------------------------------------------------------


def _sizes(config: architecture.BagelConfig) -> dict[str, int]:
  """Returns the size of every axis of the patterns by its name."""
  llm = config.llm
  vision = config.vision
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


def _transformer_tensors(config: architecture.BagelConfig) -> Iterator[Tensor]:
  sizes = _sizes(config)
  for pattern in _PATTERNS:
    shape = tuple(sizes[axis] for axis in pattern.axes.split())
    in_vision = pattern.name.startswith(_VISION)
    num_layers = (config.vision if in_vision else config.llm).num_layers
    stacks_layers = "{layer}" in pattern.name
    layers = range(num_layers) if stacks_layers else [None]
    experts = EXPERT_SUFFIX if "{suffix}" in pattern.name else ["und"]
    for layer in layers:
      for expert in experts:
        suffix = EXPERT_SUFFIX[expert]
        yield Tensor(
          name=pattern.name.format(layer=layer, suffix=suffix),
          path=pattern.path.format(expert=expert),
          shape=shape,
          layout=pattern.layout,
          layer=layer,
        )


# --- Autoencoder -------------------------------------------------------------------------------


def _autoencoder_tensors(
  config: architecture.AutoencoderConfig,
) -> Iterator[Tensor]:
  for name, shape in _autoencoder_modules(config):
    # encoder.down.0.block.1.conv1 -> encoder/down_0/block_1/conv1
    module = re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")
    path = f"autoencoder/{module}"
    is_convolution = len(shape) == 4
    leaf = "kernel" if is_convolution else "scale"
    layout = CONV if is_convolution else VECTOR
    yield Tensor(f"{name}.weight", f"{path}/{leaf}", shape, layout)
    yield Tensor(f"{name}.bias", f"{path}/bias", shape[-1:], VECTOR)


def _autoencoder_modules(
  config: architecture.AutoencoderConfig,
) -> Iterator[tuple[str, Shape]]:
  """Yields the released name of every norm and convolution, and the shape of its weight."""
  widths = [config.channels * factor for factor in config.multipliers]
  last = len(widths) - 1
  num_blocks = config.num_res_blocks
  yield "encoder.conv_in", (3, 3, 3, config.channels)
  yield "decoder.conv_in", (3, 3, config.latent_channels, widths[last])
  for i, width in enumerate(widths):
    before_down = widths[i - 1] if i else config.channels
    yield from _level(f"encoder.down.{i}", before_down, width, num_blocks)
    before_up = widths[min(i + 1, last)]
    yield from _level(f"decoder.up.{i}", before_up, width, num_blocks + 1)
    if i < last:
      yield f"encoder.down.{i}.downsample.conv", (3, 3, width, width)
    if i > 0:
      yield f"decoder.up.{i}.upsample.conv", (3, 3, width, width)
  # The encoder returns mean and log-variance.
  num_outputs = 2 * config.latent_channels
  yield from _ends("encoder", widths[last], widths[last], num_outputs)
  yield from _ends("decoder", widths[last], widths[0], 3)


def _level(
  name: str, width_before: int, width: int, num_blocks: int
) -> Iterator[tuple[str, Shape]]:
  for block in range(num_blocks):
    yield from _residual(f"{name}.block.{block}", width_before, width)
    width_before = width


def _ends(
  name: str, deepest_width: int, width: int, num_outputs: int
) -> Iterator[tuple[str, Shape]]:
  """Yields the middle of an encoder or decoder, and its last norm and convolution."""
  yield from _middle(f"{name}.mid", deepest_width)
  yield f"{name}.norm_out", (width,)
  yield f"{name}.conv_out", (3, 3, width, num_outputs)


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
  yield from _residual(f"{name}.block_1", width, width)
  yield f"{name}.attn_1.norm", (width,)
  for part in ("q", "k", "v", "proj_out"):
    yield f"{name}.attn_1.{part}", (1, 1, width, width)
  yield from _residual(f"{name}.block_2", width, width)


def _residual(
  name: str, width_before: int, width: int
) -> Iterator[tuple[str, Shape]]:
  yield f"{name}.norm1", (width_before,)
  yield f"{name}.conv1", (3, 3, width_before, width)
  yield f"{name}.norm2", (width,)
  yield f"{name}.conv2", (3, 3, width, width)
  if width_before != width:
    yield f"{name}.nin_shortcut", (1, 1, width_before, width)
