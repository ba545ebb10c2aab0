"""Text in images, by RapidOCR: the models of PP-OCR in ONNX Runtime.

Needs the extra `r3jax[ocr]`; the weights are in RapidOCR's wheel, nothing is downloaded. A line is
found by a detector, cut out, turned upright if it is steep, and read by a recognizer. Lines that
stand on their head are not turned: they are not written as the prompt asks.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
from importlib import metadata
import pathlib
import threading

import numpy as np

from r3jax.rewards.serving import ocr

_SETTINGS = {
  # Lines of which the recognizer is less confident are left out; RapidOCR's own default.
  "Global.text_score": 0.5,
  # No classifier that turns lines which stand on their head.
  "Global.use_cls": False,
  "Global.log_level": "error",
  # The shorter side is enlarged to so many pixels. 736, the default, takes twice the time of 512,
  # which is a side of BAGEL's images.
  "Det.limit_side_len": 512,
  "Det.limit_type": "min",
  # Images are read side by side, each by one thread.
  "EngineConfig.onnxruntime.intra_op_num_threads": 1,
}


class ReadingError(Exception):
  """The reader failed: nothing is known about the text of an image."""


@dataclasses.dataclass(frozen=True)
class TextReader:
  """Reads the text of an image.

  Attributes:
    identity: what reads, as JSON values for the run's manifest.
    read: uint8 [H, W, 3] in RGB -> the text that is there, in any order; raises ReadingError. Any
      number of threads may call it.
  """

  identity: dict
  read: Callable[[np.ndarray], list[ocr.TextBox]]


def load() -> TextReader:
  """Loads RapidOCR with the weights that it comes with, and tries it once.

  Raises:
    ValueError: the extra is not installed, or the reader does not work.
  """
  try:
    import onnxruntime  # noqa: F401  RapidOCR can be imported without it, and fails later
    import rapidocr  # an optional extra, and slow to import
  except ImportError as error:
    raise ValueError(
      f"reading text needs `pip install r3jax[ocr]`: {error}"
    ) from error
  engines = threading.local()

  def read(image: np.ndarray) -> list[ocr.TextBox]:
    # An engine keeps state during a call, so that every thread has its own.
    if not hasattr(engines, "own"):
      engines.own = rapidocr.RapidOCR(params=dict(_SETTINGS))
    # It takes an array for OpenCV's: BGR.
    flipped = np.ascontiguousarray(image[..., ::-1])
    try:
      result = engines.own(flipped)
    except Exception as error:
      # Whatever OpenCV and ONNX Runtime raise, the image has no score, and the next may have one.
      raise ReadingError(
        f"RapidOCR raised {type(error).__name__}: {error}"
      ) from error
    return boxes_of(result)

  blank = np.full((64, 64, 3), 255, np.uint8)
  try:
    read(blank)
  except ReadingError as error:
    raise ValueError(
      f"the text reader must read a blank image: {error}"
    ) from error
  folder = pathlib.Path(rapidocr.__file__).parent / "models"
  identity = {
    "model": f"RapidOCR {metadata.version('rapidocr')}",
    "weights": _digests(folder),
    "settings": _SETTINGS,
  }
  return TextReader(identity, read)


def boxes_of(result) -> list[ocr.TextBox]:
  """Returns the boxes of RapidOCR's result.

  Args:
    result: has `boxes`, float [n, 4, 2] of corners (x, y), and for each of them a text in `txts`
      and a confidence in `scores`. Without text in the image all three are None.

  Raises:
    ReadingError: there are boxes, and not a text for each of them.
  """
  corners = _listed(getattr(result, "boxes", None))
  texts = _listed(getattr(result, "txts", None))
  confidences = _listed(getattr(result, "scores", None))
  # RapidOCR returns boxes alone where its recognizer gave nothing.
  if not len(corners) == len(texts) == len(confidences):
    raise ReadingError(
      f"RapidOCR found text in {len(corners)} places and read it in {len(texts)}"
    )
  boxes = []
  for quadrangle, text, confidence in zip(
    corners, texts, confidences, strict=True
  ):
    left, top = np.min(quadrangle, axis=0)
    right, bottom = np.max(quadrangle, axis=0)
    sides = [float(side) for side in (left, top, right, bottom)]
    boxes.append(ocr.TextBox(text, *sides, confidence=float(confidence)))
  return boxes


def _listed(values: Sequence | np.ndarray | None) -> list:
  return [] if values is None else list(values)


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256, 16 hex digits, of every file of weights in a folder."""
  digests = {}
  for path in sorted(folder.glob("*.onnx")):
    digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  return digests
