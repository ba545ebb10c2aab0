"""Compiled passes of the golden model."""

from collections.abc import Mapping, Sequence
import functools

import jax

from r3jax import types
from r3jax.model import network
from r3jax.parity import goldens
from r3jax.sequence import segments

Golden = goldens.Golden


def run(
  golden: Golden,
  layout: segments.Layout,
  inputs: Mapping[str, network.SegmentInput],
  lengths: Mapping[str, types.Lengths],
  past: Sequence[network.Cache] = (),
) -> network.Output:
  """Runs segments through the policy, see `network.Bagel.__call__`."""
  # Names and values apart: as a dict, a compiled function would sort the segments.
  names = tuple(inputs)
  values = tuple(inputs.values())
  return _run(
    golden, golden.policy, layout, names, values, dict(lengths), tuple(past)
  )


@functools.partial(jax.jit, static_argnames=("golden", "layout", "names"))
def _run(golden, policy, layout, names, values, lengths, past):
  inputs = dict(zip(names, values, strict=True))
  return golden.bagel.apply({"params": policy}, layout, inputs, lengths, past)


def read(golden: Golden, hidden: jax.Array, method: str) -> jax.Array:
  """Returns the "logits" or the "velocity" of final hidden states."""
  return _read(golden, golden.policy, hidden, method)


@functools.partial(jax.jit, static_argnames=("golden", "method"))
def _read(golden, policy, hidden, method):
  return golden.bagel.apply({"params": policy}, hidden, method=method)


@functools.partial(jax.jit, static_argnames=("golden", "layout", "names"))
def velocities(
  golden: Golden,
  policy: types.Params,
  layout: segments.Layout,
  names: tuple[str, ...],
  latent: jax.Array,
  t: jax.Array,
  lengths: Mapping[str, types.Lengths],
  past: Sequence[network.Cache],
) -> tuple[jax.Array, ...]:
  """Returns the velocities [B, N, C] of the named noise segments, each fed the same latent."""
  inputs = dict.fromkeys(names, network.Noised(latent, t))
  variables = {"params": policy}
  output = golden.bagel.apply(variables, layout, inputs, lengths, past)
  return tuple(
    golden.bagel.apply(variables, output.latent(name), method="velocity")
    for name in names
  )


def decode(
  golden: Golden, latent: jax.Array, size: tuple[int, int]
) -> jax.Array:
  """Returns the 8-bit images of latent tokens."""
  return _decode(golden, golden.frozen, latent, size)


@functools.partial(jax.jit, static_argnames=("golden", "size"))
def _decode(golden, frozen, latent, size):
  images, _ = golden.towers(size).decode(frozen, latent)
  return images


def look(golden: Golden, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the ViT features and the clean latents of 8-bit images."""
  return _look(golden, golden.frozen, images)


@functools.partial(jax.jit, static_argnames="golden")
def _look(golden, frozen, images):
  towers = golden.towers(images.shape[1:3])
  return towers.features(frozen, images), towers.encode(frozen, images)
