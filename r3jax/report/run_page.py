"""Writes the page of a training run, and its summary as lines for `r3jax report WORKDIR`."""

from collections.abc import Mapping, Sequence
import dataclasses

from etils import epath

from r3jax.data import contamination
from r3jax.evaluation import comparison
from r3jax.evaluation import estimates
from r3jax.evaluation import sample_log
from r3jax.report import charts as charts_lib
from r3jax.report import page
from r3jax.report import tables

Estimate = estimates.Estimate
Table = tables.Table
# How names of numbers of one answer begin, see `labelled_estimates.views_of`.
_OF_ANSWERS = ("precision of", "recall of")


@dataclasses.dataclass(frozen=True)
class RunSummary:
  """What a run's summary.json says, as far as the page shows it; every part may be missing.

  Attributes:
    title: Heading.
    scores: Scores before and after training by view, see `comparison.compare_pair`.
    labelled: How well questions about labelled images are answered, before and after, by view, see
      `comparison.compare_answers`.
    refinement: Score of the last round minus that of the draft, by model: "before", "after".
    behaviour: How the model edits and stops, by model.
    missing: Share of images without a score, by model.
    skipped_updates: Number of updates that were not finite and were not made.
    leaked: Which of the held-out prompts the model was trained on.
    seconds: Time of the run's stages.
    iterations: Number of iterations.
    seed: Seed of the run.
    peak_memory_gib: Most memory of a device.
    versions: Versions of packages.
  """

  title: str = "r3jax run"
  scores: Mapping[str, comparison.PairedEstimates] = dataclasses.field(
    default_factory=dict
  )
  labelled: Mapping[str, comparison.PairedEstimates] = dataclasses.field(
    default_factory=dict
  )
  refinement: Mapping[str, Estimate | None] = dataclasses.field(
    default_factory=dict
  )
  behaviour: Mapping[str, Mapping[str, float | None]] = dataclasses.field(
    default_factory=dict
  )
  missing: Mapping[str, float] = dataclasses.field(default_factory=dict)
  skipped_updates: int = 0
  leaked: contamination.Leaked = contamination.Leaked({}, True)
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  iterations: int | None = None
  seed: int | None = None
  peak_memory_gib: float | None = None
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def from_json(cls, values: Mapping) -> "RunSummary":
    """Returns the summary of a summary.json; other keys are ignored."""
    names = {field.name for field in dataclasses.fields(cls)}
    present = {name: value for name, value in values.items() if name in names}
    scores = _paired_estimates(values.get("scores", {}))
    labelled = _paired_estimates(values.get("labelled images", {}))
    refinement = {
      model: estimates.estimate_from_json(estimate)
      for model, estimate in values.get("last round minus draft", {}).items()
    }
    if "leaked" in values:
      present["leaked"] = contamination.Leaked(**values["leaked"])
    missing = values.get("images without a score", {})
    typed = {
      "scores": scores,
      "labelled": labelled,
      "refinement": refinement,
      "missing": missing,
      "skipped_updates": values.get("skipped updates", 0),
    }
    return cls(**{**present, **typed})

  def notes(self) -> list[str]:
    """Returns what a reader must know before the numbers."""
    texts = list(self.leaked.notes())
    if any(self.missing.values()):
      shares = [f"{share:.1%} {model}" for model, share in self.missing.items()]
      texts.append(
        f"Some images have no score and count in no mean: {', '.join(shares)}."
      )
    if self.skipped_updates:
      texts.append(
        f"Updates that were not finite and were skipped: {self.skipped_updates} (see the folder "
        "skipped/ of the workdir)."
      )
    return texts


def _paired_estimates(
  values: Mapping[str, Mapping],
) -> dict[str, comparison.PairedEstimates]:
  """Returns scores before and after by view from JSON values."""
  pairs = {}
  for view, numbers in values.items():
    pairs[view] = comparison.PairedEstimates(
      before=Estimate(*numbers["before"]),
      after=Estimate(*numbers["after"]),
      difference=Estimate(*numbers["difference"]),
      prompts=numbers.get("prompts"),
    )
  return pairs


def write_report(
  folder: epath.PathLike,
  summary: RunSummary,
  metrics: Sequence[dict],
  samples: Sequence[sample_log.Sample],
  charts: Sequence[str] | None = None,
) -> epath.Path:
  """Writes the page of a run, folder/index.html.

  Args:
    folder: Folder of the page and of the samples' images.
    summary: Summary of the run.
    metrics: Objects of metrics.jsonl.
    samples: Samples of the gallery.
    charts: Names of the metrics to draw, in order, all by default.

  Returns:
    The path of the page.
  """
  if charts is None:
    names = set().union(*metrics)
    charts = sorted(names - {"step"})
  content = page.Page(
    title=summary.title,
    notes=summary.notes(),
    tables=[table for table in _tables(summary) if table.rows],
    charts=[_chart(name, metrics) for name in charts],
    samples=samples,
  )
  return page.write_page(folder, content)


def _chart(name: str, metrics: Sequence[dict]) -> charts_lib.Chart:
  """Returns the curve of a metric over iterations."""
  points = []
  for row in metrics:
    value = row.get(name)
    # A line that was edited by hand may hold anything.
    if name in row and isinstance(value, int | float | None):
      points.append((row["step"], value, None, None))
  return charts_lib.Chart(name, [charts_lib.Series(name, points)])


def summary_lines(summary: RunSummary) -> list[str]:
  """Returns notes, then a line for every score: before, after, difference with its interval."""
  lines = summary.notes()
  labelled = {}
  for view, numbers in summary.labelled.items():
    part = view.partition(", ")[2]
    # Accuracies by tag stand on the page.
    if not part or part.startswith(_OF_ANSWERS):
      labelled[f"labelled images, {view}"] = numbers
  for view, numbers in (summary.scores | labelled).items():
    facts = _facts_of_difference(view, numbers)
    lines.append(
      f"{view}: {numbers.before.mean:.3f} -> {numbers.after.mean:.3f}  ({facts})"
    )
  return lines


def _facts_of_difference(view: str, numbers: comparison.PairedEstimates) -> str:
  """Returns a difference, its number of prompts, its interval and the verdict, if it has them."""
  difference = tables.difference(view, numbers.difference)
  facts = [f"{numbers.difference.mean:+.3f}"]
  if numbers.prompts is not None:
    plural = "" if numbers.prompts == 1 else "s"
    facts.append(f"{numbers.prompts} prompt{plural}")
  if numbers.difference.interval is None:
    facts.append("too few for an interval")
    return ", ".join(facts)
  low, high = numbers.difference.interval
  verdict = difference.verdict or "no clear change"
  facts.append(f"95 % interval {low:+.3f} to {high:+.3f}: {verdict}")
  return ", ".join(facts)


def _tables(summary: RunSummary) -> list[Table]:
  """Returns the tables of a run; those about which the summary says nothing have no rows."""
  return [
    _scores(summary.scores, "Scores: mean and 95 % interval"),
    _scores(
      summary.labelled,
      "Understanding: questions about labelled images, the same before and after; balanced "
      "accuracy, or what is named",
    ),
    _refinement(summary),
    _behaviour(summary),
    _seconds(summary),
    _facts(summary),
  ]


def _scores(
  scores: Mapping[str, comparison.PairedEstimates], caption: str
) -> Table:
  rows = []
  for view, numbers in scores.items():
    difference = tables.difference(view, numbers.difference)
    cells = [numbers.prompts, numbers.before, numbers.after, difference]
    rows.append((view, cells))
  columns = ["score", "prompts", "before", "after", "difference"]
  return Table(caption, columns, rows)


def _refinement(summary: RunSummary) -> Table:
  rows = []
  for model, estimate in summary.refinement.items():
    if estimate:
      rows.append((model, [tables.difference("score", estimate)]))
  return Table(
    "Last round minus draft: mean and 95 % interval", ["model", "change"], rows
  )


def _behaviour(summary: RunSummary) -> Table:
  before = summary.behaviour.get("before", {})
  after = summary.behaviour.get("after", {})
  rows = []
  for name, share in before.items():
    rows.append((name.replace("_", " "), [share, after[name]]))
  return Table(
    "How the model edits and stops",
    ["share of rounds", "before", "after"],
    rows,
  )


def _seconds(summary: RunSummary) -> Table:
  rows = [(stage, [seconds]) for stage, seconds in summary.seconds.items()]
  return Table("Seconds", ["stage", "seconds"], rows, number_format=".2f")


def _facts(summary: RunSummary) -> Table:
  rows = []
  if summary.iterations is not None:
    rows.append(("iterations", [summary.iterations]))
  if summary.seed is not None:
    rows.append(("seed", [summary.seed]))
  if summary.peak_memory_gib is not None:
    rows.append(("peak memory", [f"{summary.peak_memory_gib:.2f} GiB"]))
  for package, version in summary.versions.items():
    rows.append((package, [version]))
  return Table("Run", ["", "value"], rows)
