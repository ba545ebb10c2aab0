"""Reads finished evaluations from their folders."""

import dataclasses
import functools
import json

from etils import epath

from r3jax.evaluation import evaluate
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import summary as summary_lib

_STEP_PREFIX = "step_"  # of the folders of a run's evaluations


@dataclasses.dataclass(frozen=True)
class FinishedEvaluation:
  """A finished evaluation.

  Attributes:
    name: Name in tables and plots.
    run: Name of the run that it belongs to; its own if it belongs to none.
    settings: What its results depend on, except the model.
    summary: Its numbers.
    samples: Its samples, in the order of their keys.
  """

  name: str
  run: str
  settings: dict
  summary: summary_lib.Summary
  samples: list[sample_log.Sample]

  @functools.cached_property
  def table(self) -> sample_table.SampleTable:
    """Its samples as arrays."""
    return sample_table.of_samples(self.samples)


def _read_folder(folder: epath.Path, name: str, run: str) -> FinishedEvaluation:
  # A sample that was drawn again has several lines; the last one counts.
  latest = {sample.key: sample for sample in sample_log.read(folder)}
  settings = json.loads((folder / evaluate.SETTINGS).read_text())
  values = json.loads((folder / evaluate.SUMMARY).read_text())
  return FinishedEvaluation(
    name=name,
    run=run,
    settings=settings,
    summary=summary_lib.Summary.from_json(values),
    samples=[latest[key] for key in sorted(latest)],
  )


def _is_finished(folder: epath.Path) -> bool:
  return (folder / evaluate.SUMMARY).exists()


def read(path: str) -> list[FinishedEvaluation]:
  """Reads the evaluation of a folder, or all evaluations of a run's workdir by iteration.

  Raises:
    ValueError: There is no finished evaluation.
  """
  folder = epath.Path(path)
  name = path.rstrip("/")
  evaluations = []
  if sample_log.exists(folder):
    if _is_finished(folder):
      evaluations.append(_read_folder(folder, name, name))
  elif (folder / "evaluation").exists():
    for step_folder in sorted((folder / "evaluation").iterdir()):
      if _is_finished(step_folder):
        step = int(step_folder.name.removeprefix(_STEP_PREFIX))
        evaluation = _read_folder(step_folder, f"{name} @ {step}", name)
        evaluations.append(evaluation)
  if not evaluations:
    raise ValueError(
      f"there must be a finished evaluation in {path}, or in its folder evaluation; there is none"
    )
  return evaluations
