"""What an evaluation comes to, as one JSON object, and the files that show it."""

from collections.abc import Sequence
import dataclasses
import json

from etils import epath
import jax

from r3jax.data import contamination
from r3jax.evaluation import evaluate
from r3jax.evaluation import numbers
from r3jax.evaluation import render
from r3jax.evaluation import result
from r3jax.files import atomic
from r3jax.report import page as page_lib


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a reader must know of an evaluation beside its samples.

  Attributes:
    title: of its page.
    step: iteration of the policy.
    leaked: which of the evaluated prompts the model was trained on.
    flops: of a draft and of a revision of one image, texts at their longest.
    seed: of the bootstrap.
  """

  title: str
  step: int
  leaked: contamination.Leaked
  flops: tuple[float, float]
  seed: int


def make(samples: Sequence[dict], facts: Facts) -> dict:
  """Returns the summary of all samples of an evaluation."""
  found, answers, seed = (
    result.of_samples(samples),
    result.answers_of(samples),
    facts.seed,
  )
  rounds = numbers.by_round(found, seed)
  for turn, one in enumerate(rounds):
    one["tflops"] = facts.flops[bool(turn)] / 1e12
  return {
    "title": facts.title,
    "iteration": facts.step,
    "seed": seed,
    "images": len(samples),
    "prompts": len(set(zip(found.tags, found.prompts))),
    "images_by_tag": {
      tag: found.tags.count(tag) for tag in dict.fromkeys(found.tags)
    },
    "missing": found.missing,
    "leaked": dataclasses.asdict(facts.leaked),
    "rounds": rounds,
    "tags": numbers.by_tag(found, seed),
    "refinement": numbers.refinement(found, seed),
    "stops": numbers.stops(found, seed),
    "behaviour": numbers.behaviour(found),
    "understanding": numbers.understanding(answers, seed),
  }


def notes(summary: dict) -> list[str]:
  """Returns what must stand beside every number of an evaluation."""
  return contamination.Leaked(**summary["leaked"]).notes() + (
    [f"{summary['missing']:.1%} of the images have no score."]
    if summary["missing"]
    else []
  )


def finished(exam: evaluate.Exam, folder: epath.Path) -> list[dict] | None:
  """Returns the samples of an evaluation that was concluded with the same settings, None where there is none."""
  if not (folder / evaluate.SUMMARY).exists():
    return None
  done, keys = exam.read(folder), exam.keys()
  return [done[key] for key in keys] if done.keys() >= keys.keys() else None


def conclude(folder: epath.Path, samples: Sequence[dict], facts: Facts) -> dict:
  """Writes summary.json, tables.md, tables/*.csv and the page index.html; returns the summary.

  Only process 0 writes. summary.json is the last: where it is, the evaluation is over.
  """
  summary = make(samples, facts)
  if jax.process_index():
    return summary
  made = render.of_summary(summary)
  head = [f"# {summary['title']}", *(f"**{note}**" for note in notes(summary))]
  (folder / "tables.md").write_text(
    "\n\n".join([*head, *map(render.markdown, made.values())]) + "\n"
  )
  (folder / "tables").mkdir(exist_ok=True)
  for name, table in made.items():
    (folder / "tables" / f"{name}.csv").write_text(render.csv_text(table))
  page = page_lib.Page(
    summary["title"],
    notes(summary),
    list(made.values()),
    render.charts(summary),
    samples,
  )
  page_lib.write_page(folder, page)
  atomic.write_text(
    folder / evaluate.SUMMARY,
    json.dumps(summary, indent=1, allow_nan=False) + "\n",
  )
  return summary
