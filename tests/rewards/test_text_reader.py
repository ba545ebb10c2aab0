"""Tests of rewards/serving/text_reader.py and local.Ocr.

The real weights: pip install -e ".[ocr]" && python -m pytest tests/rewards/test_text_reader.py
"""

import contextlib
import importlib.util
import sys
import threading
import types

import numpy as np
import pytest

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import services
from r3jax.rewards.serving import geneval
from r3jax.rewards.serving import local
from r3jax.rewards.serving import ocr
from r3jax.rewards.serving import server as server_lib
from r3jax.rewards.serving import text_reader
from tests.rewards import defaults
from tests.rewards import ocr_figures

PROMPT = records.Prompt("word", 'a sign, "Open"', inscription="Open")
IMAGE = np.zeros((1, 8, 8, 3), np.uint8)
CORNERS = [[5, 2], [41, 8], [39, 30], [3, 24]]
# A white, a light and a black one.
IMAGES = np.stack([np.full((8, 8, 3), x, np.uint8) for x in (255, 200, 0)])
HAS_EXTRA = all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime")))


def result(boxes=None, txts=None, scores=None):
  """Returns what RapidOCR returns."""
  return types.SimpleNamespace(boxes=boxes, txts=txts, scores=scores)


class TestBoxesOf:
  def test_box_is_the_rectangle_around_its_corners(self):
    boxes = np.array([CORNERS], np.float32)
    (box,) = text_reader.boxes_of(result(boxes, ("OPEN",), (0.75,)))
    assert box == ocr.TextBox("OPEN", 3, 2, 41, 30, confidence=0.75)

  def test_nothing_read_is_no_box(self):
    assert text_reader.boxes_of(result()) == []
    empty = result(np.zeros((0,)), (), ())
    assert text_reader.boxes_of(empty) == []

  def test_places_without_a_text_are_a_failure(self):
    """RapidOCR then returns the detector's result, which has no texts at all."""
    alone = types.SimpleNamespace(boxes=np.array([CORNERS]), scores=(0.9,))
    with pytest.raises(
      text_reader.ReadingError, match="in 1 places and read it in 0"
    ):
      text_reader.boxes_of(alone)


class TestLoad:
  @pytest.mark.parametrize("name", ["rapidocr", "onnxruntime"])
  def test_missing_extra_is_named(self, monkeypatch, name):
    for module in ("rapidocr", "onnxruntime"):
      monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
      ValueError, match=r"reading text needs `pip install r3jax\[ocr\]`"
    ):
      local.load("ocr", "", "", geneval.OFFICIAL)


class TestOcr:
  def score(self, read, *prompts):
    reward = local.Ocr(text_reader.TextReader({"model": "scripted"}, read))
    images = np.repeat(IMAGE, len(prompts), axis=0)
    return reward.score(images, prompts)

  def test_image_is_scored_by_what_is_read(self):
    def read(image):
      assert image.shape == (8, 8, 3)
      return [ocr.TextBox("OPEM", 0, 0, 1, 1)]

    (scored,) = self.score(read, PROMPT)
    assert scored.score == 0.75
    assert tuple(scored.parts) == local.Ocr.parts

  def test_reader_that_fails_gives_no_score(self):
    def read(image):
      raise text_reader.ReadingError("RapidOCR raised RuntimeError: memory")

    (scored,) = self.score(read, PROMPT)
    assert scored == outcome.Failed("RapidOCR raised RuntimeError: memory")

  def test_prompt_without_inscription_is_not_read(self):
    def read(image):
      raise AssertionError

    (scored,) = self.score(read, records.Prompt("t", "a sign"))
    assert isinstance(scored, outcome.Invalid)
    assert "the record cannot be judged: the reward ocr needs" in scored.reason


@contextlib.contextmanager
def serving(reward):
  """Yields the client of a server of a reward, as a run has it."""
  server = server_lib.Server(("127.0.0.1", 0), reward)
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  url = f"http://127.0.0.1:{server.server_address[1]}"
  client = http_client.Client(defaults.client(endpoints=(url,)))
  try:
    yield services.JsonService(
      client, batch=2, kind="png", image_size=IMAGES.shape[1:3]
    )
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def test_run_gets_scores_of_a_server_and_refuses_other_prompts():
  def read(image):
    if image.max() == 200:
      raise text_reader.ReadingError("no memory")
    return [ocr.TextBox("open", 0, 0, 1, 1)] if image.max() == 255 else []

  identity = {"model": "scripted"}
  reward = local.Ocr(text_reader.TextReader(identity, read))
  with serving(reward) as service:
    assert service.describe() == {"service": "json"} | identity
    service.check(PROMPT)
    with pytest.raises(ValueError, match="it answers: .*field inscription"):
      service.check(records.Prompt("t", "a sign"))
    right, failed, empty = service.score(IMAGES, [PROMPT] * 3)
  assert (right.score, right.detail["read"]) == (1, "open")
  assert failed == outcome.Failed("no memory")
  assert (empty.score, empty.parts["strict"]) == (0, 0)


@pytest.fixture(scope="module")
def reward():
  """The reward with RapidOCR's own weights."""
  return local.load("ocr", "", "", geneval.OFFICIAL)


@pytest.mark.skipif(
  not HAS_EXTRA,
  reason='RapidOCR\'s weights come with the extra: pip install -e ".[ocr]"',
)
class TestRealWeights:
  def test_texts_are_read_in_five_fonts_and_wrong_ones_are_told_apart(
    self, reward
  ):
    figures = ocr_figures.measure(reward, 100)
    assert len(figures.right_by_font) == 5
    assert all(len(scores) == 20 for scores in figures.right_by_font.values())
    assert np.mean(figures.right) > 0.95
    assert min(map(np.mean, figures.right_by_font.values())) > 0.9
    assert np.mean(figures.wrong) < 0.5
    # "GIANT TURTLE" and "giant whale" share seven of eleven characters.
    assert np.mean(np.array(figures.wrong) < 0.5) >= 0.9

  def test_image_without_text_has_the_score_zero(self, reward):
    grey = np.full((1, 256, 256, 3), 128, np.uint8)
    (scored,) = reward.score(grey, [PROMPT])
    assert (scored.score, scored.detail["read"]) == (0, "")

  def test_failure_of_the_engine_is_no_score(self, reward):
    """An array that OpenCV refuses: without pixels."""
    (scored,) = reward.score(np.zeros((1, 0, 8, 3), np.uint8), [PROMPT])
    assert isinstance(scored, outcome.Failed)
    assert scored.reason.startswith("RapidOCR raised ")

  def test_identity_names_the_weights(self, reward):
    identity = reward.describe()
    assert identity["model"].startswith("RapidOCR 3.")
    assert len(identity["weights"]) >= 2
