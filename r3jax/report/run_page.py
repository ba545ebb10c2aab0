"""Writes the page of a training run, and its summary as lines for `r3jax report WORKDIR`."""

from collections.abc import Mapping, Sequence
import dataclasses
import shlex

from etils import epath

from r3jax.data import contamination
from r3jax.evaluation import comparison
from r3jax.evaluation import estimates
from r3jax.evaluation import sample_log
from r3jax.evaluation import summary as summary_lib
from r3jax.files import paths
from r3jax.report import forest
from r3jax.report import page
from r3jax.report import run_charts
from r3jax.report import tables

Estimate = estimates.Estimate
Table = tables.Table
# How names of numbers of one answer begin, see `labelled_estimates.views_of`.
_OF_ANSWERS = ("precision of", "recall of")
_LABELLED = "labelled images, "  # begins names of views of questions about them
# Scores of all prompts, as `comparison.compare_pair` names them.
_HEADLINE = (
  "draft",
  "last round",
  "draft, strict",
  "last round, strict",
  "draft, correct",
  "last round, correct",
)


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
    start: Command, commit, date and machine of the last start, by name.
    prompt: A prompt of the run, "" if none is known.
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
  start: Mapping[str, str] = dataclasses.field(default_factory=dict)
  prompt: str = ""

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


@dataclasses.dataclass(frozen=True)
class RunDetails:
  """What the page of a run shows beside its summary, its metrics and its samples.

  Attributes:
    state: How far the run is and when the page was written; "" of a finished run.
    evaluations: Finished evaluations of the run by iteration.
    pages: Paths of their pages, relative to that of the run, likewise.
    config: Values of the config by their dotted keys.
    mismatch_limit: Deviation of a ratio from 1 above which the run warns; None knows none.
  """

  state: str = ""
  evaluations: Mapping[int, summary_lib.Summary] = dataclasses.field(
    default_factory=dict
  )
  pages: Mapping[int, str] = dataclasses.field(default_factory=dict)
  config: Mapping[str, object] = dataclasses.field(default_factory=dict)
  mismatch_limit: float | None = None


def write_report(
  folder: epath.PathLike,
  summary: RunSummary,
  metrics: Sequence[dict],
  samples: Sequence[sample_log.Sample],
  details: RunDetails | None = None,
) -> epath.Path:
  """Writes the page of a run, folder/index.html, whole or not at all.

  Args:
    folder: Folder of the page and of the samples' images.
    summary: Summary of the run, or what is known of it while the run goes on.
    metrics: Objects of metrics.jsonl.
    samples: Samples of the gallery.
    details: What else is shown.

  Returns:
    The path of the page.
  """
  if details is None:
    details = RunDetails()
  content = page.Page(
    title=summary.title,
    state=details.state,
    notes=summary.notes(),
    tiles=_tiles(summary, details),
    lead=run_charts.lead(metrics, details.evaluations),
    forest=_forest(summary, details.evaluations),
    links=_links(details),
    tables=[table for table in _tables(summary, metrics) if table.rows],
    groups=run_charts.groups(metrics, details.mismatch_limit),
    samples=samples,
    facts=dict(summary.start),
    config={key: str(value) for key, value in details.config.items()},
  )
  return page.write_page(folder, content)


def _tiles(summary: RunSummary, details: RunDetails) -> list[page.Tile]:
  """Returns the headline: scores before and after, what edits add, when the model stops."""
  tiles = []
  for view in ("draft", "last round"):
    numbers = summary.scores.get(view)
    if numbers is not None:
      tiles.append(_paired_tile(view, numbers))
    elif details.evaluations:
      tiles.append(_tile_so_far(view, details.evaluations))
  judgement = summary.labelled.get("judgement")
  if judgement is not None:
    tiles.append(_paired_tile("judgement of labelled images", judgement))
  refinement = summary.refinement
  if refinement.get("before") and refinement.get("after"):
    tiles.append(
      page.Tile(
        "last round minus draft",
        f"{refinement['before'].mean:+.3f}",
        f"{refinement['after'].mean:+.3f}",
      )
    )
  for name in ("stop_when_right", "stop_when_wrong"):
    before = summary.behaviour.get("before", {}).get(name)
    after = summary.behaviour.get("after", {}).get(name)
    if before is not None and after is not None:
      label = name.replace("stop", "stops").replace("_", " ")
      tiles.append(page.Tile(label, f"{before:.3f}", f"{after:.3f}"))
  return tiles


def _paired_tile(view: str, numbers: comparison.PairedEstimates) -> page.Tile:
  """Returns the tile of a score before and after training."""
  difference = tables.difference(view, numbers.difference)
  shown = tables.format_cell(difference, ".3f")
  return page.Tile(
    name=view,
    before=f"{numbers.before.mean:.3f}",
    value=f"{numbers.after.mean:.3f}",
    change=str(shown),
    verdict=shown.verdict,
    remark=_count(numbers.prompts),
  )


def _tile_so_far(
  view: str, evaluations: Mapping[int, summary_lib.Summary]
) -> page.Tile:
  """Returns the tile of a score while a run goes on: before training, and at present."""
  first = min(evaluations)
  last = max(evaluations)
  turn = 0 if view == "draft" else -1
  shown = []
  for step in (first, last):
    score = evaluations[step].rounds[turn].score
    shown.append(f"{score.mean:.3f}" if score else "-")
  return page.Tile(
    name=view,
    before=shown[0] if last > first else "",
    value=shown[1],
    remark=f"iteration {last}, {_count(evaluations[last].prompts)}",
  )


def _count(num_prompts: int | None) -> str:
  """Returns "120 prompts"; "" where the number is not known."""
  if num_prompts is None:
    return ""
  return f"{num_prompts} prompt{'' if num_prompts == 1 else 's'}"


def _forest(
  summary: RunSummary,
  evaluations: Mapping[int, summary_lib.Summary],
) -> list[forest.Row]:
  """Returns the scores of the last round by tag, of the first and of the last evaluation."""
  if not evaluations:
    return []
  first = evaluations[min(evaluations)]
  last = evaluations[max(evaluations)]
  rows = []
  for tag, scores in first.tags.items():
    after = None
    if last is not first and tag in last.tags:
      after = last.tags[tag][-1]
    amount = f"{first.images_by_tag[tag]} images"
    paired = summary.scores.get(f"last round, {tag}")
    if paired is not None and paired.prompts is not None:
      amount = _count(paired.prompts)
    rows.append(forest.Row(tag, amount, scores[-1], after))
  return rows


def _links(details: RunDetails) -> list[page.Link]:
  """Returns links to the evaluations of a run."""
  links = []
  for step, target in sorted(details.pages.items()):
    evaluation = details.evaluations[step]
    text = f"evaluation of iteration {step}, {_count(evaluation.prompts)}"
    links.append(page.Link(target, text))
  return links


def summary_lines(summary: RunSummary) -> list[str]:
  """Returns notes, then a line for every score: before, after, difference with its interval."""
  lines = summary.notes()
  labelled = {}
  for view, numbers in summary.labelled.items():
    part = view.partition(", ")[2]
    # Accuracies by tag stand on the page.
    if not part or part.startswith(_OF_ANSWERS):
      labelled[_LABELLED + view] = numbers
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
    facts.append(_count(numbers.prompts))
  if numbers.difference.interval is None:
    facts.append("too few for an interval")
    return ", ".join(facts)
  low, high = numbers.difference.interval
  verdict = difference.verdict or "no clear change"
  facts.append(f"95 % interval {low:+.3f} to {high:+.3f}: {verdict}")
  return ", ".join(facts)


def closing_lines(summary: RunSummary, folder: epath.PathLike) -> list[str]:
  """Returns what a command prints at the end of a run: headline, report, what to do next.

  Args:
    summary: Summary of the run.
    folder: Workdir of the run.
  """
  workdir = paths.absolute(folder)
  lines = [*summary.notes(), *_headline(summary)]
  lines += ["", f"report: {workdir / 'report' / 'index.html'}", "", "next:"]
  quoted = shlex.quote(str(workdir))
  prompt = shlex.quote(summary.prompt or "PROMPT")
  commands = {
    f"r3jax generate --model={quoted} --prompt={prompt} --out=drawn": "draw",
    f"r3jax compare {quoted} --workdir=compared": "compare its evaluations",
    f"r3jax report {quoted}": "print all scores, by tag",
  }
  width = max(map(len, commands))
  for command, purpose in commands.items():
    lines.append(f"  {command:{width}}  # {purpose}")
  return lines


def _headline(summary: RunSummary) -> list[str]:
  """Returns the scores of all prompts as an aligned table; none if there are none."""
  rows = [["", "before", "after", "difference, 95 % interval", "prompts"]]
  scores = dict(summary.scores)
  for view, numbers in summary.labelled.items():
    # Those by tag and by answer stand on the page.
    if "," not in view:
      scores[_LABELLED + view] = numbers
  for view, numbers in scores.items():
    if view not in _HEADLINE and not view.startswith(_LABELLED):
      continue
    difference = tables.difference(view, numbers.difference)
    shown = tables.format_cell(difference, ".3f")
    rows.append(
      [
        view,
        f"{numbers.before.mean:.3f}",
        f"{numbers.after.mean:.3f}",
        f"{shown} {shown.verdict}".rstrip(),
        "-" if numbers.prompts is None else str(numbers.prompts),
      ]
    )
  if len(rows) == 1:
    return []
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
    lines.append("  ".join(cells).rstrip())
  return lines


def _tables(summary: RunSummary, metrics: Sequence[dict]) -> list[Table]:
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
    _facts(summary, device_hours(summary, metrics)),
  ]


def _scores(
  scores: Mapping[str, comparison.PairedEstimates], caption: str
) -> Table:
  rows = []
  for view, numbers in scores.items():
    difference = tables.difference(view, numbers.difference)
    cells = [difference, numbers.before, numbers.after, numbers.prompts]
    rows.append((view, cells))
  # The difference first: a phone shows the first columns only.
  columns = ["score", "difference", "before", "after", "prompts"]
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


def device_hours(summary: RunSummary, metrics: Sequence[dict]) -> float | None:
  """Returns what the iterations cost: their hours times the number of devices; None if unknown.

  Evaluations and compilations are not in it.
  """
  seconds = [row.get("seconds/iteration") for row in metrics]
  known = [x for x in seconds if isinstance(x, int | float)]
  devices = summary.versions.get("devices", "")
  if not known or not devices.isdecimal():
    return None
  return sum(known) / 3600 * int(devices)


def _facts(summary: RunSummary, hours: float | None) -> Table:
  rows = []
  if summary.iterations is not None:
    rows.append(("iterations", [summary.iterations]))
  if summary.seed is not None:
    rows.append(("seed", [summary.seed]))
  if hours is not None:
    cost = (
      f"{hours:.2f} hours of a device ({summary.versions['devices']} devices)"
    )
    rows.append(("iterations cost", [cost]))
  if summary.peak_memory_gib is not None:
    rows.append(("peak memory", [f"{summary.peak_memory_gib:.2f} GiB"]))
  for package, version in summary.versions.items():
    rows.append((package, [version]))
  return Table("Run", ["", "value"], rows)
