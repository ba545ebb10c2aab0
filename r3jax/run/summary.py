"""Writes the summary of a finished run: `summary.json` and the report page."""

from collections.abc import Mapping
import dataclasses
import json
import math

from absl import logging
import jax
import numpy as np

from r3jax import types
from r3jax.evaluation import comparison
from r3jax.evaluation import estimates
from r3jax.evaluation import evaluate
from r3jax.evaluation import finished
from r3jax.evaluation import sample_log
from r3jax.evaluation import summary as evaluation_summary
from r3jax.files import atomic
from r3jax.files import damage
from r3jax.files import jsonl
from r3jax.report import run_page
from r3jax.run import health
from r3jax.run import machine
from r3jax.run import sessions
from r3jax.run import workdir

# What of a summary is about a start, not about the run.
_TIMES = ("seconds", "compile_seconds", "peak_memory_gib", "start")


def count_parameters(
  session: sessions.Session, policy: types.Params
) -> dict[str, int]:
  """Counts the parameters that training changes, and those of the whole model.

  Args:
    session: Constants of the run.
    policy: Trained parameters.

  Returns:
    {"trainable", "all"}, as the summary has them.
  """
  whole_policy = session.frozen.whole(policy)
  return {
    "trainable": _size(policy),
    "all": _size(whole_policy) + _size(session.frozen.towers),
  }


def _size(tree: types.Params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def title(session: sessions.Session) -> str:
  """Returns the title of a run."""
  config = session.config
  text = f"r3jax: {config.total_steps} iterations, seed {config.seed}"
  if session.leaked.contaminated:
    text += " (CONTAMINATED: trained on test prompts)"
  return text


def make(
  session: sessions.Session,
  seconds: Mapping[str, float],
  evaluated_before: sessions.Evaluated,
  evaluated_after: sessions.Evaluated,
) -> dict:
  """Returns the summary of a run as JSON values.

  Args:
    session: Constants of the run.
    seconds: Wall-clock time of the phases of this start, by phase.
    evaluated_before: Evaluation of the policy before training.
    evaluated_after: Evaluation of the trained policy.
  """
  before = evaluated_before.table
  after = evaluated_after.table
  seed = session.config.seed
  num_iterations = session.config.total_steps
  compared = comparison.compare_pair(before, after, seed)
  scores = {view: dataclasses.asdict(pair) for view, pair in compared.items()}
  answers = comparison.compare_answers(
    evaluated_before.answers, evaluated_after.answers, seed
  )
  return {
    "title": title(session),
    "scores": scores,
    "last round minus draft": {
      "before": estimates.refinement(before, seed),
      "after": estimates.refinement(after, seed),
    },
    "labelled images": {
      view: dataclasses.asdict(pair) for view, pair in answers.items()
    },
    "images without a score": {
      "before": before.missing,
      "after": after.missing,
    },
    "behaviour": {
      "before": dataclasses.asdict(estimates.behaviour(before)),
      "after": dataclasses.asdict(estimates.behaviour(after)),
    },
    "leaked": dataclasses.asdict(session.leaked),
    "contamination": session.experiment.contamination.to_json(),
    "skipped updates": skipped_updates(session.files),
    "iterations": num_iterations,
    "seed": seed,
    "prompt": session.experiment.heldout[0].text,
    "seconds": dict(seconds) | _median_iteration(session.files),
    "compile_seconds": seconds["compile"],
    "peak_memory_gib": machine.peak_memory() / 2**30,
    "versions": machine.versions(),
    "start": machine.start(),
  }


def former_times(files: workdir.Workdir) -> dict:
  """Returns what an earlier start has written to the summary about itself: seconds, command, ...

  There are none where that file is missing or damaged: it is written again.
  """
  if not files.summary.exists():
    return {}
  try:
    with damage.explained(
      files.summary, "the summary of a run", "It is written again"
    ):
      former = damage.read_object(files.summary)
  except ValueError as error:
    logging.warning("%s", error)
    return {}
  return {name: former[name] for name in _TIMES if name in former}


def _median_iteration(files: workdir.Workdir) -> dict[str, float]:
  """Returns the median time of an iteration, without the first one where there are others."""
  metrics = jsonl.read(files.metrics)
  if not metrics:
    return {}
  steady = metrics[1:] or metrics
  seconds = [row.get("seconds/iteration") for row in steady]
  # A line that was edited by hand may lack it.
  seconds = [value for value in seconds if _is_number(value)]
  if not seconds:
    return {}
  return {"median iteration": float(np.median(seconds))}


def skipped_updates(files: workdir.Workdir) -> int:
  """Returns how many updates were skipped because they were not finite."""
  total = 0.0
  for row in jsonl.read(files.metrics):
    count = row.get(health.SKIPPED)
    # Iterations of earlier versions have none, and a line that was edited by hand any value.
    if _is_number(count):
      total += count
  return int(total)


def _is_number(value: object) -> bool:
  """Returns whether a value of a log is a finite number."""
  return isinstance(value, int | float) and math.isfinite(value)


def write(session: sessions.Session, summary: dict) -> None:
  """Writes the report page and summary.json; only process 0 writes."""
  if jax.process_index():
    return
  # Formatted first: values that JSON does not have must not leave a page without a summary.
  text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
  write_page(session, run_page.RunSummary.from_json(summary), state="")
  # Last: a run with a summary is complete.
  atomic.write_text(session.files.summary, text)


def write_page(
  session: sessions.Session, summary: run_page.RunSummary, state: str
) -> None:
  """Writes the report page from the files of a run.

  Args:
    session: Constants of the run.
    summary: What is known of the run.
    state: How far it is; "" of a finished run.
  """
  files = session.files
  evaluations = _evaluations(files)
  pages = {}
  for step in evaluations:
    name = files.evaluation(step).name
    pages[step] = f"../{finished.EVALUATIONS}/{name}/index.html"
  details = run_page.RunDetails(
    state=state,
    evaluations=evaluations,
    pages=pages,
    config=_flattened(session.config.to_dict()),
    mismatch_limit=health.mismatch_limit(session.config),
  )
  run_page.write_report(
    files.report,
    summary,
    jsonl.read(files.metrics),
    sample_log.read(files.report),
    details,
  )


def _evaluations(
  files: workdir.Workdir,
) -> dict[int, evaluation_summary.Summary]:
  """Returns the summaries of the finished evaluations of a run, by iteration.

  One that is damaged is left out with a warning; the next start writes it again.
  """
  evaluations = {}
  for step, folder in sorted(finished.step_folders(files.path).items()):
    path = folder / evaluate.SUMMARY
    if not path.exists():
      continue
    try:
      with damage.explained(
        path, "the summary of an evaluation", "The report leaves it out"
      ):
        values = damage.read_object(path)
        evaluations[step] = evaluation_summary.Summary.from_json(values)
    except ValueError as error:
      logging.warning("%s", error)
  return evaluations


def _flattened(config: Mapping, prefix: str = "") -> dict[str, object]:
  """Returns the values of a nested config by their dotted keys."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= _flattened(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat
