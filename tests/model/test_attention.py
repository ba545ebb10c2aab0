"""Tests of attention over several sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model import attention

ROWS, SLOTS, HEADS, KV_HEADS, WIDTH = 4, 3, 4, 2, 8


def _normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _source(seed: int, slots: int, rows: int = ROWS) -> attention.Source:
  """Returns a random source; every query slot sees its first key."""
  entry = (rows, slots, KV_HEADS, WIDTH)
  mask = np.random.default_rng(seed + 2).random((ROWS, SLOTS, slots)) < 0.5
  mask[:, :, 0] = True
  return attention.Source(
    *(
      jnp.asarray(x)
      for x in (_normal(seed, *entry), _normal(seed + 1, *entry), mask)
    )
  )


QUERY = jnp.asarray(_normal(99, ROWS, SLOTS, HEADS, WIDTH))


def _dense(query, key, value, mask) -> np.ndarray:
  """Attends row by row, head by head, in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros(query.shape)
  for row, head in np.ndindex(query.shape[0], query.shape[2]):
    kv_head = head // (HEADS // KV_HEADS)
    scores = query[row, :, head] @ key[row, :, kv_head].T / np.sqrt(WIDTH)
    weights = np.exp(scores) * np.asarray(mask[row])
    out[row, :, head] = (
      weights @ value[row, :, kv_head] / weights.sum(axis=1, keepdims=True)
    )
  return out


def _joined(*sources: attention.Source) -> attention.Source:
  def repeat(x):
    return jnp.repeat(x, ROWS // x.shape[0], axis=0)

  def join(name, axis):
    return jnp.concatenate(
      [repeat(getattr(s, name)) for s in sources], axis=axis
    )

  return attention.Source(join("key", 1), join("value", 1), join("mask", 2))


class TestAttend:
  def test_equals_dense_attention_with_shared_key_heads(self):
    source = _source(0, 5)
    expected = _dense(QUERY, source.key, source.value, source.mask)
    np.testing.assert_allclose(
      attention.attend(QUERY, [source]), expected, atol=1e-5
    )

  def test_several_sources_equal_one(self):
    sources = [_source(0, 5), _source(10, 2), _source(20, 3)]
    joined = attention.attend(QUERY, [_joined(*sources)])
    np.testing.assert_allclose(
      attention.attend(QUERY, sources), joined, atol=1e-6
    )

  @pytest.mark.parametrize("rows", [1, 2])
  def test_shared_rows_equal_repeated_rows(self, rows):
    sources = [_source(0, 5, rows), _source(10, 2)]
    repeated = attention.attend(QUERY, [_joined(*sources)])
    np.testing.assert_allclose(
      attention.attend(QUERY, sources), repeated, atol=1e-6
    )

  def test_long_query_in_blocks_equals_the_whole(self, monkeypatch):
    sources = [_source(0, 5, 2), _source(10, 2)]

    def energy(q):
      return jnp.sum(attention.attend(q, sources) ** 2)

    whole, gradient = attention.attend(QUERY, sources), jax.grad(energy)(QUERY)
    monkeypatch.setattr(attention, "_BLOCK", 1)
    np.testing.assert_allclose(
      attention.attend(QUERY, sources), whole, atol=1e-6
    )
    np.testing.assert_allclose(jax.grad(energy)(QUERY), gradient, atol=1e-5)

  def test_does_not_read_masked_values(self):
    source = _source(0, 5)
    unseen = ~source.mask.any(axis=1)[:, :, None, None]
    assert unseen.any()
    other = attention.Source(
      *(jnp.where(unseen, 1e3, x) for x in (source.key, source.value)),
      source.mask,
    )
    found, expected = (attention.attend(QUERY, [s]) for s in (other, source))
    np.testing.assert_array_equal(found, expected)

  def test_a_slot_that_sees_nothing_gets_the_mean(self):
    source = _source(0, 5)
    blind = attention.Source(
      source.key, source.value, jnp.zeros_like(source.mask)
    )
    found = attention.attend(QUERY, [blind])
    mean = np.repeat(source.value.mean(axis=1), HEADS // KV_HEADS, axis=1)
    np.testing.assert_allclose(
      found, np.broadcast_to(mean[:, None], found.shape), atol=1e-6
    )

  def test_gradient_is_finite_for_a_slot_that_sees_nothing(self):
    source = _source(0, 5)
    blind = jnp.zeros_like(source.mask)

    def energy(q, k, v):
      return jnp.sum(attention.attend(q, [attention.Source(k, v, blind)]) ** 2)

    for gradient in jax.grad(energy, argnums=(0, 1, 2))(
      QUERY, source.key, source.value
    ):
      assert bool(jnp.isfinite(gradient).all())

  def test_softmax_is_float32_for_bfloat16(self):
    def narrow(x):
      return x.astype(jnp.bfloat16)

    source = _source(0, 64)
    found = attention.attend(
      narrow(QUERY),
      [attention.Source(narrow(source.key), narrow(source.value), source.mask)],
    )
    assert found.dtype == jnp.bfloat16
    wide = (
      narrow(x).astype(jnp.float32) for x in (QUERY, source.key, source.value)
    )
    expected = _dense(*wide, source.mask)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02)

  def test_adds_sources_up_in_float32(self):
    """The relative error of four bfloat16 sources is that of one: 0.0022, formerly 0.0033."""
    rng = np.random.default_rng(0)
    num_keys = 64
    query = 2 * rng.normal(size=(1, num_keys, HEADS, WIDTH))
    key, value = 2 * rng.normal(size=(2, 1, num_keys, KV_HEADS, WIDTH))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    query, key, value = narrow
    sources = []
    for start in range(0, num_keys, 16):
      part = slice(start, start + 16)
      mask = jnp.ones((1, num_keys, 16), bool)
      sources.append(attention.Source(key[:, part], value[:, part], mask))
    mixed = attention.attend(query, sources)
    assert mixed.dtype == jnp.bfloat16
    expected = _dense(*narrow, np.ones((1, num_keys, num_keys), bool))
    error = np.linalg.norm(np.asarray(mixed, np.float64) - expected)
    assert error / np.linalg.norm(expected) < 0.0026

  def test_rounds_a_float32_query_to_the_dtype_of_the_keys(self):
    source = _source(0, 5)
    key = source.key.astype(jnp.bfloat16)
    value = source.value.astype(jnp.bfloat16)
    narrow = attention.Source(key, value, source.mask)
    mixed = attention.attend(QUERY, [narrow])
    assert mixed.dtype == jnp.bfloat16
    rounded = attention.attend(QUERY.astype(jnp.bfloat16), [narrow])
    np.testing.assert_array_equal(mixed, rounded)
