"""Tests of data/sets.py."""

import dataclasses
import json

import pytest

from r3jax.data import records
from r3jax.data import sets
from r3jax.data.generators import ocr
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import world

RED, BLUE = (
  {
    "tag": "colors",
    "prompt": f"a photo of a {color} bench",
    "include": [{"class": "bench", "count": 1, "color": color}],
  }
  for color in ("red", "blue")
)
BENCH = {
  "tag": "single_object",
  "prompt": "a photo of a bench",
  "include": [{"class": "bench", "count": 1}],
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
  """Returns settings of three training prompts, one of which is the held-out one in other words."""
  monkeypatch.setenv("R3JAX_DATA", str(tmp_path / "data"))
  for name, objects in {
    "train": [RED, BLUE, BENCH],
    "test": [BENCH | {"prompt": "A photo of  the bench."}],
    "more": [RED | {"tag": "of another benchmark"}],
  }.items():
    (tmp_path / f"{name}.jsonl").write_text(
      "".join(json.dumps(obj) + "\n" for obj in objects)
    )
  return sets.Settings(
    benchmark="geneval",
    train=str(tmp_path / "train.jsonl"),
    heldout=str(tmp_path / "test.jsonl"),
    generated=100,
    generated_seed=0,
    more_tests=(),
    keep_tags=(),
    balance="none",
  )


def of(*objects):
  """Returns the prompts of JSON objects."""
  return [records.Prompt.from_json(obj) for obj in objects]


class TestLoad:
  def test_training_prompt_of_the_test_set_is_dropped(self, settings):
    found = sets.load(settings)
    assert found.train == of(RED, BLUE)
    assert found.heldout == of(BENCH | {"prompt": "A photo of  the bench."})
    assert (
      not found.contamination.contaminated
      and found.contamination.vanished == ("single_object",)
    )

  def test_kept_tag_makes_the_run_contaminated(self, settings, caplog):
    found = sets.load(
      dataclasses.replace(settings, keep_tags=("single_object",))
    )
    assert found.train == of(RED, BLUE, BENCH)
    assert found.contamination.contaminated

  def test_prompts_of_further_tests_are_dropped_and_not_evaluated(
    self, settings, tmp_path
  ):
    found = sets.load(
      dataclasses.replace(settings, more_tests=(str(tmp_path / "more.jsonl"),))
    )
    assert found.train == of(BLUE)
    assert len(found.heldout) == 1

  def test_generated_prompts_avoid_the_test_set(self, settings):
    found = sets.load(
      dataclasses.replace(settings, train="generated", generated=600)
    )
    assert found.contamination.tags["single_object"].total == 80
    assert (
      len(found.train)
      == 600
      - sum(overlap.dropped for overlap in found.contamination.tags.values())
      == 599
    )
    assert not [
      prompt for prompt in found.train if prompt.text == "a photo of a bench"
    ]

  def test_embedded_world_loses_nothing(self, settings):
    found = sets.load(
      dataclasses.replace(settings, train="world", heldout="world"),
      world.WORLD.records,
    )
    assert found.train == prompts.train_records()
    assert found.heldout == prompts.heldout_records()

  @pytest.mark.parametrize(
    "changes, message",
    [
      (
        {"heldout": ""},
        "data.heldout must name a file of prompts, as JSON lines or lines of text, or a URL",
      ),
      (
        {"train": "/nowhere.jsonl"},
        "data.train must name a file of prompts that can be read: .*/nowhere.jsonl",
      ),
      ({"more_tests": ("",)}, "data.more_tests must name"),
      (
        {"benchmark": "tiif", "train": "generated", "heldout": "world"},
        "data.benchmark is 'tiif'",
      ),
      ({"benchmark": "coco"}, "benchmark must be one of"),
    ],
  )
  def test_source_that_is_not_there_is_refused(
    self, settings, changes, message
  ):
    with pytest.raises(ValueError, match=message):
      sets.load(dataclasses.replace(settings, **changes), world.WORLD.records)

  def test_empty_file_of_further_tests_is_refused(self, settings, tmp_path):
    (tmp_path / "more.txt").write_text("\n")
    more = dataclasses.replace(
      settings, more_tests=(str(tmp_path / "more.txt"),)
    )
    with pytest.raises(ValueError, match="data.more_tests must name files"):
      sets.load(more)

  def test_own_prompts_need_no_more_than_their_text(self, settings, tmp_path):
    (tmp_path / "own.txt").write_text("a red cat\na photo of a bench.\n")
    own = dataclasses.replace(settings, train=str(tmp_path / "own.txt"))
    loaded = sets.load(own)
    assert loaded.train == [records.Prompt("untagged", "a red cat")]
    overlap = loaded.contamination.tags["untagged"]
    assert (overlap.total, overlap.folded, overlap.include) == (2, 1, 0)

  def test_test_set_of_a_benchmark_is_generated(self, settings):
    own = dataclasses.replace(
      settings, benchmark="ocr", train="generated", heldout="generated"
    )
    loaded = sets.load(own)
    assert loaded.heldout == ocr.heldout()
    with pytest.raises(
      ValueError, match="data.heldout may be 'generated' for .'ocr'. and"
    ):
      sets.load(dataclasses.replace(own, benchmark="tiif"))

  def test_inscriptions_are_read_out_of_quotes(self, settings, tmp_path):
    """In every file: of training, of the test set, of further tests."""
    texts = {
      "own": 'a cup, "One"\na cup, "Two"\na cup, "Three"\na cup\n',
      "test": "a mug, “ONE”\n",
      "more": 'a bus that says "two"\n',
    }
    for name, text in texts.items():
      (tmp_path / f"{name}.txt").write_text(text)
    own = dataclasses.replace(
      settings,
      benchmark="ocr",
      train=str(tmp_path / "own.txt"),
      heldout=str(tmp_path / "test.txt"),
      more_tests=(str(tmp_path / "more.txt"),),
    )
    loaded = sets.load(own)
    assert [prompt.inscription for prompt in loaded.heldout] == ["ONE"]
    assert [prompt.inscription for prompt in loaded.train] == ["Three", None]
    assert sets.places(own)[loaded.train[0]] == f"{own.train}:3"
    # Another benchmark leaves texts alone.
    geneval = dataclasses.replace(own, benchmark="geneval")
    assert len(sets.load(geneval).train) == 4

  def test_places_are_lines_of_files(self, settings):
    loaded = sets.load(settings)
    places = sets.places(settings)
    assert places[loaded.train[1]] == f"{settings.train}:2"
    assert places[loaded.heldout[0]] == f"{settings.heldout}:1"

  @pytest.mark.parametrize("name", ["train", "heldout"])
  def test_prompts_of_no_world_are_refused(self, settings, name):
    with pytest.raises(
      ValueError, match=f"data.{name} is 'world', so config.world must name"
    ):
      sets.load(dataclasses.replace(settings, **{name: "world"}))
