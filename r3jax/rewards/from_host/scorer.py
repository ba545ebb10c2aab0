"""Calls to the host from inside the mapped step: rewards and text parsing.

Inside the step only `data` is mapped by hand. A nested, fully mapped region makes every device of
a replica handle its own rows, so each image is scored once, on the host that holds it.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import threading
import time

from etils import epath
import jax
from jax.experimental import buffer_callback
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.files import jsonl
from r3jax.rewards import outcome as outcome_lib
from r3jax.sequence import thoughts

_INNER = ("fsdp", "tensor")


def _padded(tree, multiple: int):
  """Repeats the last row until the number of rows is a multiple."""

  def pad(x):
    missing = -x.shape[0] % multiple
    return (
      jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
      if missing
      else x
    )

  return jax.tree.map(pad, tree)


def _call_host(
  function: Callable, like, mesh: jax.sharding.Mesh, pure: bool
) -> Callable:
  """Makes a numpy function callable in the graph, once per device.

  JAX's own callbacks copy large arguments with the threads that run the CPU's devices. When all of
  those wait for a callback, nobody copies, and the program hangs; so on CPUs the function gets XLA's
  buffers themselves, copied: they are XLA's again when it returns.

  Args:
    function: arrays -> arrays.
    like: shapes and dtypes of what it returns.
    mesh: tells the platform.
    pure: whether calls may be left out or repeated.
  """
  if mesh.devices.flat[0].platform != "cpu":
    call = jax.pure_callback if pure else io_callback
    return functools.partial(call, function, like)

  def fill(context, out, *args):
    del context
    found = function(*jax.tree.map(lambda x: np.asarray(x).copy(), args))
    jax.tree.map(lambda buffer, x: np.copyto(np.asarray(buffer), x), out, found)

  return buffer_callback.buffer_callback(fill, like, has_side_effect=not pure)


def reward_from_host(
  reward: Callable[[np.ndarray, object], types.Score],
  parts: tuple[str, ...],
  mesh: jax.sharding.Mesh,
):
  """Makes a reward of the compiled step from a Python function.

  Args:
    reward: scores numpy images [n, H, W, 3] by the rows of their targets; called once per device with that device's rows. It must not wait for
      computations on the mesh's own devices, which wait for it.
    parts: names of the parts that it returns.
    mesh: the step's mesh.

  Returns:
    A function (images [B, H, W, 3], target rows) -> Score for use inside the step.
  """
  shards = mesh.shape["fsdp"] * mesh.shape["tensor"]

  def call(images, target):
    rows = images.shape[0]
    like = types.Score(
      jax.ShapeDtypeStruct((rows,), jnp.float32),
      jax.ShapeDtypeStruct((rows,), jnp.bool_),
      {name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in parts},
    )
    return _call_host(reward, like, mesh, pure=False)(images, target)

  spec = jax.sharding.PartitionSpec(_INNER)
  scored = jax.shard_map(
    call, in_specs=spec, out_specs=spec, axis_names=set(_INNER), check_vma=False
  )

  def score(images: types.Images, target) -> types.Score:
    rows = images.shape[0]
    # Else the sharding of the rows spreads back into the model, where the partitioner aborts.
    images = jax.lax.with_sharding_constraint(
      images, jax.sharding.PartitionSpec()
    )
    found = scored(*_padded((images, target), shards))
    return jax.tree.map(lambda x: x[:rows], found)

  return score


class Scorer:
  """A host reward at work: knows the records by number, keeps a log, and never breaks the step.

  An exception inside a callback would end this host's program while the others wait for it in a
  collective. It is kept instead, the images count as not scored, and the run raises it on all hosts
  together once the step is over, see `train.py`.
  """

  def __init__(self, reward: outcome_lib.HostReward):
    """Scores with `reward`."""
    self._reward = reward
    self._records: list[dict] = []
    self._lock = threading.Lock()
    self._log: epath.Path | None = None
    self._lines: list[dict] = []  # that the log does not hold yet
    self.step = 0  # iteration that the log's lines belong to
    self._counts = dict.fromkeys(
      (outcome_lib.Ok, outcome_lib.Failed, outcome_lib.Invalid), 0
    )
    self.error: Exception | None = None

  @property
  def parts(self) -> tuple[str, ...]:
    """Names of the parts of its scores."""
    return self._reward.parts

  def log_to(self, path: epath.PathLike, restored_step: int | None):
    """Keeps what every image got in JSON lines, see `flush`; those of later steps are dropped first."""
    self._log = epath.Path(path)
    self._log.parent.mkdir(parents=True, exist_ok=True)
    jsonl.drop_after(self._log, restored_step)

  @contextlib.contextmanager
  def logging_to(self, path: epath.PathLike):
    """Keeps what images get meanwhile in another file, behind what is there."""
    self.flush()
    former, self._log = self._log, epath.Path(path)
    self._log.parent.mkdir(parents=True, exist_ok=True)
    jsonl.drop_cut_off(self._log)
    try:
      yield
    finally:
      self.flush()
      self._log = former

  def encode(self, records: Sequence[dict]) -> np.ndarray:
    """Returns the numbers by which the step knows the records, int32 [n].

    Raises:
      ValueError: the reward cannot be asked about one of them.
    """
    for record in records:
      self._reward.check(record)
    first = len(self._records)
    self._records.extend(records)
    return np.arange(first, len(self._records), dtype=np.int32)

  def on(self, mesh: jax.sharding.Mesh):
    """Returns the reward as the step takes it, see `reward_from_host`."""
    return reward_from_host(self._score, self.parts, mesh)

  def _score(self, images, rows) -> types.Score:
    records = [self._records[row] for row in np.asarray(rows)]
    try:
      outcomes = self._reward.score(np.asarray(images), records)
      self._note(records, outcomes)
      return outcome_lib.to_score(outcomes, self._reward.parts)
    except Exception as error:  # kept for the run to raise, see above
      with self._lock:
        self.error = self.error or error
      return outcome_lib.to_score(
        [outcome_lib.Failed(str(error))] * len(records), self._reward.parts
      )

  def _note(
    self, records: Sequence[dict], outcomes: Sequence[outcome_lib.Outcome]
  ):
    now = {"step": self.step, "time": round(time.time(), 3)}
    lines = [
      now
      | {"prompt": record["prompt"], "tag": record["tag"]}
      | outcome_lib.to_json(outcome)
      for record, outcome in zip(records, outcomes, strict=True)
    ]
    with self._lock:
      for outcome in outcomes:
        self._counts[type(outcome)] += 1
      if self._log:
        self._lines += lines

  def flush(self):
    """Appends the lines of the calls since the last time to the log, in one write."""
    with self._lock:
      lines, self._lines = self._lines, []
    if lines:
      jsonl.append(self._log, lines)

  def describe(self) -> dict:
    """Returns what scores, see `base.HostReward`."""
    return self._reward.describe()

  def metrics(self) -> dict[str, float]:
    """Returns the reward's numbers, and how many images were ok, failed, invalid since the last call."""
    with self._lock:
      counts = {
        f"images_{kind.__name__.lower()}": float(n)
        for kind, n in self._counts.items()
      }
      self._counts = dict.fromkeys(self._counts, 0)
    return self._reward.metrics() | counts


def parse_on_host(
  tokenizer, instruction_capacity: int, mesh: jax.sharding.Mesh
):
  """Makes the step's parser from the real tokenizer, for vocabularies without a token parser.

  Args:
    tokenizer: a `sequence.tokenizer.TextTokenizer`.
    instruction_capacity: slots of an instruction.
    mesh: the step's mesh.

  Returns:
    A function (ids [B, T], lengths [B], stage) -> Parsed for use inside the step.
  """

  def on_host(ids, lengths, stage: str) -> np.ndarray:
    """Returns what was parsed side by side: the instruction's slots and four numbers, [B, slots + 4]."""
    found = thoughts.parse_strings(
      ids, lengths, stage, tokenizer, instruction_capacity
    )
    numbers = [
      found.instruction_length,
      found.stop,
      found.truncated,
      found.format,
    ]
    return np.concatenate(
      [found.instruction, np.stack(numbers, axis=1)], axis=1
    ).astype(np.int32)

  def parse(
    ids: types.TokenIds, lengths: types.Lengths, stage: str
  ) -> thoughts.Parsed:
    # One result: for TPUs, JAX 0.10 gives all results of a callback the sharding of the first one's rank.
    like = jax.ShapeDtypeStruct(
      (ids.shape[0], instruction_capacity + 4), jnp.int32
    )
    call = _call_host(
      functools.partial(on_host, stage=stage), like, mesh, pure=True
    )
    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
      call,
      in_specs=spec,
      out_specs=spec,
      axis_names=set(_INNER),
      check_vma=False,
    )
    found = mapped(ids, lengths)
    length, stop, truncated, has_format = jnp.moveaxis(
      found[:, instruction_capacity:], 1, 0
    )
    return thoughts.Parsed(
      format=has_format.astype(jnp.float32),
      instruction=found[:, :instruction_capacity],
      instruction_length=length,
      stop=stop.astype(bool),
      truncated=truncated.astype(bool),
    )

  return parse
