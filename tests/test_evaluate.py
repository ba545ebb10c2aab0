"""Tests of launch/evaluate.py: goes on after SIGKILL, labels, compares, swaps the judge."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from r3jax.data import records
from r3jax.evaluation import finished
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import sample_log
from r3jax.model import preprocess
from r3jax.run import workdir as workdir_lib
from r3jax.worlds.shapes import labelled_set
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {
  "eval.prompts": 12,
  "eval.images_per_prompt": 2,
  "eval.rounds": 3,
  "eval.ask": "('match','count')",
}


def start(*arguments: str, log: pathlib.Path) -> subprocess.Popen:
  flags = re.sub(
    r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
  )
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
  with log.open("a") as file:
    return subprocess.Popen(
      [sys.executable, "launch/evaluate.py", *arguments],
      cwd=ROOT,
      env=environment,
      stdout=file,
      stderr=file,
    )


def run(*arguments: str, log: pathlib.Path) -> str:
  process = start(*arguments, log=log)
  assert process.wait(timeout=1200) == 0, log.read_text()[-3000:]
  return log.read_text()


def write_labelled(folder: pathlib.Path) -> pathlib.Path:
  """Writes a file of six labelled images, right and wrong ones; returns its path."""
  path = folder / "labelled.jsonl"
  if not path.exists():
    images = labelled_set.load()[:6]
    for image in images:
      name = folder / image.labels()["image"]
      name.write_bytes(preprocess.png(image.pixels))
    lines = [json.dumps(image.labels()) for image in images]
    path.write_text("\n".join(lines) + "\n")
  return path


def flags_of(
  model: pathlib.Path, workdir: pathlib.Path, **changes
) -> list[str]:
  labelled = {"eval.labelled_images": write_labelled(model.parent)}
  settings = tiny.settings(model) | SETTINGS | labelled | changes
  return [
    "--config=configs/r3_geneval.py:shapes",
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in settings.items()),
  ]


@pytest.fixture(name="evaluated", scope="module")
def fixture_evaluated(tiny_model, tmp_path_factory):
  """An evaluation that was killed and went on, and one that was not."""
  folder = tmp_path_factory.mktemp("evaluated")
  killed = start(
    *flags_of(tiny_model, folder / "killed"), log=folder / "killed.log"
  )
  while not (folder / "killed" / "samples.jsonl").exists():
    assert killed.poll() is None, (folder / "killed.log").read_text()[-3000:]
    time.sleep(0.005)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  written = sample_log.read(folder / "killed")
  run(*flags_of(tiny_model, folder / "killed"), log=folder / "killed.log")
  run(*flags_of(tiny_model, folder / "whole"), log=folder / "whole.log")
  return folder, written


class TestEvaluate:
  def test_goes_on_to_the_same_result(self, evaluated):
    folder, written = evaluated

    def plain(name):
      return [
        dataclasses.replace(
          sample,
          turns=[dataclasses.replace(turn, seconds=0) for turn in sample.turns],
        )
        for sample in sample_log.read(folder / name)
      ]

    answers, again = (
      labelled_questions.read(folder / name) for name in ("whole", "killed")
    )
    assert answers == again and len(answers) > 12
    assert 0 < len(written) < 24
    assert plain("killed") == plain("whole") and len(plain("whole")) == 24
    # not drawn again
    assert sample_log.read(folder / "killed")[: len(written)] == written

  def test_files_are_as_documented(self, evaluated):
    folder, _ = evaluated
    assert {path.name for path in (folder / "whole").iterdir()} == {
      "config.json",
      "settings.json",
      "samples.jsonl",
      "labelled.jsonl",
      "images",
      "summary.json",
      "tables.md",
      "tables",
      "index.html",
    }
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert (
      len(summary["rounds"]) == 3 and summary["leaked"]["complete"] is False
    )
    assert set(summary["understanding"]) == {
      "match",
      "count",
      "match, last image",
      "count, last image",
    }
    assert {"judgement", "match"} <= set(summary["labelled"])
    assert summary["labelled"]["judgement"]["questions"] == 6
    log = (folder / "whole.log").read_text()
    assert "questions about labelled images" in log
    assert "is not known in full" in log and "| draft |" in log
    assert "evaluating iteration 0: 24 samples of" in log
    assert "evaluated 24/24 samples" in log
    resumed = (folder / "killed.log").read_text()
    assert f"; {len(evaluated[1])} are there already" in resumed

  def test_another_config_in_the_folder_is_refused(
    self, evaluated, tiny_model, tmp_path
  ):
    folder, _ = evaluated
    process = start(
      *flags_of(tiny_model, folder / "whole", **{"eval.points": 4}),
      log=tmp_path / "log",
    )
    assert process.wait(timeout=600) == 1
    assert "eval.points: 3 there, 4 now" in (tmp_path / "log").read_text()

  def test_comparison_of_two(self, evaluated, tmp_path):
    folder, _ = evaluated
    said = run(
      "compare",
      str(folder / "whole"),
      str(folder / "killed"),
      f"--workdir={tmp_path / 'out'}",
      log=tmp_path / "log",
    )
    assert "| labelled images, judgement |" in said
    assert (
      "+0.000 [+0.000, +0.000]" in said
      and (tmp_path / "out" / "by_round.svg").exists()
    )
    assert said.rstrip().endswith(f"files: {tmp_path / 'out'}")

  def test_judge_swap_with_the_same_judge_agrees(
    self, evaluated, tiny_model, tmp_path
  ):
    folder, _ = evaluated
    said = run(
      "rescore",
      str(folder / "whole"),
      "--judge=again",
      *flags_of(tiny_model, tmp_path)[:1],
      *flags_of(tiny_model, tmp_path)[2:],
      log=tmp_path / "log",
    )
    assert "| all |" in said
    found = json.loads(
      (folder / "whole" / "judges" / "again.json").read_text()
    )["agreement"]["all"]
    assert found["agreement"] == 1.0 and found["difference"] == [0.0, 0.0, 0.0]


def prompt_of(text):
  return records.Prompt("t", text, (records.Expectation("cat", 1),))


class TestTrainedOn:
  def test_runs_upon_runs_are_added_up(self, tmp_path):
    for name, before in (("a", "world"), ("b", str(tmp_path / "a"))):
      (tmp_path / name).mkdir()
      (tmp_path / name / "config.json").write_text(
        json.dumps({"model": {"folder": before}})
      )
      workdir_lib.write_training_prompts(
        tmp_path / name, (prompt_of(name),) * 2
      )
    prompts, complete = workdir_lib.trained_on(str(tmp_path / "b"))
    assert prompts == [prompt_of("a"), prompt_of("b")] and complete

  def test_prompts_that_are_not_those_of_the_run_are_refused(self, tmp_path):
    prompts = (prompt_of("a"), prompt_of("b"))
    config = {"model": {"folder": "world"}}
    config["distinct_training_prompts"] = records.sha256(prompts)
    (tmp_path / "config.json").write_text(json.dumps(config))
    workdir_lib.write_training_prompts(tmp_path, prompts * 2)
    assert workdir_lib.trained_on(str(tmp_path)) == (list(prompts), True)
    path = tmp_path / "training_prompts.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="must hold what the run was trained"):
      workdir_lib.trained_on(str(tmp_path))

  def test_a_folder_of_no_run_is_not_known(self, tmp_path):
    assert workdir_lib.trained_on(str(tmp_path)) == ([], False)
    assert workdir_lib.trained_on("world") == ([], True)

  def test_what_a_run_on_an_unknown_model_was_trained_on_is_known_in_part(
    self, tmp_path
  ):
    (tmp_path / "config.json").write_text(
      json.dumps({"model": {"folder": str(tmp_path / "base")}})
    )
    prompt = records.Prompt.from_json(
      {
        "prompt": "a ring",
        "tag": "t",
        "include": [{"class": "ring", "count": 1}],
      }
    )
    workdir_lib.write_training_prompts(tmp_path, (prompt,))
    assert workdir_lib.trained_on(str(tmp_path)) == ([prompt], False)


class TestMessages:
  @pytest.mark.parametrize(
    "arguments, message",
    [
      (["compare", "--workdir=out"], "at least two evaluations must be given"),
      (["--workdir=out"], "--config must name a config file"),
      (
        [
          "rescore",
          "here",
          "--config=configs/r3_geneval.py:shapes",
          "--judge=a/b",
        ],
        "--judge must be letters, digits",
      ),
      (
        ["rescore", ".", "--config=configs/r3_geneval.py:shapes", "--judge=b"],
        "there are no samples in .",
      ),
    ],
  )
  def test_what_cannot_be_is_one_line(self, tmp_path, arguments, message):
    assert start(*arguments, log=tmp_path / "log").wait(timeout=300) == 1
    said = (tmp_path / "log").read_text()
    assert message in said and "Traceback" not in said


class TestWorkdir:
  def test_evaluations_that_are_repeated_are_dropped(self, tmp_path):
    files = workdir_lib.Workdir(epath.Path(tmp_path))
    files.drop_evaluations_after(0)  # there is none
    for step in (0, 20, 40):
      files.evaluation(step).mkdir(parents=True)
      (files.evaluation(step) / "summary.json").write_text("{}")
    files.drop_evaluations_after(20)
    assert sorted(
      path.name for path in (tmp_path / "evaluation").iterdir()
    ) == ["step_000000", "step_000020"]

  @pytest.mark.parametrize(
    "name",
    [".DS_Store", ".ipynb_checkpoints", "step_000040 (copy)", "notes", "step_"],
  )
  def test_what_others_left_among_the_evaluations_stays(self, tmp_path, name):
    files = workdir_lib.Workdir(epath.Path(tmp_path))
    for step in (0, 40):
      files.evaluation(step).mkdir(parents=True)
    (tmp_path / "evaluation" / name).mkdir()
    (tmp_path / "evaluation" / "step_000041").write_text("a file")
    assert list(finished.step_folders(files.path)) == [0, 40]
    files.drop_evaluations_after(4)
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {
      "step_000000",
      "step_000041",
      name,
    }
