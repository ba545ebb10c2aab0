"""Summarizes an evaluation: all its numbers, as the file summary.json holds them."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from r3jax.data import contamination
from r3jax.evaluation import estimates
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table

Estimate = estimates.Estimate


@dataclasses.dataclass(frozen=True)
class Context:
  """What a summary says of an evaluation beside the numbers of its samples.

  Attributes:
    title: Title of its page.
    step: Iteration of the policy.
    leaked: Which of the evaluated prompts the model was trained on.
    flops: Operations of a draft and of a revision of one image, with texts at their longest.
    seed: Seed of the bootstrap.
  """

  title: str
  step: int
  leaked: contamination.Leaked
  flops: tuple[float, float]
  seed: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """Numbers of an evaluation.

  Attributes:
    title: Title of its page.
    iteration: Iteration of the policy.
    seed: Seed of the bootstrap.
    images: Number of chains.
    prompts: Number of distinct prompts.
    images_by_tag: Number of chains by tag.
    missing: Share of the images of all rounds that have no score.
    leaked: Which of the evaluated prompts the model was trained on.
    rounds: Numbers of every round.
    tflops: 10¹² operations per image of every round, with texts at their longest.
    tags: Score of every round by tag.
    correct: GenEval's score of every round, the share of correct images, over all tags and by tag;
      empty if no reward says which images are correct.
    refinement: Score of the last round minus that of the draft.
    stops: How well the model knows when to stop.
    behaviour: How chains edit and stop.
    understanding: How often answers about drafts and last images are right, by kind of question.
    labelled: How well the model answers questions about labelled images, by kind of question.
  """

  title: str
  iteration: int
  seed: int
  images: int
  prompts: int
  images_by_tag: dict[str, int]
  missing: float
  leaked: contamination.Leaked
  rounds: list[estimates.RoundEstimates]
  tflops: list[float]
  tags: dict[str, list[Estimate | None]]
  correct: dict[str, list[Estimate | None]]
  refinement: Estimate | None
  stops: estimates.Stops
  behaviour: estimates.Behaviour
  understanding: dict[str, estimates.Understanding]
  labelled: dict[str, labelled_estimates.KindEstimates] = dataclasses.field(
    default_factory=dict
  )

  def notes(self) -> list[str]:
    """Returns what a reader must know beside every number of the evaluation."""
    texts = list(self.leaked.notes())
    if self.missing:
      texts.append(f"{self.missing:.1%} of the images have no score.")
    return texts

  def to_json(self) -> dict:
    """Returns the JSON values of summary.json; "tflops" stands in every round."""
    values = dict(vars(self))
    del values["tflops"]
    rounds = []
    for numbers, tflops in zip(self.rounds, self.tflops, strict=True):
      rounds.append(numbers.to_json() | {"tflops": tflops})
    understanding = {
      kind: numbers.to_json() for kind, numbers in self.understanding.items()
    }
    return values | {
      "leaked": dataclasses.asdict(self.leaked),
      "rounds": rounds,
      "stops": self.stops.to_json(),
      "behaviour": dataclasses.asdict(self.behaviour),
      "understanding": understanding,
      "labelled": {
        kind: dataclasses.asdict(numbers)
        for kind, numbers in self.labelled.items()
      },
    }

  @classmethod
  def from_json(cls, values: Mapping) -> "Summary":
    """Returns the summary that `to_json` has written."""
    tags = _estimates_by_tag(values["tags"])
    # Summaries of versions that did not report it have none.
    correct = _estimates_by_tag(values.get("correct", {}))
    understanding = {
      kind: estimates.Understanding.from_json(numbers)
      for kind, numbers in values["understanding"].items()
    }
    # Summaries of versions that asked about no labelled images have none.
    labelled = {
      kind: labelled_estimates.KindEstimates.from_json(numbers)
      for kind, numbers in values.get("labelled", {}).items()
    }
    typed = {
      "leaked": contamination.Leaked(**values["leaked"]),
      "rounds": [
        estimates.RoundEstimates.from_json(numbers)
        for numbers in values["rounds"]
      ],
      "tflops": [numbers["tflops"] for numbers in values["rounds"]],
      "tags": tags,
      "correct": correct,
      "refinement": estimates.estimate_from_json(values["refinement"]),
      "stops": estimates.Stops.from_json(values["stops"]),
      "behaviour": estimates.Behaviour(**values["behaviour"]),
      "understanding": understanding,
      "labelled": labelled,
    }
    return cls(**{**values, **typed})


def _estimates_by_tag(
  values: Mapping[str, list],
) -> dict[str, list[Estimate | None]]:
  """Returns estimates by tag and round from JSON values."""
  by_tag = {}
  for tag, rounds in values.items():
    by_tag[tag] = [estimates.estimate_from_json(value) for value in rounds]
  return by_tag


def summarize(
  samples: Sequence[sample_log.Sample],
  context: Context,
  labelled: Sequence[labelled_questions.Answer] = (),
) -> Summary:
  """Computes the summary of all samples of an evaluation.

  Args:
    samples: Samples of the evaluation.
    context: What the summary says beside their numbers.
    labelled: Answers about labelled images.

  Raises:
    ValueError: There are no samples.
  """
  table = sample_table.of_samples(samples)
  answers = sample_table.answers_of(samples)
  seed = context.seed
  flops_of_draft, flops_of_revision = context.flops
  num_revisions = len(table.score) - 1
  flops = [flops_of_draft] + [flops_of_revision] * num_revisions
  return Summary(
    title=context.title,
    iteration=context.step,
    seed=seed,
    images=len(samples),
    prompts=table.num_prompts(np.arange(len(table.tags))),
    images_by_tag={tag: table.tags.count(tag) for tag in table.distinct_tags},
    missing=table.missing,
    leaked=context.leaked,
    rounds=estimates.by_round(table, seed),
    tflops=[operations / 1e12 for operations in flops],
    tags=estimates.by_tag(table, seed),
    correct=estimates.correct_by_tag(table, seed),
    refinement=estimates.refinement(table, seed),
    stops=estimates.stops(table, seed),
    behaviour=estimates.behaviour(table),
    understanding=estimates.understanding(answers, seed),
    labelled=labelled_estimates.by_kind(
      labelled_estimates.table_of(labelled), seed
    ),
  )
