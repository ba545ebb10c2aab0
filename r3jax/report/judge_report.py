"""Writes how far another reward agrees with an evaluation's own."""

from collections.abc import Mapping, Sequence
import dataclasses
import json

from etils import epath

from r3jax.evaluation import second_judge
from r3jax.report import tables

Agreements = Mapping[str, second_judge.Agreement | None]


def write(
  folder: epath.Path,
  name: str,
  scores: Sequence[second_judge.ImageScore],
  agreements: Agreements,
  notes: Sequence[str],
) -> str:
  """Writes judges/NAME.json and NAME.md into the folder of an evaluation.

  Args:
    folder: Folder of the evaluation.
    name: Name of the other judge.
    scores: Its scores.
    agreements: Its agreement with the evaluation's own reward, by tag.
    notes: What a reader must know beside numbers of the evaluation.

  Returns:
    The Markdown.
  """
  judges = folder / "judges"
  judges.mkdir(exist_ok=True)
  blocks = [f"**{note}**" for note in notes]
  blocks.append(tables.markdown(table(agreements, ("own", name))))
  text = "\n\n".join(blocks) + "\n"
  (judges / f"{name}.md").write_text(text)

  agreements_json = {}
  for tag, numbers in agreements.items():
    if numbers is None:
      agreements_json[tag] = {"images": 0}
    else:
      agreements_json[tag] = dataclasses.asdict(numbers)
  values = {
    "notes": list(notes),
    "agreement": agreements_json,
    "scores": [dataclasses.asdict(score) for score in scores],
  }
  json_text = json.dumps(values, allow_nan=False)
  (judges / f"{name}.json").write_text(json_text + "\n")
  return text


def table(agreements: Agreements, names: tuple[str, str]) -> tables.Table:
  """Returns agreements as a table; `names` are those of the two rewards."""
  columns = [
    "tag",
    "images",
    *names,
    "difference",
    "Pearson",
    "Spearman",
    "both right",
    f"only {names[0]}",
    f"only {names[1]}",
    "neither",
    "agreement",
    "kappa",
  ]
  rows = []
  for tag, numbers in agreements.items():
    if numbers is None:
      continue
    confusion = numbers.confusion
    cells = [
      numbers.images,
      *numbers.mean,
      tables.difference("score", numbers.difference),
      numbers.pearson,
      numbers.spearman,
      confusion.both,
      confusion.only_first,
      confusion.only_second,
      confusion.neither,
      numbers.agreement,
      numbers.kappa,
    ]
    rows.append((tag, cells))
  return tables.Table(
    "Two rewards on the same images; right: strict is 1", columns, rows
  )
