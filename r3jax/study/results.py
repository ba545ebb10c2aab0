"""Computes the numbers of a study from its finished runs."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.study import declarations
from r3jax.study import measures
from r3jax.study import runs
from r3jax.study import verdicts

BEFORE = declarations.BEFORE
Estimate = bootstrap.Estimate


@dataclasses.dataclass(frozen=True)
class Cell:
  """One measure of one arm.

  Attributes:
    estimate: Mean over seeds, with an interval over prompts and seeds.
    by_seed: Mean of every run, by its seed; None for the model before training.
  """

  estimate: Estimate
  by_seed: Mapping[int | None, float]


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric of training.

  Attributes:
    label: What it is.
    by_seed: Its value in every iteration, by seed.
  """

  label: str
  by_seed: Mapping[int, Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class Results:
  """Numbers of a study.

  Attributes:
    title: What it is about.
    arms: Meanings of the arms by name; the first is BEFORE.
    num_runs: Finished runs, and runs of the whole study.
    cells: By measure and arm; what is not measured is missing.
    verdicts: One per claim.
    rounds: Score of every round by arm.
    curves: Reward of drafts in training by arm.
    hours: Hours that the iterations of all runs took; None where that is not known.
  """

  title: str
  arms: Mapping[str, str]
  num_runs: tuple[int, int]
  cells: Mapping[str, Mapping[str, Cell]]
  verdicts: Sequence[verdicts.Verdict]
  rounds: Mapping[str, Sequence[Estimate]]
  curves: Mapping[str, Curve]
  hours: float | None

  def to_json(self) -> dict:
    """Returns JSON values."""
    values = dataclasses.asdict(self)
    del values["curves"]
    for verdict, numbers in zip(values["verdicts"], self.verdicts, strict=True):
      verdict["claim"] = dataclasses.asdict(numbers.claim)
    return values


def compute(
  plan: runs.Plan, finished_runs: Sequence[runs.Run], seed: int = 0
) -> Results:
  """Computes the numbers of a study from the runs that have finished.

  Args:
    plan: The study.
    finished_runs: Its finished runs; claims about others stay undecided.
    seed: Seed of the bootstrap.
  """
  study = plan.study
  names = {*study.measures, *(claim.measure for claim in study.claims)}
  values = {name: _values(name, finished_runs) for name in names}
  cells = {}
  for name in study.measures:
    cells[name] = {}
    for arm, of_arm in values[name].items():
      cell = _cell(of_arm, seed)
      if cell is not None:
        cells[name][arm] = cell
  differences = []
  for claim in study.claims:
    differences.append(_difference(claim, values[claim.measure], seed))
  arms = {BEFORE: "the model before training"}
  arms |= {arm.name: arm.meaning for arm in study.arms}
  return Results(
    title=study.title,
    arms=arms,
    num_runs=(len(finished_runs), len(study.arms) * len(plan.seeds)),
    cells=cells,
    verdicts=verdicts.judge(study.claims, differences),
    rounds=_rounds(finished_runs, seed),
    curves=_curves(finished_runs),
    hours=_hours(finished_runs),
  )


def _values(
  name: str, finished_runs: Sequence[runs.Run]
) -> dict[str, dict[int | None, measures.Measured]]:
  """Returns what a measure is of every arm and seed, and of the model before training."""
  measure = measures.MEASURES[name]
  values = {}
  if finished_runs:
    # All runs start from one model, and are evaluated with the same noise.
    first = measure.read(finished_runs[0].before, ())
    if first is not None:
      values[BEFORE] = {None: first}
  for run in finished_runs:
    measured = measure.read(run.after, run.metrics)
    if measured is not None:
      values.setdefault(run.arm, {})[run.seed] = measured
  return values


def _cell(
  values: Mapping[int | None, measures.Measured], seed: int
) -> Cell | None:
  """Returns a measure of an arm, None where all its values are missing."""
  draws = verdicts.of_arm(values, seed)
  if draws is None:
    return None
  by_seed = {}
  for number, measured in values.items():
    alone = verdicts.of_arm({number: measured}, seed)
    if alone is not None:
      by_seed[number] = alone.mean
  return Cell(draws.estimate(), by_seed)


def _difference(
  claim: declarations.Claim,
  values: Mapping[str, Mapping[int | None, measures.Measured]],
  seed: int,
) -> verdicts.Draws | None:
  """Returns the difference that a claim is about; None where it is not measured yet."""
  arm = values.get(claim.arm)
  if arm is None:
    return None
  if claim.than == declarations.ZERO:
    return verdicts.of_arm(arm, seed)
  other = values.get(claim.than)
  return None if other is None else verdicts.difference(arm, other, seed)


def _rounds(
  finished_runs: Sequence[runs.Run], seed: int
) -> dict[str, list[Estimate]]:
  """Returns the score of every round by arm."""
  result = {}
  for arm in (BEFORE, *dict.fromkeys(run.arm for run in finished_runs)):
    tables = _tables(finished_runs, arm)
    if not tables:
      continue
    design = tables[0].design(np.arange(len(tables[0].tags)))
    estimates = []
    for number in range(len(tables[0].score)):
      values = {}
      for i, table in enumerate(tables):
        values[i] = measures.Measured(table.score[number], design)
      draws = verdicts.of_arm(values, seed)
      if draws is not None:
        estimates.append(draws.estimate())
    result[arm] = estimates
  return result


def _tables(finished_runs: Sequence[runs.Run], arm: str) -> list:
  """Returns the scores of an arm's runs."""
  if arm == BEFORE:
    return [run.before.table for run in finished_runs[:1]]
  return [run.after.table for run in finished_runs if run.arm == arm]


def _curves(finished_runs: Sequence[runs.Run]) -> dict[str, Curve]:
  """Returns the reward of drafts in training by arm."""
  curves = {}
  for arm in dict.fromkeys(run.arm for run in finished_runs):
    by_seed = {}
    for run in finished_runs:
      if run.arm == arm:
        by_seed[run.seed] = [row.get("reason/score") for row in run.metrics]
    curves[arm] = Curve("reward of drafts", by_seed)
  return curves


def _hours(finished_runs: Sequence[runs.Run]) -> float | None:
  """Returns the hours of all iterations, by the median of each run."""
  seconds = 0.0
  for run in finished_runs:
    if run.seconds is None:
      return None
    seconds += run.seconds * len(run.metrics)
  return seconds / 3600
