"""The labelled images of the embedded world: how they are made, and the set that is shipped.

Of every tag it has rendered scenes and drafts of the shipped model, half of both right and half of
them wrong. `launch/labelled_images.py` makes it from an evaluation. It is stored as pixels, so that
a later renderer or model changes none of it.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import importlib.resources
import io
import json
import pathlib

import jax
import numpy as np
import PIL.Image

from r3jax.data import labelled_images
from r3jax.data import records
from r3jax.files import image_files
from r3jax.worlds.shapes import edits
from r3jax.worlds.shapes import examples
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import quiz
from r3jax.worlds.shapes import readings
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import verifier

# Of a tag, right and wrong ones each.
NUM_RENDERED = 32
NUM_DRAFTS = 20
_CANDIDATES = 8  # questions of which the one with the rarest answer is asked
_MOST_OF_KIND = 240  # questions
_LEAST = 12  # questions with an answer; a rarer answer is not asked for
_TILES_IN_ROW = 24
_SHEET = "images.png"
_LABELS = "labels.jsonl"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """An image for a prompt, right or wrong.

  Attributes:
    record: The prompt.
    pixels: uint8 [48, 48, 3].
    is_right: Whether the verifier finds exactly what was asked for.
  """

  record: records.Prompt
  pixels: np.ndarray
  is_right: bool


# --- Making the set -------------------------------------------------------------------------------


def make(
  drafts: Sequence[Candidate], seed: int
) -> list[labelled_images.LabelledImage]:
  """Makes the set, tag by tag: right and wrong images in turn, rendered ones first.

  Args:
    drafts: Drafts of a model without clutter, from which the set draws.
    seed: Seed of all draws.

  Raises:
    ValueError: There are too few right or wrong drafts of a tag.
  """
  chosen = []
  for number, tag in enumerate(prompts.TAGS):
    rng = np.random.default_rng((seed, number))
    rendered = _rendered(tag, NUM_RENDERED, rng)
    of_tag = [draft for draft in drafts if draft.record.tag == tag]
    drawn = _choose(of_tag, tag, rng)
    chosen += [("rendered", candidate) for candidate in rendered]
    chosen += [("draft", candidate) for candidate in drawn]
  return _with_questions(chosen, seed)


def rendered(num_scenes: int, seed: int) -> list[labelled_images.LabelledImage]:
  """Makes a set of rendered scenes alone, which needs no model.

  Args:
    num_scenes: Right scenes of each tag; as many are wrong.
    seed: Seed of all draws.
  """
  chosen = []
  for number, tag in enumerate(prompts.TAGS):
    rng = np.random.default_rng((seed, number))
    for candidate in _rendered(tag, num_scenes, rng):
      chosen.append(("rendered", candidate))
  return _with_questions(chosen, seed)


def _with_questions(
  chosen: Sequence[tuple[str, Candidate]], seed: int
) -> list[labelled_images.LabelledImage]:
  """Asks questions about images, which are pairs of their origin and what they show."""
  pixels = np.stack([candidate.pixels for _, candidate in chosen])
  questions = _questions(readings.objects(pixels), np.random.default_rng(seed))
  images = []
  for number, (origin, candidate) in enumerate(chosen):
    image = labelled_images.LabelledImage(
      name=f"{number:05d}_{origin}",
      pixels=candidate.pixels,
      prompt=candidate.record.text,
      matches=candidate.is_right,
      tag=candidate.record.tag,
      questions=questions[number],
    )
    images.append(image)
  return images


@functools.cache
def _compiled_render():
  return jax.jit(scenes.render)


@functools.cache
def _compiled_verify():
  return jax.jit(verifier.verify)


def _rendered(
  tag: str, num_scenes: int, rng: np.random.Generator
) -> list[Candidate]:
  """Renders right and wrong scenes for held-out prompts of a tag, which take turns."""
  heldout = [x for x in prompts.heldout_records() if x.tag == tag]
  order = []
  while len(order) < num_scenes:
    order += rng.permutation(len(heldout)).tolist()
  drawn_scenes = []
  chosen_records = []
  for number in order[:num_scenes]:
    record = heldout[number]
    drawn_scenes += [prompts.scene_for(record, rng), _wrong_scene(record, rng)]
    chosen_records += [record, record]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn_scenes)
  pixels = np.asarray(_compiled_render()(stacked))
  targets = verifier.encode_records(chosen_records)
  score = _compiled_verify()(pixels, targets)
  strict = np.asarray(score.parts["strict"]) == 1
  expected = [number % 2 == 0 for number in range(len(pixels))]
  if strict.tolist() != expected:
    raise ValueError(
      "the verifier must read rendered scenes as they were drawn"
    )
  return [
    Candidate(record, image, bool(is_right))
    for record, image, is_right in zip(
      chosen_records, pixels, strict, strict=True
    )
  ]


def _wrong_scene(
  record: records.Prompt, rng: np.random.Generator
) -> scenes.Scene:
  """Draws a scene that a prompt does not ask for, with an error as drafts have."""
  while True:
    objects = examples.imperfect_objects(record, rng)
    if not edits.satisfied(record, objects):
      return scenes.place(objects, rng)


def _choose(
  drafts: Sequence[Candidate], tag: str, rng: np.random.Generator
) -> list[Candidate]:
  """Draws right and wrong drafts, in turn.

  Raises:
    ValueError: There are too few.
  """
  halves = []
  for is_right in (True, False):
    half = [draft for draft in drafts if draft.is_right == is_right]
    if len(half) < NUM_DRAFTS:
      name = "right" if is_right else "wrong"
      raise ValueError(
        f"there must be {NUM_DRAFTS} {name} drafts of {tag} without clutter; there are "
        f"{len(half)}: evaluate more prompts (eval.prompts)"
      )
    halves.append([half[i] for i in rng.permutation(len(half))[:NUM_DRAFTS]])
  return [draft for pair in zip(*halves, strict=True) for draft in pair]


def _questions(
  all_objects: Sequence[Sequence[edits.Object]], rng: np.random.Generator
) -> list[tuple[labelled_images.Question, ...]]:
  """Draws questions about images; of a kind, the right answers are about equally frequent."""
  drawn = [[] for _ in all_objects]
  for kind in quiz.KINDS:
    # answer -> (index of an image, question), in a random order
    by_answer = {}
    counts = {}
    for i in rng.permutation(len(all_objects)).tolist():
      question = _rarest(kind, all_objects[i], counts, rng)
      if question is not None:
        by_answer.setdefault(question.answer, []).append((i, question))
        counts[question.answer] = len(by_answer[question.answer])
    common = [pairs for pairs in by_answer.values() if len(pairs) >= _LEAST]
    fewest = min(len(pairs) for pairs in common)
    most = min(_MOST_OF_KIND // len(common), 2 * fewest)
    for pairs in common:
      for i, question in pairs[:most]:
        drawn[i].append(question)
  return [tuple(questions) for questions in drawn]


def _rarest(
  kind: str,
  objects: Sequence[edits.Object],
  counts: Mapping[str, int],
  rng: np.random.Generator,
) -> labelled_images.Question | None:
  """Returns that of several drawn questions whose answer is rarest so far; None without any."""
  candidates = []
  for _ in range(_CANDIDATES):
    drawn = quiz.KINDS[kind](objects, rng)
    if drawn is not None:
      candidates.append(labelled_images.Question(kind, *drawn))
  if not candidates:
    return None
  return min(candidates, key=lambda question: counts.get(question.answer, 0))


# --- Storing it -----------------------------------------------------------------------------------


def write(
  images: Sequence[labelled_images.LabelledImage], folder: pathlib.Path
) -> None:
  """Writes a set: one sheet of all images, row by row, and a line of labels for each."""
  size = scenes.CANVAS
  num_rows = -(-len(images) // _TILES_IN_ROW)
  sheet = np.zeros((num_rows * size, _TILES_IN_ROW * size, 3), np.uint8)
  for number, image in enumerate(images):
    row, column = divmod(number, _TILES_IN_ROW)
    top = row * size
    left = column * size
    sheet[top : top + size, left : left + size] = image.pixels
  content = io.BytesIO()
  PIL.Image.fromarray(sheet).save(content, "PNG", optimize=True)
  lines = [
    json.dumps(image.labels(), separators=(",", ":")) for image in images
  ]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / _SHEET).write_bytes(content.getvalue())
  (folder / _LABELS).write_text("\n".join(lines) + "\n")


def read(folder: pathlib.Path) -> list[labelled_images.LabelledImage]:
  """Returns the set that `write` has written."""
  size = scenes.CANVAS
  sheet = image_files.read(folder / _SHEET)
  images = []
  for number, line in enumerate((folder / _LABELS).read_text().splitlines()):
    row, column = divmod(number, _TILES_IN_ROW)
    top = row * size
    left = column * size
    pixels = sheet[top : top + size, left : left + size]
    images.append(labelled_images.from_labels(json.loads(line), pixels))
  return images


def folder() -> pathlib.Path:
  """Returns the folder of the set that is shipped."""
  path = importlib.resources.files("r3jax") / "assets" / "shapes_labelled"
  return pathlib.Path(str(path))


def load() -> list[labelled_images.LabelledImage]:
  """Returns the set that is shipped."""
  return read(folder())
