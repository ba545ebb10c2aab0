"""Rewards that Python computes on the host, called from inside the compiled step."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import threading
import time

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.data import records
from r3jax.files import jsonl
from r3jax.parallel import host_calls
from r3jax.rewards import outcome


def reward_from_host(
  reward: Callable[[np.ndarray, object], types.Score],
  parts: tuple[str, ...],
  mesh: jax.sharding.Mesh,
) -> types.Scoring:
  """Makes a reward of the compiled step from a Python function.

  Args:
    reward: scores numpy images [n, H, W, 3] by the rows of their targets. It is called once per
      device with that device's rows. It must not wait for computations on the mesh's own devices,
      which wait for it.
    parts: names of the parts that it returns.
    mesh: the step's mesh.

  Returns:
    The reward for use inside the step. It leaves out the rows that are not needed.
  """

  def score_needed(images, target, needed) -> types.Score:
    """Scores the needed rows of a device; the others have no score."""
    rows = np.flatnonzero(needed)
    missing = np.full(len(needed), np.nan, np.float32)
    scores = types.Score(
      value=missing,
      valid=np.zeros(len(needed), bool),
      parts={name: missing.copy() for name in parts},
    )
    if not rows.size:
      return scores
    target_rows = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], target)
    result = reward(np.asarray(images)[rows], target_rows)

    def write(column: np.ndarray, values: np.ndarray) -> None:
      column[rows] = values

    jax.tree.map(write, scores, result)
    return scores

  def call(images, target, needed):
    rows = images.shape[0]
    floats = jax.ShapeDtypeStruct((rows,), jnp.float32)
    like = types.Score(
      value=floats,
      valid=jax.ShapeDtypeStruct((rows,), jnp.bool_),
      parts=dict.fromkeys(parts, floats),
    )
    scoring = host_calls.call_host(score_needed, like, mesh, pure=False)
    return scoring(images, target, needed)

  call_with_rows = host_calls.map_rows(call, mesh)

  def score(images: types.Images, target, needed=None) -> types.Score:
    if needed is None:
      needed = jnp.ones(images.shape[0], bool)
    # Otherwise the sharding of the rows spreads back into the model, where the partitioner aborts.
    images, needed = jax.lax.with_sharding_constraint(
      (images, needed), jax.sharding.PartitionSpec()
    )
    return call_with_rows(images, target, needed)

  return score


class Scorer:
  """A host reward at work: stores the prompts by number, writes a log, never breaks the step.

  An exception inside a callback would end this host's program while the others wait for it in a
  collective. The scorer stores it instead, the images count as not scored, and the run raises it on
  all hosts together once the step is over, see `combine.GraphReward.raise_together`.

  Attributes:
    step: the iteration of the lines that are logged next.
    error: the first exception that the reward raised, if any.
    failure: why the first image without a score, between the last two calls of `flush`, has none;
      "" where all have one.
  """

  def __init__(self, reward: outcome.HostReward):
    """Scores with `reward`."""
    self.step = 0
    self.error: Exception | None = None
    self.failure = ""
    self._reward = reward
    self._prompts: list[records.Prompt] = []
    self._lock = threading.Lock()
    self._log: epath.Path | None = None
    # Lines that are not in the log yet, and the first reason why an image has no score.
    self._pending: list[dict] = []
    self._first_reason = ""
    self._counts = _no_counts()

  @property
  def parts(self) -> tuple[str, ...]:
    """Names of the parts of its scores."""
    return self._reward.parts

  def log_to(self, path: epath.PathLike, restored_step: int | None) -> None:
    """Logs every image's outcome to a file of JSON lines from now on, see `flush`.

    Args:
      path: the file.
      restored_step: lines of later steps are dropped, for the run repeats them.
    """
    self._log = epath.Path(path)
    self._log.parent.mkdir(parents=True, exist_ok=True)
    jsonl.drop_after(self._log, restored_step)

  @contextlib.contextmanager
  def logging_to(self, path: epath.PathLike) -> Iterator[None]:
    """Appends the outcomes to another file while the context is open."""
    self.flush()
    outer_log = self._log
    self._log = epath.Path(path)
    self._log.parent.mkdir(parents=True, exist_ok=True)
    jsonl.drop_cut_off(self._log)
    try:
      yield
    finally:
      self.flush()
      self._log = outer_log

  def encode(self, prompts: Sequence[records.Prompt]) -> np.ndarray:
    """Returns the numbers of prompts, int32 [n]; the step hands them back with the images.

    Raises:
      ValueError: the reward cannot score images of one of the prompts.
    """
    for prompt in prompts:
      self._reward.check(prompt)
    first = len(self._prompts)
    self._prompts.extend(prompts)
    return np.arange(first, len(self._prompts), dtype=np.int32)

  def on(self, mesh: jax.sharding.Mesh) -> types.Scoring:
    """Returns the reward for use inside the step, see `reward_from_host`."""
    return reward_from_host(self._score, self.parts, mesh)

  def _score(self, images, numbers) -> types.Score:
    """Scores images [n, H, W, 3] of the prompts with these numbers [n]."""
    prompts = [self._prompts[number] for number in np.asarray(numbers)]
    try:
      results = self._reward.score(np.asarray(images), prompts)
      self._record(prompts, results)
      return outcome.to_score(results, self._reward.parts)
    except (
      Exception
    ) as error:  # the run raises it, see the docstring of the class
      with self._lock:
        self.error = self.error or error
      failures = [outcome.Failed(str(error))] * len(prompts)
      return outcome.to_score(failures, self._reward.parts)

  def _record(
    self,
    prompts: Sequence[records.Prompt],
    results: Sequence[outcome.Outcome],
  ) -> None:
    """Counts outcomes, and adds them to the lines of the log."""
    now = round(time.time(), 3)
    lines = []
    for prompt, result in zip(prompts, results, strict=True):
      line = {
        "step": self.step,
        "time": now,
        "prompt": prompt.text,
        "tag": prompt.tag,
      }
      lines.append(line | outcome.to_json(result))
    with self._lock:
      for result in results:
        self._counts[type(result)] += 1
        if not isinstance(result, outcome.Ok):
          self._first_reason = self._first_reason or result.reason
      if self._log:
        self._pending += lines

  def flush(self) -> None:
    """Appends the lines since the last call to the log, in one write; warns of missing scores."""
    with self._lock:
      lines = self._pending
      reason = self._first_reason
      self._pending = []
      self._first_reason = ""
    self.failure = reason
    if reason:
      logging.warning("images without a score; the first: %s", reason)
    if lines:
      jsonl.append(self._log, lines)

  def describe(self) -> dict:
    """Returns what scores, see `outcome.HostReward`."""
    return self._reward.describe()

  def metrics(self) -> dict[str, float]:
    """Returns the reward's metrics, and the numbers of outcomes by kind since the last call."""
    with self._lock:
      counts = self._counts
      self._counts = _no_counts()
    metrics = self._reward.metrics()
    for kind, count in counts.items():
      metrics[f"images_{kind.__name__.lower()}"] = float(count)
    return metrics


def _no_counts() -> dict[type, int]:
  """Returns the number of outcomes of each kind before the first."""
  kinds = (outcome.Ok, outcome.Failed, outcome.Invalid)
  return dict.fromkeys(kinds, 0)
