"""SigLIP vision transformer without its head, on patches of one image size.

See docs/algorithm.md#model.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from r3jax import types
from r3jax.model import architecture
from r3jax.model import layers


def _layer_norm(
  config: architecture.VisionConfig, dtype: types.DType
) -> nn.LayerNorm:
  # The fast variance, E[x²] - E[x]², loses digits by cancellation.
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=dtype,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
  )


class Layer(nn.Module):
  """A pre-norm encoder layer: full attention, then a tanh-GELU MLP; biases everywhere.

  Attributes:
    config: sizes.
    dtype: compute dtype.
  """

  config: architecture.VisionConfig
  dtype: types.DType

  def setup(self):
    """Makes the submodules."""
    c = self.config
    projection = functools.partial(
      layers.Projection, use_bias=True, dtype=self.dtype
    )
    heads = (c.num_heads, c.hidden_size // c.num_heads)
    into_heads = ("vit_embed", "vit_heads", "head_dim")
    out_of_heads = ("vit_heads", "head_dim", "vit_embed")
    self.norm1 = _layer_norm(c, self.dtype)
    self.q = projection(heads, into_heads)
    self.k = projection(heads, into_heads)
    self.v = projection(heads, into_heads)
    self.out = projection((c.hidden_size,), out_of_heads, num_contracted=2)
    self.norm2 = _layer_norm(c, self.dtype)
    self.fc1 = projection((c.intermediate_size,), ("vit_embed", "vit_mlp"))
    self.fc2 = projection((c.hidden_size,), ("vit_mlp", "vit_embed"))

  def __call__(
    self, x: Float[Array, "B N D"], _
  ) -> tuple[Float[Array, "B N D"], None]:
    """Returns the features after the layer, and nothing to stack (the form of a scanned layer)."""
    y = self.norm1(x)
    attended = layers.full_attention(self.q(y), self.k(y), self.v(y))
    x = x + self.out(attended)
    hidden = self.fc1(self.norm2(x))
    x = x + self.fc2(nn.gelu(hidden, approximate=True))
    return x, None


class VisionTransformer(nn.Module):
  """Maps the patches of images to features, the last layer norm included.

  Attributes:
    config: sizes.
    dtype: compute dtype.
  """

  config: architecture.VisionConfig
  dtype: types.DType = jnp.float32

  def setup(self):
    """Makes the submodules."""
    c = self.config
    self.patch_embedding = layers.Projection(
      (c.hidden_size,), ("patch", "vit_embed"), use_bias=True, dtype=self.dtype
    )
    self.position_embedding = nn.Embed(
      c.positions_per_side**2,
      c.hidden_size,
      dtype=self.dtype,
      embedding_init=nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ("vit_positions", "vit_embed")
      ),
    )
    stack = nn.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    self.layers = stack(c, self.dtype)
    self.post_norm = _layer_norm(c, self.dtype)

  def __call__(
    self, patches: types.Patches, position_ids: Int[Array, " N"]
  ) -> Float[Array, "B N D"]:
    """Encodes images of one size; attention is full inside each image.

    Args:
      patches: [B, N, p] `layers.patchify` of pixels in [-1, 1].
      position_ids: [N] `layers.grid_positions(rows, columns, config.positions_per_side)`.

    Returns:
      [B, N, hidden_size] features.
    """
    positions = self.position_embedding(jnp.asarray(position_ids))
    x = self.patch_embedding(patches) + positions
    x, _ = self.layers(x, None)
    return self.post_norm(x)
