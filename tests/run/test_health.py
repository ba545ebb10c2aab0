"""Tests of run/health.py and run/skipped_batches.py, and of the loop around a scripted step."""

import dataclasses
import json

from absl import logging
from etils import epath
import jax
import numpy as np
import pytest

from r3jax.checkpoint import training
from r3jax.files import jsonl
from r3jax.rl import stage_outputs
from r3jax.run import health
from r3jax.run import loop
from r3jax.run import skipped_batches
from r3jax.run import summary
from r3jax.run import workdir
from r3jax.run.logging import metric_writer
from r3jax.run.logging import sinks
from r3jax.run.logging import timing
from tests import tiny

SETTINGS = health.Settings(
  max_skipped=3, mismatch_limit=0.0, mismatch_stop=False
)


def _of(**stages: float) -> dict[str, float]:
  """Returns the metrics of an iteration by what its stages skipped."""
  return {f"{stage}/skipped": value for stage, value in stages.items()}


@pytest.fixture
def warnings(monkeypatch):
  lines = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: lines.append(text % args)
  )
  return lines


class TestSkipped:
  @pytest.mark.parametrize(
    "metrics, number, stages",
    [
      (_of(reason=0.0, edit=0.0), 0, []),
      (_of(reason=0.0, edit=1.0), 1, ["edit"]),
      (_of(reason=1.0, edit=1.0, edit2=1.0), 3, ["reason", "edit", "edit2"]),
      # One update, which one of its stages has spoilt.
      (_of(chain=1.0, reason=0.0, edit=1.0), 1, ["edit"]),
      (_of(chain=1.0, reason=0.0, edit=0.0), 1, ["chain"]),
      (_of(chain=0.0, reason=0.0), 0, []),
      (_of(reason=1.0) | {"optimizer/skipped": 1.0}, 1, ["reason"]),
    ],
  )
  def test_counts_updates_and_names_stages(self, metrics, number, stages):
    assert health.num_skipped(metrics) == number
    assert health.skipped_stages(metrics) == stages


class TestWatch:
  def test_stops_after_so_many_in_a_row(self):
    watch = health.Watch(SETTINGS, None)
    for number, skipped in enumerate([1, 1, 0, 1, 1], 1):
      watch.add(number, _of(reason=skipped))
    with pytest.raises(health.Unhealthy) as error:
      watch.add(6, _of(reason=0.0, edit=1.0))
    message = str(error.value)
    assert "from 4 to 6 was skipped" in message and "\n" not in message
    assert "skipped/step_000006" in message

  def test_warns_of_ratios_once_for_a_run_of_iterations(self, warnings):
    watch = health.Watch(SETTINGS, 0.1)
    for number, value in enumerate([0.1, 0.2, 0.3, np.nan, 0.01, 0.5], 1):
      watch.add(number, {"mismatch/edit_text": value, "mismatch/a": 0.0})
    assert len(warnings) == 2
    assert "mismatch/edit_text of iteration 2 is 0.2" in warnings[0]
    assert "iteration 6 is 0.5" in warnings[1]

  def test_stops_at_ratios_where_asked(self):
    settings = dataclasses.replace(SETTINGS, mismatch_stop=True)
    watch = health.Watch(settings, 0.1)
    watch.add(1, {"mismatch/edit_text": 0.1})
    with pytest.raises(health.Unhealthy, match="health.mismatch_stop"):
      watch.add(2, {"mismatch/edit_text": 0.11})

  @pytest.mark.parametrize(
    "changes, limit",
    [
      ({}, 1e-3),
      ({"model.dtype": "bfloat16"}, 0.05),
      ({"health.mismatch_limit": 0.02}, 0.02),
      ({"compat.reference_loss": True}, None),
    ],
  )
  def test_limit_is_that_of_the_dtype(self, tiny_model, changes, limit):
    config = tiny.make_config(tiny_model, changes)
    assert health.watch(config)._limit == limit


@pytest.fixture(scope="module")
def bench(tiny_model):
  changes = {
    "total_steps": 9,
    "reflect_rounds": 0,
    "health.max_skipped": 3,
    "log.samples_every": 0,
    "log.tensorboard": False,
  }
  return tiny.make_bench(tiny_model, changes=changes)


def _samples(bench) -> stage_outputs.Samples:
  """Returns an iteration's samples; the latents of sample 5 are not finite."""
  drafts = tiny.drafts(bench)
  rows = np.arange(8)
  flow = drafts.rollout.trajectory
  latent = np.where((rows == 5)[:, None, None], np.inf, flow.latent)
  rollout = dataclasses.replace(
    drafts.rollout,
    trajectory=dataclasses.replace(flow, latent=latent),
    is_finite=rows != 5,
  )
  drafts = dataclasses.replace(
    drafts, rollout=rollout, prompt_index=(rows // 4).astype(np.int32)
  )
  score = tiny.brightness(jax.numpy.asarray(rollout.images), None)
  return stage_outputs.Samples(drafts, score, None, None)


class TestFindings:
  def test_name_stage_quantity_and_sample_in_order(self, bench):
    prompts = bench.session.experiment.train[:2]
    by_sample = skipped_batches.findings(_samples(bench), prompts)
    assert [
      (finding["quantity"], finding["sample"], finding["prompt"])
      for finding in by_sample
    ] == [
      ("latents at t = 0", 5, prompts[1].text),
      ("image", 5, prompts[1].text),
    ]


@pytest.fixture(scope="module")
def stopped(bench, tmp_path_factory):
  """The workdir of a run that has stopped, and its error."""
  files = workdir.Workdir(epath.Path(tmp_path_factory.mktemp("stopped")))
  session = dataclasses.replace(bench.session, files=files)
  samples = _samples(bench)

  def step(state, indices):
    del indices
    state = dataclasses.replace(state, step=state.step + 1)
    skipped = float(state.step > 2)
    metrics = {
      "reason/skipped": np.float32(skipped),
      "reason/loss": np.float32(np.nan if skipped else 0.5),
      "reason/valid": np.float32(1 - skipped),
      "reason/score": np.float32(0.5),
      "reason/tokens": np.float32(7),
    }
    return state, metrics, samples

  log_sinks = sinks.open_all(
    files.path, None, sinks.WandbSettings("", "", "offline"), {}, False
  )
  writer = metric_writer.MetricWriter(log_sinks)
  with jax.set_mesh(bench.mesh), pytest.raises(health.Unhealthy) as error:
    start = loop.resume(session, bench.state())
    loop.iterate(session, step, start, timing.PhaseClock(), writer)
  writer.close()
  return files, error.value


class TestLoop:
  """The loop with a step that skips the updates of all iterations from the third on."""

  def test_stops_and_leaves_the_last_checkpoint(self, stopped):
    """Missing scores of such iterations are not the reward's: its budget would have ended it."""
    files, error = stopped
    assert "from 3 to 5 was skipped" in str(error)
    assert training.latest_step(files.checkpoints) == 4

  def test_counts_in_the_log_and_in_the_report(self, stopped):
    files, _ = stopped
    rows = jsonl.read(files.metrics)
    assert [row["optimizer/skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert summary.skipped_updates(files) == 3

  def test_writes_every_batch(self, stopped, bench):
    files, _ = stopped
    folders = sorted(path.name for path in files.skipped.iterdir())
    assert folders == ["step_000003", "step_000004", "step_000005"]
    batch = json.loads((files.skipped / folders[-1] / "batch.json").read_text())
    train = bench.session.experiment.train
    assert batch["prompts"] == [train[index].text for index in batch["indices"]]
    assert (batch["step"], batch["stages"]) == (5, ["reason"])
    assert batch["checkpoint"] in (2, 4)
    assert batch["metrics"]["reason/loss"] == "nan"
    assert [finding["sample"] for finding in batch["not_finite"]] == [5, 5]
