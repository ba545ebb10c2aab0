"""Tests of refusals: a clear message before any compilation, and nothing half-written."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from etils import epath
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from r3jax.checkpoint import convert
from r3jax.checkpoint import pretrained
from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.data import records
from r3jax.files import ownership
from r3jax.generation import draw
from r3jax.generation import edit
from r3jax.run import evaluation_job
from r3jax.run import sessions
from r3jax.run import setup
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def model(tiny_model, tmp_path):
  """A copy of the tiny model to break."""
  return pathlib.Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def refused(tiny_model, tmp_path, monkeypatch):
  """Returns the message of a run that must be refused before it compiles or writes."""

  def compiles(*_):
    raise AssertionError("the run went on to compile")

  monkeypatch.setattr(sessions.Session, "init", compiles)
  monkeypatch.setattr(sessions.Session, "compile", compiles)

  def message(changes: dict, folder: pathlib.Path = tiny_model) -> str:
    workdir = tmp_path / "workdir"
    with pytest.raises(ValueError) as error:
      sessions.prepare(
        tiny.make_config(
          folder, {"mesh.data": 8, "eval.batch_size": 8} | changes
        ),
        str(workdir),
      )
    assert not workdir.exists()
    return str(error.value)

  return message


def _edit(path: pathlib.Path, change):
  """Rewrites a safetensors file after `change` worked on its dict of tensors."""
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


class TestConfig:
  def test_group_size_that_does_not_divide_is_refused(self, refused):
    assert (
      "(2 * 3) must be divisible by the number of data replicas (8)"
      in refused({"group_size": 3})
    )

  def test_groups_that_straddle_replicas_are_refused(self, refused):
    message = refused({"groups_per_step": 3, "group_size": 8})
    assert (
      "groups_per_step (3) must be a multiple or a divisor of the number of data replicas (8)"
      in message
    )

  def test_group_of_one_is_refused(self, refused):
    assert "group_size must be a whole number in 2.." in refused(
      {"group_size": 1}
    )

  def test_mesh_that_is_not_all_devices_is_refused(self, refused):
    assert "must be the number of devices (8); got 3 * 1 * 1" in refused(
      {"mesh.data": 3}
    )

  def test_tensor_axis_that_does_not_divide_the_heads_is_refused(self, refused):
    message = refused({"mesh.data": 1, "mesh.tensor": 8})
    assert "must be divisible by their mesh axis" in message
    assert "['q']['kernel']: 4 by tensor=8" in message

  @pytest.mark.parametrize(
    "key, value, named",
    [
      ("model.dtype", "float8", "model.dtype must be one of"),
      (
        "model.attention",
        "flash",
        "model.attention must be one of 'auto', 'by_head', 'splash', 'xla'; got 'flash'",
      ),
      (
        "model.attention",
        "splash",
        "needs heads whose width is a multiple of 128; the model's are 8",
      ),
      (
        "step.micro_batches",
        3,
        "step.micro_batches (3) must split the samples of a data replica",
      ),
      (
        "sharding.rollout.mlp",
        ("data",),
        "every value is a tuple in which every item is one of 'fsdp', 'tensor'",
      ),
      ("reward.name", "pickle", "reward.name must be one of"),
      (
        "reward.value",
        "beauty",
        "reward.value must be 'score' or one of ['clutter', 'correct', 'strict']; got 'beauty'",
      ),
      ("sequence.parser", "regex", "sequence.parser must be"),
      ("step.mode", "pmap", "step.mode must be"),
      ("reason.renorm", "none", "renorm must be"),
      ("reason.eta_mode", "cosine", "reason.eta_mode must be one of"),
      ("reason.sde_index_max", 9, "reason.sde_index_max must be in 0..3"),
      ("reason.sde_index_max", 0, "reason.sde_index_max must be a whole"),
      ("seed", -1, "seed must be a whole number in 0..4294967295; got -1"),
      ("seed", 2**32, "in 0..4294967295; got 4294967296"),
      ("log.samples", -1, "log.samples must be a whole number in 0.."),
      ("loss.clip_range", -0.2, "loss.clip_range must be a number in"),
      ("reward.failure_window", 0, "reward.failure_window must be a whole"),
      ("text.top_k", 5, "set top_p or top_k, not both"),
      (
        "eval.batch_size",
        6,
        "eval.batch_size (6) must be divisible by the number of data replicas (8)",
      ),
      (
        "eval.points",
        1,
        "eval.points must be a whole number in 2..10000; got 1",
      ),
      ("eval.rounds", 0, "eval.rounds must be a whole number in 1..1000"),
      ("checkpoint.every", 0, "checkpoint.every must be a whole number in 1.."),
      ("checkpoint.keep", 0, "checkpoint.keep must be a whole number in 1.."),
      (
        "profile.steps",
        -1,
        "profile.steps must be a whole number in 0..2147483647; got -1",
      ),
      ("profile.steps", 2, "must be in 1..3 (total_steps); got 0..1"),
      (
        "profile",
        {"start": 3, "steps": 2},
        "must be in 1..3 (total_steps); got 3..4",
      ),
      ("model.remat", "some", "remat"),
      ("groups_per_step", 0, "groups_per_step must be a whole number in 1.."),
      ("reflect_rounds", -1, "reflect_rounds must be a whole number in 0.."),
      (
        "mesh.fsdp",
        0,
        "mesh.fsdp must be a whole number in 1..1000000; got 0",
      ),
      (
        "total_steps",
        -1,
        "total_steps must be a whole number in 0..2147483647; got -1",
      ),
      ("data.train", "", "data.train must name"),
      ("data.train", "/nowhere/prompts.jsonl", "/nowhere/prompts.jsonl"),
    ],
  )
  def test_value_that_cannot_be_is_refused(self, refused, key, value, named):
    assert named in refused({key: value})

  @pytest.mark.parametrize("split", ["train", "heldout"])
  def test_file_without_prompts_is_refused(self, refused, tmp_path, split):
    (tmp_path / "empty.jsonl").write_text("")
    message = refused({f"data.{split}": str(tmp_path / "empty.jsonl")})
    assert (
      f"{tmp_path / 'empty.jsonl'} must hold at least one prompt; there is none"
      in message
    )

  def test_prompt_longer_than_its_segment_is_refused(self, refused):
    message = refused({"sequence.prompt_tokens": 7})
    assert "a text must fit its segment" in message
    assert "exceed the capacity 7: 'a photo of" in message

  def test_heldout_prompt_longer_than_its_segment_is_refused(
    self, refused, tmp_path
  ):
    record = {
      "tag": "counting",
      "prompt": "a photo of" + " red" * 12,
      "include": [{"class": "ring", "count": 1}],
    }
    (tmp_path / "heldout.jsonl").write_text(json.dumps(record) + "\n")
    assert "exceed the capacity 12" in refused(
      {"data.heldout": str(tmp_path / "heldout.jsonl")}
    )

  def test_question_longer_than_its_segment_is_refused(self, refused):
    assert "exceed the capacity 8: 'The description" in refused(
      {"sequence.question_tokens": 8}
    )

  def test_record_of_unknown_words_is_refused(self, refused, tmp_path):
    record = {
      "tag": "single_object",
      "prompt": "a photo of a zebra",
      "include": [{"class": "ring", "count": 1}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    assert "unknown ['zebra']" in refused(
      {"data.train": str(tmp_path / "train.jsonl")}
    )


class TestModelFolder:
  def test_missing_folder_is_refused(self, refused, tmp_path):
    message = refused({"model.folder": str(tmp_path / "nothing")})
    assert "must be in a folder that exists; not found" in message
    assert str(tmp_path / "nothing") in message

  @pytest.mark.parametrize(
    "name",
    [
      "llm_config.json",
      "vit_config.json",
      "ema.safetensors",
      "ae.safetensors",
      "tokenizer.json",
    ],
  )
  def test_missing_file_is_named(self, refused, model, name):
    (model / name).unlink()
    assert name in refused({}, model)

  def test_wrong_tensors_are_all_named(self, refused, model):

    def change(tensors):
      del tensors[HEAD]
      tensors["surplus.weight"] = np.zeros(3, np.float32)
      tensors["vae2llm.bias"] = np.zeros(5, np.float32)

    _edit(model / "ema.safetensors", change)
    message = refused({}, model)
    for named in (HEAD, "surplus.weight", "vae2llm.bias", "(5,)"):
      assert named in message

  def test_truncated_file_is_refused(self, refused, model):
    path = model / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "ema.safetensors" in refused({}, model)

  def test_config_file_that_is_not_json_is_refused(self, refused, model):
    (model / "llm_config.json").write_text("{")
    assert "llm_config.json" in refused({}, model)

  def test_config_file_without_a_key_is_refused(self, refused, model):
    path = model / "llm_config.json"
    raw = json.loads(path.read_text())
    del raw["hidden_size"]
    path.write_text(json.dumps(raw))
    message = refused({}, model)
    assert "llm_config.json" in message and "hidden_size" in message

  def test_vocabulary_smaller_than_the_tokenizer_is_refused(
    self, refused, model
  ):
    path = model / "llm_config.json"
    path.write_text(
      json.dumps(json.loads(path.read_text()) | {"vocab_size": 90})
    )
    assert (
      "the tokenizer's ids (96) must fit the model's vocabulary (90)"
      in refused({}, model)
    )


class TestWorkdir:
  def _config(self, folder, changes=None):
    return tiny.make_config(
      folder, {"mesh.data": 8, "eval.batch_size": 8} | (changes or {})
    )

  @pytest.fixture
  def opened(self, tiny_model, tmp_path):
    """A workdir in which a run has begun."""
    workdir = tmp_path / "workdir"
    sessions.prepare(self._config(tiny_model), str(workdir))
    return workdir

  def test_second_run_is_refused_before_weights_are_read(
    self, tiny_model, opened, monkeypatch
  ):
    def reads(*_):
      raise AssertionError("weights are read")

    ownership.release_all()
    first = dataclasses.replace(
      ownership._this_process(),
      pid=os.getppid(),
      process_start=ownership._process_start(os.getppid()),
    )
    (opened / ownership.FILE).write_bytes(first.to_bytes())
    before = {path: path.read_bytes() for path in opened.iterdir()}
    monkeypatch.setattr(setup.Experiment, "start", reads)
    with pytest.raises(ValueError, match=f"; process {first.pid} of .* writes"):
      sessions.prepare(self._config(tiny_model), str(opened))
    assert {path: path.read_bytes() for path in opened.iterdir()} == before

  def test_file_in_place_of_the_folder_is_refused(self, tiny_model, tmp_path):
    (tmp_path / "workdir").write_text("mine")
    with pytest.raises(
      ValueError, match="workdir must be a writable folder, got '.*workdir'"
    ):
      sessions.prepare(self._config(tiny_model), str(tmp_path / "workdir"))
    assert (tmp_path / "workdir").read_text() == "mine"

  def test_run_of_another_config_is_refused_by_key(self, tiny_model, opened):
    before = {path: path.read_bytes() for path in opened.iterdir()}
    with pytest.raises(ValueError) as error:
      sessions.prepare(
        self._config(
          tiny_model, {"seed": 7, "optimizer.b2": 0.5, "total_steps": 9}
        ),
        str(opened),
      )
    lines = str(error.value).splitlines()[1:]
    assert lines == [
      "  optimizer.b2: 0.95 there, 0.5 now",
      "  seed: 0 there, 7 now",
    ]
    assert {path: path.read_bytes() for path in opened.iterdir()} == before

  def test_fewer_steps_than_are_done_are_refused(self, tiny_model, opened):
    before = (opened / "config.json").read_bytes()
    saved = training.Checkpoints(opened / "checkpoints", 1, 1)
    saved.save(3, {"x": np.zeros(1)}, pipeline.prompt_iterator(2, 1, 0), {})
    saved.close()
    with pytest.raises(
      ValueError,
      match=r"total_steps \(2\) must be at least the iterations done there \(3\)",
    ):
      sessions.prepare(
        self._config(tiny_model, {"total_steps": 2}), str(opened)
      )
    assert (opened / "config.json").read_bytes() == before

  def test_run_of_another_model_in_the_same_place_is_refused(
    self, model, tmp_path
  ):
    workdir = str(tmp_path / "workdir")
    sessions.prepare(self._config(model), workdir)
    _edit(
      model / "ema.safetensors",
      lambda tensors: tensors["llm2vae.bias"].fill(0.5),
    )
    with pytest.raises(
      ValueError, match='  weights: "[0-9a-f]{16}" there, "[0-9a-f]{16}" now$'
    ):
      sessions.prepare(self._config(model), workdir)

  def test_other_spelling_of_the_same_inputs_goes_on(
    self, model, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(setup.Experiment, "start", lambda *_: ({}, None))
    monkeypatch.chdir(tmp_path)
    workdir = str(tmp_path / "workdir")
    sessions.prepare(self._config(pathlib.Path("model")), workdir)
    shutil.copytree(model, tmp_path / "moved")
    spellings = {
      "model.folder": ["model/", str(model), "moved", "~/model"],
      "data.train": ["./model/train.jsonl", str(model / "train.jsonl")],
    }
    monkeypatch.setenv("HOME", str(tmp_path))
    for key, paths in spellings.items():
      for path in paths:
        sessions.prepare(
          self._config(pathlib.Path("model"), {key: path}), workdir
        )
        written = json.loads((tmp_path / "workdir/config.json").read_text())
        section, _, name = key.partition(".")
        assert written[section][name] == path

  def test_other_prompts_at_the_same_path_are_refused(
    self, model, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(setup.Experiment, "start", lambda *_: ({}, None))
    workdir = str(tmp_path / "workdir")
    sessions.prepare(self._config(model), workdir)
    lines = (model / "train.jsonl").read_text().splitlines(keepends=True)
    (model / "train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="\n  training_prompts: .* there"):
      sessions.prepare(self._config(model), workdir)

  def test_prompts_that_lack_what_the_reward_needs_are_named_by_line(
    self, refused, tmp_path
  ):
    (tmp_path / "own.txt").write_text("\na red ring\na bow\n")
    message = refused({"data.train": str(tmp_path / "own.txt")})
    head, *lines = message.splitlines()
    assert head == "2 problems with prompts:"
    for number, line in zip((2, 3), lines, strict=True):
      assert line.startswith(f"{tmp_path / 'own.txt'}:{number}: ")
      assert "the field include is missing" in line

  def test_listed_keys_may_differ_and_are_logged(
    self, tiny_model, opened, caplog
  ):
    changes = {
      "total_steps": 9,
      "log.samples": 1,
      "checkpoint.every": 5,
      "eval.points": 4,
    }
    with caplog.at_level("INFO", logger="absl"):
      sessions.prepare(self._config(tiny_model, changes), str(opened))
    for key, value in changes.items():
      assert (
        f"config {key} was {tiny.SETTINGS[key]}, is now {value}" in caplog.text
      )
    assert json.loads((opened / "config.json").read_text())["total_steps"] == 9


class TestOtherCommands:
  """Their folders are written after every check, too."""

  def test_evaluation_of_damaged_weights_writes_nothing(self, model, tmp_path):
    _edit(model / "ema.safetensors", lambda tensors: tensors.pop(HEAD))
    config = tiny.make_config(model, {"mesh.data": 8, "eval.batch_size": 8})
    with pytest.raises(ValueError, match=re.escape(HEAD)):
      evaluation_job.prepare(config, str(tmp_path / "evaluation"))
    assert not (tmp_path / "evaluation").exists()

  def test_evaluation_of_another_config_is_refused_before_weights_are_read(
    self, tiny_model, tmp_path, monkeypatch
  ):
    changes = {"mesh.data": 8, "eval.batch_size": 8}
    config = tiny.make_config(tiny_model, changes)
    evaluation_job.prepare(config, str(tmp_path))

    def reads(*_):
      raise AssertionError("weights were read")

    monkeypatch.setattr(pretrained.Pretrained, "load", reads)
    other = tiny.make_config(tiny_model, changes | {"eval.points": 4})
    with pytest.raises(ValueError, match="eval.points: 3 there, 4 now"):
      evaluation_job.prepare(other, str(tmp_path))

  @pytest.mark.parametrize(
    "changes, prompt, message",
    [
      ({"mesh.data": 3}, "a photo of a red ring", "the number of devices"),
      ({"eval.points": 1}, "a photo of a red ring", "eval.points must be"),
      ({"mesh.data": -1}, "a photo of a zebra", "unknown ['zebra']"),
    ],
  )
  def test_drawing_that_cannot_be_writes_nothing(
    self, tiny_model, tmp_path, changes, prompt, message
  ):
    config = tiny.make_config(tiny_model, changes)
    progress = draw.Progress(print, print, print)
    with pytest.raises(ValueError, match=re.escape(message)):
      draw.draw(
        config,
        [records.Prompt(tag="", text=prompt)],
        1,
        epath.Path(tmp_path / "out"),
        progress,
      )
    assert not (tmp_path / "out").exists()

  def test_conversion_into_a_file_is_refused_before_weights_are_read(
    self, tiny_model, tmp_path
  ):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="--out must be a writable folder"):
      convert.convert(
        str(tiny_model),
        epath.Path(tmp_path / "out"),
        "orbax",
        None,
        on_read=pytest.fail,
        on_write=pytest.fail,
      )
    assert (tmp_path / "out").read_text() == "mine"

  def test_edit_by_a_long_instruction_writes_nothing(
    self, tiny_model, tmp_path
  ):
    PIL.Image.new("RGB", (48, 48)).save(tmp_path / "image.png")
    config = tiny.make_config(tiny_model, {"mesh.data": -1})
    with pytest.raises(ValueError, match="a text must fit its segment"):
      edit.edit(
        config,
        str(tmp_path / "image.png"),
        "add a red ring at top " * 9,
        1,
        epath.Path(tmp_path / "out"),
        print,
      )
    assert not (tmp_path / "out").exists()


class TestCommand:
  """The command line turns a refusal into one message and an exit code."""

  @staticmethod
  def _run(tmp_path, *arguments):
    main = [
      "launch/tpu.py",
      "--config=configs/r3_geneval.py:shapes",
      f"--workdir={tmp_path / 'workdir'}",
    ]
    return TestCommand._start(*main, *arguments)

  @staticmethod
  def _start(*arguments):
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
      command,
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
    )

  def test_unknown_key_is_refused(self, tmp_path):
    found = self._run(tmp_path, "--config.group_sise=4")
    assert found.returncode != 0
    assert "group_sise" in found.stderr
    assert not (tmp_path / "workdir").exists()

  @pytest.mark.parametrize("name", ["tpu.py", "generate.py", "compile.py"])
  def test_config_files_import_each_other_wherever_they_are(
    self, tmp_path, name
  ):
    (tmp_path / "launch").mkdir()
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "launch" / name, tmp_path / "launch" / name)
    (tmp_path / "configs" / "only_here.py").write_text(
      "raise RuntimeError('it was found')"
    )
    (tmp_path / "configs" / "child.py").write_text(
      "from configs import only_here"
    )
    arguments = {
      "tpu.py": ["--workdir=w"],
      "generate.py": ["--prompt=p"],
      "compile.py": ["--topology=v5e:1x1"],
    }[name]
    found = self._start(
      str(tmp_path / "launch" / name),
      f"--config={tmp_path / 'configs' / 'child.py'}",
      *arguments,
    )
    assert found.returncode != 0 and "it was found" in found.stderr

  def test_missing_model_is_one_message_without_a_traceback(self, tmp_path):
    found = self._run(tmp_path, f"--config.model.folder={tmp_path / 'nothing'}")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(
      "r3jax: a model must be in a folder that exists; not found"
    )
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "workdir").exists()

  def test_supervised_start_that_is_no_model_is_one_message_and_writes_nothing(
    self, tmp_path
  ):
    out = tmp_path / "out"
    found = self._start(
      "launch/sft.py",
      "--config=configs/sft_shapes.py",
      f"--out={out}",
      f"--config.start={tmp_path / 'nothing'}",
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(
      "r3jax: a model must be in a folder that exists; not found"
    )
    assert not out.exists()
