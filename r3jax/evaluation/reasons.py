"""Says in a few words why an image is not right, from what the verifier recognizes in it."""

from collections.abc import Mapping, Sequence

from r3jax.data import records
from r3jax.evaluation import sample_log

_CLUTTER = "clutter"
_LEAST_CLUTTER = 0.005  # a share of the image that is shown as 0 %


def of_turn(
  turn: sample_log.Turn, prompt: records.Prompt, boxes: Sequence[dict] | None
) -> str | None:
  """Returns why the image of a turn is not right; None where it is, or nobody can say.

  Args:
    turn: Turn with its score and parts.
    prompt: What the image must show.
    boxes: Objects that the verifier recognizes, see `sample_log.Turn`; None where it says nothing.
  """
  if boxes is None or turn.score is None or turn.score >= 1:
    return None
  labels = [box["label"] for box in boxes]
  return of_image(prompt, labels, turn.parts or {}) or None


def of_image(
  prompt: records.Prompt,
  labels: Sequence[str],
  parts: Mapping[str, float | None],
) -> str:
  """Returns what is wrong with an image, "" where nothing of it can be said.

  Args:
    prompt: What the image must show.
    labels: Objects that the verifier recognizes, as "COLOR CLASS".
    parts: Parts of the score by name.
  """
  problems = []
  for item in prompt.include:
    problems += _of_item(item, labels)
  placed = [item for item in prompt.include if item.position is not None]
  if placed and not problems and not parts.get("correct", 1.0):
    for item in placed:
      relation, other = item.position
      other_name = prompt.include[other].class_name
      problems.append(f"not there: {item.class_name} {relation} {other_name}")
  clutter = parts.get(_CLUTTER) or 0.0
  if clutter > _LEAST_CLUTTER:
    problems.append(f"unreadable: {clutter:.0%} of the image")
  return "; ".join(problems)


def _of_item(item: records.Expectation, labels: Sequence[str]) -> list[str]:
  """Returns what is wrong with the objects of one item of a prompt."""
  name = item.class_name
  colors = [
    label.removesuffix(f" {name}")
    for label in labels
    if label.endswith(f" {name}")
  ]
  fitting = colors
  if item.color is not None:
    name = f"{item.color} {name}"
    fitting = [color for color in colors if color == item.color]
  num_missing = item.count - len(fitting)
  if num_missing > 0:
    amount = "" if item.count == 1 else f" ({num_missing} of {item.count})"
    others = sorted(set(colors) - set(fitting))
    elsewhere = f", seen in {' and '.join(others)}" if others else ""
    return [f"missing: {name}{amount}{elsewhere}"]
  if num_missing < 0:
    return [f"too many: {name} ({len(fitting)}, not {item.count})"]
  return []
