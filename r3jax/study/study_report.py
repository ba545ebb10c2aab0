"""Writes what a study shows: study.md, tables in CSV, study.json, plots, and a page with links."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import urllib.parse

from etils import epath
import matplotlib.axes
import matplotlib.figure
import numpy as np

from r3jax.evaluation import finished
from r3jax.files import atomic
from r3jax.report import plots
from r3jax.report import tables as tables_lib
from r3jax.report import templates
from r3jax.study import declarations
from r3jax.study import measures
from r3jax.study import results as results_lib
from r3jax.study import runs
from r3jax.study import verdicts

Results = results_lib.Results
Table = tables_lib.Table

CRITERION = (
  'Criteria, fixed before the runs: a claim "more" is held where the difference is surely above 0, '
  "not held where it is surely below the smallest difference that matters, else undecided; "
  '"not more" is held where it is surely below that. Sure: one-sided p below '
  f"{verdicts.LEVEL}, by a bootstrap over prompts and seeds, corrected by Holm's method for the "
  f"number of claims; with fewer than {verdicts.MIN_SEEDS} seeds every claim is undecided. "
  "Intervals are of 95 % and uncorrected."
)


def write(
  plan: runs.Plan, finished_runs: Sequence[runs.Run], results: Results
) -> str:
  """Writes the files of a study into its folder.

  Args:
    plan: The study.
    finished_runs: Its finished runs, which the page links to.
    results: Its numbers.

  Returns:
    The Markdown.
  """
  folder = plan.folder
  (folder / "tables").mkdir(parents=True, exist_ok=True)
  named = tables(results)
  text = _markdown(results, named)
  atomic.write_text(folder / "study.md", text)
  for name, table in named.items():
    path = folder / "tables" / f"{name}.csv"
    atomic.write_text(path, tables_lib.csv_text(table))
  drawings = {}
  if finished_runs:
    (folder / "plots").mkdir(exist_ok=True)
    drawings = figures(results)
    for name, figure in drawings.items():
      plots.save(figure, folder / "plots" / name)
  _write_page(plan, finished_runs, results, list(drawings))
  values = json.dumps(results.to_json(), indent=1, allow_nan=False)
  atomic.write_text(folder / "study.json", values + "\n")
  return text


# --- Tables ---------------------------------------------------------------------------------------


def tables(results: Results) -> dict[str, Table]:
  """Returns the tables of a study by name."""
  return {
    "verdicts": _verdicts(results),
    "arms": _arms(results),
    "seeds": _seeds(results),
  }


def comparison_text(claim: declarations.Claim) -> str:
  """Returns what a claim compares: "last round: r3 - reason > 0"."""
  label = measures.MEASURES[claim.measure].label
  pair = claim.arm if not claim.than else f"{claim.arm} - {claim.than}"
  condition = {
    "more": "> 0",
    "less": "< 0",
    "not more": f"< {claim.least:g}",
  }[claim.says]
  return f"{label}: {pair} {condition}"


def _verdicts(results: Results) -> Table:
  rows = []
  for verdict in results.verdicts:
    difference = None
    if verdict.difference:
      difference = tables_lib.Difference(verdict.difference, "")
    cells = [
      verdict.verdict,
      comparison_text(verdict.claim),
      difference,
      verdict.claim.least,
      verdict.num_seeds,
      verdict.p_held,
      verdict.p_not_held,
    ]
    rows.append((verdict.claim.text, cells))
  columns = [
    "claim",
    "verdict",
    "held if",
    "difference",
    "smallest that matters",
    "seeds",
    "p against held",
    "p against not held",
  ]
  return Table("Claims", columns, rows)


def _arms(results: Results) -> Table:
  rows = []
  for name, cells in results.cells.items():
    measure = measures.MEASURES[name]
    shown = []
    for arm in results.arms:
      cell = cells.get(arm)
      estimate = cell.estimate if cell else None
      if estimate and measure.is_signed:
        estimate = tables_lib.Difference(estimate, "")
      shown.append(estimate)
    rows.append((measure.label, shown))
  return Table(
    "Arms: mean over seeds with 95 % interval over prompts and seeds",
    ["measure", *results.arms],
    rows,
  )


def _seeds(results: Results) -> Table:
  seeds = set()
  for cells in results.cells.values():
    for cell in cells.values():
      seeds |= set(cell.by_seed) - {None}
  ordered = sorted(seeds)
  rows = []
  for name, cells in results.cells.items():
    label = measures.MEASURES[name].label
    for arm, cell in cells.items():
      if arm != declarations.BEFORE:
        values = [cell.by_seed.get(seed) for seed in ordered]
        rows.append((f"{label}: {arm}", values))
  columns = ["measure and arm", *(f"seed {seed}" for seed in ordered)]
  return Table("Every run", columns, rows)


def _markdown(results: Results, named: Mapping[str, Table]) -> str:
  num_finished, num_all = results.num_runs
  blocks = [f"# {results.title}"]
  blocks.append(f"{num_finished} of {num_all} runs have finished.")
  blocks.append(CRITERION)
  blocks += [tables_lib.markdown(table) for table in named.values()]
  blocks.append("Arms:")
  blocks.append(
    "\n".join(f"- {arm}: {meaning}" for arm, meaning in results.arms.items())
  )
  return "\n\n".join(blocks) + "\n"


# --- Plots ----------------------------------------------------------------------------------------


def figures(results: Results) -> dict[str, matplotlib.figure.Figure]:
  """Returns the plots of a study by name: arms, rounds, and the reward in training."""
  drawn = {"arms": _plot_arms(results), "rounds": _plot_rounds(results)}
  curves = _plot_curves(results)
  if curves is not None:
    drawn["training"] = curves
  return drawn


def _new_figure(
  x_label: str, y_label: str
) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
  """Returns a figure with one panel."""
  figure = matplotlib.figure.Figure(
    figsize=(6.4, 4.0), layout="constrained", dpi=150
  )
  axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
  axes.grid(alpha=0.3)
  return figure, axes


def _bars(estimates: Sequence[results_lib.Estimate]) -> np.ndarray:
  """Returns the lengths of error bars below and above, [2, n]; NaN draws none."""
  values = np.array(estimates, float)
  return np.abs(values[:, 1:] - values[:, :1]).T


def _plot_arms(results: Results) -> matplotlib.figure.Figure:
  figure, axes = _new_figure("", "mean, 95 % interval")
  names = [
    name for name in results.cells if not measures.MEASURES[name].is_signed
  ]
  num_arms = len(results.arms)
  for number, arm in enumerate(results.arms):
    cells = [results.cells[name].get(arm) for name in names]
    places = [i for i, cell in enumerate(cells) if cell]
    if not places:
      continue
    estimates = [cells[i].estimate for i in places]
    offset = 0.6 * ((number + 0.5) / num_arms - 0.5)
    axes.errorbar(
      np.array(places) + offset,
      [estimate.mean for estimate in estimates],
      _bars(estimates),
      label=arm,
      marker="o",
      linestyle="none",
      capsize=3,
    )
  labels = [measures.MEASURES[name].label for name in names]
  axes.set_xticks(range(len(names)), labels, rotation=30, ha="right")
  axes.legend()
  return figure


def _plot_rounds(results: Results) -> matplotlib.figure.Figure:
  figure, axes = _new_figure("round", "score, 95 % interval")
  for number, (arm, estimates) in enumerate(results.rounds.items()):
    places = np.arange(1, len(estimates) + 1) + 0.03 * number
    means = [estimate.mean for estimate in estimates]
    bars = _bars(estimates)
    axes.errorbar(places, means, bars, label=arm, marker="o", capsize=3)
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.legend()
  return figure


def _plot_curves(results: Results) -> matplotlib.figure.Figure | None:
  figure, axes = _new_figure("iteration", "reward of drafts, seeds and mean")
  has_curves = False
  for number, (arm, curve) in enumerate(results.curves.items()):
    color = f"C{number}"
    # NaN where an iteration has none.
    series = [np.array(row, float) for row in curve.by_seed.values()]
    series = [row for row in series if row.size]
    if not series:
      continue
    has_curves = True
    shortest = min(row.size for row in series)
    for row in series:
      axes.plot(np.arange(1, row.size + 1), row, color=color, alpha=0.25)
    mean = np.mean([row[:shortest] for row in series], axis=0)
    axes.plot(np.arange(1, shortest + 1), mean, color=color, label=arm)
  if not has_curves:
    return None
  axes.legend()
  return figure


# --- Page -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunLinks:
  """A run on the page.

  Attributes:
    arm: Name of its arm.
    seed: Its seed.
    report: Address of its report.
    before: Address of its evaluation before training, with all pictures.
    after: Address of that after training.
    values: Its number of every measure, in the order of the study; None where it has none.
  """

  arm: str
  seed: int
  report: str
  before: str
  after: str
  values: Sequence[float | None]


def _write_page(
  plan: runs.Plan,
  finished_runs: Sequence[runs.Run],
  results: Results,
  drawings: Sequence[str],
) -> None:
  """Writes index.html: a cell leads to the runs of its arm, and these to their pictures."""
  style = templates.asset("report.css")
  text = templates.load("study.html.j2").render(
    results=results,
    criterion=CRITERION,
    measures=measures.MEASURES,
    comparison_text=comparison_text,
    difference=lambda estimate: tables_lib.Difference(estimate, ""),
    format_cell=tables_lib.format_cell,
    links=[_links(plan, run, results) for run in finished_runs],
    drawings=drawings,
    style=style,
    style_hash=templates.csp_hash(style),
  )
  atomic.write_text(plan.folder / "index.html", text)


def _links(plan: runs.Plan, run: runs.Run, results: Results) -> RunLinks:
  """Returns what the page says of a run."""
  steps = list(finished.step_folders(run.folder).values())

  def address(path: epath.Path) -> str:
    relative = path.relative_to(plan.folder)
    return urllib.parse.quote(str(relative / "index.html"))

  values = []
  for cells in results.cells.values():
    cell = cells.get(run.arm)
    values.append(cell.by_seed.get(run.seed) if cell else None)
  return RunLinks(
    arm=run.arm,
    seed=run.seed,
    report=address(run.folder / "report"),
    before=address(steps[0]),
    after=address(steps[-1]),
    values=values,
  )
