"""Reads the prompts to draw from a file."""

import json

from etils import epath

from r3jax.data import records
from r3jax.files import paths


def read(path: epath.Path) -> list[records.Prompt]:
  """Returns the prompts of a file, with `include` items where they can be scored.

  Args:
    path: a prompt per line: a text, or a JSON object with the key "prompt".

  Raises:
    ValueError: the file is missing or has lines that are no prompts; lists all of them.
  """
  if not path.is_file():
    raise ValueError(
      f"--prompts must be a file; not found: {path}{paths.did_you_mean(path)}"
    )
  prompts = []
  problems = []
  for number, line in enumerate(path.read_text().splitlines(), start=1):
    if not line.strip():
      continue
    try:
      prompts.append(_parse(line.strip(), f"{path}:{number}"))
    except ValueError as error:
      problems.append(str(error))
  if not problems and not prompts:
    problems = [f"{path} has none"]
  if problems:
    raise ValueError("--prompts must hold prompts:\n" + "\n".join(problems))
  return prompts


def _parse(line: str, place: str) -> records.Prompt:
  """Returns the prompt of a line.

  Raises:
    ValueError: the line is no prompt; the message begins with its place.
  """
  if not line.startswith("{"):
    return records.Prompt(tag="", text=line)
  try:
    values = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{place}: the line must be JSON: {error}") from error
  if not isinstance(values.get("prompt"), str):
    raise ValueError(f"{place}: the object must have a text 'prompt'")
  if "include" not in values:
    return records.Prompt(tag="", text=values["prompt"])
  return records.Prompt.from_json({"tag": "none"} | values, place)
