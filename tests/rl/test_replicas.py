"""Tests of who holds what: checks, keys and gathers over 1 to 8 replicas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.rl import placement

GROUPS, GROUP_SIZE = 2, 8
REPLICAS = (1, 2, 4, 8)
SPEC = jax.sharding.PartitionSpec
SHARED, SPLIT = SPEC(), SPEC(placement.AXIS)


@functools.cache
def _mapped(method, replicas: int, out_specs, groups: int = GROUPS):
  """Maps `method(place, argument)` over replicas."""
  if len(jax.devices()) < replicas:
    pytest.skip(f"needs {replicas} devices; got {len(jax.devices())}")
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:replicas]), (placement.AXIS,)
  )
  body = functools.partial(
    method, placement.Placement(groups, GROUP_SIZE, replicas)
  )
  return jax.jit(
    jax.shard_map(
      body, mesh=mesh, in_specs=SHARED, out_specs=out_specs, check_vma=False
    )
  )


def _key_data(place, key):
  """Returns the keys of two stages: of every sample, and of every sample's group."""
  found = []
  for stage, turn in (("reason", 0), ("refine", 1)):
    keys = place.keys(key, stage, turn)
    found += [
      jax.random.key_data(keys.sample),
      jax.random.key_data(place.repeat(keys.group)),
    ]
  return jnp.stack(found, axis=1)


STEPS = 3


def _drawn_from(place, key):
  """Returns the keys that the stages of an iteration draw from, as `rollout.py` derives them."""

  def data(keys):
    return jax.random.key_data(keys).reshape(-1, 2)

  def noise(keys):  # initial noise, SDE index
    return data(jax.vmap(jax.random.split)(keys.group))

  def step(keys):
    def steps_of(key):
      return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(STEPS))

    return data(jax.vmap(steps_of)(keys.sample))

  text, flow = random_keys.split_keys(place.keys(key, "reason"))
  reflect, refine = place.keys(key, "reflect"), place.keys(key, "refine")
  pool = jax.vmap(lambda k: jax.random.fold_in(k, 0))(reflect.group)
  parts = [
    data(text.sample),
    noise(flow),
    step(flow),
    data(pool),
    data(reflect.sample),
    noise(refine),
    step(refine),
  ]
  return jnp.concatenate(parts)


class TestCheck:
  @pytest.mark.parametrize(
    "groups, replicas", [(1, 4), (2, 8), (4, 2), (3, 3), (8, 8)]
  )
  def test_accepts_an_even_split(self, groups, replicas):
    placement.check(groups, GROUP_SIZE, replicas, 1)

  def test_refuses_a_rest(self):
    with pytest.raises(
      ValueError, match=r"\(2 \* 8\) must be divisible .* \(3\)"
    ):
      placement.check(2, 8, 3, 1)

  def test_refuses_replicas_with_parts_of_several_groups(self):
    with pytest.raises(ValueError, match=r"groups_per_step \(3\) .* \(2\)"):
      placement.check(3, 8, 2, 1)

  def test_refuses_more_replicas_than_samples(self):
    with pytest.raises(ValueError, match="must be divisible"):
      placement.check(1, 2, 4, 1)

  def test_refuses_micro_batches_that_do_not_divide(self):
    placement.check(6, 8, 1, 12)  # sixths of the groups, halves of each
    with pytest.raises(
      ValueError,
      match=r"step.micro_batches \(4\) must split .* \(3 groups of 6\)",
    ):
      placement.check(3, 6, 1, 4)


class TestPlacement:
  @pytest.mark.parametrize(
    "groups, replicas, rows, samples, local_groups",
    [(2, 1, 16, 8, 2), (2, 2, 8, 8, 1), (2, 4, 4, 4, 1), (4, 2, 16, 8, 2)],
  )
  def test_counts_its_share(
    self, groups, replicas, rows, samples, local_groups
  ):
    place = placement.Placement(groups, GROUP_SIZE, replicas)
    assert (
      place.num_rows,
      place.samples_per_group,
      place.num_local_groups,
    ) == (
      rows,
      samples,
      local_groups,
    )

  @pytest.mark.parametrize(
    "number, expected",
    [
      (1, [[[0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]]),
      (2, [[[0], [0, 1, 2, 3]], [[1], [4, 5, 6, 7]]]),
      (4, [[[0], [0, 1]], [[0], [2, 3]], [[1], [4, 5]], [[1], [6, 7]]]),
    ],
  )
  def test_micro_batches_are_groups_or_parts_of_them(self, number, expected):
    place = placement.Placement(2, 4, 1)
    groups, samples = place.micro_batches(jnp.arange(2), jnp.arange(8), number)
    assert [
      list(part) for part in zip(groups.tolist(), samples.tolist())
    ] == expected

  def test_micro_batch_may_hold_parts_of_several_groups(self):
    groups, samples = placement.Placement(3, 4, 1).micro_batches(
      jnp.arange(3), jnp.arange(12), 2
    )
    assert groups.tolist() == [[0, 1, 2]] * 2
    assert samples.tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]

  def test_sources_of_samples_are_cut_like_the_samples(self):
    place = placement.Placement(3, 4, 1)
    sources, samples = place.micro_batches(jnp.arange(12), jnp.arange(12), 2)
    assert sources.tolist() == samples.tolist()


class TestKeys:
  @pytest.mark.parametrize("groups", [1, 2])
  def test_do_not_depend_on_the_replicas(self, groups):
    key = jax.random.key(3)
    expected = _mapped(_key_data, 1, SPLIT, groups)(key)
    for replicas in REPLICAS[1:]:
      np.testing.assert_array_equal(
        _mapped(_key_data, replicas, SPLIT, groups)(key), expected
      )

  def test_are_all_different(self):
    # [B, 4, words]
    found = np.asarray(_mapped(_key_data, 1, SPLIT)(jax.random.key(3)))
    samples, groups = found[:, [0, 2]], found[::GROUP_SIZE, [1, 3]]
    keys = np.concatenate(
      [
        samples.reshape(-1, found.shape[-1]),
        groups.reshape(-1, found.shape[-1]),
      ]
    )
    assert len(np.unique(keys, axis=0)) == len(keys)

  def test_what_is_drawn_from_is_never_drawn_from_twice(self):
    """Splitting and folding make equal children of a parent: what is drawn from counts."""
    drawn = np.asarray(_mapped(_drawn_from, 1, SHARED)(jax.random.key(3)))
    assert (
      len(drawn)
      == 2 * GROUPS * (2 + GROUP_SIZE * STEPS)
      + 2 * GROUPS * GROUP_SIZE
      + GROUPS
    )
    assert len(np.unique(drawn, axis=0)) == len(drawn)

  def test_a_group_shares_its_key(self):
    found = np.asarray(_mapped(_key_data, 1, SPLIT)(jax.random.key(3)))
    by_group = found[:, [1, 3]].reshape(GROUPS, GROUP_SIZE, -1)
    np.testing.assert_array_equal(
      by_group, np.repeat(by_group[:, :1], GROUP_SIZE, axis=1)
    )


def _round_trip(place, values):
  """Takes this replica's rows, gathers them by group and takes them again."""
  rows = jax.lax.dynamic_slice_in_dim(values, place.first_row(), place.num_rows)
  by_group = place.by_group(rows)
  return by_group, place.local_rows(by_group), place.gather(rows)


def _prompt_index(place, index):
  prompts = experience.Prompts(*([index] * 6))
  return place.repeat(place.local_prompts(prompts).index)


class TestGather:
  @pytest.mark.parametrize("replicas", REPLICAS)
  def test_returns_all_rows_in_sample_order(self, replicas):
    values = jnp.arange(GROUPS * GROUP_SIZE * 2.0).reshape(-1, 2)
    mapped = _mapped(_round_trip, replicas, (SHARED, SPLIT, SHARED))
    by_group, rows, gathered = mapped(values)
    np.testing.assert_array_equal(
      by_group, values.reshape(GROUPS, GROUP_SIZE, 2)
    )
    np.testing.assert_array_equal(rows, values)
    np.testing.assert_array_equal(gathered, values)


class TestLocalPrompts:
  @pytest.mark.parametrize("replicas", REPLICAS)
  def test_are_those_of_the_samples(self, replicas):
    found = _mapped(_prompt_index, replicas, SPLIT)(jnp.array([30, 40]))
    np.testing.assert_array_equal(found, np.repeat([30, 40], GROUP_SIZE))
