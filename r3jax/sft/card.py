"""Writes the card of a trained model: the README beside its weights."""

from collections.abc import Mapping, Sequence
import pathlib

import ml_collections

from r3jax.files import atomic
from r3jax.sft import curves
from r3jax.sft import stages

_MOST_ROWS = 12  # of a table of curves
# Scores in this order: what each table shows, and the names of its scores without their group.
_TABLES = (
  ("draft", "Mean score of drafts for held-out prompts"),
  ("edit", "Share of edits after the right instruction that are exact"),
  ("untouched", "Share of the other cells that such edits leave alone"),
  ("judgement", "Balanced accuracy of stopping or editing, rendered scenes"),
  ("answer", "Balanced accuracy of answers about these scenes"),
  ("stop", "Share of these scenes that the model stops at"),
)


def write(
  path: pathlib.Path,
  config: ml_collections.ConfigDict,
  records: Mapping[str, stages.Record],
  start: Mapping[str, str],
) -> None:
  """Writes the card.

  Args:
    path: File to write.
    config: Config of the run.
    records: What every stage has done, in their order.
    start: Command, commit, date and machine, see `machine.start`.
  """
  atomic.write_text(path, "\n".join(_lines(config, records, start)) + "\n")


def _lines(
  config: ml_collections.ConfigDict,
  records: Mapping[str, stages.Record],
  start: Mapping[str, str],
) -> list[str]:
  lines = [
    "# The small BAGEL of the world of shapes",
    "",
    "A BAGEL in its own file format, trained from nothing on the embedded world"
    f" (docs/embedded_world.md) with seed {config.seed}:",
    "",
    "```bash",
    start["command"],
    "```",
    "",
    f"Finished {start['date']} at commit {start['commit'] or 'unknown'}.",
    f"Machine: {start['machine']}.",
    "",
    "| stage | steps | seconds | seconds of all cores |",
    "| --- | --- | --- | --- |",
  ]
  for name, record in records.items():
    lines.append(_stage_line(name, record))
  scores = records["joint"].scores
  if scores:
    lines += _verdict(scores[-1], curves.Window(**config.window))
  for name in ("joint", "text"):
    for group, meaning in _TABLES:
      lines += _table(name, group, meaning, records[name].scores)
  return lines


def _stage_line(name: str, record: stages.Record) -> str:
  numbers = (record.step, record.seconds, record.cpu_seconds)
  return f"| {name} | " + " | ".join(f"{x:.0f}" for x in numbers) + " |"


def _verdict(scores: Mapping[str, float], window: curves.Window) -> list[str]:
  """Returns whether the last scores are inside the window."""
  outside = window.outside(scores)
  limits = (
    f"drafts {_range(window.draft)}, exact edits from {window.edit:g},"
    f" judgement on every tag {_range(window.judgement)},"
    f" answers of every kind {_range(window.answer)}"
  )
  if not outside:
    return ["", f"The model is inside its window: {limits}."]
  values = [f"{name} {scores[name]:.3f}" for name in outside]
  return ["", f"Outside the window ({limits}): {', '.join(values)}."]


def _range(limits: Sequence[float]) -> str:
  low, high = limits
  return f"{low:g} to {high:g}"


def _table(
  stage: str, group: str, meaning: str, scores: Sequence[Mapping[str, float]]
) -> list[str]:
  """Returns the curves of a group of scores; nothing where a stage has none of them."""
  if not scores:
    return []
  names = [name for name in scores[-1] if _group(name) == group]
  if not names:
    return []
  columns = [name.removeprefix(f"{group}/") for name in names]
  every = -(-len(scores) // _MOST_ROWS)
  shown = scores[::-1][::every][::-1]  # the last one always
  lines = [
    "",
    f"{meaning}, stage `{stage}`:",
    "",
    f"| step | {' | '.join(columns)} |",
    "| --- |" + " --- |" * len(columns),
  ]
  for row in shown:
    values = " | ".join(f"{row[name]:.3f}" for name in names)
    lines.append(f"| {row['step']:.0f} | {values} |")
  return lines


def _group(name: str) -> str:
  return "stop" if name.startswith("stop_") else name.partition("/")[0]
