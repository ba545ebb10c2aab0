"""Tests of evaluation: results do not depend on batches or devices; what is read off them."""

import functools
import json

import jax
import numpy as np
import pytest

from r3jax import evaluate
from r3jax import experiment as experiment_lib
from r3jax.parallel import mesh as mesh_lib
from tests import tiny


@pytest.fixture(scope="module")
def bench(tiny_model):
  return tiny.make_bench(tiny_model)


@pytest.fixture(scope="module")
def rounds_of(bench):
  """Rounds of the held-out prompts by (devices, batch size)."""
  session = bench.session
  settings = experiment_lib.evaluation_settings(session.config, bench.iteration.settings)

  @functools.cache
  def rounds(devices: int, batch_size: int) -> list[evaluate.Round]:
    mesh = mesh_lib.make_mesh_of(jax.devices()[:devices], devices, 1, 1)
    evaluator = evaluate.Evaluator(
        bench.iteration.modules, settings, tiny.brightness, bench.iteration.parse, mesh, 3, batch_size, 1
    )
    policy, towers = session.experiment.load(mesh)
    with jax.set_mesh(mesh):
      return evaluator.run(policy, towers, session.heldout, 1)

  return rounds


class TestEvaluator:

  @pytest.mark.parametrize("devices, batch_size", [(1, 3), pytest.param(2, 6, marks=pytest.mark.slow), (8, 8)])
  def test_results_do_not_depend_on_batch_or_devices(self, rounds_of, devices, batch_size):
    for found, expected in zip(rounds_of(devices, batch_size), rounds_of(1, 6), strict=True):
      np.testing.assert_array_equal(found.text.ids, expected.text.ids)
      np.testing.assert_array_equal(found.stop, expected.stop)
      np.testing.assert_array_equal(found.format, expected.format)
      assert np.abs(found.images.astype(int) - expected.images).max() <= 1
      np.testing.assert_allclose(found.score, expected.score, rtol=0, atol=2e-3)  # a few pixels by a level

  def test_finished_samples_keep_image_and_score(self, rounds_of):
    rounds = rounds_of(1, 6)
    assert not rounds[0].stop.any()
    assert rounds[-1].stop.any() and not rounds[-1].stop.all()
    for before, after in zip(rounds, rounds[1:]):
      assert (after.stop >= before.stop).all()
      np.testing.assert_array_equal(after.images[after.stop], before.images[after.stop])
      np.testing.assert_array_equal(after.score[after.stop], before.score[after.stop])

  def test_images_of_a_prompt_differ_and_come_prompt_by_prompt(self, bench):
    evaluator = evaluate.Evaluator(
        bench.iteration.modules, bench.iteration.settings, tiny.brightness, bench.iteration.parse, bench.mesh, 2, 4, 1
    )
    rows = np.concatenate(list(evaluator._rows(bench.session.heldout, 2)))
    assert rows[:12].tolist() == [[i // 2, i % 2] for i in range(12)]
    keys = evaluator._keys(np.array([[3, 0, 0], [3, 1, 0], [3, 0, 1], [3, 0, 0]]))
    group = jax.random.key_data(keys.group)
    assert len(np.unique(group, axis=0)) == 3
    np.testing.assert_array_equal(group[0], group[3])

  def test_batch_that_does_not_divide_is_refused(self, bench):
    mesh = mesh_lib.make_mesh_of(jax.devices()[:2], 2, 1, 1)
    with pytest.raises(ValueError, match=r"eval.batch_size \(3\) must be divisible by .* \(2\)"):
      evaluate.Evaluator(None, None, None, None, mesh, 2, 3, 1)


def _result() -> evaluate.Result:
  """Three rounds of five images: right and stops; wrong and mended; mended late; worsened; wrong and stops."""
  nan = np.nan
  return evaluate.Result(
      tags=["a", "a", "b", "b", "b"],
      prompts=["p", "q", "r", "r", "s"],
      score=np.array([[1, 0.5, 0.0, 0.5, 0.2], [1, 1, 0.5, 0.25, 0.2], [1, 1, 1, nan, 0.2]]),
      parts={"strict": np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, nan, 0]])},
      stop=np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 0, 0, 1]], bool),
      format=np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 1]], float),
  )


class TestResult:

  def test_json_gives_the_same_result_back(self):
    found = _result()
    # Through text: what stands for a missing score must survive it.
    back = evaluate.Result.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert (back.tags, back.prompts) == (found.tags, found.prompts)
    for name in ("score", "stop", "format"):
      np.testing.assert_array_equal(getattr(back, name), getattr(found, name))
      assert getattr(back, name).dtype == getattr(found, name).dtype
    np.testing.assert_array_equal(back.parts["strict"], found.parts["strict"])

  def test_invalid_scores_are_missing(self):
    row = lambda *values: np.array(values)
    made = evaluate.Round(
        images=np.zeros((2, 1, 1, 3), np.uint8), score=row(0.5, 0.9), valid=row(True, False),
        parts={"strict": row(0.0, 1.0)}, format=row(1.0, 1.0), stop=row(False, False), text=None,
    )
    found = evaluate.result([made, made], ["a", "b"], ["p", "q"])
    np.testing.assert_array_equal(found.score, [[0.5, np.nan]] * 2)
    np.testing.assert_array_equal(found.parts["strict"], [[0.0, np.nan]] * 2)


class TestBehaviour:

  def test_counts_by_hand(self):
    found = evaluate.behaviour(_result())
    # Open before a round: five images, then images 1, 2, 3; edits: 1, 2, 3, then 2, 3 (score lost).
    assert found["edit_rate"] == 5 / 8
    assert found["stop_precision"] == 2 / 3  # images 0 and 1 are right, 4 is not
    assert found["stop_when_right"] == 1.0
    assert found["stop_when_wrong"] == 1 / 6
    assert found["improvement"] == pytest.approx((0.5 + 0.5 - 0.25 + 0.5) / 4)
    assert found["improved"] == 3 / 4
    assert found["worse"] == 1 / 4
    assert found["finished"] == 3 / 5

  def test_nothing_edited_is_no_improvement(self):
    score, stop = np.ones((2, 3)), np.array([[False] * 3, [True] * 3])
    found = evaluate.behaviour(evaluate.Result(["a"] * 3, ["p"] * 3, score, {}, stop, score))
    assert (found["edit_rate"], found["improvement"], found["stop_precision"]) == (0.0, 0.0, 1.0)


class TestCompare:

  def test_difference_is_paired_and_leaves_missing_out(self):
    before, nan = _result(), np.nan
    score = np.array([[1, 1, 0.5, nan, 0.2], [1, 1, 1, 1, 0.2], [1, 1, 1, 1, 1]])
    after = evaluate.Result(before.tags, before.prompts, score, before.parts, before.stop, before.format)
    found = evaluate.compare(before, after, seed=0)
    assert found["draft"]["before"][0] == pytest.approx((1 + 0.5 + 0 + 0.2) / 4)
    assert found["draft"]["after"][0] == pytest.approx((1 + 1 + 0.5 + 0.2) / 4)
    assert found["draft"]["difference"][0] == pytest.approx(1.0 / 4)
    assert found["last round"]["difference"][0] == pytest.approx(0.8 / 4)
    assert found["last round, strict"]["before"][0] == pytest.approx(3 / 4)  # of the four images with a score
    assert found["last round, b"]["difference"][0] == pytest.approx(0.8 / 2)
    mean, low, high = found["draft"]["difference"]
    assert low <= mean <= high

  def test_tag_without_any_score_is_left_out(self):
    before = _result()
    score = np.where(np.array(before.tags) == "a", np.nan, before.score)
    after = evaluate.Result(before.tags, before.prompts, score, before.parts, before.stop, before.format)
    found = evaluate.compare(before, after, seed=0)
    assert "draft, a" not in found and "draft, b" in found


class TestRefinement:

  def test_last_round_minus_draft(self):
    mean, low, high = evaluate.refinement(_result(), seed=0)
    assert mean == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    assert low <= mean <= high
