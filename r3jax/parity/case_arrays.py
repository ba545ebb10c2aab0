"""Recorded arrays as r3jax reads them, and computed ones in the recorded order."""

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.parity import goldens

Golden = goldens.Golden


def numbered(golden: Golden, case: str, array: str) -> list[np.ndarray]:
  """Returns the arrays `array`_0, `array`_1, ... of a case."""
  arrays = golden.arrays(case)
  rows = []
  while f"{array}_{len(rows)}" in arrays:
    rows.append(arrays[f"{array}_{len(rows)}"])
  return rows


def padded(
  rows: list[np.ndarray], capacity: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns ids [B, capacity] and lengths [B] of texts; without a capacity the longest fits."""
  lengths = [len(row) for row in rows]
  ids = np.zeros((len(rows), capacity or max(lengths)), np.int32)
  for row, slots in zip(rows, ids, strict=True):
    slots[: len(row)] = row
  return jnp.asarray(ids), jnp.asarray(lengths, jnp.int32)


def texts(
  golden: Golden, case: str, array: str, num_empty: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Returns ids [B, T] and lengths [B] of numbered texts; `num_empty` slots stay empty."""
  rows = numbered(golden, case, array)
  longest = max(len(row) for row in rows)
  return padded(rows, longest + num_empty)


def images(golden: Golden, case: str) -> jax.Array:
  """Returns the case's 8-bit images, [B, h, w, 3]."""
  return jnp.asarray(np.stack(numbered(golden, case, "image")))


def packed(x: jax.Array) -> np.ndarray:
  """Returns [B, N, C] as [B * N, C]."""
  return np.asarray(x).reshape(-1, x.shape[-1])


def unpacked(tokens: np.ndarray, rows: int) -> jax.Array:
  """Returns [B * N, C] as [B, N, C]."""
  return jnp.asarray(tokens.reshape(rows, -1, *tokens.shape[1:]))


def filled(hidden: jax.Array, lengths: jax.Array) -> np.ndarray:
  """Returns the slots of [B, T, ...] that hold a token, one row after another."""
  rows = [
    np.asarray(row)[:length]
    for row, length in zip(hidden, lengths, strict=True)
  ]
  return np.concatenate(rows)
