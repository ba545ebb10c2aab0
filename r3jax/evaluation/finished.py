"""Reads finished evaluations from their folders."""

import dataclasses
import functools
import json
import re

from etils import epath

from r3jax.evaluation import evaluate
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import summary as summary_lib
from r3jax.files import paths

EVALUATIONS = "evaluation"  # folder of a workdir that holds its evaluations
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


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


def step_folders(workdir: epath.Path) -> dict[int, epath.Path]:
  """Returns the folders of a run's evaluations by iteration, in its order.

  Anything else in WORKDIR/evaluation, such as a copy, is not ours.
  """
  folder = workdir / EVALUATIONS
  if not folder.exists():
    return {}
  folders = {}
  for path in folder.iterdir():
    match = _STEP_FOLDER.fullmatch(path.name)
    if match and path.is_dir():
      folders[int(match[1])] = path
  return dict(sorted(folders.items()))


def read(path: str) -> list[FinishedEvaluation]:
  """Reads the evaluation of a folder, or all evaluations of a run's workdir by iteration.

  Raises:
    ValueError: There is no finished evaluation.
  """
  folder = paths.of_user(path)
  name = path.rstrip("/")
  evaluations = []
  if sample_log.exists(folder):
    if _is_finished(folder):
      evaluations.append(_read_folder(folder, name, name))
  else:
    for step, step_folder in step_folders(folder).items():
      if _is_finished(step_folder):
        evaluation = _read_folder(step_folder, f"{name} @ {step}", name)
        evaluations.append(evaluation)
  if not evaluations:
    raise ValueError(
      f"there must be a finished evaluation in {path}, or in its folder evaluation; there is none"
      f"{paths.did_you_mean(path)}"
    )
  return evaluations
