"""Reads finished evaluations from their folders."""

import dataclasses
import functools
import re

from etils import epath

from r3jax.evaluation import evaluate
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import summary as summary_lib
from r3jax.files import damage
from r3jax.files import paths

EVALUATIONS = "evaluation"  # folder of a workdir that holds its evaluations
_STEP = "step_"
_STEP_NAME = re.compile(rf"{_STEP}\d{{6,18}}")


@dataclasses.dataclass(frozen=True)
class FinishedEvaluation:
  """A finished evaluation.

  Attributes:
    name: Name in tables and plots.
    run: Name of the run that it belongs to; its own if it belongs to none.
    settings: What its results depend on, except the model.
    summary: Its numbers.
    samples: Its samples, in the order of their keys.
    labelled: Its answers about labelled images, in the order of their keys.
  """

  name: str
  run: str
  settings: dict
  summary: summary_lib.Summary
  samples: list[sample_log.Sample]
  labelled: list[labelled_questions.Answer] = dataclasses.field(
    default_factory=list
  )

  @functools.cached_property
  def table(self) -> sample_table.SampleTable:
    """Its samples as arrays."""
    return sample_table.of_samples(self.samples)

  @functools.cached_property
  def answers(self) -> sample_table.AnswerTable:
    """Its answers about labelled images."""
    return labelled_estimates.table_of(self.labelled)


def _read_folder(folder: epath.Path, name: str, run: str) -> FinishedEvaluation:
  remedy = f"Evaluate again, or delete {folder}"
  path = folder / evaluate.SETTINGS
  with damage.explained(path, "the settings of an evaluation", remedy):
    settings = damage.read_object(path)
  path = folder / evaluate.SUMMARY
  with damage.explained(path, "the summary of an evaluation", remedy):
    summary = summary_lib.Summary.from_json(damage.read_object(path))
    summary.notes()  # raises an error where it holds no numbers
  path = sample_log.path(folder)
  with damage.explained(path, "the samples of an evaluation", remedy):
    # A sample that was drawn again has several lines; the last one counts.
    latest = sample_log.read_evaluated(folder)
    if len(latest) < summary.images:
      raise ValueError(
        f"it has {len(latest)} samples, and {evaluate.SUMMARY} is of {summary.images}"
      )
  path = labelled_questions.path(folder)
  with damage.explained(path, "answers about labelled images", remedy):
    answers = labelled_questions.read(folder)
  return FinishedEvaluation(
    name=name,
    run=run,
    settings=settings,
    summary=summary,
    samples=[latest[key] for key in sorted(latest)],
    labelled=[answers[key] for key in sorted(answers)],
  )


def _is_finished(folder: epath.Path) -> bool:
  return (folder / evaluate.SUMMARY).exists()


def step_folders(workdir: epath.Path) -> dict[int, epath.Path]:
  """Returns the folders of a run's evaluations by iteration, in its order.

  Anything else in WORKDIR/evaluation, such as a copy, is not ours.
  """
  folders = {}
  for path in step_paths(workdir):
    if path.is_dir():
      folders[int(path.name.removeprefix(_STEP))] = path
  return dict(sorted(folders.items()))


def step_paths(workdir: epath.Path) -> list[epath.Path]:
  """Returns what has the name of an evaluation in a run's workdir, be it a folder or not."""
  folder = workdir / EVALUATIONS
  if not folder.is_dir():
    return []
  return [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)]


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
