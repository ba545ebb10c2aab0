"""Writes samples of an iteration to the report page and, as pictures, to the sinks.

A draft has one turn; an edit has two, the image before it and the image after it.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses

import jax
import numpy as np

from r3jax.agent import experience
from r3jax.data import records
from r3jax.evaluation import reasons
from r3jax.evaluation import sample_log
from r3jax.rewards import outcome
from r3jax.rl import stage_outputs
from r3jax.run import sessions
from r3jax.run import setup
from r3jax.run.logging import metric_writer
from r3jax.run.logging import sinks
from r3jax.sequence import thoughts
from r3jax.worlds import base

_GAP = 4  # pixels between the two images of an edit


@dataclasses.dataclass(frozen=True)
class ReportSample:
  """A sample of the report, and its images.

  Attributes:
    sample: Sample whose turns do not name their images yet.
    images: uint8 [H, W, 3], one per turn.
    prompt: What the images must show.
  """

  sample: sample_log.Sample
  images: Sequence[np.ndarray]
  prompt: records.Prompt


def write(
  session: sessions.Session,
  step: int,
  indices: np.ndarray,
  samples: stage_outputs.Samples,
  writer: metric_writer.MetricWriter,
) -> None:
  """Adds an iteration's first samples to the report and to the sinks; only process 0 writes.

  Args:
    session: Constants of the run.
    step: Number of the iteration.
    indices: [G] indices of the iteration's training records.
    samples: Samples of the iteration as numpy arrays.
    writer: Gets the pictures.
  """
  if jax.process_index():
    return
  # A config may ask for more groups than an iteration has.
  num_groups = min(session.config.log.samples, len(indices))
  logged = []
  images = {}
  first = first_samples(session.experiment, step, indices, samples, num_groups)
  for shown in with_boxes(list(first), session.experiment.world):
    turns = []
    for number, image in enumerate(shown.images):
      path = f"images/{shown.sample.key}_{number}.png"
      images[path] = image
      turn = dataclasses.replace(shown.sample.turns[number], image=path)
      turns.append(turn)
    logged.append(dataclasses.replace(shown.sample, turns=tuple(turns)))
  sample_log.append(session.files.report, logged, images)
  writer.write_pictures(step, pictures(logged, images))


def first_samples(
  experiment: setup.Experiment,
  step: int,
  indices: np.ndarray,
  samples: stage_outputs.Samples,
  num_groups: int,
) -> Iterator[ReportSample]:
  """Yields the first draft and the first edit of each of the first groups.

  Args:
    experiment: Training records, settings and tokenizer of the run.
    step: Number of the iteration.
    indices: [G] indices of the iteration's training records.
    samples: Samples of the iteration as numpy arrays.
    num_groups: Number of groups, at most G.
  """
  for group in range(num_groups):
    row = group * experiment.settings.group_size
    yield _draft(experiment, step, group, row, indices, samples)
    if samples.edits is not None:
      yield _edit(experiment, step, group, row, indices, samples)


def with_boxes(
  samples: Sequence[ReportSample], world: base.World | None
) -> list[ReportSample]:
  """Returns samples with what a world's verifier sees in their images, and why they are not right.

  They stay as they are where there is no world, or it does not say what it sees.
  """
  if world is None or world.boxes is None or not samples:
    return list(samples)
  # All at once: one program for all iterations.
  images = [image for sample in samples for image in sample.images]
  boxes = iter(world.boxes(np.stack(images)))
  explained = []
  for shown in samples:
    turns = []
    for turn in shown.sample.turns:
      recognized = next(boxes)
      reason = reasons.of_turn(turn, shown.prompt, recognized)
      turns.append(dataclasses.replace(turn, boxes=recognized, reason=reason))
    sample = dataclasses.replace(shown.sample, turns=tuple(turns))
    explained.append(dataclasses.replace(shown, sample=sample))
  return explained


def _draft(
  experiment: setup.Experiment,
  step: int,
  group: int,
  row: int,
  indices: np.ndarray,
  samples: stage_outputs.Samples,
) -> ReportSample:
  """Returns the draft of a row, which belongs to `group`."""
  rollout = samples.drafts.rollout
  turn = sample_log.Turn(
    image="",
    **outcome.as_json(samples.draft_score, row),
    text=_text(experiment, rollout.text, row),
    instruction="",
    stop=False,
  )
  prompt = experiment.train[indices[group]]
  sample = sample_log.Sample(
    step=step,
    key=f"{step:06d}-{group}",
    prompt=prompt.text,
    tag=prompt.tag,
    turns=(turn,),
  )
  return ReportSample(sample, [rollout.images[row]], prompt)


def _edit(
  experiment: setup.Experiment,
  step: int,
  group: int,
  row: int,
  indices: np.ndarray,
  samples: stage_outputs.Samples,
) -> ReportSample:
  """Returns the edit of a row, which belongs to `group`, and its source."""
  edits = samples.edits
  text = _text(experiment, edits.text, row)
  has_pool = experiment.settings.chain == "tree"
  before = sample_log.Turn(
    image="",  # named in `write`
    label="from the pool" if has_pool else "its own image",
    score=float(edits.reward_before[row]) if edits.valid_before[row] else None,
    text="",
    instruction="",
    stop=False,
  )
  after = sample_log.Turn(
    image="",
    label="edited",
    **outcome.as_json(samples.edit_score, row),
    text=text,
    instruction=thoughts.edit_instruction(text),
    stop=bool(edits.instruction.stop[row]),
  )
  prompt = experiment.train[indices[edits.prompt_index[row]]]
  sample = sample_log.Sample(
    step=step,
    key=f"{step:06d}-{group}-edit",
    prompt=prompt.text,
    tag=prompt.tag,
    turns=(before, after),
  )
  # Sources have one row per group, edits one per sample.
  num_groups = edits.source.images.shape[0]
  num_samples = edits.prompt_index.shape[0]
  source = edits.source.images[row * num_groups // num_samples]
  return ReportSample(sample, [source, edits.refined.images[row]], prompt)


def _text(experiment: setup.Experiment, text: experience.Text, row: int) -> str:
  """Decodes one row of sampled texts."""
  rows = slice(row, row + 1)
  return experiment.decode(text.ids[rows], text.lengths[rows])[0]


def pictures(
  samples: Sequence[sample_log.Sample], images: Mapping[str, np.ndarray]
) -> dict[str, sinks.Picture]:
  """Returns samples as pictures, by "reason/sample/N" (drafts) and "edit/sample/N" (edits).

  Args:
    samples: Samples of the report, whose turns name their images.
    images: uint8 [H, W, 3], by these names.
  """
  by_name = {}
  counts = collections.Counter()
  for sample in samples:
    turns = sample.turns
    stage = "reason" if len(turns) == 1 else "edit"
    counts[stage] += 1
    image = _side_by_side([images[turn.image] for turn in turns])
    by_name[f"{stage}/sample/{counts[stage]}"] = sinks.Picture(
      image, _caption(sample)
    )
  return by_name


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
  """Returns images of one size as one image, uint8 [H, W, 3]."""
  height = images[0].shape[0]
  gap = np.full((height, _GAP, 3), 255, np.uint8)
  columns = [images[0]]
  for image in images[1:]:
    columns += [gap, image]
  return np.concatenate(columns, axis=1)


def _caption(sample: sample_log.Sample) -> str:
  """Returns "PROMPT [TAG]: SCORE -> SCORE (INSTRUCTION)"."""
  first, *edits = sample.turns
  caption = f"{sample.prompt} [{sample.tag}]: {_score(first)}"
  for turn in edits:
    caption += f" -> {_score(turn)} ({turn.instruction})"
  return caption


def _score(turn: sample_log.Turn) -> str:
  return "missing" if turn.score is None else f"{turn.score:.2f}"
