"""`launch/generate.py` and `launch/convert.py` as a user runs them."""

import html
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from r3jax.worlds.shapes import prompts

ROOT = pathlib.Path(__file__).parents[1]
RECORD = prompts.heldout_records()[0]
OTHER = "a photo of a red ring and a ring"  # no prompt of the world's


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, f"launch/{program}.py", *arguments]
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_NUM_CPU_DEVICES": "1",
  }
  environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  return subprocess.run(
    command,
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=600,
  )


def _refusal(program: str, *arguments: str) -> str:
  found = _run(program, *arguments)
  assert found.returncode == 1, found.stderr
  return found.stderr.splitlines()[-1]


def _arguments(model: pathlib.Path, folder: pathlib.Path) -> list[str]:
  few = ["--num_images=2", "--rounds=2", "--points=3"]
  return [
    f"--model={model}",
    f"--prompts={folder / 'prompts.txt'}",
    f"--out={folder / 'out'}",
    *few,
  ]


@pytest.fixture(scope="module")
def drawn(tiny_model, tmp_path_factory):
  """What the command left in the folder of two prompts, and what it printed."""
  folder = tmp_path_factory.mktemp("generate")
  (folder / "prompts.txt").write_text(
    json.dumps(RECORD.to_json()) + "\n\n" + OTHER + "\n"
  )
  found = _run("generate", *_arguments(tiny_model, folder))
  assert found.returncode == 0, found.stderr
  return folder, found.stdout


class TestGenerate:
  def test_writes_every_image_of_every_round_and_what_was_said(self, drawn):
    folder, printed = drawn
    samples = [
      json.loads(path.read_text())
      for path in sorted((folder / "out").glob("0*.json"))
    ]
    assert [
      (s["prompt"], s["prompt_number"], s["image_number"]) for s in samples
    ] == [
      (RECORD.text, 0, 0),
      (RECORD.text, 0, 1),
      (OTHER, 1, 0),
      (OTHER, 1, 1),
    ]
    for sample in samples:
      assert (
        sample["size"] == [48, 48]
        and len(sample["turns"]) == 2
        and sample["seed"] == 0
      )
      for turn in sample["turns"]:
        assert np.asarray(
          PIL.Image.open(folder / "out" / turn["image"])
        ).shape == (48, 48, 3)
        assert turn["text"] in printed and turn["seconds"] > 0
        assert (turn["score"] is not None) == (sample["prompt"] == RECORD.text)

  def test_the_page_shows_all_of_it_escaped(self, drawn):
    folder, _ = drawn
    page = (folder / "out" / "index.html").read_text()
    for path in (folder / "out").glob("0*.json"):
      for turn in json.loads(path.read_text())["turns"]:
        assert f'src="{turn["image"]}"' in page
        assert html.escape(turn["text"]) in page

  def test_goes_on_where_it_stopped_with_the_same_images(
    self, drawn, tiny_model
  ):
    folder, _ = drawn
    before = {
      path.name: path.read_bytes() for path in (folder / "out").glob("*.png")
    }
    (folder / "out" / "00001_01.json").unlink()
    (folder / "out" / "00001_01_1.png").unlink()
    found = _run("generate", *_arguments(tiny_model, folder))
    assert found.returncode == 0, found.stderr
    assert OTHER in found.stdout and RECORD.text not in found.stdout
    assert {
      path.name: path.read_bytes() for path in (folder / "out").glob("*.png")
    } == before

  def test_a_config_gives_the_defaults_of_the_flags(self, drawn, tiny_model):
    config = [
      "--config=configs/r3_geneval.py:shapes",
      "--config.eval.temperature=0.9",
    ]
    found = _run("generate", *_arguments(tiny_model, drawn[0]), *config)
    assert found.returncode == 1
    assert (
      "eval.temperature: 0.3 there, 0.9 now" in found.stderr
      and "eval.seed: 0 there, 1 now" in found.stderr
    )
    assert "eval.points" not in found.stderr

  def test_refuses_to_mix_two_seeds_in_a_folder(self, drawn, tiny_model):
    found = _run("generate", *_arguments(tiny_model, drawn[0]), "--seed=1")
    assert found.returncode == 1
    assert "eval.seed: 0 there, 1 now" in found.stderr

  def test_more_images_and_prompts_keep_those_that_are_there(
    self, drawn, tiny_model
  ):
    folder, _ = drawn
    before = {
      path.name: path.read_bytes()
      for path in (folder / "out").iterdir()
      if path.stem[:1] == "0"
    }
    with (folder / "prompts.txt").open("a") as file:
      file.write("a photo of a bow\n")
    found = _run("generate", *_arguments(tiny_model, folder), "--num_images=3")
    assert found.returncode == 0, found.stderr
    after = {
      path.name: path.read_bytes()
      for path in (folder / "out").iterdir()
      if path.stem[:1] == "0"
    }
    assert {name: after[name] for name in before} == before
    assert {"00000_02.json", "00001_02.json", "00002_00.json"} <= after.keys()

  def test_refuses_another_prompt_of_the_same_number(
    self, drawn, tiny_model, tmp_path
  ):
    (tmp_path / "prompts.txt").write_text("a photo of a heart\n")
    changed = [
      *_arguments(tiny_model, drawn[0]),
      f"--prompts={tmp_path / 'prompts.txt'}",
    ]
    message = _refusal("generate", *changed)
    assert (
      f"prompt 0 must be {RECORD.text!r} as in" in message
      and "it is 'a photo of a heart'" in message
    )

  @pytest.mark.parametrize(
    "lines, messages",
    [
      (
        ['{"prompt": 3}', "{broken", "a photo of a ring"],
        [
          "txt:1: prompt must be a non-empty string",
          "txt:2: the line must be JSON",
        ],
      ),
      (["", " "], ["txt has none"]),
      (
        ["a photo of a dragon"],
        ["unknown ['dragon'] in 'a photo of a dragon'"],
      ),
      (
        [
          json.dumps(
            {
              "prompt": "a photo of a ring",
              "include": [{"class": "dragon", "count": 1}],
            }
          )
        ],
        ["cannot encode the record"],
      ),
    ],
  )
  def test_bad_prompts_are_named_before_anything_is_drawn(
    self, tiny_model, tmp_path, lines, messages
  ):
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    found = _run("generate", *_arguments(tiny_model, tmp_path))
    assert found.returncode == 1 and all(
      message in found.stderr for message in messages
    ), found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "out").exists()

  @pytest.mark.parametrize(
    "arguments, message",
    [
      (
        [],
        "r3jax: one of --prompt, --prompts, --instruction, --question must be given; got none",
      ),
      (
        ["--prompt=a ring", "--question=why ?"],
        "must be given; got ['--prompt', '--question']",
      ),
      (["--instruction=add a ring"], "--image must name the image to edit"),
      (["--prompt=a ring"], "--out must name the folder to write"),
      (
        ["--image=setup.py", "--question=why ?", "--points=9"],
        "Unknown command line flag 'points'",
      ),
      (
        ["--image=setup.py", "--question=why ?"],
        "--image must be an image file: setup.py must be an image file, one of PNG",
      ),
      (
        ["--image=nothing.png", "--question=why ?"],
        "--image must be an image file: [Errno 2]",
      ),
    ],
  )
  def test_says_what_is_missing(self, arguments, message):
    assert message in _refusal("generate", *arguments)


class TestReviseAnImage:
  def test_edits_and_answers(self, drawn, tiny_model, tmp_path):
    image = f"--image={drawn[0] / 'out' / '00000_00_0.png'}"
    few = [f"--model={tiny_model}", "--points=3"]
    found = _run(
      "generate",
      *few,
      image,
      "--instruction=add a red ring",
      f"--out={tmp_path}",
      "--num_images=2",
    )
    assert found.returncode == 0, found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
      "edit.json",
      "edit_00.png",
      "edit_01.png",
    ]
    assert (
      json.loads((tmp_path / "edit.json").read_text())["instruction"]
      == "add a red ring"
    )
    again = _refusal(
      "generate", *few, image, "--instruction=add a ring", f"--out={tmp_path}"
    )
    assert "edits are never overwritten" in again
    found = _run(
      "generate", f"--model={tiny_model}", image, "--question=what is there ?"
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 1


class TestConvert:
  def test_there_and_back_gives_the_same_bytes(self, tiny_model, tmp_path):
    for source, out, form in (
      (tiny_model, "orbax", "orbax"),
      (tmp_path / "orbax", "bagel", "bagel"),
    ):
      found = _run(
        "convert",
        f"--source={source}",
        f"--out={tmp_path / out}",
        f"--format={form}",
      )
      assert found.returncode == 0, found.stderr
      assert found.stdout == f"wrote {tmp_path / out}\n"
      assert "100%" in found.stderr
    for name in (
      "ema.safetensors",
      "ae.safetensors",
      "tokenizer.json",
      "llm_config.json",
    ):
      assert (tmp_path / "bagel" / name).read_bytes() == (
        tiny_model / name
      ).read_bytes()

  def test_refuses_a_folder_with_a_model_and_a_missing_source(
    self, tiny_model, tmp_path
  ):
    message = _refusal(
      "convert", "--source=shapes", f"--out={tiny_model}", "--format=bagel"
    )
    assert (
      f"another folder than {tiny_model}, which has ae.safetensors, ema.safetensors"
      in message
    )
    message = _refusal(
      "convert",
      f"--source={tmp_path / 'no'}",
      f"--out={tmp_path / 'out'}",
      "--format=bagel",
    )
    assert "must be in a folder that exists; not found" in message
    assert not (tmp_path / "out").exists()
