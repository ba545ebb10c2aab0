"""Objects and their colours in photographs: an object detector and CLIP, by Hugging Face's pipelines.

Needs the extra `r3jax[detector]`. GenEval itself uses a Mask2Former of COCO's classes and cuts the
background away before it asks for a colour; here the whole crop is asked about. Not verified with real
weights: scores of another detector are not the benchmark's, compare them before you rely on them.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
from PIL import Image

from r3jax.data import geneval as vocabulary
from r3jax.rewards import geneval

# (image, class names) -> [{"label", "score", "box": {"xmin", "ymin", "xmax", "ymax"}}, ...]
Find = Callable[[Image.Image, Sequence[str]], list[dict]]
# (image, labels) -> [{"label", "score"}, ...]
Classify = Callable[[Image.Image, Sequence[str]], list[dict]]

_OPEN_VOCABULARY = ("owlvit", "owlv2", "grounding-dino")
_COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_LEAST = 0.1  # below what any threshold asks for; keeps the lists short


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

  def detect(self, image: np.ndarray, record: dict) -> list[geneval.Detection]:
    """Returns the objects of the classes that a record names.

    Args:
      image: uint8 [H, W, 3].
      record: in GenEval's format.
    """
    picture = Image.fromarray(image)
    items = [*record["include"], *record.get("exclude", [])]
    classes = sorted({item["class"] for item in items})
    colored = {item["class"] for item in items if "color" in item}
    found = []
    for one in self.find(picture, classes):
      name, box = _COCO_NAMES.get(one["label"], one["label"]), _box(one["box"])
      if name in classes:
        color = self._color(picture, box, name) if name in colored else None
        found.append(geneval.Detection(name, float(one["score"]), box, color))
    return found

  def _color(self, picture: Image.Image, box: tuple[float, ...], name: str) -> str | None:
    """Returns the colour that fits the crop best; None where the box is empty."""
    crop = picture.crop((int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3]))))
    if not crop.width or not crop.height:
      return None
    labels = {f"{color} {name}": color for color in vocabulary.COLORS}
    best = max(self.classify(crop, list(labels)), key=lambda one: one["score"])
    return labels[best["label"]]


def _box(box: dict) -> tuple[float, float, float, float]:
  return tuple(float(box[name]) for name in ("xmin", "ymin", "xmax", "ymax"))


def load(detector: str, clip: str) -> Detector:
  """Loads models by folder or name.

  Args:
    detector: an open-vocabulary one (OWL-ViT, OWLv2, Grounding DINO) or one of COCO's classes.
    clip: a CLIP model.

  Raises:
    ValueError: a model is not named, or the extra is not installed.
  """
  if not detector or not clip:
    raise ValueError("GenEval's rules need --detector and --clip, each a folder or name of a model")
  try:
    import transformers  # an optional extra, and slow to import
  except ImportError as error:
    raise ValueError(f"a detector needs `pip install r3jax[detector]`: {error}") from error
  classify = transformers.pipeline("zero-shot-image-classification", model=clip)
  by_label = lambda crop, labels: classify(crop, candidate_labels=labels, hypothesis_template="a photo of a {}")
  if transformers.AutoConfig.from_pretrained(detector).model_type in _OPEN_VOCABULARY:
    find = transformers.pipeline("zero-shot-object-detection", model=detector)
    return Detector(f"{detector} + {clip}", lambda image, names: find(image, candidate_labels=names, threshold=_LEAST), by_label)
  find = transformers.pipeline("object-detection", model=detector)
  return Detector(f"{detector} + {clip}", lambda image, names: find(image, threshold=_LEAST), by_label)
