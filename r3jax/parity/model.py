"""The golden model at work: compiled passes over segments, and the inputs of the cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.model import network
from r3jax.parity import goldens
from r3jax.sequence import segments

Golden = goldens.Golden


@functools.partial(jax.jit, static_argnames=("golden", "layout", "names"))
def _run(golden, policy, layout, names, values, lengths, past):
  return golden.bagel.apply(
    {"params": policy}, layout, dict(zip(names, values)), lengths, past
  )


def run(
  golden: Golden, layout: segments.Layout, inputs, lengths, past=()
) -> network.Output:
  """Runs segments through the policy."""
  values = tuple(inputs.values())
  return _run(
    golden,
    golden.policy,
    layout,
    tuple(inputs),
    values,
    dict(lengths),
    tuple(past),
  )


@functools.partial(jax.jit, static_argnames=("golden", "method"))
def _read(golden, policy, hidden, method):
  return golden.bagel.apply({"params": policy}, hidden, method=method)


def read(golden: Golden, hidden: jax.Array, method: str) -> jax.Array:
  """Reads "logits" or "velocity" off final hidden states."""
  return _read(golden, golden.policy, hidden, method)


@functools.partial(jax.jit, static_argnames=("golden", "layout", "names"))
def velocities(
  golden: Golden, policy, layout, names, latent, t, lengths, past
) -> tuple[jax.Array, ...]:
  """Returns the velocities [B, N, C] of the named noise segments, each fed the same latent."""
  noised = network.Noised(latent, t)
  output = golden.bagel.apply(
    {"params": policy}, layout, dict.fromkeys(names, noised), lengths, past
  )
  read_one = lambda name: golden.bagel.apply(
    {"params": policy}, output.latent(name), method="velocity"
  )
  return tuple(read_one(name) for name in names)


@functools.partial(jax.jit, static_argnames=("golden", "size"))
def _decode(golden, frozen, latent, size):
  return golden.towers(size).decode(frozen, latent)


def decode(
  golden: Golden, latent: jax.Array, size: tuple[int, int]
) -> jax.Array:
  """Returns the 8-bit images of latent tokens."""
  return _decode(golden, golden.frozen, latent, size)


@functools.partial(jax.jit, static_argnames="golden")
def _look(golden, frozen, images):
  towers = golden.towers(images.shape[1:3])
  return towers.features(frozen, images), towers.encode(frozen, images)


def look(golden: Golden, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the ViT features and the clean latents of 8-bit images."""
  return _look(golden, golden.frozen, images)


# Inputs of the cases.


def padded(
  rows: list[np.ndarray], capacity: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns ids [B, capacity] and lengths [B] of text segments."""
  capacity = capacity or max(len(row) for row in rows)
  ids = np.zeros((len(rows), capacity), np.int32)
  for row, target in zip(rows, ids):
    target[: len(row)] = row
  return jnp.asarray(ids), jnp.asarray([len(row) for row in rows], jnp.int32)


def numbered(golden: Golden, case: str, array: str) -> list[np.ndarray]:
  """Returns the arrays `array`_0, `array`_1, ..."""
  arrays, rows = golden.arrays(case), []
  while f"{array}_{len(rows)}" in arrays:
    rows.append(arrays[f"{array}_{len(rows)}"])
  return rows


def texts(
  golden: Golden, case: str, array: str, extra: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Returns ids and lengths of numbered texts, with `extra` empty slots."""
  rows = numbered(golden, case, array)
  return padded(rows, max(map(len, rows)) + extra)


def images(golden: Golden, case: str) -> jax.Array:
  """Returns the case's 8-bit images, [B, H, W, 3]."""
  return jnp.asarray(np.stack(numbered(golden, case, "image")))


def packed(x: jax.Array) -> np.ndarray:
  """Returns [B, N, C] as [B * N, C]."""
  return np.asarray(x).reshape(-1, x.shape[-1])


def unpacked(tokens: np.ndarray, rows: int) -> jax.Array:
  """Returns [B * N, C] as [B, N, C]."""
  return jnp.asarray(tokens.reshape(rows, -1, *tokens.shape[1:]))


def filled(hidden: jax.Array, lengths: jax.Array) -> np.ndarray:
  """Returns the filled slots of all rows [B, T, ...], one row after another."""
  return np.concatenate(
    [np.asarray(row)[:length] for row, length in zip(hidden, lengths)]
  )
