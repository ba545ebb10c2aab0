"""A stage of training that goes on where a former process ended.

Its file holds the parameters, while it trains also the optimizer's state, and a record of what it
has done so far. It is replaced as a whole, so that a killed process leaves the one before.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
import time

from absl import logging
from flax import serialization
import jax

from r3jax import types
from r3jax.files import atomic
from r3jax.files import damage
from r3jax.sft import fitting
from r3jax.worlds.shapes import batches

_REMEDY = "Delete it, and this stage is trained from its beginning"

# (number of updates done, parameters) -> scores by name; see `curves.py`
Measure = Callable[[int, types.Params], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Record:
  """What a stage has done.

  Attributes:
    step: Updates done.
    seconds: Wall-clock time of these, compilation included.
    cpu_seconds: Time of all cores together.
    is_finished: Whether nothing is left to do.
    losses: {"step": ..., NAME: ...} for some of the steps.
    scores: The same of the scores that were measured.
  """

  step: int = 0
  seconds: float = 0.0
  cpu_seconds: float = 0.0
  is_finished: bool = False
  losses: Sequence[dict[str, float]] = ()
  scores: Sequence[dict[str, float]] = ()


@dataclasses.dataclass(frozen=True)
class Watchers:
  """What a stage does beside its updates.

  Attributes:
    log_every: Steps between losses.
    save_every: Steps between savings.
    measure_every: Steps between measurements.
    measure: Measures parameters; None measures nothing.
    is_enough: Scores -> whether training ends here; None trains all steps.
    save: Called with the parameters when they are saved, if given.
  """

  log_every: int
  save_every: int
  measure_every: int = 1
  measure: Measure | None = None
  is_enough: Callable[[dict[str, float]], bool] | None = None
  save: Callable[[types.Params], None] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    folder: Of its file.
    name: What it is called.
    schedule: How long and how fast it trains.
    watchers: What it does beside its updates.
  """

  folder: pathlib.Path
  name: str
  schedule: fitting.Schedule
  watchers: Watchers

  @property
  def path(self) -> pathlib.Path:
    """The stage's file."""
    return _path(self.folder, self.name)

  def fit(
    self,
    loss: fitting.Loss,
    params: types.Params,
    example: Callable[[int], object],
    seed: int,
  ) -> types.Params:
    """Minimises a loss, from the beginning or from where a former process ended.

    Args:
      loss: See `fitting.fit`.
      params: Parameters before the first update.
      example: Number of an example -> its arrays.
      seed: Seed of the loss's keys.

    Returns:
      The parameters after the last update.

    Raises:
      ValueError: The stage's file is damaged, or of another model.
    """
    optimizer = self.schedule.optimizer()
    state = fitting.begin(params, optimizer)
    record = Record()
    if self.path.exists():
      state, record = self._read(state)
      logging.info("%s: %d steps are done", self.name, record.step)
    if record.is_finished:
      return state.params
    examples = batches.iterate(
      example, self.schedule.batch_size, self.schedule.num_steps, record.step
    )
    watch = _Watch(self, record)
    state = fitting.fit(loss, state, optimizer, examples, seed, watch)
    return state.params

  def write(self, state: fitting.FitState, record: Record) -> None:
    """Replaces the stage's file; a finished stage needs no state of the optimizer."""
    state = jax.device_get(state)
    if record.is_finished:
      state = state.replace(opt_state=())
    contents = {
      "record": json.dumps(dataclasses.asdict(record)),
      "state": serialization.to_state_dict(state),
    }
    packed = serialization.msgpack_serialize(contents)
    atomic.write_bytes(self.path, packed)

  def _read(self, start: fitting.FitState) -> tuple[fitting.FitState, Record]:
    """Returns what the stage's file holds, in the form of `start`."""
    contents = _contents(self.path)
    with damage.explained(self.path, "the state of a stage", _REMEDY):
      record = _record_of(contents)
      if record.is_finished:
        start = start.replace(opt_state=())
      return serialization.from_state_dict(start, contents["state"]), record


def record(folder: pathlib.Path, name: str) -> Record:
  """Returns what a stage has done so far; nothing where it has no file."""
  path = _path(folder, name)
  if not path.exists():
    return Record()
  contents = _contents(path)
  with damage.explained(path, "the state of a stage", _REMEDY):
    return _record_of(contents)


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / f"{name}.msgpack"


def _contents(path: pathlib.Path) -> dict:
  with damage.explained(path, "the state of a stage", _REMEDY):
    contents = serialization.msgpack_restore(path.read_bytes())
    if not isinstance(contents, dict) or set(contents) != {"record", "state"}:
      raise ValueError("it holds something else")
    return contents


def _record_of(contents: dict) -> Record:
  return Record(**json.loads(contents["record"]))


class _Watch:
  """Keeps the record of a stage in training."""

  def __init__(self, stage: Stage, record: Record):
    self._stage = stage
    self._record = record
    self._start = time.monotonic()
    self._cpu_start = time.process_time()

  def __call__(
    self, step: int, state: fitting.FitState, metrics: fitting.Metrics
  ) -> bool:
    """Logs, measures and saves after an update; returns whether to stop here."""
    watchers = self._stage.watchers
    losses = list(self._record.losses)
    scores = list(self._record.scores)
    is_last = step == self._stage.schedule.num_steps
    if step % watchers.log_every == 0:
      losses.append(_row(step, metrics))
      logging.info("%s, step %s", self._stage.name, _line(losses[-1]))
    if watchers.measure and (step % watchers.measure_every == 0 or is_last):
      scores.append(_row(step, watchers.measure(step, state.params)))
      logging.info("%s, scores at step %s", self._stage.name, _line(scores[-1]))
      if watchers.is_enough:
        is_last = is_last or watchers.is_enough(scores[-1])
    self._record = dataclasses.replace(
      self._record, losses=losses, scores=scores
    )
    if step % watchers.save_every == 0 or is_last:
      self._stage.write(state, self._so_far(step, is_last))
      if watchers.save:
        watchers.save(state.params)
    return is_last

  def _so_far(self, step: int, is_finished: bool) -> Record:
    return dataclasses.replace(
      self._record,
      step=step,
      seconds=self._record.seconds + time.monotonic() - self._start,
      cpu_seconds=(
        self._record.cpu_seconds + time.process_time() - self._cpu_start
      ),
      is_finished=is_finished,
    )


def _row(step: int, values: dict) -> dict[str, float]:
  return {"step": step} | {name: float(x) for name, x in values.items()}


def _line(row: dict[str, float]) -> str:
  values = [f"{name} {x:.4g}" for name, x in row.items() if name != "step"]
  return f"{row['step']}: {', '.join(values)}"
