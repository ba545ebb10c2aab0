"""Tests of run/replay.py; the command itself is slow."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.checkpoint import bagel_files
from r3jax.rl import inspection
from r3jax.rl import mapped
from r3jax.run import replay
from r3jax.run import setup
from r3jax.run import skipped_batches
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


class TestFolder:
  def test_missing_one_is_named_with_the_nearest(self, tmp_path):
    (tmp_path / "skipped" / "step_000003").mkdir(parents=True)
    folder = tmp_path / "skipped" / "step_00003"
    message = f"there is no folder {folder}; did you mean .*/step_000003[?]$"
    with pytest.raises(ValueError, match=message):
      replay.check_exists(folder)


class TestRead:
  @pytest.mark.parametrize(
    "content",
    [
      None,
      "",
      "{",
      "[]",
      '{"step": 3}',
      '{"step": "x"}',
      '{"step": 0, "stages": [], "indices": [0], "config_sha256": ""}',
      '{"step": 1, "stages": "edit", "indices": [0], "config_sha256": ""}',
      '{"step": 1, "stages": [1], "indices": [0], "config_sha256": ""}',
      '{"step": 1, "stages": [], "indices": [[0]], "config_sha256": ""}',
      '{"step": 1, "stages": [], "indices": [1e30], "config_sha256": ""}',
      '{"step": 1, "stages": [], "indices": 4e10, "config_sha256": ""}',
    ],
  )
  def test_refuses_what_is_no_batch(self, tmp_path, content):
    if content is not None:
      (tmp_path / skipped_batches.FILE).write_text(content)
    with pytest.raises(
      ValueError, match="must be the batch of a skipped update.*WORKDIR/skip"
    ):
      replay.read(epath.Path(tmp_path))


class TestConfigOfRun:
  def test_is_the_one_that_was_written(self, tiny_model, tmp_path):
    changes = {
      "reward.endpoints": ("http://a:1", "http://b:2"),
      "data.keep_tags": ("counting",),
    }
    config = tiny.make_config(tiny_model, changes)
    saved = config.to_dict() | {"weights": "x", "model_path": str(tiny_model)}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    read = replay.config_of_run(epath.Path(tmp_path))
    assert read.to_dict() == config.to_dict()
    assert skipped_batches.config_digest(read) == skipped_batches.config_digest(
      config
    )

  def test_refuses_a_folder_without_one(self, tmp_path):
    with pytest.raises(ValueError, match="config.json must be the config of"):
      replay.config_of_run(epath.Path(tmp_path))

  @pytest.mark.parametrize(
    "changes",
    [
      {"mesh": "x"},
      {"mesh": {"data": "a"}},
      {"groups_per_step": "two"},
      {"step": None},
      {"model_path": 5},
      {"model": [1]},
      {"loss": {}},
    ],
  )
  def test_refuses_a_damaged_one(self, tiny_model, tmp_path, changes):
    saved = tiny.make_config(tiny_model).to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="config.json must be the config of"):
      replay.config_of_run(epath.Path(tmp_path))


class TestCheckIndices:
  @pytest.mark.parametrize("indices", [[0], [0, -1], [0, 7], [0, 1, 2]])
  def test_refuses_prompts_that_are_not_there(self, indices):
    batch = replay.Batch(3, ["edit"], np.array(indices, np.int32), "")
    session = types.SimpleNamespace(
      config=types.SimpleNamespace(groups_per_step=2),
      experiment=types.SimpleNamespace(train=[None] * 7),
    )
    with pytest.raises(ValueError, match="2 of the 7 training prompts"):
      replay._check_indices(batch, session)


class TestInspectedStages:
  @pytest.mark.slow
  def test_names_samples_and_gradients(self, tiny_model):
    """Two micro-batches and two replicas: rows come back in the order of the samples."""
    bench = tiny.make_bench(tiny_model, (2, 1, 1), {"step.micro_batches": 2})
    stages = inspection.InspectedStages(**vars(bench.stages))
    split = mapped.split(stages, bench.mesh)
    with jax.set_mesh(bench.mesh):
      state = bench.state()
      batch = bench.batch(0)
      drafts = split.draft(state, bench.frozen, batch, jax.random.key(0))
      score = split.score_drafts(drafts)
      before = drafts.rollout.trajectory.before
      before = before.at[jnp.array([1, 6]), 0, 0].set(np.nan)
      trajectory = drafts.rollout.trajectory.replace(before=before)
      drafts = drafts.replace(
        rollout=drafts.rollout.replace(trajectory=trajectory)
      )
      _, metrics = split.learn_to_reason(state, bench.frozen, drafts, score)
    counts = jax.device_get(metrics[inspection.COUNTS])
    velocity = counts["scored"]["velocity of the policy"]
    assert set(np.flatnonzero(velocity)) == {1, 6}
    # Tokens run in the same pass as latents: a weight of 0 times NaN is NaN.
    logprob = counts["scored"]["log-probs of the policy"]
    assert set(np.flatnonzero(logprob)) <= {1, 6}
    assert counts["gradients"]["llm2vae"]["kernel"] > 0
    assert metrics["skipped"] == 1


def _run(*arguments: str) -> subprocess.CompletedProcess:
  flags = re.sub(
    r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
  )
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=1200,
  )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The workdir of a run that has stopped, and what it printed."""
  folder = tmp_path_factory.mktemp("large") / "model"
  tiny.write_model(folder)
  sizes = setup.build(tiny.make_config(folder)).pretrained.sizes
  weights = tiny.random_weights(sizes)
  weights["policy"]["llm2vae"]["kernel"] *= 1e30
  bagel_files.save(weights, sizes, folder)
  workdir = folder.parent / "workdir"
  changes = {
    "total_steps": 6,
    "health.max_skipped": 3,
    "checkpoint.every": 1,
    "reward.max_failed_fraction": 1.0,
  }
  settings = tiny.settings(folder) | changes
  done = _run(
    "launch/tpu.py",
    "--config=configs/r3_geneval.py:shapes",
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in settings.items()),
  )
  return workdir, done


@pytest.mark.slow
class TestCommand:
  """Weights that are finite and too large: every forward pass overflows."""

  def test_run_stops_with_one_line_and_code_1(self, stopped):
    workdir, done = stopped
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("r3jax: updates must be finite"), last
    assert "Traceback" not in done.stderr
    assert done.stderr.count("is not finite and is skipped") == 3
    assert (workdir / "checkpoints" / "2").is_dir()

  def test_replay_finds_the_first_number(self, stopped):
    workdir, _ = stopped
    done = _run("launch/replay.py", str(workdir / "skipped" / "step_000003"))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "iteration 3, repeated from iteration 2"
    assert lines[1] == "as in the run, the update of reason, edit is not finite"
    assert lines[2].startswith("reason, latents")
    assert any("gradient of" in line for line in lines)
