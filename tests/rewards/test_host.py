"""Tests of calls to the host from inside a mapped program, on one device and on a 2x2x2 mesh."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from r3jax import types
from r3jax.data import records
from r3jax.files import jsonl
from r3jax.parallel import meshes
from r3jax.rewards import combine
from r3jax.rewards import outcome
from r3jax.rewards.from_host import scorer as scorer_lib
from r3jax.sequence import host_parser
from r3jax.sequence import thoughts
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import vocabulary

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = (
  "<think> a red ring </think>",
  "<think> a red ring </think> add a blue bow",
  "<think> </think> no further edit needed",
  "<think> a red ring </think> change </think> the ring",
  "a red ring",
  "<think> <think> a </think> add a ring",
  "</think> add a red ring and a blue bow and a green heart",
  "<think> no further edit </think> a ring",
)


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=["one device", "2x2x2"])
def mesh(request):
  return meshes.make_mesh_on(
    jax.devices()[: np.prod(request.param)], *request.param
  )


def _mapped(mesh, function, *arguments):
  """Runs a function over rows as the step does: mapped over `data`, else left to the compiler."""
  rows = jax.sharding.PartitionSpec("data")
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(
      function,
      in_specs=rows,
      out_specs=rows,
      axis_names={"data"},
      check_vma=False,
    )
    return jax.device_get(jax.jit(mapped)(*arguments))


def _images(number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns different images and a target for each."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (number, 4, 4, 3), np.uint8), {
    "wanted": np.arange(number, dtype=np.int32)
  }


def _brightness(images, target) -> types.Score:
  """Scores images by their brightness plus what is wanted, in numpy."""
  bright = np.asarray(images).mean(axis=(1, 2, 3), dtype=np.float32)
  value = bright + np.asarray(target["wanted"], np.float32)
  return types.Score(value, bright > 0, {"bright": bright})


class TestRewardFromHost:
  @pytest.mark.parametrize("rows", [8, 6], ids=["even", "padded"])
  def test_every_image_is_scored_once_with_its_target(self, mesh, rows):
    images, target = _images(rows)
    seen = []

    def reward(images, target):
      seen.extend(np.asarray(image).tobytes() for image in images)
      return _brightness(images, target)

    found = _mapped(
      mesh,
      scorer_lib.reward_from_host(reward, ("bright",), mesh),
      images,
      target,
    )
    jax.tree.map(
      np.testing.assert_array_equal, found, _brightness(images, target)
    )
    shards, replicas = (
      mesh.shape["fsdp"] * mesh.shape["tensor"],
      mesh.shape["data"],
    )
    padding = -(rows // replicas) % shards * replicas
    assert len(seen) == rows + padding
    assert set(seen) == {image.tobytes() for image in images}

  def test_rows_that_are_not_needed_are_not_scored(self, mesh):
    images, target = _images(8)
    needed = np.array([1, 0, 0, 1, 0, 0, 0, 1], bool)
    seen = []

    def reward(images, target):
      seen.extend(target["wanted"].tolist())
      return _brightness(images, target)

    found = _mapped(
      mesh,
      scorer_lib.reward_from_host(reward, ("bright",), mesh),
      images,
      target,
      needed,
    )
    assert sorted(seen) == [0, 3, 7]
    np.testing.assert_array_equal(found.valid, needed)
    expected = _brightness(images, target)
    for ours, theirs in (
      (found.value, expected.value),
      (found.parts["bright"], expected.parts["bright"]),
    ):
      np.testing.assert_array_equal(ours, np.where(needed, theirs, np.nan))

  def test_missing_score_stays_missing(self, mesh):
    images, target = _images(8)
    images[:3], images[3:] = 200, 50

    def reward(images, target):
      bright = np.asarray(images).mean(axis=(1, 2, 3)) > 128
      value = np.where(bright, 0.5, np.nan).astype(np.float32)
      return types.Score(value, bright, {})

    found = _mapped(
      mesh, scorer_lib.reward_from_host(reward, (), mesh), images, target
    )
    assert found.valid.tolist() == [True] * 3 + [False] * 5
    assert found.value[:3].tolist() == [0.5] * 3


PROMPTS = [records.Prompt("t", f"number {i}") for i in range(10)]


class Numbered:
  """Scores the prompt's number over ten; some numbers fail, are invalid, or break the reward."""

  parts = ("strict",)

  def __init__(self, broken=()):
    self.broken = broken

  def check(self, prompt):
    if prompt.text == "nothing":
      raise ValueError("there is nothing to ask")

  def score(self, images, prompts):
    return [self._outcome(int(prompt.text.split()[1])) for prompt in prompts]

  def _outcome(self, number: int):
    if number in self.broken:
      raise ZeroDivisionError("a bug")
    if number == 3:
      return outcome.Failed("down")
    return (
      outcome.Invalid("odd")
      if number == 7
      else outcome.Ok(number / 10, {"strict": 0.0}, {"answer": "é"})
    )

  def describe(self):
    return {"model": "m"}

  def metrics(self):
    return {"requests": 1.0}


class TestScorer:
  def test_every_row_gets_the_outcome_of_its_record(self, mesh, tmp_path):
    scorer = scorer_lib.Scorer(Numbered())
    scorer.encode(PROMPTS[:2])
    rows = scorer.encode(PROMPTS[2:])
    assert rows.tolist() == list(range(2, 10))
    scorer.log_to(tmp_path / "rewards" / "a.jsonl", 0)
    scorer.step = 5
    found = _mapped(
      mesh, scorer.on(mesh), np.zeros((8, 4, 4, 3), np.uint8), rows
    )
    scorer.flush()
    assert found.valid.tolist() == [number not in (3, 7) for number in rows]
    # Number 3 fails, 7 is invalid.
    expected = np.float32([0.2, np.nan, 0.4, 0.5, 0.6, -np.inf, 0.8, 0.9])
    np.testing.assert_array_equal(found.value, expected)
    lines = jsonl.read(tmp_path / "rewards" / "a.jsonl")
    assert sorted(line["prompt"] for line in lines) == sorted(
      prompt.text for prompt in PROMPTS[2:]
    )
    assert {line["step"] for line in lines} == {5}
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert (failed["prompt"], failed["reason"]) == ("number 3", "down")
    metrics = scorer.metrics()
    assert metrics == {
      "requests": 1,
      "images_ok": 6,
      "images_failed": 1,
      "images_invalid": 1,
    }
    assert scorer.metrics()["images_ok"] == 0

  def test_reason_of_a_missing_score_is_known_until_the_next_flush(self):
    scorer = scorer_lib.Scorer(Numbered())
    reward = combine.on_host("judge", scorer)
    assert reward.failure() == ""
    failed = [outcome.Ok(1.0, {"strict": 1.0}), outcome.Failed("HTTP 503")]
    scorer._record(PROMPTS[:2], failed)
    reward.raise_together()
    assert reward.failure() == "judge: HTTP 503"
    reward.raise_together()
    assert reward.failure() == ""

  def test_bug_is_kept_and_scores_nothing(self, mesh):
    scorer = scorer_lib.Scorer(Numbered(broken=range(10)))
    rows = scorer.encode(PROMPTS[:8])
    found = _mapped(
      mesh, scorer.on(mesh), np.zeros((8, 4, 4, 3), np.uint8), rows
    )
    assert not found.valid.any() and np.isnan(found.value).all()
    assert isinstance(scorer.error, ZeroDivisionError)

  def test_lines_of_repeated_steps_are_dropped(self, tmp_path):
    scorer, path = scorer_lib.Scorer(Numbered()), tmp_path / "a.jsonl"
    rows = scorer.encode(PROMPTS[:1])
    scorer.log_to(path, 0)
    for scorer.step in (0, 1, 2):
      scorer._score(np.zeros((1, 4, 4, 3), np.uint8), rows)
      scorer.flush()
    scorer_lib.Scorer(Numbered()).log_to(path, 1)
    assert [line["step"] for line in jsonl.read(path)] == [0, 1]

  def test_record_that_cannot_be_asked_about_is_refused(self):
    with pytest.raises(ValueError, match="there is nothing to ask"):
      scorer_lib.Scorer(Numbered()).encode(
        PROMPTS + [records.Prompt("t", "nothing")]
      )


# Two devices on two threads, each with more to hand over than JAX copies in place (100 kB).
LARGE = """
import jax, numpy as np
from r3jax import types
from r3jax.parallel import meshes
from r3jax.rewards.from_host import scorer

def reward(images, rows):
  value = np.asarray(images).mean((1, 2, 3)).astype(np.float32)
  return types.Score(value, np.ones(len(rows), bool), {})

mesh, rows = meshes.make_mesh(2, 1, 1), jax.sharding.PartitionSpec("data")
score = scorer.reward_from_host(reward, (), mesh)
images = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3)).astype(np.uint8)
with jax.set_mesh(mesh):
  mapped = jax.shard_map(score, in_specs=rows, out_specs=rows, axis_names={"data"}, check_vma=False)
  for _ in range(5):
    found = jax.device_get(jax.jit(mapped)(images, np.arange(8)))
np.testing.assert_allclose(found.value, images.mean((1, 2, 3)), rtol=1e-6)
"""


class TestLargeImages:
  def test_no_device_waits_for_a_copy_by_the_others(self):
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "NPROC": "2",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    subprocess.run(
      [sys.executable, "-c", LARGE], env=environment, check=True, timeout=120
    )


class TestParseOnHost:
  @pytest.mark.parametrize("stage", ["reason", "reflect"])
  def test_parsed_is_that_of_the_graph(self, mesh, stage):
    tokenizer = tokenization.TextTokenizer(vocabulary.build_tokenizer())
    segments = [tokenizer.segment(text, 16) for text in TEXTS]
    ids, lengths = (
      np.stack(column).astype(np.int32) for column in zip(*segments)
    )
    tags = thoughts.tag_ids(tokenizer)

    def in_graph(ids, lengths):
      return thoughts.parse_tokens(ids, lengths, stage, tags, 9)

    on_host = host_parser.parse_on_host(tokenizer, 9, mesh)
    found = _mapped(
      mesh, lambda ids, lengths: on_host(ids, lengths, stage), ids, lengths
    )
    expected = _mapped(mesh, in_graph, ids, lengths)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.format.sum() == {"reason": 1, "reflect": 3}[stage]
    assert found.truncated.any() and not found.truncated.all()
