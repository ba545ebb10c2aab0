"""Reads the prompts to draw from a file."""

from etils import epath

from r3jax.data import records
from r3jax.files import bounded
from r3jax.files import paths

# Texts may stand beside JSON, and a prompt may be drawn twice: nothing is learned from them.
_READING = records.Reading(mixed=True, repeats=True)


def read(path: epath.Path) -> list[records.Prompt]:
  """Returns the prompts of a file, with `include` items where they can be scored.

  Args:
    path: a prompt per line: a text, or a record of `docs/reference/prompts.md`.

  Raises:
    ValueError: the file is missing or has lines that are no prompts; lists all of them.
  """
  if not path.is_file():
    raise ValueError(
      f"--prompts must be a file; not found: {path}{paths.did_you_mean(path)}"
    )
  try:
    prompts = records.parse(bounded.read_bytes(path), str(path), _READING)
  except ValueError as error:
    raise ValueError(f"--prompts must hold prompts: {error}") from error
  if not prompts:
    raise ValueError(f"--prompts must hold prompts: {path} has none")
  return prompts
