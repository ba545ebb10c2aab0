"""Tests of data/labelled_images.py."""

import json

import numpy as np
from PIL import Image
import pytest

from r3jax.data import labelled_images

LINE = {
  "image": "a.png",
  "prompt": "a photo of a cat",
  "matches": True,
  "questions": [
    {"kind": "count", "question": "How many cats?", "answer": "one"}
  ],
}


def write(folder, *lines, name="labels.jsonl"):
  """Writes images a.png and b.png of 4 x 6 pixels, and a file of labels; returns its path."""
  for number, image in enumerate(("a.png", "b.png")):
    pixels = np.full((4, 6, 3), 50 * number, np.uint8)
    Image.fromarray(pixels).save(folder / image)
  path = folder / name
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def test_a_file_is_read_with_its_pixels(tmp_path):
  other = {"image": "b.png", "prompt": "a dog", "matches": False, "tag": "t"}
  first, second = labelled_images.read(write(tmp_path, LINE, other), (4, 6))
  assert (first.name, first.matches, first.tag) == ("a.png", True, "untagged")
  assert first.questions[0].answer == "one"
  assert second.tag == "t" and not second.matches
  np.testing.assert_array_equal(second.pixels, np.full((4, 6, 3), 50))


def test_the_hash_is_that_of_labels_and_pixels(tmp_path):
  images = labelled_images.read(write(tmp_path, LINE), (4, 6))
  moved = tmp_path / "moved"
  moved.mkdir()
  same = labelled_images.read(write(moved, LINE, name="other.jsonl"), (4, 6))
  changed = labelled_images.read(
    write(tmp_path, LINE | {"matches": False}), (4, 6)
  )
  digest = labelled_images.sha256(images)
  assert labelled_images.sha256(same) == digest
  assert labelled_images.sha256(changed) != digest


@pytest.mark.parametrize(
  "change, message",
  [
    ({"matches": "yes"}, "labels.jsonl:1: matches must be true or false"),
    ({"prompt": " "}, "prompt must be a text"),
    ({"image": "none.png"}, "none.png"),
    ({"questions": [{"kind": "match"}]}, "question of a question must be"),
    (
      {"questions": [{"kind": "match", "question": "?", "answer": "yes"}]},
      "every image is asked anyway",
    ),
    (
      {"questions": [{"kind": "count", "question": "?", "answer": "A cat"}]},
      "answer of a question must be one word",
    ),
  ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, change, message):
  path = write(tmp_path, LINE | change)
  with pytest.raises(ValueError, match=message):
    labelled_images.read(path, (4, 6))


def test_other_sizes_repeats_and_empty_files_are_refused(tmp_path):
  with pytest.raises(ValueError, match="4 x 4 .* has 4 x 6"):
    labelled_images.read(write(tmp_path, LINE), (4, 4))
  with pytest.raises(ValueError, match=r":2: .* repeats"):
    labelled_images.read(write(tmp_path, LINE, LINE), (4, 6))
  with pytest.raises(ValueError, match="it is empty"):
    labelled_images.read(write(tmp_path), (4, 6))
