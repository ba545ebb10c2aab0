"""Computes the numbers of an evaluation: scores with intervals, edits, stops, understanding.

A score over all prompts is the mean of the tags' means, as in official GenEval. Intervals are of
95 %, by the bootstrap over prompts, tag by tag (`bootstrap.py`). An image without a score counts in
no number that needs one.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import sample_table

Estimate = bootstrap.Estimate
SampleTable = sample_table.SampleTable

# Name of the mean of the tags' means among the tags.
ALL_TAGS = "all tags"


def estimate_from_json(values: list[float] | None) -> Estimate | None:
  """Returns the estimate of [mean, low, high]."""
  return None if values is None else Estimate(*values)


def round_name(number: int) -> str:
  """Returns the name of a round by its index: "draft", "round 2", "round 3", ..."""
  return f"round {number + 1}" if number else "draft"


def score_estimate(
  values: np.ndarray,
  table: SampleTable,
  seed: int,
  columns: np.ndarray | None = None,
) -> Estimate | None:
  """Estimates the mean of the tags' means of a value per chain.

  Args:
    values: One per chain, [n]; NaN where it is missing.
    table: Samples that the values belong to.
    seed: Seed of the bootstrap.
    columns: Indices of the chains that count, all by default.

  Returns:
    The estimate, None if no chain has a value.
  """
  if columns is None:
    columns = np.arange(len(values))
  valid = columns[np.isfinite(values[columns])]
  if not valid.size:
    return None
  return bootstrap.bootstrap_mean(values[valid], seed, table.design(valid))


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
  """Returns which share of `whole` is in `part` (both bool), None if `whole` is empty."""
  if not whole.any():
    return None
  return float(np.sum(part & whole) / np.sum(whole))


def _mean_where(values: np.ndarray, mask: np.ndarray) -> float | None:
  """Returns the mean of the values under a mask, None if it is empty."""
  if not mask.any():
    return None
  return float(values[mask].mean())


# --- Rounds ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
  """What a round changed, over the images that have a score before and after.

  Attributes:
    improved: Share of images whose score rose.
    worse: Share of images whose score fell.
    unchanged: Share of images whose score stayed.
    gain: Mean change of the score.
  """

  improved: float | None
  worse: float | None
  unchanged: float | None
  gain: Estimate | None


@dataclasses.dataclass(frozen=True)
class RoundEstimates:
  """Numbers of one round.

  Attributes:
    round: Name of the round.
    score: Reward in [0, 1].
    parts: Parts of the reward by name, in [0, 1].
    finished: Share of chains that have stopped in this round or before.
    format: Mean format reward of the chains that were open before the round.
    tokens: Mean length of their texts.
    instruction_tokens: Mean length of their instructions.
    seconds: Median time per image.
    change: What the round changed; None for drafts.
  """

  round: str
  score: Estimate | None
  parts: Mapping[str, Estimate | None]
  finished: float
  format: float | None
  tokens: float | None
  instruction_tokens: float | None
  seconds: float
  change: Change | None

  def to_json(self) -> dict:
    """Returns JSON values; those of the change stand beside the others, or are left out."""
    values = dict(vars(self))
    del values["change"]
    if self.change is not None:
      values.update(vars(self.change))
    return values

  @classmethod
  def from_json(cls, values: Mapping) -> "RoundEstimates":
    """Returns the numbers that `to_json` has written."""
    change = None
    # Drafts change nothing, and have no such keys.
    if "gain" in values:
      change = Change(
        improved=values["improved"],
        worse=values["worse"],
        unchanged=values["unchanged"],
        gain=estimate_from_json(values["gain"]),
      )
    parts = {
      name: estimate_from_json(part) for name, part in values["parts"].items()
    }
    return cls(
      round=values["round"],
      score=estimate_from_json(values["score"]),
      parts=parts,
      finished=values["finished"],
      format=values["format"],
      tokens=values["tokens"],
      instruction_tokens=values["instruction_tokens"],
      seconds=values["seconds"],
      change=change,
    )


def by_round(table: SampleTable, seed: int) -> list[RoundEstimates]:
  """Returns the numbers of every round."""
  rounds = []
  for number in range(len(table.score)):
    # Chains that finished before this round wrote nothing that counts in it.
    is_open = np.ones(len(table.tags), bool)
    change = None
    if number:
      is_open = ~table.stop[number - 1]
      change = _change(table, number, seed)
    parts = {
      name: score_estimate(values[number], table, seed)
      for name, values in table.parts.items()
    }
    estimates = RoundEstimates(
      round=round_name(number),
      score=score_estimate(table.score[number], table, seed),
      parts=parts,
      finished=float(table.stop[number].mean()),
      format=_mean_where(table.format[number], is_open),
      tokens=_mean_where(table.tokens[number], is_open),
      instruction_tokens=_mean_where(table.instruction_tokens[number], is_open),
      seconds=float(np.median(table.seconds[number])),
      change=change,
    )
    rounds.append(estimates)
  return rounds


def _change(table: SampleTable, number: int, seed: int) -> Change:
  change = table.score[number] - table.score[number - 1]
  valid = np.isfinite(change)
  return Change(
    improved=_share(change > 0, valid),
    worse=_share(change < 0, valid),
    unchanged=_share(change == 0, valid),
    gain=score_estimate(change, table, seed),
  )


def by_tag(table: SampleTable, seed: int) -> dict[str, list[Estimate | None]]:
  """Returns the score of every round, by tag."""
  return _by_tag(table.score, table, seed)


def correct_by_tag(
  table: SampleTable, seed: int
) -> dict[str, list[Estimate | None]]:
  """Returns the share of correct images of every round: by tag, after that of ALL_TAGS.

  This is GenEval's score. It is empty if no reward says which images are correct.
  """
  correct = table.correct
  if correct is None:
    return {}
  overall = [score_estimate(values, table, seed) for values in correct]
  return {ALL_TAGS: overall} | _by_tag(correct, table, seed)


def _by_tag(
  rows: np.ndarray, table: SampleTable, seed: int
) -> dict[str, list[Estimate | None]]:
  """Returns estimates of a value per chain, [rounds, n], by tag and round."""
  tags = np.asarray(table.tags)
  estimates = {}
  for tag in table.distinct_tags:
    columns = np.flatnonzero(tags == tag)
    estimates[tag] = [
      score_estimate(values, table, seed, columns) for values in rows
    ]
  return estimates


def refinement(table: SampleTable, seed: int) -> Estimate | None:
  """Returns the score of the last round minus that of the draft; None without scores."""
  return score_estimate(table.score[-1] - table.score[0], table, seed)


# --- Stops and edits ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StopEstimates:
  """How well one round stops, over the chains that were open before it.

  Attributes:
    round: Name of the round.
    right: Number of chains whose image was right (score 1).
    wrong: Number of chains whose image was wrong.
    stop_when_right: Share of the right images that the model stopped at.
    stop_when_wrong: Share of the wrong images that the model stopped at.
    stop_precision: Share of right images among those that it stopped at.
  """

  round: str
  right: int
  wrong: int
  stop_when_right: float | None
  stop_when_wrong: float | None
  stop_precision: float | None


@dataclasses.dataclass(frozen=True)
class Stops:
  """How well the model knows when to stop (docs/algorithm.md#evaluation).

  Attributes:
    rounds: Every round after the draft.
    score: Score of the last image by the way of stopping: "its own stops"; "stopped at the draft";
      where chains continue behind their stops also "never stopped", and "stopped at the best
      image" of the chain that never stops, which is what a perfect judge of its own images would
      reach. All are over the chains whose images all have scores.
  """

  rounds: list[StopEstimates]
  score: dict[str, Estimate | None]

  def to_json(self) -> dict:
    """Returns JSON values."""
    return {"rounds": [dict(vars(x)) for x in self.rounds], "score": self.score}

  @classmethod
  def from_json(cls, values: Mapping) -> "Stops":
    """Returns the numbers that `to_json` has written."""
    score = {
      name: estimate_from_json(value) for name, value in values["score"].items()
    }
    return cls([StopEstimates(**x) for x in values["rounds"]], score)


def stops(table: SampleTable, seed: int) -> Stops:
  """Returns how well the model knows when to stop."""
  rounds = []
  for number in range(1, len(table.score)):
    before = table.score[number - 1]
    is_open = ~table.stop[number - 1]
    right = is_open & (before == 1)
    wrong = is_open & (before < 1)
    says_stop = table.says_stop[number]
    estimates = StopEstimates(
      round=round_name(number),
      right=int(right.sum()),
      wrong=int(wrong.sum()),
      stop_when_right=_share(says_stop, right),
      stop_when_wrong=_share(says_stop, wrong),
      stop_precision=_share(right, says_stop & (right | wrong)),
    )
    rounds.append(estimates)

  last_scores = {
    "its own stops": table.score[-1],
    "stopped at the draft": table.score[0],
  }
  is_complete = np.isfinite(table.score).all(0)
  if table.never_stops:
    last_scores["never stopped"] = table.chain_score[-1]
    last_scores["stopped at the best image"] = table.chain_score.max(0)
    is_complete &= np.isfinite(table.chain_score).all(0)
  # All ways of stopping are compared on the same chains.
  complete = np.flatnonzero(is_complete)
  score = {
    name: score_estimate(values, table, seed, complete)
    for name, values in last_scores.items()
  }
  return Stops(rounds, score)


@dataclasses.dataclass(frozen=True)
class Behaviour:
  """How chains edit and stop, over all rounds after the draft.

  Rounds without a score count in none of the shares that need one; a share of nothing is None.

  Attributes:
    edit_rate: Edits per round in which a chain was open.
    stop_precision: Share of right images (score 1) among those that the model stopped at.
    stop_when_right: Share of right images that it stopped at.
    stop_when_wrong: Share of other images that it stopped at.
    improvement: Mean change of the score by an edit.
    improved: Share of edits after which the score is higher.
    worse: Share of edits after which the score is lower.
    finished: Share of chains that have stopped in the last round or before.
  """

  edit_rate: float | None
  stop_precision: float | None
  stop_when_right: float | None
  stop_when_wrong: float | None
  improvement: float | None
  improved: float | None
  worse: float | None
  finished: float


def behaviour(table: SampleTable) -> Behaviour:
  """Returns how the chains edit and stop."""
  open_before = ~table.stop[:-1]
  stopped = table.stop[1:] & open_before
  edited = ~table.stop[1:]
  before = table.score[:-1]
  change = np.diff(table.score, axis=0)
  # A comparison with NaN is False: images without a score are neither right nor wrong.
  valid = edited & np.isfinite(change)
  return Behaviour(
    edit_rate=_share(edited, open_before),
    stop_precision=_share(before == 1, stopped & np.isfinite(before)),
    stop_when_right=_share(stopped, open_before & (before == 1)),
    stop_when_wrong=_share(stopped, open_before & (before < 1)),
    improvement=_mean_where(change, valid),
    improved=_share(change > 0, valid),
    worse=_share(change < 0, valid),
    finished=float(table.stop[-1].mean()),
  )


# --- Curves ---------------------------------------------------------------------------------------


def curve_values(table: SampleTable) -> dict[str, float]:
  """Returns the numbers that curves over iterations show, by "evaluation/NAME"; NaN where missing.

  Scores are means of the tags' means; those of tags and of parts are of the last round.
  """
  last_round = table.score[-1]
  tags = np.asarray(table.tags)
  scores = {
    "draft": table.score[0],
    "last_round": last_round,
    "gain": last_round - table.score[0],
  }
  for name, part in table.parts.items():
    scores[f"part/{name}"] = part[-1]
  for tag in table.distinct_tags:
    # The mean over one tag leaves out what is NaN.
    scores[f"tag/{tag}"] = np.where(tags == tag, last_round, np.nan)

    if table.correct is not None:
      scores[f"correct/{tag}"] = np.where(
        tags == tag, table.correct[-1], np.nan
      )

  values = {name: _valid_mean(score, table) for name, score in scores.items()}
  values["missing"] = table.missing
  values.update(vars(behaviour(table)))
  numbers = {}
  for name, value in values.items():
    numbers[f"evaluation/{name}"] = np.nan if value is None else value
  return numbers


def _valid_mean(values: np.ndarray, table: SampleTable) -> float | None:
  """Returns the mean of the tags' means over the chains that have a value."""
  valid = np.flatnonzero(np.isfinite(values))
  if not valid.size:
    return None
  return bootstrap.mean(values[valid], table.design(valid))


# --- Understanding --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class YesOrNo:
  """Numbers of questions that are answered by yes or no; every tag weighs the same.

  Attributes:
    precision: Share of right answers among those that are "yes".
    recall: Share of "yes" among the answers to questions whose right answer it is.
    says_yes: Share of "yes" among the answers.
    always_yes: Accuracy of always answering "yes".
  """

  precision: float | None
  recall: float | None
  says_yes: float
  always_yes: float


@dataclasses.dataclass(frozen=True)
class Understanding:
  """How often the answers to one kind of question are right; every tag weighs the same.

  Attributes:
    questions: Number of questions.
    accuracy: Share of right answers.
    most_frequent: Accuracy of always giving the most frequent right answer.
    most_frequent_word: That answer.
    unread: Share of texts that hold no answer, and count as wrong.
    yes_or_no: Further numbers of yes/no questions; None for other kinds.
  """

  questions: int
  accuracy: Estimate
  most_frequent: float
  most_frequent_word: str
  unread: float
  yes_or_no: YesOrNo | None

  def to_json(self) -> dict:
    """Returns JSON values; those of yes/no questions stand beside the others, or are left out."""
    values = dict(vars(self))
    del values["yes_or_no"]
    if self.yes_or_no is not None:
      values.update(vars(self.yes_or_no))
    return values

  @classmethod
  def from_json(cls, values: Mapping) -> "Understanding":
    """Returns the numbers that `to_json` has written."""
    yes_or_no = None
    if "always_yes" in values:
      yes_or_no = YesOrNo(
        precision=values["precision"],
        recall=values["recall"],
        says_yes=values["says_yes"],
        always_yes=values["always_yes"],
      )
    return cls(
      questions=values["questions"],
      accuracy=Estimate(*values["accuracy"]),
      most_frequent=values["most_frequent"],
      most_frequent_word=values["most_frequent_word"],
      unread=values["unread"],
      yes_or_no=yes_or_no,
    )


def _ratio(part: float, whole: float) -> float | None:
  return part / whole if whole else None


def understanding(
  answers: sample_table.AnswerTable, seed: int
) -> dict[str, Understanding]:
  """Returns how often answers are right, by kind of question."""
  kinds = np.asarray(answers.kinds)
  estimates = {}
  for kind in dict.fromkeys(answers.kinds):
    rows = np.flatnonzero(kinds == kind)
    estimates[kind] = _understanding_of(answers, rows, seed)
  return estimates


def _understanding_of(
  answers: sample_table.AnswerTable, rows: np.ndarray, seed: int
) -> Understanding:
  """Returns the numbers of one kind of question; `rows` are the indices of its answers."""
  expected = np.asarray(answers.expected)[rows]
  given = np.asarray(answers.given)[rows]
  tags = np.asarray(answers.tags)[rows]
  prompts = [answers.prompts[i] for i in rows]
  _, tag_index, sizes = np.unique(tags, return_inverse=True, return_counts=True)
  # With these weights a sum over questions is the mean of the tags' means.
  weights = 1 / (len(sizes) * sizes[tag_index])

  def share(mask: np.ndarray) -> float:
    """Returns which share of the questions a mask holds; every tag weighs the same."""
    return float(weights[mask].sum())

  shares = {str(word): share(expected == word) for word in np.unique(expected)}
  most_frequent_word = max(shares, key=shares.get)
  # A text without an answer gave "", which is never right.
  is_right = (expected == given).astype(float)
  design = bootstrap.Design(clusters=prompts, strata=tags)

  yes_or_no = None
  if set(shares) <= {"yes", "no"}:
    is_yes = expected == "yes"
    says_yes = given == "yes"
    true_yes = share(is_yes & says_yes)
    yes_or_no = YesOrNo(
      precision=_ratio(true_yes, share(says_yes)),
      recall=_ratio(true_yes, share(is_yes)),
      says_yes=share(says_yes),
      always_yes=share(is_yes),
    )
  return Understanding(
    questions=len(rows),
    accuracy=bootstrap.bootstrap_mean(is_right, seed, design),
    most_frequent=shares[most_frequent_word],
    most_frequent_word=most_frequent_word,
    unread=share(given == ""),
    yes_or_no=yes_or_no,
  )
