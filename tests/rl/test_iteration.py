"""Tests of the whole iteration: on-policy ratios, split against fused, meshes, host rewards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax import types
from r3jax.model import parameters
from r3jax.rewards.from_host import scorer
from r3jax.rl import mapped
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from tests import documented
from tests import tiny

# What the runs on several meshes differ in from `tiny.SETTINGS`.
WIDE = tiny.NOT_SQUARE | {"model.dtype": "float64"}
MESHES = {  # with the number of micro-batches
  "one device": ((1, 1, 1), 1),
  "2x2x2, halves of groups": ((2, 2, 2), 2),
  "groups over two replicas": ((4, 1, 1), 1),
}


def _close(found, expected, tolerance: float):
  """Asserts that two trees of arrays agree, NaN where NaN; float32 metrics may round once."""

  def check(path, a, b):
    rounding = 2e-7 if tolerance and np.asarray(b).dtype == np.float32 else 0.0
    np.testing.assert_allclose(
      a, b, rtol=rounding, atol=tolerance, err_msg=jax.tree_util.keystr(path)
    )

  jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.fixture(scope="module")
def bench(tiny_model):
  return tiny.make_bench(tiny_model)


@pytest.fixture(scope="module")
def fused(bench):
  """Three iterations of the fused step."""
  return bench.run(3)


@pytest.fixture(scope="module")
def split(bench):
  return mapped.split(bench.stages, bench.mesh)


@pytest.fixture(scope="module")
def wide_run(not_square_model):
  """Two iterations in float64 with images that are not square, by mesh."""

  @functools.cache
  def run(name: str):
    with jax.enable_x64(True):
      shape, parts = MESHES[name]
      return tiny.make_bench(
        not_square_model,
        shape,
        WIDE | {"step.micro_batches": parts},
      ).run(2)

  return run


def _staged(
  split: mapped.StagePrograms, change=lambda score: score, rounds: int = 1
) -> mapped.StagePrograms:
  """Returns a split iteration with other scores or rounds."""
  return dataclasses.replace(
    split,
    settings=dataclasses.replace(split.settings, num_reflect_rounds=rounds),
    score_drafts=lambda drafts: change(split.score_drafts(drafts)),
    score_edits=lambda edits: change(split.score_edits(edits)),
  )


class TestFused:
  def test_ratios_are_one_on_policy(self, fused):
    for _, metrics, _ in fused:
      for name in ("reason_text", "reason_image", "edit_text", "edit_image"):
        assert metrics[f"mismatch/{name}"] < 1e-4

  def test_both_halves_have_something_to_learn_from(self, fused):
    for _, metrics, _ in fused:
      for stage in ("reason", "edit"):
        assert metrics[f"{stage}/gradient_norm_und"] > 1e-3
        assert metrics[f"{stage}/gradient_norm_gen"] > 1e-3
    assert any(metrics["reason/format"] > 0 for _, metrics, _ in fused)
    assert any(0 < metrics["edit/edit_rate"] < 1 for _, metrics, _ in fused)

  def test_pool_is_what_the_drafts_are(self, fused):
    for _, metrics, samples in fused:
      right = np.mean(samples.draft_score.value == 1)
      assert (
        metrics["pool/right"],
        metrics["pool/wrong"],
        metrics["pool/unscored"],
      ) == pytest.approx((right, 1 - right, 0))
      drawn = samples.edits.prompt_index
      assert metrics["edit/pool_prompts"] == pytest.approx(
        len(set(drawn.tolist())) / 2
      )

  def test_ratios_and_lengths_are_those_of_the_samples(self, fused):
    for _, metrics, samples in fused:
      text = samples.drafts.rollout.text
      assert metrics["reason/text_ratio"] == pytest.approx(1, abs=1e-4)
      assert metrics["edit/image_ratio"] == pytest.approx(1, abs=1e-4)
      assert metrics["reason/tokens_at_limit"] == pytest.approx(
        np.mean(text.lengths == text.ids.shape[1])
      )
      scored = np.arange(text.ids.shape[1] - 1) < text.lengths[:, None] - 2
      assert metrics["reason/text_entropy"] == pytest.approx(
        -text.behavior_logprob[scored].mean(), rel=1e-5
      )

  def test_updates_and_iterations_are_counted(self, fused):
    state = fused[-1][0]
    counts = {
      int(leaf)
      for leaf in jax.tree.leaves(state.opt_state)
      if leaf.dtype == np.int32
    }
    assert (int(state.step), counts) == (3, {6})

  def test_stopped_samples_keep_image_and_score(self, fused):
    for _, _, samples in fused:
      stop, size = (
        samples.edits.instruction.stop,
        samples.edits.prompt_index.size // len(samples.edits.source.images),
      )
      source = np.repeat(samples.edits.source.images, size, axis=0)
      np.testing.assert_array_equal(
        samples.edits.refined.images[stop], source[stop]
      )
      np.testing.assert_array_equal(
        samples.edit_score.value[stop], samples.edits.reward_before[stop]
      )

  @pytest.mark.parametrize("rounds", [0, 2])
  def test_metrics_follow_the_number_of_rounds(self, tiny_model, rounds):
    bench = tiny.make_bench(tiny_model, changes={"reflect_rounds": rounds})
    with jax.set_mesh(bench.mesh):
      step = mapped.fused(bench.stages, bench.mesh)
      state, metrics, samples = jax.eval_shape(
        step, bench.state(), bench.frozen, bench.batch(0), np.uint32(0)
      )
    stages = {name.split("/")[0] for name in metrics} - {"mismatch"}
    assert (
      stages
      == {"reason"} | {0: set(), 2: {"pool", "edit", "pool2", "edit2"}}[rounds]
    )
    assert not documented.undocumented(metrics, "always", parts=("strict",))
    assert (samples.edits is None) == (rounds == 0)
    assert state.step.shape == ()


class TestSplit:
  def test_numbers_are_those_of_the_fused_step(self, bench, split, fused):
    staged = bench.run_staged(split, 2)
    for (state, metrics, samples), (
      fused_state,
      fused_metrics,
      fused_samples,
    ) in zip(staged, fused):
      np.testing.assert_array_equal(
        samples.drafts.rollout.text.ids, fused_samples.drafts.rollout.text.ids
      )
      np.testing.assert_array_equal(
        samples.edits.text.ids, fused_samples.edits.text.ids
      )
      _close(metrics, fused_metrics, 1e-4)
      _close(state.policy, fused_state.policy, 1e-4)

  def test_stages_are_timed(self, bench, split, fused):
    with jax.set_mesh(bench.mesh):
      _, metrics, _ = mapped.run_timed(
        split, bench.state(), bench.frozen, bench.batch(0), np.uint32(0)
      )
    seconds = {
      name: metrics[name] for name in metrics if name not in fused[0][1]
    }
    documented.check(seconds, "split")
    stages = set(split.names()) - {"learn_from_chain"}
    assert {name.split("/")[-1] for name in seconds} == stages
    assert all(value > 0 for value in seconds.values())

  @pytest.mark.parametrize("rounds", [0, 2])
  def test_rounds_are_updates_on_edits(self, bench, split, rounds):
    ((state, metrics, _),) = bench.run_staged(_staged(split, rounds=rounds), 1)
    counts = {
      int(leaf)
      for leaf in jax.tree.leaves(state.opt_state)
      if leaf.dtype == np.int32
    }
    assert counts == {1 + rounds}
    assert ("edit2/loss" in metrics) == (rounds == 2)
    assert all(
      np.isfinite(value)
      for name, value in metrics.items()
      if name.endswith(("loss", "norm"))
    )

  @pytest.mark.parametrize("source", ["drafts", "edits"])
  def test_pool_of_a_further_round_holds_its_source(self, bench, split, source):
    pooled = []
    drawn_from = []

    def pool(images):
      pooled.append(images)
      return split.pool(images)

    def draw(images, *arguments):
      drawn_from.append(images)
      return split.draw(images, *arguments)

    def learn(state, frozen, samples, score):
      return state, {}

    settings = dataclasses.replace(
      split.settings, num_reflect_rounds=2, pool_source=source
    )
    stages = dataclasses.replace(
      split,
      settings=settings,
      pool=pool,
      draw=draw,
      learn_to_reason=learn,
      learn_to_edit=learn,
    )
    bench.run_staged(stages, 1)
    first, second = (np.asarray(images.images) for images in drawn_from)
    np.testing.assert_array_equal(first, np.asarray(pooled[0].images))
    if source == "drafts":
      np.testing.assert_array_equal(first, second)
      assert len(pooled) == 1
    else:
      np.testing.assert_array_equal(second, np.asarray(pooled[1].images))
      assert (first != second).any()


class TestInvalidRewards:
  """A failed reward is missing: whatever stands in its value reaches nothing."""

  @staticmethod
  def _staged(split, valid, value):
    """Returns stages whose score is `value` where not `valid`, [groups, group_size]."""

    def change(score: types.Score) -> types.Score:
      known = valid.reshape(-1)

      def fill(x):
        return jnp.where(known, x, value).astype(jnp.float32)

      return types.Score(
        fill(score.value), known, jax.tree.map(fill, score.parts)
      )

    return _staged(split, change)

  @pytest.mark.parametrize(
    "valid",
    [
      [[True, False, True, True], [True, True, True, False]],
      [[False] * 4, [True] * 4],
      [[True, False, False, False], [True] * 4],
    ],
    ids=["some samples", "a group", "all but one of a group"],
  )
  def test_value_is_not_read_where_invalid(self, bench, split, valid):
    valid = np.array(valid)
    ((one, one_metrics, _),) = bench.run_staged(
      self._staged(split, valid, np.nan), 1
    )
    ((two, two_metrics, _),) = bench.run_staged(
      self._staged(split, valid, 0.7), 1
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one.policy))
    _close(one, two, 0.0)
    _close(one_metrics, two_metrics, 0.0)
    assert one_metrics["reason/valid"] == valid.mean()

  def test_nothing_is_learned_without_rewards(self, bench, split):
    ((state, metrics, _),) = bench.run_staged(
      self._staged(split, np.zeros((2, 4), bool), np.nan), 1
    )
    _close(state.policy, jax.device_get(bench.policy), 0.0)
    assert (
      metrics["reason/loss"]
      == metrics["edit/loss"]
      == metrics["reason/valid"]
      == 0
    )
    assert np.isnan(metrics["reason/score"])

  def test_momentum_moves_nothing_without_rewards(self, bench, split):
    some, none = (
      self._staged(split, np.ones((2, 4), bool), 0.0),
      self._staged(split, np.zeros((2, 4), bool), np.nan),
    )
    ((first, _, _),) = bench.run_staged(some, 1)
    calls = iter(
      [some.score_drafts, some.score_edits, none.score_drafts, none.score_edits]
    )
    turning = dataclasses.replace(
      some,
      score_drafts=lambda drafts: next(calls)(drafts),
      score_edits=lambda edits: next(calls)(edits),
    )
    _, (second, _, _) = bench.run_staged(turning, 2)
    _close(
      (second.policy, second.opt_state), (first.policy, first.opt_state), 0.0
    )
    assert any(
      np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(first.opt_state)
    )

  def test_group_with_one_score_contributes_nothing(self, bench, split):
    alone, none = (
      np.array([[True] + [False] * 3, [True] * 4]),
      np.array([[False] * 4, [True] * 4]),
    )
    one, two = (
      self._reason(bench, self._staged(split, valid, np.nan))
      for valid in (alone, none)
    )
    _close(one, two, 0.0)

  @staticmethod
  def _reason(bench, stages: mapped.StagePrograms):
    """Returns the policy after the reason stage's update."""
    with jax.set_mesh(bench.mesh):
      state, key = bench.state(), jax.random.key(3)
      drafts = stages.draft(state, bench.frozen, bench.batch(0), key)
      state, _ = stages.learn_to_reason(
        state, bench.frozen, drafts, stages.score_drafts(drafts)
      )
      return jax.device_get(state.policy)


class TestNotFinite:
  """One number that is not finite skips the update, and is in no later one."""

  @staticmethod
  def _with_first(leaf: jax.Array, value: float) -> jax.Array:
    """Returns an array whose first number is replaced."""
    return leaf.at[(0,) * leaf.ndim].set(value)

  def test_log_prob_of_one_token_skips_one_stage(self, bench, split):
    """The edits are learned from by the policy that the drafts left as it was."""

    def draft(*arguments):
      drafts = split.draft(*arguments)
      text = drafts.rollout.text
      logprob = self._with_first(text.behavior_logprob, np.nan)
      text = dataclasses.replace(text, behavior_logprob=logprob)
      rollout = dataclasses.replace(drafts.rollout, text=text)
      return dataclasses.replace(drafts, rollout=rollout)

    stages = dataclasses.replace(split, draft=draft)
    ((state, metrics, samples),) = bench.run_staged(stages, 1)
    assert (metrics["reason/skipped"], metrics["edit/skipped"]) == (1, 0)
    assert np.isnan(metrics["reason/loss"])
    # Only one of two updates counts for the warm-up, which begins at rate 0.
    assert train_state.updates_done(state.opt_state) == 1
    _close(state.policy, jax.device_get(bench.policy), 0.0)
    assert samples.draft_score.valid.all()

  def test_infinite_return_skips_the_update(self, bench, split):
    def score_drafts(drafts):
      score = split.score_drafts(drafts)
      return score.replace(value=self._with_first(score.value, np.inf))

    stages = dataclasses.replace(
      split,
      score_drafts=score_drafts,
      settings=dataclasses.replace(split.settings, num_reflect_rounds=0),
    )
    ((state, metrics, _),) = bench.run_staged(stages, 1)
    assert metrics["reason/skipped"] == 1
    before = jax.device_get(bench.state())
    _close(
      (state.policy, state.opt_state), (before.policy, before.opt_state), 0
    )

  @pytest.mark.parametrize("path", ["layers/gen/down", "lm_head", "llm2vae"])
  def test_nan_weight_reaches_no_other_weight_and_no_score(
    self, bench, split, path
  ):
    """It made the whole policy NaN; images of NaN had the score 0, and counted."""

    def poison(key_path, leaf):
      name = "/".join(part.key for part in key_path)
      return self._with_first(leaf, np.nan) if name.startswith(path) else leaf

    policy = jax.tree_util.tree_map_with_path(poison, bench.policy)
    poisoned = dataclasses.replace(bench, policy=policy)
    ((state, metrics, samples),) = poisoned.run_staged(split, 1)
    before = jax.device_get(poisoned.state())
    _close(
      (state.policy, state.opt_state), (before.policy, before.opt_state), 0
    )
    assert (metrics["reason/skipped"], metrics["edit/skipped"]) == (1, 1)
    if path != "lm_head":
      assert metrics["reason/nonfinite_images"] == 1
      assert not samples.draft_score.valid.any()
      assert metrics["pool/unscored"] == 1

  @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
  def test_reward_in_the_graph_is_missing(self, bench, value):
    """A world's verifier is a user's program: what it returns may be anything."""

    def reward(images, target, needed=None):
      score = tiny.brightness(images, target)
      return score.replace(value=self._with_first(score.value, value))

    stages = dataclasses.replace(bench.stages, reward=reward)
    with jax.set_mesh(bench.mesh):
      programs = mapped.split(stages, bench.mesh)
      score = programs.score_drafts(tiny.drafts(bench))
    np.testing.assert_array_equal(score.valid, [False] + [True] * 7)

  @pytest.mark.parametrize("value", [np.nan, np.inf])
  def test_image_of_a_latent_that_is_not_finite_is_known(self, bench, value):
    towers = bench.stages.modules.towers
    rows, columns = towers.latent_grid
    channels = bench.stages.modules.bagel.config.latent_dim
    latent = jnp.zeros((2, rows * columns, channels)).at[0, 0, 0].set(value)
    with jax.set_mesh(bench.mesh):
      images, is_finite = jax.jit(towers.decode)(bench.frozen.towers, latent)
    np.testing.assert_array_equal(is_finite, [False, True])
    # Where it is NaN it is black, on every machine.
    assert np.isnan(value) <= (np.asarray(images[0]) == 0).any()


def _assert_equal(runs: list[tuple], runs_of_one_device: list[tuple]) -> None:
  """Asserts that iterations in float64 have the same samples and the same numbers."""
  for (state, metrics, samples), (one_state, one_metrics, one_samples) in zip(
    runs, runs_of_one_device, strict=True
  ):
    np.testing.assert_array_equal(
      samples.drafts.rollout.images, one_samples.drafts.rollout.images
    )
    np.testing.assert_array_equal(
      samples.edits.text.ids, one_samples.edits.text.ids
    )
    np.testing.assert_array_equal(
      samples.edits.refined.images, one_samples.edits.refined.images
    )
    size = (tiny.NOT_SQUARE["image.height"], tiny.NOT_SQUARE["image.width"])
    assert samples.drafts.rollout.images.shape[1:] == (*size, 3)
    assert samples.edits.refined.images.shape[1:] == (*size, 3)
    for stage in ("reason_text", "reason_image", "edit_text", "edit_image"):
      assert metrics[f"mismatch/{stage}"] < 1e-8
    # Equal scores would leave the images nothing to learn from but rounding.
    assert np.std(samples.draft_score.value) > 0
    _close(samples.draft_score, one_samples.draft_score, 1e-8)
    _close(samples.edit_score, one_samples.edit_score, 1e-8)
    _close(metrics, one_metrics, 1e-8)
    _close(state, one_state, 1e-8)


class TestMesh:
  """The quick suite has the first mesh with rewards of the host, see `TestHost`."""

  @pytest.mark.slow
  @pytest.mark.parametrize(
    "name", ["2x2x2, halves of groups", "groups over two replicas"]
  )
  def test_two_iterations_equal_those_of_one_device(self, wide_run, name):
    _assert_equal(wide_run(name), wide_run("one device"))

  # what the test above shows in float64, in the dtype that is trained in
  @pytest.mark.slow
  def test_losses_and_gradients_in_float32_equal_those_of_one_device(
    self, tiny_model, fused
  ):
    # off-policy by then: ratios differ from 1, the KL from 0
    state, _, samples = fused[-1]
    found = [
      self._learned(tiny_model, *MESHES[name], state.policy, samples)
      for name in ("2x2x2, halves of groups", "one device")
    ]
    _close(*found, 1e-5)

  @staticmethod
  def _learned(folder, shape, parts, policy, samples: stage_outputs.Samples):
    """Returns losses and gradients of both updates from a recorded iteration."""
    keep = optax.GradientTransformation(
      lambda params: jax.tree.map(jnp.zeros_like, params),
      lambda updates, *_: (jax.tree.map(jnp.zeros_like, updates), updates),
    )
    bench = tiny.make_bench(folder, shape, {"step.micro_batches": parts})
    stages = dataclasses.replace(bench.stages, optimizer=keep)
    session = dataclasses.replace(bench.session, stages=stages)
    found, split = [], mapped.split(stages, bench.mesh)
    with jax.set_mesh(bench.mesh):
      state = session.init(
        jax.device_put(
          policy,
          parameters.shardings(session.experiment.modules.bagel, bench.mesh),
        )
      )
      for learn, rollout, score in (
        (split.learn_to_reason, samples.drafts, samples.draft_score),
        (split.learn_to_edit, samples.edits, samples.edit_score),
      ):
        new, metrics = learn(state, bench.frozen, rollout, score)
        found.append(jax.device_get((metrics["loss"], new.opt_state)))
    return found


class TestHost:
  def test_two_iterations_on_eight_devices_equal_those_of_one(
    self, not_square_model, wide_run
  ):
    """One device computes reward and parser in the graph.

    Also: an image that was kept is not scored again, and keeps its parts.
    """
    scored = []

    def reward(images, target):
      scored.extend(np.asarray(images))
      return tiny.brightness(images, target)

    shape, parts = MESHES["2x2x2, halves of groups"]
    changes = {"step.micro_batches": parts, "sequence.parser": "strings"}
    with jax.enable_x64(True):
      bench = tiny.make_bench(not_square_model, shape, WIDE | changes)
      called = scorer.reward_from_host(reward, ("strict",), bench.mesh)
      stages = dataclasses.replace(bench.stages, reward=called)
      session = dataclasses.replace(bench.session, stages=stages)
      runs = dataclasses.replace(bench, session=session).run(2)
    _assert_equal(runs, wide_run("one device"))
    new = []
    for _, _, samples in runs:
      edits = samples.edits
      stop = edits.instruction.stop
      assert 0 < stop.sum() < len(stop)
      np.testing.assert_array_equal(
        samples.edit_score.parts["strict"][stop],
        edits.parts_before["strict"][stop],
      )
      new += [*samples.drafts.rollout.images, *edits.refined.images[~stop]]
    assert sorted(image.tobytes() for image in scored) == sorted(
      image.tobytes() for image in new
    )
