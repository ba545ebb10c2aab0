"""A user's own Python function as a reward, named by `package.module:function` in the config.

docs/howto/add_a_reward.md shows a complete example.
"""

from collections.abc import Callable, Sequence
import hashlib
import inspect
import json
import threading

import numpy as np

from r3jax import plugins
from r3jax.data import records
from r3jax.files import bounded
from r3jax.rewards import outcome

# What a function raises; sys.exit() must not end a run from inside of a step.
_OF_USER = (Exception, SystemExit)
# A line of the log holds the detail, and is read again.
_DETAIL_LIMITS = bounded.Limits(max_levels=40, max_values=100_000)


class UserFunction:
  """A host reward that calls a user's function.

  The function scores one image:
    f(image: uint8 [H, W, 3], prompt: records.Prompt) -> float | Ok | Failed | Invalid
  or, if it has an attribute `batched` that is true, all images of a call:
    f(images: uint8 [n, H, W, 3], prompts: list of Prompt) -> a sequence of n such results

  A number is the score and must be in [0, 1]; "strict" is 1 where it is 1. A function that returns
  `Ok` with further parts names them in an attribute `parts`. An exception, or a result of another
  kind, is the outcome `Failed` for the images of that call.

  The function is called by one thread at a time. It must not compute on JAX's devices, which wait
  for it.
  """

  def __init__(self, path: str, image_size: tuple[int, int]):
    """Finds the function.

    Args:
      path: `package.module:function`.
      image_size: height and width of the run's images, for a trial before the run starts.

    Raises:
      ValueError: there is no such function.
    """
    function = plugins.load(path, "reward.name")
    if not callable(function):
      raise ValueError(
        f"reward.name is {path!r}, so it must name a function; it is a "
        f"{type(function).__name__}"
      )
    self._function: Callable = function
    self._path = path
    self._image_size = image_size
    self._batched = bool(getattr(function, "batched", False))
    extra_parts = tuple(getattr(function, "parts", ()))
    self.parts = tuple(dict.fromkeys(("strict", *extra_parts)))
    self._lock = threading.Lock()
    self._was_tried = False

  @property
  def name(self) -> str:
    """The function's name, for logs and metrics."""
    return self._path.partition(":")[2]

  def check(self, prompt: records.Prompt) -> None:
    """Scores a black image of the first prompt, so that a broken function stops before compilation.

    Raises:
      ValueError: the function raises an exception or returns no outcome.
    """
    if self._was_tried:
      return
    self._was_tried = True
    blank = np.zeros((1, *self._image_size, 3), np.uint8)
    try:
      self._call(blank, [prompt])
    except _OF_USER as error:
      raise ValueError(
        f"reward.name is {self._path!r}, and that function must score a first image before a run "
        f"starts (black, {self._image_size[0]} x {self._image_size[1]}, prompt {prompt.text!r}): "
        f"{type(error).__name__}: {error}"
      ) from error

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images, see `outcome.HostReward`."""
    if self._batched:
      return self._score_call(images, prompts)
    results = []
    for row, prompt in enumerate(prompts):
      results += self._score_call(images[row : row + 1], [prompt])
    return results

  def _score_call(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Returns the outcomes of one call; all of them are `Failed` where it raises an exception."""
    try:
      return self._call(images, prompts)
    except _OF_USER as error:
      # The budget counts these images.
      reason = f"{self._path} raised {type(error).__name__}: {error}"
      return [outcome.Failed(reason)] * len(prompts)

  def _call(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Calls the function once, with one image unless it takes batches.

    Raises:
      ValueError: it returns no outcome, or not one for each image.
      Exception: whatever it raises.
    """
    # The devices of a process call back from several threads.
    with self._lock:
      if not self._batched:
        return [self._to_outcome(self._function(images[0], prompts[0]))]
      results = list(self._function(images, list(prompts)))
    if len(results) != len(prompts):
      raise ValueError(
        f"it must return {len(prompts)} results, one for each image; got {len(results)}"
      )
    return [self._to_outcome(result) for result in results]

  def _to_outcome(self, result: object) -> outcome.Outcome:
    """Returns a result of the function as an outcome with the parts that it must have.

    Raises:
      ValueError: the result is of another kind, outside [0, 1], lacks a part, or has a detail that
        cannot be written to the log.
    """
    if isinstance(result, (outcome.Failed, outcome.Invalid)):
      return result
    if not isinstance(result, outcome.Ok):
      result = outcome.Ok(_to_number(result))
    # Numbers of numpy are none in JSON.
    parts = {"strict": float(result.score == 1)}
    for name, value in result.parts.items():
      parts[name] = float(value)
    if set(parts) != set(self.parts):
      raise ValueError(
        f"its results must have the parts {sorted(self.parts)}; got {sorted(parts)}. A function "
        "names its parts in an attribute `parts`"
      )
    _check_detail(result.detail)
    return outcome.Ok(float(result.score), parts, result.detail)

  def describe(self) -> dict:
    """Returns the function's name and a hash of its source, see `outcome.HostReward`."""
    description = {"function": self._path, "parts": list(self.parts)}
    try:
      source = inspect.getsource(self._function)
    except (OSError, TypeError):  # not written in Python, or not in a file
      return description
    digest = hashlib.sha256(source.encode()).hexdigest()
    return description | {"source_sha256": digest}

  def metrics(self) -> dict[str, float]:
    """Returns no metrics; the scorer counts the outcomes."""
    return {}


def _check_detail(detail: object) -> None:
  """Checks that the detail of an outcome can be written to the log, a line of JSON.

  Raises:
    ValueError: it cannot.
  """
  try:
    bounded.check_levels(detail, _DETAIL_LIMITS)
    json.dumps(detail, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f"its detail must hold JSON values: {error}") from error


def _to_number(result: object) -> float:
  """Returns a number that a function returned.

  Raises:
    ValueError: it is something else, for example a boolean or an array of several numbers.
  """
  # numpy returns scalars as arrays without axes; an array of several numbers is a mistake.
  is_array = isinstance(result, (np.ndarray, np.generic))
  value = result.item() if is_array and np.size(result) == 1 else result
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(
      "it must return a number in [0, 1], or an outcome.Ok, Failed or Invalid; got a "
      f"{type(result).__name__}"
    )
  return float(value)
