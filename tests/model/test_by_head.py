"""Tests of CPU attention, a row and a head at a time, against `attention.attend`."""

import functools

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model import attention
from r3jax.model import by_head
from r3jax.parallel import meshes
from r3jax.sequence import layouts
from r3jax.sequence import segments

ROWS, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 8
LAYOUT = segments.Layout(
  (
    segments.text("prompt", 5),
    segments.image("siglip", "vit", (2, 3), ("prompt",)),
    segments.text("answer", 12, ("prompt", "siglip")),
    segments.image("draft", "noise", (2, 4), ("prompt", "answer")),
    segments.image("alone", "noise", (2, 2)),
  )
)
SHARED, EVERY_ROW, OWN = ("prompt",), ("siglip",), ("answer", "draft", "alone")
LENGTHS = {
  "prompt": jnp.array([5, 5, 2, 2]),
  "answer": jnp.array([12, 1, 7, 4]),
}
FILLED = segments.filled(LAYOUT, OWN, LENGTHS, ROWS)[:, :, None, None]


@pytest.fixture(params=[0, 2**14], ids=["a block a segment", "one block"])
def blocks(request, monkeypatch):
  """Makes blocks of single segments, or one of all."""
  monkeypatch.setattr(by_head, "_NEGLIGIBLE_PAIRS", request.param)
  by_head._blocks.cache_clear()
  yield
  by_head._blocks.cache_clear()


def _arrays(dtype=jnp.float32):
  """Returns a query, and keys and values of three sources; two rows share the first."""
  rng = np.random.default_rng(0)

  def normal(names, rows, heads):
    slots = len(LAYOUT.slots(names).segment)
    return jnp.asarray(rng.normal(size=(rows, slots, heads, WIDTH)), dtype)

  sources = []
  for names, rows in ((SHARED, 2), (EVERY_ROW, ROWS), (OWN, ROWS)):
    key = normal(names, rows, KV_HEADS)
    value = normal(names, rows, KV_HEADS)
    sources.append((key, value))
  return normal(OWN, ROWS, HEADS), sources


def _attended(attend, query, arrays):
  """Returns the results of slots that hold a token, and zeros."""
  sources = []
  for names, (key, value) in zip((SHARED, EVERY_ROW, OWN), arrays, strict=True):
    mask = segments.mask(LAYOUT, OWN, names, LENGTHS, ROWS)
    sources.append(attention.Source(key, value, mask))
  return jnp.where(FILLED, attend(query, sources), 0)


def _results(attend, query, arrays):
  """Returns the result, and the gradients of a sum over it, as one list."""

  def weighted_sum(query, arrays):
    mixed = _attended(attend, query, arrays)
    wide = mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))
    weights = jnp.cos(jnp.arange(mixed.size, dtype=wide.dtype))
    return jnp.sum(wide * weights.reshape(mixed.shape)), mixed

  run = jax.jit(jax.grad(weighted_sum, argnums=(0, 1), has_aux=True))
  gradients, mixed = run(query, arrays)
  return [mixed, *jax.tree.leaves(gradients)]


@functools.cache
def _expected():
  return _results(attention.attend, *_arrays())


class TestAttend:
  def test_equals_attend_where_a_slot_holds_a_token(self, blocks):
    results = _results(by_head.attend, *_arrays())
    for result, expected in zip(results, _expected(), strict=True):
      np.testing.assert_allclose(result, expected, atol=5e-6)

  def test_computes_float64_in_float64(self):
    with jax.enable_x64(True):
      arrays = _arrays(jnp.float64)
      results = _results(by_head.attend, *arrays)
      others = _results(attention.attend, *arrays)
      for result, expected in zip(results, others, strict=True):
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, expected, atol=1e-13)

  def test_rounds_the_weights_as_attend_does_in_bfloat16(self):
    """Otherwise decoding, which `attend` serves, and scoring disagree by 0.006 in a ratio."""
    query, arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _arrays())
    results = _results(by_head.attend, query, arrays)
    others = _results(attention.attend, query, arrays)
    for result, expected in zip(results, others, strict=True):
      np.testing.assert_array_equal(result, expected)

  def test_compiler_partitions_what_attend_does(self):
    """A loop over rows or heads would gather what the devices of a mesh share."""
    query, arrays = _arrays()
    mesh = meshes.make_mesh_on(jax.devices(), 2, 2, 2)
    rows = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    with jax.set_mesh(mesh):
      query, arrays = jax.device_put((query, arrays), rows)
      programs = []
      for attend in (by_head.attend, attention.attend):
        run = jax.jit(functools.partial(_attended, attend))
        programs.append(run.lower(query, arrays).as_text())
    assert programs[0] == programs[1]

  def test_refuses_whole_masks(self):
    query, ((key, value), *_) = _arrays()
    mask = jnp.ones((ROWS, query.shape[1], key.shape[1]), bool)
    with pytest.raises(TypeError, match="masks in halves"):
      by_head.attend(query, [attention.Source(key, value, mask)])


class TestBlocks:
  def test_meet_the_visible_keys_only(self):
    """An edit of 256x256 pixels has 774 queries and 1390 keys; half of the pairs are hidden."""
    capacities = layouts.Capacities(
      30, 24, 65, 60, 97, 16, latent_grid=(16, 16), vit_grid=(18, 18)
    )
    layout = layouts.refine(capacities)
    sources = (
      ("source", "siglip"),
      ("instruction", "instruction_alone"),
      layouts.EDIT,
    )
    views = tuple(
      segments.View(layout, layouts.EDIT, names) for names in sources
    )
    visible = np.concatenate([view.visible() for view in views], axis=1)
    assert visible.shape == (774, 1390)

    covered = np.zeros_like(visible)
    for block in by_head._blocks(views):
      for slots in block.slots:
        for keys in block.keys:
          assert not covered[slots, keys].any()
          covered[slots, keys] = True
    np.testing.assert_array_equal(covered, visible)
    assert covered.sum() < 0.48 * covered.size

  def test_never_hold_the_scores_of_two_heads(self):
    query, arrays = _arrays()
    slots = query.shape[1]
    keys = sum(key.shape[1] for key, _ in arrays)
    largest = max(slots * keys * HEADS // KV_HEADS, query.size)

    def sizes(jaxpr):
      for equation in jaxpr.eqns:
        for variable in equation.outvars:
          yield variable.aval.size
        for inner in jax_core.jaxprs_in_params(equation.params):
          yield from sizes(inner)

    run = functools.partial(_results, by_head.attend)
    jaxpr = jax.make_jaxpr(run)(query, arrays)
    assert max(sizes(jaxpr.jaxpr)) <= largest
