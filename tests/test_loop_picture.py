"""Tests for launch/loop_picture.py, and of the picture that README shows."""

import base64
import io
import pathlib
from xml.etree import ElementTree

import numpy as np
from PIL import Image
import pytest

from launch import loop_picture
from r3jax.evaluation import sample_log

PICTURE = pathlib.Path(__file__).parents[1] / "docs" / "loop.svg"
SVG = "{http://www.w3.org/2000/svg}"


def turn(score, text, stop=False, instruction=""):
  return sample_log.Turn(
    image="a.png",
    score=score,
    text=text,
    instruction=instruction,
    stop=stop,
    reason=None if score == 1 else "missing: heart",
  )


def sample(key, *scores):
  turns = [turn(score, "<think> a ring : missing </think>") for score in scores]
  turns.append(turn(scores[-1], "<think> & </think>", stop=True))
  return sample_log.Sample(
    step=0, key=key, prompt="a ring & a heart", tag="two_object", turns=turns
  )


RIGHT = sample("0_0", 1.0)
FIXED = sample("1_0", 0.5, 1.0)
LATER = sample("2_0", 0.5, 0.5, 1.0)
NEXT = sample("3_0", 0.0, 1.0)
SAMPLES = [RIGHT, FIXED, LATER, NEXT]


def test_chooses_the_first_wrong_draft_that_one_edit_mends():
  chosen, note = loop_picture.choose(SAMPLES, "")
  assert chosen is FIXED
  assert "Of 4 held-out prompts, 3 drafts are wrong, and 2 of these" in note
  assert loop_picture.choose(SAMPLES, "3_0")[0] is NEXT


@pytest.mark.parametrize("key", ["0_0", "2_0", "9_9"])
def test_refuses_another_sample(key):
  with pytest.raises(ValueError, match=f"{key} is not one of: 1_0, 3_0"):
    loop_picture.choose(SAMPLES, key)


def images_of(root):
  for element in root.iter(f"{SVG}image"):
    header, content = element.get("href").split(",")
    assert header == "data:image/png;base64"
    yield np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_pixels_are_enlarged_without_smoothing_and_texts_are_escaped():
  rng = np.random.default_rng(0)
  draft, edited = rng.integers(0, 256, (2, 48, 48, 3), np.uint8)
  text = loop_picture.draw(FIXED, (draft, edited), "A note.")
  root = ElementTree.fromstring(text)
  for shown, pixels in zip(images_of(root), (draft, edited), strict=True):
    np.testing.assert_array_equal(shown[::4, ::4], pixels)
    np.testing.assert_array_equal(shown[3::4, 3::4], pixels)
  texts = [element.text for element in root.iter(f"{SVG}text")]
  assert "Prompt: a ring & a heart" in texts
  assert "missing: heart" in texts


def test_the_picture_of_readme_is_small_and_loads_nothing():
  text = PICTURE.read_text()
  assert len(text) < 100_000
  root = ElementTree.fromstring(text)
  assert len(list(images_of(root))) == 2
  assert text.count("http") == 1  # the namespace
  assert "prefers-color-scheme: dark" in text
