"""Lists how the tensors of a checkpoint differ from those that a model of a config has."""

from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]


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
    problems: One line each.
  """
  if not problems:
    return
  listed = "\n".join(f"  {problem}" for problem in problems)
  raise ValueError(
    f"{subject} must match the config; {len(problems)} problem(s):\n{listed}"
  )
