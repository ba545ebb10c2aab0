"""Classifier-free guidance with BAGEL's three renorms (docs/algorithm.md#guidance)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types

_RENORMS = ("global", "channel", "text_channel")
_EPSILON = 1e-8  # keeps the renorm finite where the guided velocity is 0


@dataclasses.dataclass(frozen=True)
class Guidance:
  """How the branches of a velocity are combined.

  Attributes:
    text_scale: s_t; at 1 nothing is guided.
    image_scale: s_i; at 1 there is no branch without the image.
    renorm: "global", "channel" or "text_channel".
    renorm_min: lower bound of the factor |v| / |guided|, which is at most 1.
    interval: (low, high); guidance acts where low < t <= high.
  """

  text_scale: float
  image_scale: float
  renorm: str
  renorm_min: float = 0.0
  interval: tuple[float, float] = (0.4, 1.0)

  def __post_init__(self):
    if self.renorm not in _RENORMS:
      raise ValueError(
        f"renorm must be global, channel or text_channel; got {self.renorm!r}"
      )

  @property
  def uses_text(self) -> bool:
    """Whether any step is guided (image guidance alone does nothing, as in the reference)."""
    return self.text_scale > 1

  @property
  def uses_image(self) -> bool:
    """Whether the branch without the image is needed."""
    return self.uses_text and self.image_scale > 1

  def active(self, t: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Returns whether guidance acts at times t, bool, in numpy or JAX as t is.

    Time and bounds are compared in float32, whatever the dtype of t: sampling asks about the times
    of its schedule, which are float64, and the loss about recorded ones.
    """
    low, high = (np.float32(bound) for bound in self.interval)
    t = t.astype(np.float32)
    return (t > low) & (t <= high) & self.uses_text


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the Euclidean norm over `axes`, which stay with size 1."""
  squares = jnp.sum(x * x, axis=axes, keepdims=True)
  # The root has no gradient at 0.
  return jnp.sqrt(jnp.maximum(squares, jnp.finfo(x.dtype).tiny))


def _renormed(
  guided: types.Latent,
  velocity: types.Latent,
  axes: tuple[int, ...],
  renorm_min: float,
) -> types.Latent:
  """Shrinks the guided velocity to the norm of the unguided one, by at most `renorm_min`."""
  factor = _norm(velocity, axes) / (_norm(guided, axes) + _EPSILON)
  return guided * jnp.clip(factor, renorm_min, 1.0)


def combine(
  guidance: Guidance,
  velocity: types.Latent,
  without_text: types.Latent,
  without_image: types.Latent | None = None,
) -> types.Latent:
  """Combines the branches of one step.

    a = u + s_t (v - u)
    text_channel:     w + s_i (renorm(a) - w)
    global, channel:  renorm(w + s_i (a - w))

  The renorm is over tokens and channels ("global") or over channels (the others). Source:
  docs/algorithm.md#guidance.

  Args:
    guidance: scales and renorm.
    velocity: v [B, N, C], full context.
    without_text: u [B, N, C].
    without_image: w [B, N, C]; None where there is no image guidance.

  Returns:
    The guided velocity, [B, N, C].
  """
  # The letters of the formula.
  v = velocity
  u = without_text
  w = without_image
  a = u + guidance.text_scale * (v - u)
  if guidance.renorm == "text_channel":
    a = _renormed(a, v, (-1,), guidance.renorm_min)
  if w is not None:
    a = w + guidance.image_scale * (a - w)
  if guidance.renorm == "text_channel":
    return a
  axes = (-2, -1) if guidance.renorm == "global" else (-1,)
  return _renormed(a, v, axes, guidance.renorm_min)


def combine_where_active(
  guidance: Guidance, t: types.Time, branches: tuple[types.Latent, ...]
) -> types.Latent:
  """Combines the branches of the rows whose time is guided; the others keep v.

  Args:
    guidance: scales, renorm and interval.
    t: [B] in [0, 1].
    branches: v, u and, with image guidance, w; each [B, N, C].

  Returns:
    The velocity, [B, N, C].
  """
  active = guidance.active(t)[:, None, None]
  return jnp.where(active, combine(guidance, *branches), branches[0])
