"""Writes the summary of a finished run: `summary.json` and the report page."""

from collections.abc import Mapping
import dataclasses
import json
import math

import jax
import numpy as np

from r3jax import types
from r3jax.evaluation import comparison
from r3jax.evaluation import estimates
from r3jax.evaluation import sample_log
from r3jax.files import atomic
from r3jax.files import jsonl
from r3jax.report import run_page
from r3jax.run import health
from r3jax.run import machine
from r3jax.run import sessions
from r3jax.run import workdir

# Metrics that the report draws, in this order.
CHARTS = (
  "reason/score",
  "reason/strict",
  "edit/before",
  "edit/score",
  "edit/improvement",
  "edit/edit_rate",
  "edit/stop_when_right",
  "edit/stop_when_wrong",
  "reason/format",
  "edit/format",
  "reason/tokens",
  "edit/tokens",
  "reason/gradient_norm",
  "edit/gradient_norm",
  "reason/text_kl",
  "edit/text_kl",
  "mismatch/reason_text",
  "mismatch/reason_image",
  "mismatch/edit_text",
  "mismatch/edit_image",
)


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
  title = f"r3jax: {num_iterations} iterations, seed {seed}"
  if session.leaked.contaminated:
    title += " (CONTAMINATED: trained on test prompts)"
  compared = comparison.compare_pair(before, after, seed)
  scores = {view: dataclasses.asdict(pair) for view, pair in compared.items()}
  answers = comparison.compare_answers(
    evaluated_before.answers, evaluated_after.answers, seed
  )
  return {
    "title": title,
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
    "skipped updates": _skipped_updates(session.files),
    "iterations": num_iterations,
    "seed": seed,
    "seconds": dict(seconds) | _median_iteration(session.files),
    "compile_seconds": seconds["compile"],
    "peak_memory_gib": machine.peak_memory() / 2**30,
    "versions": machine.versions(),
  }


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


def _skipped_updates(files: workdir.Workdir) -> int:
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


def write(files: workdir.Workdir, summary: dict) -> None:
  """Writes the report page and summary.json; only process 0 writes."""
  if jax.process_index():
    return
  # Formatted first: values that JSON does not have must not leave a page without a summary.
  text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
  run_page.write_report(
    files.report,
    run_page.RunSummary.from_json(summary),
    jsonl.read(files.metrics),
    sample_log.read(files.report),
    CHARTS,
  )
  # Last: a run with a summary is complete.
  atomic.write_text(files.summary, text)
