"""Objects and their colours in photographs, by an object detector and CLIP from Hugging Face.

Needs the extra `r3jax[detector]`. Not verified with real weights. What differs from GenEval itself:
- It has a Mask2Former of COCO's classes, for which its thresholds were chosen. An open-vocabulary
  detector is rarely as sure as the 0.9 that counting asks for, and may report an object twice:
  choose `geneval.Thresholds` for it. As in GenEval, overlapping boxes are not suppressed.
- It greys out what is outside the object's mask before it asks for a colour. There is no mask here,
  so that the background in the crop has a say.
Scores of another detector are not the benchmark's: compare them before you rely on them.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np
from PIL import Image

from r3jax.data.generators import geneval as generators_geneval
from r3jax.rewards.serving import geneval as serving_geneval

# (image, class names) -> [{"label", "score", "box": {"xmin", "ymin", "xmax", "ymax"}}, ...]
Find = Callable[[Image.Image, Sequence[str]], list[dict]]
# (image, labels) -> [{"label", "score"}, ...]; a label follows "a photo of a".
Classify = Callable[[Image.Image, Sequence[str]], list[dict]]

_OPEN_VOCABULARY = ("owlvit", "owlv2", "grounding-dino")
_COCO_NAMES = {
  "mouse": "computer mouse",
  "remote": "tv remote",
  "keyboard": "computer keyboard",
}
# GenEval's
_COLOR_LABELS = ("{color} {name}", "{color}-colored {name}", "{color} object")
_LEAST = 0.1  # below what any threshold asks for; keeps the lists short
_TINY = 1e-30  # the logarithm of a score of 0 is taken of this


@dataclasses.dataclass(frozen=True)
class Detector:
  """Finds the objects that a record is about.

  Attributes:
    name: of the models, for the run's manifest.
    find: detects objects.
    classify: tells which label fits a crop.
  """

  name: str
  find: Find
  classify: Classify

  def detect(
    self, image: np.ndarray, record: dict
  ) -> list[serving_geneval.Detection]:
    """Returns the objects of the classes that a record names.

    Args:
      image: uint8 [H, W, 3].
      record: in GenEval's format.
    """
    picture = Image.fromarray(image)
    items = [*record["include"], *(record.get("exclude") or ())]
    classes = sorted({item["class"] for item in items})
    colored = {item["class"] for item in items if "color" in item}
    found = []
    for one in self.find(picture, classes):
      label, box = one["label"], _box(one["box"], picture)
      name = label if label in classes else _COCO_NAMES.get(label, label)
      if name in classes:
        color = self._color(picture, box, name) if name in colored else None
        found.append(
          serving_geneval.Detection(name, float(one["score"]), box, color)
        )
    return found

  def _color(
    self, picture: Image.Image, box: tuple[float, ...], name: str
  ) -> str | None:
    """Returns the colour whose labels fit the crop best together; None where the box is empty.

    A colour's labels are taken together by the sum of the logarithms of their scores: with CLIP's
    softmax that is the mean of their similarities to the crop.
    """
    if box[0] >= box[2] or box[1] >= box[3]:
      return None
    crop = picture.crop((*map(math.floor, box[:2]), *map(math.ceil, box[2:])))
    labels = {
      label.format(color=color, name=name): color
      for color in generators_geneval.COLORS
      for label in _COLOR_LABELS
    }
    fit = dict.fromkeys(generators_geneval.COLORS, 0.0)
    for one in self.classify(crop, list(labels)):
      fit[labels[one["label"]]] += math.log(max(one["score"], _TINY))
    return max(fit, key=fit.get)


def _box(box: dict, picture: Image.Image) -> tuple[float, float, float, float]:
  """Returns what of a box is inside the picture; outside it a crop would be black."""
  clip = lambda name, size: min(max(float(box[name]), 0.0), float(size))
  width, height = picture.size
  return (
    clip("xmin", width),
    clip("ymin", height),
    clip("xmax", width),
    clip("ymax", height),
  )


def load(detector: str, clip: str) -> Detector:
  """Loads models by folder or name, and tries them once.

  Args:
    detector: an open-vocabulary one (OWL-ViT, OWLv2, Grounding DINO) or one of COCO's classes.
    clip: a CLIP model.

  Raises:
    ValueError: a model is not named, or the extra is not installed.
  """
  if not detector or not clip:
    raise ValueError(
      "GenEval's rules need --detector and --clip, each a folder or name of a model"
    )
  try:
    import torch  # noqa: F401  # transformers can be imported without it, and fails later
    import transformers  # an optional extra, and slow to import

    is_open = (
      transformers.AutoConfig.from_pretrained(detector).model_type
      in _OPEN_VOCABULARY
    )
    task = "zero-shot-object-detection" if is_open else "object-detection"
    detecting = transformers.pipeline(task, model=detector)
    telling = transformers.pipeline(
      "zero-shot-image-classification", model=clip
    )

    def find(image: Image.Image, names: Sequence[str]) -> list[dict]:
      asked = {"candidate_labels": list(names)} if is_open else {}
      return detecting(image, threshold=_LEAST, **asked)

    def classify(crop: Image.Image, labels: Sequence[str]) -> list[dict]:
      return telling(
        crop,
        candidate_labels=list(labels),
        hypothesis_template="a photo of a {}",
      )

    blank = Image.new("RGB", (64, 64))
    # image processors may miss packages only when they run
    find(blank, generators_geneval.CLASSES[:1])
    classify(blank, generators_geneval.COLORS)
  except ImportError as error:
    raise ValueError(
      f"a detector needs `pip install r3jax[detector]`: {error}"
    ) from error
  return Detector(f"{detector} + {clip}", find, classify)
