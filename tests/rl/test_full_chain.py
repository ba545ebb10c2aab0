"""Tests of the full chain: every sample edits its own image, one update follows all stages.

In float64. Most compare separate programs on one device, which are compiled once for all tests.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax import types
from r3jax.files import config_guard
from r3jax.rl import iteration_settings
from r3jax.rl import mapped
from r3jax.run import sessions
from tests import documented
from tests import tiny

CHANGES = {
  "step.chain": "full",
  "model.dtype": "float64",
  # Without clipping, Adam's first moment after one update is the gradient times 1 - b1.
  "optimizer.clip_norm": 1e9,
  # Without guidance and the pass of the reference there is less to compile.
  "reason.text_scale": 1.0,
  "refine.text_scale": 1.0,
  "loss.text_kl": 0.0,
  "loss.image_kl": 0.0,
}
GROUPS = 2
GROUP_SIZE = 4
SAMPLES = GROUPS * GROUP_SIZE


@pytest.fixture(scope="module", autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def bench(tiny_model):
  return tiny.make_bench(tiny_model, changes=CHANGES)


@pytest.fixture(scope="module")
def split(bench):
  return mapped.split(bench.stages, bench.mesh)


@pytest.fixture(scope="module")
def iteration(bench, split):
  """State, metrics and samples of one iteration, by separate programs on one device."""
  (result,) = bench.run_staged(split, 1)
  return result


def _assert_close(actual, expected, tolerance: float = 1e-8):
  def check(path, x, y):
    # Metrics may be float32.
    rounding = 2e-7 if np.asarray(y).dtype == np.float32 else 0.0
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(
      x, y, rtol=rounding, atol=tolerance, err_msg=name
    )

  jax.tree_util.tree_map_with_path(check, actual, expected)


def _first_moments(opt_state) -> list[np.ndarray]:
  """Returns Adam's first moments of all parameters."""
  moments = optax.tree.get_all_with_path(opt_state, "mu")
  return jax.tree.leaves([value for _, value in moments])


class TestFullChain:
  def test_ratios_are_one_on_policy_in_every_stage(self, iteration):
    _, metrics, _ = iteration
    for name in ("reason_text", "reason_image", "edit_text", "edit_image"):
      assert metrics[f"mismatch/{name}"] < 1e-9
    for stage in ("reason", "edit"):
      assert metrics[f"{stage}/gradient_norm_und"] > 1e-3
      assert metrics[f"{stage}/gradient_norm_gen"] > 1e-3

  def test_every_sample_edits_its_own_draft(self, iteration):
    _, metrics, samples = iteration
    edits = samples.edits
    np.testing.assert_array_equal(
      edits.source.images, samples.drafts.rollout.images
    )
    np.testing.assert_array_equal(
      edits.reward_before, samples.draft_score.value
    )
    prompts = np.repeat(np.arange(GROUPS), GROUP_SIZE)
    np.testing.assert_array_equal(edits.prompt_index, prompts)
    assert metrics["edit/before"] == pytest.approx(metrics["reason/score"])
    assert metrics["edit/pool_prompts"] == 1

  def test_a_group_shares_its_sde_step(self, iteration):
    _, _, samples = iteration
    t = samples.edits.refined.trajectory.t.reshape(GROUPS, GROUP_SIZE)
    np.testing.assert_array_equal(t, np.repeat(t[:, :1], GROUP_SIZE, axis=1))

  def test_one_update_follows_all_stages(self, iteration):
    state, _, _ = iteration
    counts = {
      int(leaf)
      for leaf in jax.tree.leaves(state.opt_state)
      if leaf.dtype == np.int32
    }
    assert (int(state.step), counts) == (1, {1})

  def test_metrics_are_documented(self, iteration):
    _, metrics, _ = iteration
    whens = ("always", "full chain")
    assert not documented.undocumented(metrics, *whens, parts=("strict",))
    assert not documented.missing(metrics, "full chain")
    assert "pool/right" not in metrics

  def test_gradient_is_the_sum_of_those_of_the_stages(
    self, bench, split, iteration
  ):
    whole, metrics, samples = iteration
    with jax.set_mesh(bench.mesh):
      state = bench.state()
      reason, reason_metrics = split.learn_to_reason(
        state, bench.frozen, samples.drafts, samples.draft_score
      )
      edit, edit_metrics = split.learn_to_edit(
        state, bench.frozen, samples.edits, samples.edit_score
      )
    parts = zip(
      _first_moments(whole.opt_state),
      _first_moments(reason.opt_state),
      _first_moments(edit.opt_state),
      strict=True,
    )
    for whole_moment, reason_moment, edit_moment in parts:
      np.testing.assert_allclose(
        whole_moment, reason_moment + edit_moment, rtol=1e-9, atol=1e-14
      )
    # Clipping sees the norm of the sum, which is not the sum of the norms.
    moments = _first_moments(whole.opt_state)
    norm = np.sqrt(sum(np.sum(moment**2) for moment in moments)) / (1 - 0.9)
    assert metrics["chain/gradient_norm"] == pytest.approx(norm, rel=1e-6)
    loss = reason_metrics["loss"] + edit_metrics["loss"]
    assert metrics["chain/loss"] == pytest.approx(float(loss), rel=1e-9)

  def test_missing_reward_leaves_the_sample_out_of_all_stages(
    self, bench, split
  ):
    known = np.arange(SAMPLES) != 2

    def run(value: float):
      def score_drafts(drafts):
        score = split.score_drafts(drafts)
        filled = jnp.where(known, score.value, value)
        return types.Score(filled, jnp.asarray(known), score.parts)

      stages = dataclasses.replace(split, score_drafts=score_drafts)
      ((state, metrics, _),) = bench.run_staged(stages, 1)
      return state, metrics

    state, metrics = run(np.nan)
    other_state, other_metrics = run(0.7)
    assert metrics["reason/valid"] == metrics["edit/valid"] == 7 / 8
    for leaf in jax.tree.leaves(state.policy):
      assert np.isfinite(leaf).all()
    _assert_close(state.policy, other_state.policy, 0.0)
    _assert_close(metrics, other_metrics, 0.0)

  def test_further_rounds_start_from_the_edits(self, bench, split):
    chains = []

    def learn(state, frozen, drafts, draft_score, rounds):
      chains.append(rounds)
      return state, [{}] * (1 + len(rounds)), {}

    settings = dataclasses.replace(split.settings, num_reflect_rounds=2)
    stages = dataclasses.replace(
      split, settings=settings, learn_from_chain=learn
    )
    bench.run_staged(stages, 1)
    (first, first_score), (second, _) = chains[0]
    np.testing.assert_array_equal(second.source.images, first.refined.images)
    np.testing.assert_array_equal(second.reward_before, first_score.value)


class TestMesh:
  @pytest.mark.parametrize(
    "shape, num_micro_batches",
    [
      # a sample on each device
      ((8, 1, 1), 1),
      # a group on each replica, in halves
      pytest.param((2, 2, 2), 2, marks=pytest.mark.slow),
    ],
  )
  def test_fused_on_eight_devices_equals_separate_programs_on_one(
    self, tiny_model, iteration, shape, num_micro_batches
  ):
    changes = CHANGES | {"step.micro_batches": num_micro_batches}
    bench = tiny.make_bench(tiny_model, shape, changes)
    ((state, metrics, samples),) = bench.run(1)
    one_state, one_metrics, one_samples = iteration
    np.testing.assert_array_equal(
      samples.edits.text.ids, one_samples.edits.text.ids
    )
    np.testing.assert_array_equal(
      samples.edits.refined.images, one_samples.edits.refined.images
    )
    _assert_close(metrics, one_metrics)
    _assert_close(state, one_state)


class TestSettings:
  @pytest.mark.parametrize(
    "change, message",
    [
      ({"chain": "forest"}, r"step.chain must be one of .*; got 'forest'"),
      ({"pool_source": "all"}, r"pool.source must be one of .*; got 'all'"),
    ],
  )
  def test_unknown_names_are_refused(self, bench, change, message):
    settings = bench.stages.settings
    assert isinstance(settings, iteration_settings.IterationSettings)
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(settings, **change)

  def test_a_run_keeps_its_chain(self, tmp_path):
    config = {"step": {"chain": "tree", "mode": "fused"}}
    config_guard.write_or_check(tmp_path, config, sessions.MAY_DIFFER)
    other_mode = {"step": {"chain": "tree", "mode": "split"}}
    config_guard.write_or_check(tmp_path, other_mode, sessions.MAY_DIFFER)
    other_chain = {"step": {"chain": "full", "mode": "split"}}
    with pytest.raises(ValueError, match="step.chain"):
      config_guard.write_or_check(tmp_path, other_chain, sessions.MAY_DIFFER)
