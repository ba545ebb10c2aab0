"""Tests of evaluation/chains.py: what is drawn does not depend on batches or devices."""

import functools

import jax
import numpy as np
import pytest

from r3jax import types
from r3jax.evaluation import chains
from r3jax.parallel import meshes
from r3jax.rewards.from_host import scorer
from r3jax.run import stage_settings
from tests import tiny

ONE = (1, 1, 1)


@pytest.fixture(scope="module")
def bench(tiny_model):
  return tiny.make_bench(tiny_model)


@pytest.fixture(scope="module")
def sampler_of(bench):
  """Samplers by (mesh, batch size)."""
  session = bench.session
  settings = stage_settings.for_evaluation(session.config, bench.stages.rollout)

  @functools.cache
  def sampler(shape: tuple[int, int, int], batch_size: int) -> chains.Sampler:
    mesh = meshes.make_mesh_on(jax.devices()[: np.prod(shape)], *shape)
    return chains.Sampler(
      bench.stages.modules,
      settings,
      tiny.brightness,
      bench.stages.parse,
      mesh,
      3,
      batch_size,
      1,
      never_stop=True,
    )

  return sampler


@pytest.fixture(scope="module")
def rounds_of(bench, sampler_of):
  """Rounds of the held-out prompts by (mesh, batch size)."""
  session = bench.session

  @functools.cache
  def rounds(
    shape: tuple[int, int, int], batch_size: int
  ) -> list[chains.Round]:
    sampler = sampler_of(shape, batch_size)
    policy, towers = session.experiment.load(sampler.mesh)
    with jax.set_mesh(sampler.mesh):
      return tiny.draw(sampler, policy, towers, session.evaluation.prompts, 1)

  return rounds


def _assert_equal_rows(first, second, rows: np.ndarray):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[rows], b[rows]), first, second
  )


class TestNotFinite:
  def test_image_has_no_score(self, bench, sampler_of):
    """It was black, and its score was a 0 that counted."""
    sampler = sampler_of(ONE, 6)
    session = bench.session
    policy, towers = session.experiment.load(sampler.mesh)
    kernel = policy["llm2vae"]["kernel"]
    policy["llm2vae"]["kernel"] = kernel.at[0, 0].set(np.inf)
    with jax.set_mesh(sampler.mesh):
      rounds = tiny.draw(sampler, policy, towers, session.evaluation.prompts, 1)
    for result in rounds:
      assert not result.kept.score.valid.any()
      assert not result.chain.score.valid.any()


class TestSampler:
  @pytest.mark.parametrize(
    "shape, batch_size",
    [
      (ONE, 3),
      pytest.param((2, 1, 1), 6, marks=pytest.mark.slow),
      ((8, 1, 1), 8),
      ((2, 2, 2), 8),
    ],
  )
  def test_results_do_not_depend_on_batch_or_devices(
    self, rounds_of, shape, batch_size
  ):
    for found, expected in zip(
      rounds_of(shape, batch_size), rounds_of(ONE, 6), strict=True
    ):
      np.testing.assert_array_equal(found.text.ids, expected.text.ids)
      np.testing.assert_array_equal(found.stop, expected.stop)
      np.testing.assert_array_equal(found.format, expected.format)
      for ours, theirs in (
        (found.kept, expected.kept),
        (found.chain, expected.chain),
      ):
        assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
        # a few pixels by a level
        np.testing.assert_allclose(
          ours.score.value, theirs.score.value, rtol=0, atol=2e-3
        )

  def test_finished_samples_keep_image_and_score(self, rounds_of):
    rounds = rounds_of(ONE, 6)
    assert not rounds[0].stop.any()
    assert rounds[-1].stop.any() and not rounds[-1].stop.all()
    for before, after in zip(rounds, rounds[1:]):
      np.testing.assert_array_equal(after.stop, before.stop | after.says_stop)
      _assert_equal_rows(before.kept, after.kept, after.stop)

  def test_chain_goes_on_where_nothing_has_stopped_as_what_is_kept_and_elsewhere_too(
    self, rounds_of
  ):
    rounds = rounds_of(ONE, 6)
    for one in rounds:
      _assert_equal_rows(one.kept, one.chain, ~one.stop)
    before, after = rounds[-2], rounds[-1]
    assert (
      (after.chain.images != before.chain.images)[after.stop]
      .any(axis=(1, 2, 3))
      .all()
    )

  def test_only_images_that_are_kept_are_scored(self, bench, rounds_of):
    scored = []

    def reward(images, target):
      del target
      scored.extend(images)
      beyond = (images[..., 0].astype(int) - tiny.LEAST[48]).sum((1, 2))
      value = np.clip(beyond / tiny.RANGE, 0, 1).astype(np.float32)
      strict = (value == 1).astype(np.float32)
      return types.Score(value, np.ones(len(value), bool), {"strict": strict})

    session = bench.session
    sampler = chains.Sampler(
      bench.stages.modules,
      session.evaluation.sampler.settings,
      scorer.reward_from_host(reward, ("strict",), bench.mesh),
      bench.stages.parse,
      bench.mesh,
      rounds=3,
      batch_size=8,
      seed=1,
    )
    policy, towers = session.experiment.load(bench.mesh)
    with jax.set_mesh(bench.mesh):
      rounds = tiny.draw(sampler, policy, towers, session.evaluation.prompts, 1)
    # What would be scored without the stops: 3 rounds of 8 rows, 2 of which fill the batch.
    num_kept = sum(int((~drawn.stop).sum()) for drawn in rounds)
    assert len(scored) == num_kept < 3 * 6 < 3 * 8
    # Sample by sample the same as where chains never stop.
    for ours, theirs in zip(rounds, rounds_of(ONE, 6), strict=True):
      assert ours.chain is None
      np.testing.assert_array_equal(ours.stop, theirs.stop)
      images = theirs.kept.images.astype(int)
      assert np.abs(ours.kept.images - images).max() <= 1
      np.testing.assert_allclose(
        ours.kept.score.value, theirs.kept.score.value, rtol=0, atol=2e-3
      )

  @pytest.mark.parametrize("never_stop, num_revisions", [(False, 1), (True, 3)])
  def test_nothing_is_drawn_after_the_last_stop(
    self, bench, never_stop, num_revisions
  ):
    sampler = chains.Sampler(
      None,
      None,
      None,
      None,
      bench.mesh,
      rounds=4,
      batch_size=3,
      seed=1,
      never_stop=never_stop,
    )
    revised = []

    def drawn(stop) -> chains.Round:
      state = chains.ChainState(kept=None, chain=None, stop=np.array(stop))
      return chains.Round(state, None, None, None, None)

    def draft(*arguments) -> chains.Round:
      return drawn([False, False, False])

    def revise(*arguments) -> chains.Round:
      revised.append(arguments)
      # The third row fills the batch, and nobody waits for it.
      return drawn([True, True, False])

    sampler._programs.update(draft=draft, revise=revise)
    prompts = jax.tree.map(lambda x: x[:3], bench.session.prompts)
    rounds = sampler.run(None, None, prompts, [0, 0, 0], count=2)
    assert len(revised) == num_revisions
    counts = revised[0][-2]
    assert counts.tolist() == [True, True, False]
    idle = rounds[1 + num_revisions :]
    assert len(rounds) == 4
    assert all(timed.seconds == 0 for timed in idle)
    assert all(timed.round.stop[:2].all() for timed in rounds[1:])

  def test_keys_differ_by_image_and_round(self, bench):
    sampler = chains.Sampler(
      bench.stages.modules,
      bench.stages.rollout,
      tiny.brightness,
      bench.stages.parse,
      bench.mesh,
      2,
      4,
      1,
    )
    keys = sampler._keys(np.array([[3, 0, 0], [3, 1, 0], [3, 0, 1], [3, 0, 0]]))
    group = jax.random.key_data(keys.group)
    assert len(np.unique(group, axis=0)) == 3
    np.testing.assert_array_equal(group[0], group[3])

  def test_batch_that_does_not_divide_is_refused(self, bench):
    mesh = meshes.make_mesh_on(jax.devices()[:2], 2, 1, 1)
    with pytest.raises(
      ValueError, match=r"eval.batch_size \(3\) must be divisible by .* \(2\)"
    ):
      chains.Sampler(None, None, None, None, mesh, 2, 3, 1)


class TestBatches:
  def test_last_one_repeats_its_last_row(self):
    found = list(chains.batches([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)], 3))
    assert [(batch.tolist(), number) for batch, number in found] == [
      ([[0, 0], [0, 1], [1, 0]], 3),
      ([[1, 1], [2, 0], [2, 0]], 2),
    ]

  def test_nothing_is_no_batch(self):
    assert not list(chains.batches([], 3))
