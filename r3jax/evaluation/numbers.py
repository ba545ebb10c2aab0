"""Numbers of an evaluation: scores with intervals, edits, stops, understanding.

A score over all prompts is the mean of the tags' means, as in official GenEval. Intervals are of
95 %, by the bootstrap over prompts, tag by tag (`statistics.py`). What has no score counts in
nothing that needs one.
"""

import dataclasses

import numpy as np

from r3jax.evaluation import bootstrap
from r3jax.evaluation import result

Result = result.Result


def name_of(turn: int) -> str:
  """Returns what a round is called; they are counted from 1, the draft."""
  return f"round {turn + 1}" if turn else "draft"


def interval(
  values: np.ndarray, found: Result, seed: int, images: np.ndarray | None = None
) -> list[float] | None:
  """Returns [mean of the tags' means, low, high] of a value per image; None where no image has one.

  Args:
    values: [n], NaN where there is none.
    found: whose images they are.
    seed: of the draws.
    images: numbers of those that count; all if None.
  """
  images = np.arange(len(values)) if images is None else images
  known = images[np.isfinite(values[images])]
  if not known.size:
    return None
  return list(
    bootstrap.bootstrap_mean(values[known], seed, found.design(known))
  )


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
  return float(np.sum(part & whole) / np.sum(whole)) if whole.any() else None


def by_round(found: Result, seed: int) -> list[dict]:
  """Returns, for every round, scores, what became of the images since the round before, and lengths.

  improved, worse, unchanged: shares of all images with both scores; "gain": the mean change with
  its interval. finished: share that has stopped. tokens: mean length of the texts of samples that
  were not finished before. seconds: median per image.
  """
  rounds = []
  for turn in range(len(found.score)):
    open_ = ~found.stop[turn - 1] if turn else np.ones(len(found.tags), bool)
    mean = lambda values: (
      float(values[turn][open_].mean()) if open_.any() else None
    )
    rounds.append(
      {
        "round": name_of(turn),
        "score": interval(found.score[turn], found, seed),
        "parts": {
          name: interval(values[turn], found, seed)
          for name, values in found.parts.items()
        },
        "finished": float(found.stop[turn].mean()),
        "format": mean(found.format),
        "tokens": mean(found.tokens),
        "instruction_tokens": mean(found.instruction_tokens),
        "seconds": float(np.median(found.seconds[turn])),
      }
      | (_change(found, turn, seed) if turn else {})
    )
  return rounds


def _change(found: Result, turn: int, seed: int) -> dict:
  change = found.score[turn] - found.score[turn - 1]
  known = np.isfinite(change)
  return {
    "improved": _share(change > 0, known),
    "worse": _share(change < 0, known),
    "unchanged": _share(change == 0, known),
    "gain": interval(change, found, seed),
  }


def by_tag(found: Result, seed: int) -> dict[str, list[list[float] | None]]:
  """Returns the score of every round, with its interval, by tag."""
  tags = np.asarray(found.tags)
  return {
    tag: [
      interval(values, found, seed, np.flatnonzero(tags == tag))
      for values in found.score
    ]
    for tag in dict.fromkeys(found.tags)
  }


def stops(found: Result, seed: int) -> dict:
  """Returns how well the model knows when to stop (R3.md section 9: "no further edit").

  "rounds": of the samples that were open before each round, how many images were right (score 1) or
  wrong, and which share of them it stopped at. "score": of its own stops; had it always stopped at
  the draft; never stopped; and stopped at the best image of the chain that never stops, which is
  what a perfect judge of its own images would have got; all of the images whose whole chain has scores.
  """
  rounds = []
  for turn in range(1, len(found.score)):
    before, open_ = found.chain[turn - 1], ~found.stop[turn - 1]
    right, wrong = open_ & (before == 1), open_ & (before < 1)
    says = found.says_stop[turn]
    rounds.append(
      {
        "round": name_of(turn),
        "right": int(right.sum()),
        "wrong": int(wrong.sum()),
        "stop_when_right": _share(says, right),
        "stop_when_wrong": _share(says, wrong),
        "stop_precision": _share(right, says & (right | wrong)),
      }
    )
  policies = {
    "its own stops": found.score[-1],
    "stopped at the draft": found.chain[0],
    "never stopped": found.chain[-1],
    "stopped at the best image": found.chain.max(0),
  }
  whole = np.flatnonzero(np.isfinite(found.chain).all(0))
  return {
    "rounds": rounds,
    "score": {
      name: interval(values, found, seed, whole)
      for name, values in policies.items()
    },
  }


def behaviour(found: Result) -> dict[str, float | None]:
  """Returns how the chain edits and stops, over all reflect-refine rounds.

  edit_rate: edits per round in which a sample was not finished. stop_when_right / stop_when_wrong:
  share of those rounds that stop when the image is perfect / is not. improvement: mean change of
  the score by an edit. Rounds without a score count in none of the shares that need one; a share of
  nothing is None.
  """
  open_before = ~found.stop[:-1]
  stopped = found.stop[1:] & open_before
  edited = ~found.stop[1:]
  before, change = found.score[:-1], np.diff(found.score, axis=0)
  judged = edited & np.isfinite(change)
  right, wrong = open_before & (before == 1), open_before & (before < 1)
  return {
    "edit_rate": _share(edited, open_before),
    "stop_precision": _share(before == 1, stopped & np.isfinite(before)),
    "stop_when_right": _share(stopped, right),
    "stop_when_wrong": _share(stopped, wrong),
    "improvement": float(change[judged].mean()) if judged.any() else None,
    "improved": _share(change > 0, judged),
    "worse": _share(change < 0, judged),
    "finished": float(found.stop[-1].mean()),
  }


def refinement(found: Result, seed: int) -> list[float] | None:
  """Returns the last round's score minus the draft's, with its 95 % interval; None without scores."""
  return interval(found.score[-1] - found.score[0], found, seed)


def numbers(found: Result) -> dict[str, float]:
  """Returns what curves are drawn of, by "evaluation/NAME"; NaN where there is none.

  Scores are means of the tags' means; the tags', and those of the parts, are of the last round.
  """
  tags = np.asarray(found.tags)
  values = {
    "draft": found.score[0],
    "last_round": found.score[-1],
    "gain": found.score[-1] - found.score[0],
  }
  values |= {f"part/{name}": part[-1] for name, part in found.parts.items()}
  values |= {
    f"tag/{tag}": np.where(tags == tag, found.score[-1], np.nan)
    for tag in dict.fromkeys(found.tags)
  }
  made = {name: _mean(of, found) for name, of in values.items()}
  made |= {"missing": found.missing} | behaviour(found)
  return {
    f"evaluation/{name}": float("nan") if value is None else value
    for name, value in made.items()
  }


def _mean(values: np.ndarray, found: Result) -> float:
  known = np.flatnonzero(np.isfinite(values))
  return (
    bootstrap.mean(values[known], found.design(known))
    if known.size
    else float("nan")
  )


# --- Understanding --------------------------------------------------------------------------------


def understanding(answers: result.Answers, seed: int) -> dict[str, dict]:
  """Returns, by kind of question, how often the answer is right.

  accuracy: with its interval over prompts. For yes/no questions also precision and recall of "yes",
  the shares of "yes" among the answers and the truth, and what always answering the more frequent
  word, or always "yes", would get. unread: share of texts in which there was no answer; they are wrong.
  Every tag weighs the same in all of them.
  """
  kinds = np.asarray(answers.kinds)
  return {
    kind: _kind(answers, np.flatnonzero(kinds == kind), kind, seed)
    for kind in dict.fromkeys(answers.kinds)
  }


def _kind(
  answers: result.Answers, rows: np.ndarray, kind: str, seed: int
) -> dict:
  expected, given = (
    np.asarray(words)[rows] for words in (answers.expected, answers.given)
  )
  tags = np.asarray(answers.tags)[rows]
  design = bootstrap.Design([answers.prompts[i] for i in rows], tags)
  _, tag, sizes = np.unique(tags, return_inverse=True, return_counts=True)
  weights = 1 / (len(sizes) * sizes[tag])
  of = lambda part: float(weights[part].sum())
  shares = {str(word): of(expected == word) for word in np.unique(expected)}
  frequent = max(shares, key=shares.get)
  found = {
    "questions": len(rows),
    "accuracy": list(
      bootstrap.bootstrap_mean((expected == given).astype(float), seed, design)
    ),
    "most_frequent": shares[frequent],
    "most_frequent_word": frequent,
    "unread": of(given == ""),
  }
  if not set(expected) <= {"yes", "no"}:
    return found
  yes, said = expected == "yes", given == "yes"
  among = lambda whole: of(yes & said) / of(whole) if whole.any() else None
  return found | {
    "precision": among(said),
    "recall": among(yes),
    "says_yes": of(said),
    "always_yes": of(yes),
  }


# --- Comparison -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
  """One number of an evaluation: a value per image, of some of the images."""

  values: np.ndarray  # [n]
  images: np.ndarray  # their numbers


def views(found: Result, rounds: dict[str, int]) -> dict[str, View]:
  """Returns the scores of the named rounds, over all images, by part and by tag."""
  tags, every = np.asarray(found.tags), np.arange(len(found.tags))
  made = {name: View(found.score[i], every) for name, i in rounds.items()}
  made |= {
    f"{name}, {part}": View(values[i], every)
    for part, values in found.parts.items()
    for name, i in rounds.items()
  }
  for tag in dict.fromkeys(found.tags):
    made |= {
      f"{name}, {tag}": View(found.score[i], every[tags == tag])
      for name, i in rounds.items()
    }
  return made


def compare(
  before: Result, after: Result, seed: int, rounds: dict[str, int] | None = None
) -> dict[str, dict[str, list[float]]]:
  """Returns scores before and after with 95 % bootstrap intervals, and of the paired difference.

  Views without any image that has both scores are left out.

  Args:
    before, after: evaluations of the same images, in order.
    seed: of the draws.
    rounds: name -> number of the rounds that are compared; draft and last round if None.

  Raises:
    ValueError: they are not of the same images.
  """
  if (before.prompts, before.tags) != (after.prompts, after.tags):
    raise ValueError(
      "evaluations that are compared must be of the same prompts, with as many images of each"
    )
  rounds = rounds or {"draft": 0, "last round": -1}
  old, new, compared = views(before, rounds), views(after, rounds), {}
  for name in old.keys() & new.keys():
    both = np.isfinite(old[name].values) & np.isfinite(new[name].values)
    images = old[name].images[both[old[name].images]]
    of = lambda values, images=images: interval(values, before, seed, images)
    if images.size:
      a, b = old[name].values, new[name].values
      compared[name] = {
        "before": of(a),
        "after": of(b),
        "difference": of(b - a),
      }
  return {name: compared[name] for name in old if name in compared}
