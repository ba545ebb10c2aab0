"""The released tensors of BAGEL and their places in the tree of r3jax's weights.

One table (`table`) says for every released tensor where it lives in the tree, with what shape, and
how the two layouts are related; reading, writing, checking and counting all go through it.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

import numpy as np

from r3jax.model import architecture

Shape = tuple[int, ...]
# each released axis as a product of axes of the tree
Layout = tuple[tuple[int, ...], ...]

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
  (
    "language_model.model.embed_tokens.weight",
    "policy/embed_tokens/embedding",
    "V D",
    TABLE,
  ),
  (
    _LLM + "input_layernorm{suffix}.weight",
    _EXPERT + "input_norm/scale",
    "D",
    VECTOR,
  ),
  (
    _LLM + "self_attn.q_proj{suffix}.weight",
    _EXPERT + "q/kernel",
    "D H d",
    INTO_HEADS,
  ),
  (_LLM + "self_attn.q_proj{suffix}.bias", _EXPERT + "q/bias", "H d", HEADS),
  (
    _LLM + "self_attn.k_proj{suffix}.weight",
    _EXPERT + "k/kernel",
    "D K d",
    INTO_HEADS,
  ),
  (_LLM + "self_attn.k_proj{suffix}.bias", _EXPERT + "k/bias", "K d", HEADS),
  (
    _LLM + "self_attn.v_proj{suffix}.weight",
    _EXPERT + "v/kernel",
    "D K d",
    INTO_HEADS,
  ),
  (_LLM + "self_attn.v_proj{suffix}.bias", _EXPERT + "v/bias", "K d", HEADS),
  (
    _LLM + "self_attn.q_norm{suffix}.weight",
    _EXPERT + "q_norm/scale",
    "d",
    VECTOR,
  ),
  (
    _LLM + "self_attn.k_norm{suffix}.weight",
    _EXPERT + "k_norm/scale",
    "d",
    VECTOR,
  ),
  (
    _LLM + "self_attn.o_proj{suffix}.weight",
    _EXPERT + "o/kernel",
    "H d D",
    FROM_HEADS,
  ),
  (
    _LLM + "post_attention_layernorm{suffix}.weight",
    _EXPERT + "post_norm/scale",
    "D",
    VECTOR,
  ),
  (
    _LLM + "mlp{suffix}.gate_proj.weight",
    _EXPERT + "gate/kernel",
    "D F",
    LINEAR,
  ),
  (_LLM + "mlp{suffix}.up_proj.weight", _EXPERT + "up/kernel", "D F", LINEAR),
  (
    _LLM + "mlp{suffix}.down_proj.weight",
    _EXPERT + "down/kernel",
    "F D",
    LINEAR,
  ),
  (
    "language_model.model.norm{suffix}.weight",
    "policy/norm/{expert}/scale",
    "D",
    VECTOR,
  ),
  ("language_model.lm_head.weight", "policy/lm_head/kernel", "D V", LINEAR),
  ("connector.fc1.weight", "policy/connector/fc1/kernel", "vD D", LINEAR),
  ("connector.fc1.bias", "policy/connector/fc1/bias", "D", VECTOR),
  ("connector.fc2.weight", "policy/connector/fc2/kernel", "D D", LINEAR),
  ("connector.fc2.bias", "policy/connector/fc2/bias", "D", VECTOR),
  ("vae2llm.weight", "policy/vae2llm/kernel", "C D", LINEAR),
  ("vae2llm.bias", "policy/vae2llm/bias", "D", VECTOR),
  ("llm2vae.weight", "policy/llm2vae/kernel", "D C", LINEAR),
  ("llm2vae.bias", "policy/llm2vae/bias", "C", VECTOR),
  (
    "time_embedder.mlp.0.weight",
    "policy/time_embedder/fc1/kernel",
    "time D",
    LINEAR,
  ),
  ("time_embedder.mlp.0.bias", "policy/time_embedder/fc1/bias", "D", VECTOR),
  (
    "time_embedder.mlp.2.weight",
    "policy/time_embedder/fc2/kernel",
    "D D",
    LINEAR,
  ),
  ("time_embedder.mlp.2.bias", "policy/time_embedder/fc2/bias", "D", VECTOR),
  (
    _VIT_EMBED + "patch_embedding.weight",
    "vision/patch_embedding/kernel",
    "patch vD",
    LINEAR,
  ),
  (
    _VIT_EMBED + "patch_embedding.bias",
    "vision/patch_embedding/bias",
    "vD",
    VECTOR,
  ),
  (
    _VIT_EMBED + "position_embedding.weight",
    _GRID + "embedding",
    "grid vD",
    TABLE,
  ),
  (_VIT_LAYER + "layer_norm1.weight", _VISION + "norm1/scale", "vD", VECTOR),
  (_VIT_LAYER + "layer_norm1.bias", _VISION + "norm1/bias", "vD", VECTOR),
  (
    _VIT_LAYER + "self_attn.q_proj.weight",
    _VISION + "q/kernel",
    "vD vH vd",
    INTO_HEADS,
  ),
  (_VIT_LAYER + "self_attn.q_proj.bias", _VISION + "q/bias", "vH vd", HEADS),
  (
    _VIT_LAYER + "self_attn.k_proj.weight",
    _VISION + "k/kernel",
    "vD vH vd",
    INTO_HEADS,
  ),
  (_VIT_LAYER + "self_attn.k_proj.bias", _VISION + "k/bias", "vH vd", HEADS),
  (
    _VIT_LAYER + "self_attn.v_proj.weight",
    _VISION + "v/kernel",
    "vD vH vd",
    INTO_HEADS,
  ),
  (_VIT_LAYER + "self_attn.v_proj.bias", _VISION + "v/bias", "vH vd", HEADS),
  (
    _VIT_LAYER + "self_attn.out_proj.weight",
    _VISION + "out/kernel",
    "vH vd vD",
    FROM_HEADS,
  ),
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
  # index in the layers axis of the leaf; None: it has none
  layer: int | None = None

  @property
  def released_shape(self) -> Shape:
    """The shape in the file."""
    return tuple(math.prod(self.shape[i] for i in axes) for axes in self.layout)

  def to_tree(
    self, array: np.ndarray, sizes: Mapping[int, int] | None = None
  ) -> np.ndarray:
    """Brings the released array into the tree's layout.

    Args:
      array: as in the file.
      sizes: of axes of the tree of which the array holds a part only.
    """
    order = sum(self.layout, ())
    shape = [(sizes or {}).get(i, size) for i, size in enumerate(self.shape)]
    return array.reshape([shape[i] for i in order]).transpose(np.argsort(order))

  def to_released(self, array: np.ndarray) -> np.ndarray:
    """Brings the tree's array (of one layer) into the released layout."""
    return array.transpose(sum(self.layout, ())).reshape(self.released_shape)


def _sizes(config: architecture.BagelConfig) -> dict[str, int]:
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


def _transformer_tensors(config: architecture.BagelConfig) -> Iterator[Tensor]:
  sizes = _sizes(config)
  for name, path, axes, layout in PATTERNS:
    shape = tuple(sizes[axis] for axis in axes.split())
    num_layers = (
      config.vision.num_layers
      if name.startswith(_VIT)
      else config.llm.num_layers
    )
    stacked = range(num_layers) if "{layer}" in name else [None]
    experts = EXPERT_SUFFIX if "{suffix}" in name else ["und"]
    for layer in stacked:
      for expert in experts:
        full_name = name.format(layer=layer, suffix=EXPERT_SUFFIX[expert])
        yield Tensor(
          full_name, path.format(expert=expert), shape, layout, layer
        )


def _residual(
  name: str, before: int, width: int
) -> Iterator[tuple[str, Shape]]:
  yield f"{name}.norm1", (before,)
  yield f"{name}.conv1", (3, 3, before, width)
  yield f"{name}.norm2", (width,)
  yield f"{name}.conv2", (3, 3, width, width)
  if before != width:
    yield f"{name}.nin_shortcut", (1, 1, before, width)


def _level(
  name: str, before: int, width: int, num_blocks: int
) -> Iterator[tuple[str, Shape]]:
  for block in range(num_blocks):
    yield from _residual(
      f"{name}.block.{block}", before if block == 0 else width, width
    )


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
  yield from _residual(f"{name}.block_1", width, width)
  yield f"{name}.attn_1.norm", (width,)
  for part in ("q", "k", "v", "proj_out"):
    yield f"{name}.attn_1.{part}", (1, 1, width, width)
  yield from _residual(f"{name}.block_2", width, width)


def _ends(
  name: str, deepest: int, width: int, outputs: int
) -> Iterator[tuple[str, Shape]]:
  yield from _middle(f"{name}.mid", deepest)
  yield f"{name}.norm_out", (width,)
  yield f"{name}.conv_out", (3, 3, width, outputs)


def _autoencoder_modules(
  c: architecture.AutoencoderConfig,
) -> Iterator[tuple[str, Shape]]:
  """Yields the released name of every norm and convolution and the shape of its weight."""
  widths = [c.channels * m for m in c.multipliers]
  last = len(widths) - 1
  yield "encoder.conv_in", (3, 3, 3, c.channels)
  yield "decoder.conv_in", (3, 3, c.latent_channels, widths[last])
  for i, width in enumerate(widths):
    before_down = widths[i - 1] if i else c.channels
    yield from _level(f"encoder.down.{i}", before_down, width, c.num_res_blocks)
    yield from _level(
      f"decoder.up.{i}", widths[min(i + 1, last)], width, c.num_res_blocks + 1
    )
    if i < last:
      yield f"encoder.down.{i}.downsample.conv", (3, 3, width, width)
    if i > 0:
      yield f"decoder.up.{i}.upsample.conv", (3, 3, width, width)
  yield from _ends("encoder", widths[last], widths[last], 2 * c.latent_channels)
  yield from _ends("decoder", widths[last], widths[0], 3)


def _autoencoder_tensors(
  config: architecture.AutoencoderConfig,
) -> Iterator[Tensor]:
  for name, shape in _autoencoder_modules(config):
    path = "autoencoder/" + re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")
    leaf, layout = ("kernel", CONV) if len(shape) == 4 else ("scale", VECTOR)
    yield Tensor(f"{name}.weight", f"{path}/{leaf}", shape, layout)
    yield Tensor(f"{name}.bias", f"{path}/bias", shape[-1:], VECTOR)


def table(config: architecture.BagelConfig) -> tuple[Tensor, ...]:
  """Returns every released tensor of a model of these sizes, but for the two sin-cos tables."""
  return (
    *_transformer_tensors(config),
    *_autoencoder_tensors(config.autoencoder),
  )


def expected_shapes(config: architecture.BagelConfig) -> dict[str, Shape]:
  """Returns the released shape of every tensor of both files by name (without sin-cos tables)."""
  return {tensor.name: tensor.released_shape for tensor in table(config)}


def fixed_tables(
  config: architecture.BagelConfig,
) -> dict[str, tuple[int, int]]:
  """Returns width and side of the two sin-cos tables, which have no parameters in the tree."""
  width = config.llm.hidden_size
  return {
    LATENT_TABLE: (width, config.max_latent_side),
    VISION_TABLE: (width, config.max_patches_per_side),
  }


def count_parameters(config: architecture.BagelConfig) -> dict[str, int]:
  """Counts parameters by part; keys are the released prefixes (sin-cos tables included)."""
  fixed = fixed_tables(config)
  counts = {
    name.split(".")[0]: side**2 * width for name, (width, side) in fixed.items()
  }
  for name, shape in expected_shapes(config).items():
    part = name.split(".")[0]
    part = "autoencoder" if part in ("encoder", "decoder") else part
    counts[part] = counts.get(part, 0) + math.prod(shape)
  return counts
