"""Writes what an evaluation shows: summary.json, tables in Markdown and CSV, and a page."""

from collections.abc import Sequence
import json

from etils import epath
import jax

from r3jax.evaluation import bootstrap
from r3jax.evaluation import estimates
from r3jax.evaluation import evaluate
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import questions
from r3jax.evaluation import sample_log
from r3jax.evaluation import summary as summary_lib
from r3jax.files import atomic
from r3jax.report import charts as charts_lib
from r3jax.report import page
from r3jax.report import tables as tables_lib

Summary = summary_lib.Summary
Table = tables_lib.Table


def conclude(
  folder: epath.Path,
  samples: Sequence[sample_log.Sample],
  context: summary_lib.Context,
  labelled: Sequence[labelled_questions.Answer] = (),
) -> Summary:
  """Summarizes an evaluation into its folder.

  Process 0 writes tables.md, tables/*.csv, index.html and, last, summary.json: where that file is,
  the evaluation is finished. For the arguments see `summary.summarize`.
  """
  summary = summary_lib.summarize(samples, context, labelled)
  if jax.process_index() != 0:
    return summary

  (folder / "tables.md").write_text(_markdown(summary))
  (folder / "tables").mkdir(exist_ok=True)
  named_tables = tables(summary)
  for name, table in named_tables.items():
    path = folder / "tables" / f"{name}.csv"
    path.write_text(tables_lib.csv_text(table))
  content = page.Page(
    title=summary.title,
    notes=summary.notes(),
    tables=list(named_tables.values()),
    charts=charts(summary),
    samples=samples,
  )
  page.write_page(folder, content)
  # Last: an evaluation with a summary is finished.
  text = json.dumps(summary.to_json(), indent=1, allow_nan=False)
  atomic.write_text(folder / evaluate.SUMMARY, text + "\n")
  return summary


def _markdown(summary: Summary) -> str:
  blocks = [f"# {summary.title}"]
  blocks += [f"**{note}**" for note in summary.notes()]
  blocks += [tables_lib.markdown(table) for table in tables(summary).values()]
  return "\n\n".join(blocks) + "\n"


def console_text(summary: Summary) -> str:
  """Returns notes and tables for a terminal."""
  blocks = summary.notes()
  blocks += [tables_lib.markdown(table) for table in tables(summary).values()]
  return "\n\n".join(blocks)


# --- Tables ---------------------------------------------------------------------------------------


def tables(summary: Summary) -> dict[str, Table]:
  """Returns the tables of an evaluation by name."""
  named = {
    "rounds": _rounds(summary),
    "tags": _tags(summary),
  }
  if summary.correct:
    named["correct"] = _correct(summary)
  named |= {
    "lengths": _lengths(summary),
    "stops": _stops(summary),
    "stop_policies": _stop_policies(summary),
  }
  if summary.understanding:
    named["understanding"] = _understanding(summary)
  if summary.labelled:
    named["labelled"] = _labelled(summary)
    named["labelled_tags"] = _labelled_tags(summary)
  return named


def _rounds(summary: Summary) -> Table:
  parts = list(summary.rounds[0].parts)
  rows = []
  for numbers in summary.rounds:
    part_means = []
    for part in numbers.parts.values():
      part_means.append(part.mean if part else None)
    change = numbers.change
    changes = [None, None, None, None]
    if change:
      gain = tables_lib.difference("score", change.gain)
      changes = [gain, change.improved, change.worse, change.unchanged]
    cells = [
      numbers.score,
      *part_means,
      *changes,
      numbers.finished,
      numbers.format,
    ]
    rows.append((numbers.round, cells))
  changes = ["gain", "improved", "worse", "unchanged"]
  return Table(
    f"Rounds: {summary.images} images of {summary.prompts} prompts; mean of the tags' means with "
    "95 % interval; gain over the round before",
    ["round", "score", *parts, *changes, "finished", "format"],
    rows,
  )


def _tags(summary: Summary) -> Table:
  rounds = [numbers.round for numbers in summary.rounds]
  rows = []
  for tag, scores in summary.tags.items():
    rows.append((tag, [summary.images_by_tag[tag], *scores]))
  return Table(
    "Score by tag, with 95 % interval", ["tag", "images", *rounds], rows
  )


def _correct(summary: Summary) -> Table:
  rounds = [numbers.round for numbers in summary.rounds]
  num_images = {estimates.ALL_TAGS: summary.images} | summary.images_by_tag
  rows = []
  for tag, shares in summary.correct.items():
    rows.append((tag, [num_images[tag], *shares]))
  return Table(
    "Correct images, GenEval's score: all or nothing, by tag, with 95 % interval; over all tags "
    "the mean of theirs",
    ["tag", "images", *rounds],
    rows,
  )


def _lengths(summary: Summary) -> Table:
  rows = []
  for numbers, tflops in zip(summary.rounds, summary.tflops, strict=True):
    gain = None
    if numbers.change:
      gain = numbers.change.gain
    cells = [
      numbers.tokens,
      numbers.instruction_tokens,
      numbers.seconds,
      tflops,
      _per_cost(gain, numbers.seconds),
      _per_cost(gain, tflops),
    ]
    rows.append((numbers.round, cells))
  columns = [
    "round",
    "tokens",
    "of them instruction",
    "seconds an image",
    "TFLOP an image",
    "gain per second",
    "gain per TFLOP",
  ]
  return Table(
    "Lengths and cost: texts of samples that were not finished; seconds in batches, scoring "
    "included",
    columns,
    rows,
    number_format=".4g",
  )


def _per_cost(gain: bootstrap.Estimate | None, cost: float) -> float | None:
  if gain is None or not cost:
    return None
  return gain.mean / cost


def _stops(summary: Summary) -> Table:
  rows = []
  for numbers in summary.stops.rounds:
    cells = [
      numbers.right,
      numbers.wrong,
      numbers.stop_when_right,
      numbers.stop_when_wrong,
      numbers.stop_precision,
    ]
    rows.append((numbers.round, cells))
  columns = [
    "round",
    "right before",
    "wrong before",
    "stops when right",
    "stops when wrong",
    "right when it stops",
  ]
  return Table(
    "Stop calibration: samples that were not finished before the round",
    columns,
    rows,
  )


def _stop_policies(summary: Summary) -> Table:
  rows = [(name, [score]) for name, score in summary.stops.score.items()]
  return Table(
    "What stopping is worth: the score of the last image",
    ["stops", "score"],
    rows,
  )


def _understanding(summary: Summary) -> Table:
  rows = []
  for kind, numbers in summary.understanding.items():
    style = "ITA" if kind.startswith(questions.MATCH) else "VQA"
    yes = numbers.yes_or_no
    yes_cells = [None, None, None, None]
    if yes:
      yes_cells = [yes.precision, yes.recall, yes.says_yes, yes.always_yes]
    cells = [
      numbers.questions,
      numbers.accuracy,
      numbers.most_frequent_word,
      numbers.most_frequent,
      *yes_cells,
      numbers.unread,
    ]
    rows.append((f"{kind} ({style}-style)", cells))
  columns = [
    "kind",
    "questions",
    "accuracy",
    "most frequent word",
    "accuracy of that word",
    "precision of yes",
    "recall of yes",
    "says yes",
    "yes is right",
    "unread",
  ]
  return Table(
    "Understanding: questions about its own drafts and last images",
    columns,
    rows,
  )


def _labelled(summary: Summary) -> Table:
  rows = []
  for kind, numbers in summary.labelled.items():
    cells = [
      numbers.questions,
      numbers.accuracy,
      numbers.affirmation or None,
      numbers.precision,
      numbers.recall,
      numbers.recall_of_denial,
      numbers.unread,
    ]
    rows.append((kind, cells))
  columns = [
    "kind",
    "questions",
    "balanced accuracy",
    "affirmation",
    "its precision",
    "its recall",
    "recall of the opposite",
    "unread",
  ]
  return Table(
    "Understanding: questions about labelled images, the same for every model",
    columns,
    rows,
  )


def _labelled_tags(summary: Summary) -> Table:
  by_kind = {
    kind: numbers.tags
    for kind, numbers in summary.labelled.items()
    if numbers.tags
  }
  tags = dict.fromkeys(tag for numbers in by_kind.values() for tag in numbers)
  rows = []
  for tag in tags:
    rows.append((tag, [numbers.get(tag) for numbers in by_kind.values()]))
  return Table(
    "Balanced accuracy about labelled images by tag, with 95 % interval",
    ["tag", *by_kind],
    rows,
  )


# --- Charts ---------------------------------------------------------------------------------------


def charts(summary: Summary) -> list[charts_lib.Chart]:
  """Returns the score by round: of all images, and by tag if there are several.

  Beside the score of all images stands GenEval's, the share of correct images, if it is known.
  """
  scores = [numbers.score for numbers in summary.rounds]
  overall = [
    charts_lib.Series(estimates.ALL_TAGS, _points(scores, with_interval=True))
  ]
  if summary.correct:
    shares = summary.correct[estimates.ALL_TAGS]
    points = _points(shares, with_interval=True)
    overall.append(charts_lib.Series("correct", points))
  drawn = [charts_lib.Chart("score by round", overall, "round")]
  if len(summary.tags) > 1:
    by_tag = [
      charts_lib.Series(tag, _points(tag_scores, with_interval=False))
      for tag, tag_scores in summary.tags.items()
    ]
    drawn.append(charts_lib.Chart("score by round and tag", by_tag, "round"))
  return drawn


def _points(
  scores: Sequence[bootstrap.Estimate | None], with_interval: bool
) -> list[charts_lib.Point]:
  """Returns (round, mean, low, high), rounds counted from 1."""
  points = []
  for number, score in enumerate(scores, start=1):
    if score is None:
      points.append((number, None, None, None))
    elif with_interval:
      points.append((number, *score))
    else:
      points.append((number, score.mean, None, None))
  return points
