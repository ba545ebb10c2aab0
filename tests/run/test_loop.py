"""Tests of the main job: its files, one compilation, resuming after SIGKILL, control at rate 0."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from r3jax import types
from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.evaluation import sample_log
from r3jax.files import jsonl
from r3jax.parallel import meshes
from r3jax.rewards import control
from r3jax.rl import placement
from r3jax.rl import replica_stages
from r3jax.run import loop
from r3jax.run import machine
from r3jax.run import sessions
from r3jax.run.logging import metric_writer
from r3jax.worlds.shapes import verifier
from tests import documented
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8


def _start(model: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  """Starts the main job on one device."""
  changes = tiny.settings(model) | {"total_steps": STEPS, "eval.every": 4}
  command = [
    sys.executable,
    "launch/tpu.py",
    "--config=configs/r3_geneval.py:shapes",
    f"--workdir={workdir}",
  ]
  command += [f"--config.{key}={value}" for key, value in changes.items()]
  flags = re.sub(
    r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
  )
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
  with (workdir.parent / f"{workdir.name}.log").open("a") as log:
    return subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=log, stderr=log
    )


def _finish(model: pathlib.Path, workdir: pathlib.Path):
  process = _start(model, workdir)
  assert process.wait(timeout=1800) == 0, (
    workdir.parent / f"{workdir.name}.log"
  ).read_text()[-3000:]


def _metrics(workdir: pathlib.Path, log: str = "metrics.jsonl") -> list[dict]:
  """Returns a log without the times."""
  rows = jsonl.read(workdir / log)
  return [
    {
      name: value
      for name, value in row.items()
      if not name.startswith(("seconds/", "perf/"))
    }
    for row in rows
  ]


def _samples(folder: pathlib.Path) -> list[dict]:
  """Returns an evaluation's samples without the times."""
  return [
    sample | {"turns": [{**turn, "seconds": None} for turn in sample["turns"]]}
    for sample in [line.to_json() for line in sample_log.read(folder)]
  ]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
  """The workdir of an uninterrupted run of the command."""
  workdir = tmp_path_factory.mktemp("finished") / "workdir"
  _finish(tiny_model, workdir)
  return workdir


class TestCommand:
  def test_files_are_complete(self, finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["total_steps"], config["group_size"]) == (STEPS, 4)
    assert [row["step"] for row in _metrics(finished)] == list(
      range(1, STEPS + 1)
    )
    assert sorted(
      path.name for path in (finished / "checkpoints").iterdir()
    ) == ["6", "8"]
    assert sorted(
      path.name for path in (finished / "evaluation").iterdir()
    ) == ["step_000000", "step_000004", "step_000008"]
    for folder in (
      finished / "report",
      finished / "evaluation" / "step_000008",
    ):
      page = (folder / "index.html").read_text()
      assert (
        page.count("images/") > 4
        and r"\u003cthink\u003e" in page
        and "<think>" not in page
      )
      assert {
        turn.image
        for sample in sample_log.read(folder)
        for turn in sample.turns
      } <= {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert list((finished / "tensorboard").iterdir())
    assert not [
      path
      for path in finished.rglob("*")
      if path.name.endswith((".partial", ".new"))
    ]

  def test_finished_run_that_is_started_again_keeps_its_times(
    self, finished, tiny_model, tmp_path
  ):
    workdir = tmp_path / "workdir"
    shutil.copytree(finished, workdir)
    before = json.loads((workdir / "summary.json").read_text())
    _finish(tiny_model, workdir)
    after = json.loads((workdir / "summary.json").read_text())
    assert after == before

  def test_log_announces_what_takes_long_and_says_what_to_do_next(
    self, finished
  ):
    log = (finished.parent / "workdir.log").read_text()
    for pattern in (
      rf"report: {finished}/report/index\.html \(from the first iteration on\)",
      r"console\.py:\d+\] compiling the step \(minutes the first time",
      r"done compiling the step: [\d.]+ s",
      r"evaluating iteration 0: 6 samples of 6 prompts, up to 3 rounds each",
      r"evaluated 6/6 samples",
      rf"iteration 1/{STEPS}  draft 0\.\d+ .*ETA after the next",
      rf"iteration {STEPS}/{STEPS}  draft .*ETA 0:00:\d\d",
      r"before +after +difference, 95 % interval +prompts\ndraft ",
      rf"\nreport: {finished}/report/index\.html\n\nnext:\n",
      rf"r3jax compare {finished} --workdir=compared",
    ):
      assert re.search(pattern, log), pattern

  def test_summary_says_what_was_asked(self, finished):
    summary = json.loads(
      (finished / "summary.json").read_text(), parse_constant=pytest.fail
    )
    for name in (
      "draft",
      "last round",
      "draft, strict",
      "last round, strict",
      "draft, counting",
    ):
      for part in ("before", "after", "difference"):
        mean, low, high = summary["scores"][name][part]
        if name == "draft, counting":
          assert low is None and high is None  # of too few prompts
        else:
          assert low <= mean <= high
    for part in ("edit_rate", "stop_precision", "improvement"):
      assert np.isfinite(summary["behaviour"]["after"][part])
    assert (summary["iterations"], summary["seed"]) == (STEPS, 0)
    assert summary["seconds"]["median iteration"] > 0
    assert summary["compile_seconds"] > 0
    assert 0 < summary["peak_memory_gib"] < 6
    assert {"jax", "flax", "optax", "device"} <= set(summary["versions"])

  def test_metrics_are_those_of_the_table(self, finished):
    rows = jsonl.read(finished / "metrics.jsonl")
    documented.check(
      {name for row in rows for name in row} - {"step"},
      "always",
      "tag",
      parts=verifier.PARTS,
    )
    numbers = {
      name for row in rows for name, value in row.items() if value is not None
    }
    without = documented.missing(numbers, "always", "tag", parts=verifier.PARTS)
    # an image of random weights is never right
    assert without <= {"edit/stop_when_right"}

  def test_numbers_of_evaluations_are_those_of_the_table(self, finished):
    rows = jsonl.read(finished / "evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 4, 8]
    for row in rows:
      documented.check(
        row.keys() - {"step"}, "evaluation", parts=verifier.PARTS
      )
    summary = json.loads((finished / "summary.json").read_text())
    assert rows[-1]["evaluation/draft"] == pytest.approx(
      summary["scores"]["draft"]["after"][0]
    )

  def test_tensorboard_has_them_and_the_pictures(self, finished):
    events = event_accumulator.EventAccumulator(
      str(finished / "tensorboard")
    ).Reload()
    shown = {
      name for name in events.Tags()["tensors"] if not name.endswith("/caption")
    }
    documented.check(
      shown, "always", "tag", "samples", "evaluation", parts=verifier.PARTS
    )
    assert [event.step for event in events.Tensors("evaluation/draft")] == [
      0,
      4,
      8,
    ]
    assert [event.step for event in events.Tensors("edit/sample/1")] == [
      1,
      2,
      4,
      6,
      8,
    ]

  def test_scores_by_tag_are_the_score_part_by_part(self, finished):
    for row in _metrics(finished):
      tags = [
        value for name, value in row.items() if name.startswith("reason/tag/")
      ]
      assert 1 <= len(tags) <= 2 and np.mean(tags) == pytest.approx(
        row["reason/score"]
      )

  def test_learning_rate_warms_up_with_the_updates(self, finished):
    rows = _metrics(finished)
    assert [row["optimizer/updates"] for row in rows] == [
      2.0 * (i + 1) for i in range(STEPS)
    ]
    assert [
      row["optimizer/learning_rate_gen"] for row in rows
    ] == pytest.approx([5e-4] + [1e-3] * (STEPS - 1))

  def test_metrics_are_learned_on_policy(self, finished):
    for row in _metrics(finished):
      assert (
        max(
          row[f"mismatch/{name}"]
          for name in ("reason_text", "reason_image", "edit_text", "edit_image")
        )
        < 1e-4
      )
    assert any(row["reason/gradient_norm"] > 0 for row in _metrics(finished))

  def test_killed_run_ends_like_an_uninterrupted_one(
    self, finished, tiny_model, tmp_path
  ):
    workdir = tmp_path / "workdir"
    process = _start(tiny_model, workdir)
    # named so when complete
    while not (workdir / "checkpoints" / "4").exists():
      assert process.poll() is None, (tmp_path / "workdir.log").read_text()[
        -3000:
      ]
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "summary.json").exists()
    page = (workdir / "report" / "index.html").read_text()
    assert page.endswith("</html>")
    assert re.search(rf"Iteration \d of {STEPS}, written 20", page)
    assert "../evaluation/step_000000/index.html" in page
    _finish(tiny_model, workdir)
    log = (tmp_path / "workdir.log").read_text()
    assert (
      re.search(r"restored step [4-8] from", log)
      and "the step was traced before" in log
    )
    assert _metrics(workdir) == _metrics(finished)
    assert _metrics(workdir, "evaluation.jsonl") == _metrics(
      finished, "evaluation.jsonl"
    )
    for name in ("step_000000", "step_000004", f"step_{STEPS:06d}"):
      assert _samples(workdir / "evaluation" / name) == _samples(
        finished / "evaluation" / name
      )
    for part in ("samples.jsonl",):
      assert (workdir / "report" / part).read_text() == (
        finished / "report" / part
      ).read_text()


class TestPeakMemory:
  def test_is_not_that_of_the_process_that_started_it(self):
    ours = bytearray(2**30)  # touched, and held until the other has answered
    script = "from r3jax.run import machine; print(machine.peak_memory())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    theirs = subprocess.run(
      [sys.executable, "-c", script],
      env=environment,
      capture_output=True,
      text=True,
      check=True,
    )
    assert machine.peak_memory() > len(ours) > int(theirs.stdout) > 2**26


class TestRun:
  def test_step_is_traced_once_and_rate_zero_learns_nothing(
    self, tiny_model, tmp_path, monkeypatch
  ):
    changes = {
      "mesh.data": 2,
      "optimizer.und_learning_rate": 0.0,
      "optimizer.gen_learning_rate": 0.0,
      # at the end only: Orbax compiles slices of its own when it saves
      "checkpoint.every": 3,
    }
    config = tiny.make_config(tiny_model, changes)
    traces, compiled = [], []
    draft, write = (
      replica_stages.ReplicaStages.draft,
      metric_writer.MetricWriter.write,
    )
    monkeypatch.setattr(
      replica_stages.ReplicaStages,
      "draft",
      lambda *args: traces.append(1) or draft(*args),
    )
    jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: (
        compiled.append(event)
        if event.endswith("backend_compile_duration")
        else None
      )
    )
    by_step = []
    monkeypatch.setattr(
      metric_writer.MetricWriter,
      "write",
      lambda *args: by_step.append(len(compiled)) or write(*args),
    )
    monkeypatch.setattr(
      meshes,
      "make_mesh",
      lambda **shape: meshes.make_mesh_on(jax.devices()[:2], **shape),
    )
    programs = epath.Path(tmp_path / "traced")
    summary = loop.run(
      *sessions.prepare(config, str(tmp_path), "auto", programs)
    )
    assert len(traces) == 1
    # the step, and two rounds of evaluation
    assert len(list(programs.iterdir())) == 3
    # between the first and the last iteration nothing is compiled
    assert len(set(by_step)) == 1
    difference = summary["scores"]["draft"]["difference"]
    assert difference.mean == 0.0
    assert difference.interval in (None, (0.0, 0.0))

    self._assert_policy_of_checkpoint_is_that_of_the_start(config, tmp_path)

  @staticmethod
  def _assert_policy_of_checkpoint_is_that_of_the_start(config, workdir):
    session, policy = sessions.prepare(config, str(workdir))
    with jax.set_mesh(session.mesh):
      abstract = jax.eval_shape(session.init, policy)
      prompts = pipeline.prompt_iterator(len(session.experiment.train), 2, 0)
      step, state = training.Checkpoints(workdir / "checkpoints", 1, 2).restore(
        abstract, prompts
      )
    assert step == 3
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.device_get(state.policy),
      jax.device_get(policy),
    )


class TestShuffled:
  @staticmethod
  def _score(images, replicas: int, seed: int = 0) -> np.ndarray:
    """Returns the shuffled scores of images whose own score is their first byte."""

    def own(images, target):
      return types.Score(
        images[:, 0, 0, 0].astype(jnp.float32),
        images[:, 0, 0, 0] >= 0,
        {"strict": target.astype(jnp.float32)},
      )

    mesh = meshes.make_mesh_on(jax.devices()[:replicas], replicas, 1, 1)
    rows = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
      control.shuffled(own, seed, placement.AXIS),
      mesh=mesh,
      in_specs=rows,
      out_specs=rows,
      check_vma=False,
    )
    found = jax.jit(mapped)(images, jnp.arange(len(images)))
    # a score moves as a whole
    np.testing.assert_array_equal(found.value, found.parts["strict"])
    return np.asarray(found.value)

  def test_deals_out_over_all_replicas_and_anew_for_other_images(self):
    images = np.zeros((16, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(16)
    found = self._score(images, 1)
    np.testing.assert_array_equal(np.sort(found), np.arange(16))
    assert (found != np.arange(16)).mean() > 0.5
    for replicas in (2, 8):
      np.testing.assert_array_equal(self._score(images, replicas), found)
    other = images.copy()
    other[0, 0, 0, 1] = 1
    assert (self._score(other, 1) != found).any()
    assert (self._score(images, 1, seed=1) != found).any()
