"""Objects and their colours in photographs, by an object detector and CLIP from Hugging Face.

Needs the extra `r3jax[detector]`. Not verified with real weights. What differs from GenEval itself:
- It uses a Mask2Former of COCO's classes, for which its thresholds were chosen. An open-vocabulary
  detector is rarely as confident as the 0.9 that counting asks for, and may report an object twice:
  choose `geneval.Thresholds` for it. As in GenEval, overlapping boxes are not suppressed.
- It greys out the pixels outside the object's mask before it classifies the colour. There is no
  mask here, so that the background in the crop influences the colour.
Scores of another detector are not the benchmark's: compare them before you rely on them.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np
from PIL import Image

from r3jax.data import records
from r3jax.data.generators import geneval as generator
from r3jax.rewards.serving import geneval

# (image, class names) -> [{"label", "score", "box": {"xmin", "ymin", "xmax", "ymax"}}, ...]
Find = Callable[[Image.Image, Sequence[str]], list[dict]]
# (image, labels) -> [{"label", "score"}, ...]; a label follows "a photo of a".
Classify = Callable[[Image.Image, Sequence[str]], list[dict]]

_OPEN_VOCABULARY = ("owlvit", "owlv2", "grounding-dino")
# COCO's names of classes -> GenEval's.
_COCO_NAMES = {
  "mouse": "computer mouse",
  "remote": "tv remote",
  "keyboard": "computer keyboard",
}
# GenEval's labels of a crop.
_COLOR_LABELS = ("{color} {name}", "{color}-colored {name}", "{color} object")
# The detector's threshold, below any of `geneval.Thresholds`; it keeps the lists short.
_LEAST_CONFIDENCE = 0.1
# The logarithm of a score of 0 is taken of this.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Detector:
  """Finds the objects that a prompt is about.

  Attributes:
    name: the names of the models, for the run's manifest.
    find: detects objects.
    classify: scores labels by how well they fit a crop.
  """

  name: str
  find: Find
  classify: Classify

  def detect(
    self, image: np.ndarray, prompt: records.Prompt
  ) -> list[geneval.Detection]:
    """Returns the objects of the classes that a prompt names.

    Args:
      image: uint8 [H, W, 3].
      prompt: a prompt with include items.
    """
    picture = Image.fromarray(image)
    items = prompt.include + prompt.exclude
    classes = sorted({item.class_name for item in items})
    colored = {item.class_name for item in items if item.color is not None}
    detections = []
    for match in self.find(picture, classes):
      label = match["label"]
      name = label if label in classes else _COCO_NAMES.get(label, label)
      if name not in classes:
        continue
      box = _clipped_box(match["box"], picture)
      color = self._color(picture, box, name) if name in colored else None
      confidence = float(match["score"])
      detections.append(geneval.Detection(name, confidence, box, color))
    return detections

  def _color(
    self, picture: Image.Image, box: geneval.Box, name: str
  ) -> str | None:
    """Returns the colour whose labels together fit the crop best; None where the box is empty.

    The labels of a colour are combined by the sum of the logarithms of their scores: with CLIP's
    softmax that is the mean of their similarities to the crop.
    """
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
      return None
    # Whole pixels around the box, so that a thin object keeps some.
    crop = picture.crop(
      (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    )
    color_of_label = {}
    for color in generator.COLORS:
      for label in _COLOR_LABELS:
        color_of_label[label.format(color=color, name=name)] = color
    fit = dict.fromkeys(generator.COLORS, 0.0)
    for match in self.classify(crop, list(color_of_label)):
      color = color_of_label[match["label"]]
      fit[color] += math.log(max(match["score"], _TINY))
    return max(fit, key=fit.get)


def _clipped_box(box: dict, picture: Image.Image) -> geneval.Box:
  """Returns the part of a box inside the picture; outside it a crop would be black."""
  width, height = picture.size
  return (
    _clip(box["xmin"], width),
    _clip(box["ymin"], height),
    _clip(box["xmax"], width),
    _clip(box["ymax"], height),
  )


def _clip(value: float, size: int) -> float:
  return min(max(float(value), 0.0), float(size))


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
    # Without torch, transformers can be imported and fails later.
    import torch  # noqa: F401
    import transformers  # an optional extra, and slow to import

    config = transformers.AutoConfig.from_pretrained(detector)
    is_open_vocabulary = config.model_type in _OPEN_VOCABULARY
    detect = transformers.pipeline(
      "zero-shot-object-detection"
      if is_open_vocabulary
      else "object-detection",
      model=detector,
    )
    score_labels = transformers.pipeline(
      "zero-shot-image-classification", model=clip
    )

    def find(image: Image.Image, names: Sequence[str]) -> list[dict]:
      options = {"candidate_labels": list(names)} if is_open_vocabulary else {}
      return detect(image, threshold=_LEAST_CONFIDENCE, **options)

    def classify(crop: Image.Image, labels: Sequence[str]) -> list[dict]:
      return score_labels(
        crop,
        candidate_labels=list(labels),
        hypothesis_template="a photo of a {}",
      )

    # Image processors may miss packages only when they run.
    blank = Image.new("RGB", (64, 64))
    find(blank, generator.CLASSES[:1])
    classify(blank, generator.COLORS)
  except ImportError as error:
    raise ValueError(
      f"a detector needs `pip install r3jax[detector]`: {error}"
    ) from error
  return Detector(f"{detector} + {clip}", find, classify)
