"""Lists how the tensors of a checkpoint differ from those that a model of a config has."""

import collections
from collections.abc import Mapping, Sequence

from r3jax.files import texts

Shape = tuple[int, ...]

# Of a model of another size every tensor is a problem: an error lists the first of each kind, which
# is the first word of a line.
_MAX_OF_A_KIND = 5
_MAX_LINE = 300  # characters


def missing_or_misshaped(
  kind: str, expected: Mapping[str, Shape], actual: Mapping[str, Shape]
) -> list[str]:
  """Returns a line for every expected tensor that is missing or has another shape.

  Args:
    kind: What the names are of: "tensor" or "leaf".
    expected: Shapes by name that the config asks for.
    actual: Shapes by name that the checkpoint has.
  """
  problems = []
  for name, shape in expected.items():
    if name not in actual:
      problems.append(f"missing {kind} {name}: expected shape {shape}")
    elif actual[name] != shape:
      problems.append(
        f"mis-shaped {kind} {name}: expected shape {shape}, seen {actual[name]}"
      )
  return problems


def differences(
  kind: str, expected: Mapping[str, Shape], actual: Mapping[str, Shape]
) -> list[str]:
  """Returns a line for every tensor that is missing, mis-shaped or unexpected, in order."""
  problems = missing_or_misshaped(kind, expected, actual)
  for name in actual.keys() - expected.keys():
    problems.append(f"unexpected {kind} {name}: seen shape {actual[name]}")
  return sorted(problems)


def refuse(subject: str, problems: Sequence[str]) -> None:
  """Raises a ValueError that lists the problems, if there are any.

  Args:
    subject: What has the problems, for example "the BAGEL folder models/bagel".
    problems: One line each; the first of each kind are listed.
  """
  if not problems:
    return
  num_of_kind = collections.Counter()
  lines = []
  for problem in problems:
    kind = problem.partition(" ")[0]
    num_of_kind[kind] += 1
    if num_of_kind[kind] <= _MAX_OF_A_KIND:
      lines.append(texts.shorten(problem, _MAX_LINE))
  remaining = len(problems) - len(lines)
  if remaining > 0:
    lines.append(f"... and {remaining} more")
  listed = "\n".join(f"  {line}" for line in lines)
  raise ValueError(
    f"{subject} must match the config; {len(problems)} problem(s):\n{listed}"
  )
