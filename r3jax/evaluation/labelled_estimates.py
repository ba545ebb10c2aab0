"""Computes how well a model answers questions about labelled images.

Balanced accuracy is the mean, over the right answers, of the share of questions with that right
answer which are answered by it. A model that always gives the same answer has 1 / number of
answers, whatever the images are. JUDGEMENT and MATCH are about prompts: there every tag weighs the
same.

Intervals are of 95 %, by the bootstrap over prompts (`bootstrap.py`).
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import estimates
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import sample_table

Estimate = bootstrap.Estimate

# What an answer affirms -> what it denies, for the kinds that have precision and recall.
_OPPOSITES = {"yes": "no", labelled_questions.STOP: labelled_questions.EDIT}
# Kinds that are about the prompt, not about what an image shows.
ABOUT_PROMPTS = (labelled_questions.JUDGEMENT, labelled_questions.MATCH)


@dataclasses.dataclass(frozen=True)
class KindEstimates:
  """How well a model answers one kind of question.

  Attributes:
    questions: Number of questions.
    accuracy: Balanced accuracy.
    affirmation: Answer that precision and recall are about, "yes" or STOP; "" where the kind has
      other answers.
    precision: Share of right answers among those that affirm.
    recall: Share of affirmed questions among those that must be affirmed.
    recall_of_denial: Share of denied questions among those that must be denied.
    unread: Share of texts that hold no answer, and count as wrong.
    tags: Balanced accuracy by tag, of the kinds that are about prompts.
  """

  questions: int
  accuracy: Estimate | None
  affirmation: str
  precision: Estimate | None
  recall: Estimate | None
  recall_of_denial: Estimate | None
  unread: float
  tags: Mapping[str, Estimate | None]

  @classmethod
  def from_json(cls, values: Mapping) -> "KindEstimates":
    """Returns the numbers whose fields JSON has made lists."""
    typed = {}
    for name in ("accuracy", "precision", "recall", "recall_of_denial"):
      typed[name] = estimates.estimate_from_json(values[name])
    typed["tags"] = {
      tag: estimates.estimate_from_json(value)
      for tag, value in values["tags"].items()
    }
    return cls(**{**values, **typed})


@dataclasses.dataclass(frozen=True)
class View:
  """A number of some answers, mean(parts) / mean(wholes).

  Attributes:
    rows: Indices of the answers.
    parts: 0 or 1 for each of these, [m].
    wholes: Likewise.
    strata: What weighs the same, a label for each.
  """

  rows: np.ndarray
  parts: np.ndarray
  wholes: np.ndarray
  strata: Sequence[str]


def table_of(
  answers: Sequence[labelled_questions.Answer],
) -> sample_table.AnswerTable:
  """Gathers answers about labelled images."""
  return sample_table.AnswerTable(
    tags=[answer.tag for answer in answers],
    prompts=[answer.prompt for answer in answers],
    kinds=[answer.kind for answer in answers],
    expected=[answer.expected for answer in answers],
    given=[answer.answer for answer in answers],
  )


def _affirmation(expected: np.ndarray) -> str:
  """Returns the affirmative answer of a kind, "" where its answers are no affirmations."""
  for word, opposite in _OPPOSITES.items():
    if set(expected) <= {word, opposite}:
      return word
  return ""


def views_of(table: sample_table.AnswerTable) -> dict[str, View]:
  """Returns the numbers of all kinds by name: "KIND", "KIND, precision of WORD", "KIND, TAG"."""
  kinds = np.asarray(table.kinds)
  views = {}
  for kind in dict.fromkeys(table.kinds):
    views |= _views_of_kind(table, kind, np.flatnonzero(kinds == kind))
  return views


def _views_of_kind(
  table: sample_table.AnswerTable, kind: str, rows: np.ndarray
) -> dict[str, View]:
  """Returns the numbers of one kind; `rows` are the indices of its answers."""
  expected = np.asarray(table.expected)[rows]
  given = np.asarray(table.given)[rows]
  tags = np.asarray(table.tags)[rows]
  is_about_prompts = kind in ABOUT_PROMPTS
  strata_of_tags = tags if is_about_prompts else np.full(len(rows), kind)
  strata = np.char.add(np.char.add(strata_of_tags, ": "), expected)
  is_right = (expected == given).astype(float)
  every = np.ones(len(rows))
  views = {kind: View(rows, is_right, every, strata)}

  word = _affirmation(expected)
  if word:
    opposite = _OPPOSITES[word]
    affirms = (given == word).astype(float)
    views[f"{kind}, precision of {word}"] = View(
      rows, affirms * is_right, affirms, strata
    )
    for answer in (word, opposite):
      inside = expected == answer
      views[f"{kind}, recall of {answer}"] = View(
        rows[inside],
        is_right[inside],
        every[inside],
        strata_of_tags[inside],
      )
  if is_about_prompts:
    for tag in dict.fromkeys(tags.tolist()):
      inside = tags == tag
      views[f"{kind}, {tag}"] = View(
        rows[inside], is_right[inside], every[inside], expected[inside]
      )
  return {name: view for name, view in views.items() if view.rows.size}


def design(table: sample_table.AnswerTable, view: View) -> bootstrap.Design:
  """Returns how the answers of a view were drawn: prompts, stratum by stratum."""
  prompts = [table.prompts[i] for i in view.rows]
  return bootstrap.Design(clusters=prompts, strata=list(view.strata))


def by_kind(
  table: sample_table.AnswerTable, seed: int
) -> dict[str, KindEstimates]:
  """Returns the numbers of every kind of question; the seed is that of the bootstrap."""
  values = {}
  views = views_of(table)
  for name, view in views.items():
    values[name] = bootstrap.bootstrap_ratio(
      view.parts, view.wholes, seed, design(table, view)
    )
  result = {}
  for kind in dict.fromkeys(table.kinds):
    rows = views[kind].rows
    word = _affirmation(np.asarray(table.expected)[rows])
    opposite = _OPPOSITES.get(word)
    unread = np.asarray(table.given)[rows] == ""
    tags = {}
    if kind in ABOUT_PROMPTS:
      for tag in dict.fromkeys(table.tags[i] for i in rows):
        tags[tag] = values[f"{kind}, {tag}"]
    result[kind] = KindEstimates(
      questions=len(rows),
      accuracy=values[kind],
      affirmation=word,
      precision=values.get(f"{kind}, precision of {word}"),
      recall=values.get(f"{kind}, recall of {word}"),
      recall_of_denial=values.get(f"{kind}, recall of {opposite}"),
      unread=float(unread.mean()),
      tags=tags,
    )
  return result


def curve_values(table: sample_table.AnswerTable) -> dict[str, float]:
  """Returns the numbers that curves over iterations show, by "evaluation/labelled/NAME".

  They are the balanced accuracy of every kind, and the recalls of JUDGEMENT's two answers.
  """
  views = views_of(table)
  judgement = labelled_questions.JUDGEMENT
  shown = {kind: kind for kind in dict.fromkeys(table.kinds)}
  for word in (labelled_questions.STOP, labelled_questions.EDIT):
    shown[f"{judgement}_recall_of_{word}"] = f"{judgement}, recall of {word}"
  numbers = {}
  for name, view_name in shown.items():
    if view_name in views:
      view = views[view_name]
      numbers[f"evaluation/labelled/{name}"] = bootstrap.mean(
        view.parts, design(table, view)
      )
  return numbers
