"""Saves and restores the training state with Orbax, from any number of hosts."""

from collections.abc import Mapping, Sequence
from concurrent import futures
import functools
import gc
import itertools
import json
import os
import threading
import time
from typing import Any

from absl import logging
from etils import epath
import grain
import jax
import orbax.checkpoint as ocp

from r3jax.checkpoint import digests
from r3jax.checkpoint import mismatch
from r3jax.checkpoint import verification
from r3jax.checkpoint import writers
from r3jax.files import paths
from r3jax.parallel import multihost

PyTree = Any

# What Orbax raises where files cannot be written.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)
_POLL_SECONDS = 0.05  # between two looks at whether a save is complete
# A shared disk may show a new folder late to other hosts.
_RETRY_SECONDS = (1.0, 5.0)
# Arrays that are read at the same time where nothing else goes on.
_THREADS = min(8, os.cpu_count() or 1)
_STOPPED = "stopped"
# Readers hold some chunks in memory; without a limit a chunk is a whole shard.
_CHUNK_BYTES = 256 << 20
_openings = itertools.count()


class Unusable(ValueError):
  """No checkpoint can be used, or a state must not be saved; every process raises it."""


class SaveFailed(multihost.PlainError):
  """A checkpoint could not be written, or is not what it should be; maybe on one process only."""


def complete_steps(folder: epath.PathLike) -> list[int]:
  """Returns the steps of all complete checkpoints, in order; changes no file."""
  folder = paths.absolute(folder)
  if not folder.exists():
    return []
  names = [path.name for path in ocp.utils.checkpoint_steps_paths(folder)]
  # A copy such as "best_3", "3.damaged" or "003" is none of the run's checkpoints.
  steps = [int(name) for name in names if name.isdecimal()]
  return sorted(step for step in steps if str(step) in names)


def latest_step(folder: epath.PathLike) -> int | None:
  """Returns the step of the last complete checkpoint, or None; changes no file."""
  return max(complete_steps(folder), default=None)


def newest_sound(
  folder: epath.PathLike, prefix: str = "", before: int | None = None
) -> int | None:
  """Returns the step of the last checkpoint that is not damaged; changes no file.

  Every process reads all arrays of that checkpoint whose names begin with the prefix.

  Args:
    folder: Folder of the checkpoints.
    prefix: What is going to be read, for example "policy.".
    before: Only checkpoints of fewer steps count; None takes all.

  Returns:
    The step, or None where there is no checkpoint.

  Raises:
    Unusable: All checkpoints are damaged, or they cannot be read.
  """
  folder = paths.absolute(folder)
  steps = complete_steps(folder)
  if before is not None:
    steps = [step for step in steps if step < before]
  problems = []
  for step in reversed(steps):
    path = folder / str(step)
    try:
      is_verified = _check_once(path, prefix, paths.file_times(path))
    except verification.Damaged as error:
      problems.append(f"{path} is damaged: {error}")
      logging.warning("%s; the checkpoint before it is read", problems[-1])
      continue
    except verification.Unreadable as error:
      raise Unusable(f"the checkpoint {path}: {error}") from error
    if not is_verified:
      logging.warning("not verified: %s has no digests", path)
    return step
  if problems:
    raise Unusable(_none_left(folder, problems))
  return None


@functools.lru_cache(maxsize=64)
def _check_once(
  path: epath.Path, prefix: str, file_times: tuple[Any, ...]
) -> bool:
  """Returns `verification.check`, which is not repeated while no file changes."""
  del file_times
  return verification.check(path, prefix, threads=_THREADS)


def _none_left(folder: epath.Path, problems: Sequence[str]) -> str:
  return (
    f"no checkpoint can be used: {'; '.join(problems)}. Bring back a copy of one, or move {folder} "
    "away to start anew"
  )


class Checkpoints:
  """The checkpoints of a run: folder/<step>/{state, data, digests}.

  A save copies the arrays to the host, so that the caller may donate them, and writes in the
  background. A step's folder gets its name only when it is complete; the next start removes the
  incomplete ones that a crash leaves. What has been written is read back and compared with its
  digests, in the background, and only then older checkpoints are removed.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    every: int,
    keep: int,
    config: Mapping[str, str] | None = None,
  ):
    """Opens the folder, and makes it if needed.

    Args:
      folder: Folder of the checkpoints.
      every: A save is due at the multiples of this many steps.
      keep: Number of latest checkpoints to keep.
      config: What all starts of the run have, see `config_guard.fixed`.

    Raises:
      ValueError: `every` or `keep` is below 1.
    """
    if every < 1 or keep < 1:
      raise ValueError(
        f"checkpoint every and keep must be at least 1, got {every} and {keep}"
      )
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
      save_decision_policy=policies.FixedIntervalPolicy(every),
      # Orbax would remove the old before anybody has read the new.
      preservation_policy=policies.preservation_policy.PreserveAll(),
      cleanup_tmp_directories=True,
      # A damaged checkpoint must not keep the folder from being opened.
      lightweight_initialize=True,
    )
    self._folder = paths.absolute(folder)
    self._failures = writers.Failures()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=options,
      handler_registry=writers.registry(
        "state", ("data", "digests"), self._failures
      ),
    )
    self._keep = keep
    self._config = config or {}
    self._number = next(_openings)
    self._pool = futures.ThreadPoolExecutor(1, "verify_checkpoint")
    self._stop = threading.Event()
    self._verifications: list[futures.Future[None]] = []

  def save(
    self,
    step: int,
    state: PyTree,
    iterator: grain.DatasetIterator,
    force: bool = False,
  ) -> bool:
    """Starts to save what a run needs to resume after `step`, if a save is due.

    Args:
      step: Number of completed iterations.
      state: Training state, a pytree of arrays.
      iterator: Prompt iterator that has yielded the prompts of `step`.
      force: Saves also where no save is due. A step that is saved already is not written again.

    Returns:
      Whether a save was started.

    Raises:
      Unusable: The state is not finite; nothing is written.
      SaveFailed: This save cannot be started, or an earlier one has failed.
    """
    self.check()
    if step == self._manager.latest_step():
      return False
    if not (force or self._manager.should_save(step)):
      return False
    # The iterator's position is global, so it goes in as plain JSON: Grain's own handler writes a
    # file per process and would tie the checkpoint to the number of hosts.
    data = iterator.get_state()
    record = verification.Record(
      step,
      digests.of_tree(state),
      verification.hash_of_json(data),
      self._config,
    )
    self._refuse_not_finite(record)
    in_chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(
        state, save_args=jax.tree.map(lambda _: in_chunks, state)
      ),
      data=ocp.args.JsonSave(data),
      digests=ocp.args.JsonSave(record.to_json()),
    )
    try:
      self._manager.save(step, args=items, force=True)
    except _WRITE_ERRORS as error:
      raise self._save_failed(error) from error
    self._verifications.append(self._pool.submit(self._verify, step))
    return True

  def restore(
    self, abstract_state: PyTree, iterator: grain.DatasetIterator
  ) -> tuple[int, PyTree] | None:
    """Restores the last checkpoint that is not damaged, and moves `iterator` to its position.

    Newer ones that are damaged are moved aside, to `6.damaged`. Items of older checkpoints that
    this one does not have are ignored.

    Args:
      abstract_state: Pytree of jax.ShapeDtypeStructs with the shardings that the state shall have.
      iterator: New iterator with the same arguments as the saved one.

    Returns:
      (number of completed iterations, state), or None if there is no checkpoint.

    Raises:
      Unusable: All checkpoints are damaged, one cannot be read or is of another run, an array has
        another shape, or the trees differ; nothing is moved.
    """
    self.wait()
    problems: dict[int, str] = {}
    for step in reversed(complete_steps(self._folder)):
      try:
        state = self._restore(step, abstract_state, iterator)
      except verification.Damaged as error:
        problems[step] = str(error)
        continue
      self._move_aside(problems)
      logging.info("restored step %d from %s", step, self._folder)
      return step, state
    if problems:
      lines = [
        f"{self._folder / str(step)} is damaged: {problem}"
        for step, problem in problems.items()
      ]
      raise Unusable(_none_left(self._folder, lines))
    return None

  def _restore(
    self, step: int, abstract_state: PyTree, iterator: grain.DatasetIterator
  ) -> PyTree:
    """Returns the state of a checkpoint; every process returns or raises the same.

    Raises:
      Damaged: It is damaged.
      Unusable: It cannot be read, is of another run, an array has another shape, or the trees
        differ.
    """
    path = self._folder / str(step)
    self._verify_together(path)
    record = verification.record(path)
    if record is None:
      logging.warning("not verified: %s has no digests", path)
    else:
      _refuse_other_run(path, record, self._config)
      _refuse_other_shapes(path, record, abstract_state)
    items = self._read(step, abstract_state)
    try:
      iterator.set_state(items.data)
    except verification.DAMAGE as error:
      raise verification.Damaged(f"data: {verification.short(error)}") from None
    if record is not None:
      _compare(record, items.state)
    return items.state

  def _verify_together(self, path: epath.Path) -> None:
    """Reads a checkpoint, each process a share of the arrays; raises as `_agree` does."""
    share = (jax.process_index(), jax.process_count())
    problem = None
    try:
      verification.check(path, share=share, threads=_THREADS)
    except (verification.Damaged, verification.Unreadable) as error:
      problem = error
    _agree(path, problem)

  def _read(self, step: int, abstract_state: PyTree) -> ocp.args.Composite:
    """Returns what Orbax reads of a checkpoint whose arrays are good; raises as `_agree` does."""
    arguments = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract_state),
      data=ocp.args.JsonRestore(),
    )
    items = ocp.args.Composite()
    problem = None
    try:
      items = self._manager.restore(step, args=arguments)
    except (*verification.DAMAGE, OSError) as error:
      # A file beside the arrays is damaged. Orbax's other reads end here, where nobody waits for
      # them.
      problem = verification.explained(error, "what Orbax needs")
      del error
      gc.collect()
    _agree(self._folder / str(step), problem)
    return items

  def _move_aside(self, problems: dict[int, str]) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again.

    Raises:
      Unusable: They cannot be renamed.
    """
    failure = ""
    for step, problem in problems.items():
      path = self._folder / str(step)
      aside = _free_name(path)
      logging.warning(
        "the checkpoint %s is damaged: %s; it is moved to %s",
        path,
        problem,
        aside.name,
      )
      if jax.process_index() == 0:
        try:
          path.rename(aside)
        except OSError as error:
          failure = f"{path} is damaged and must be moved away by hand: {error}"
          break
    if not problems:
      return
    for text in multihost.exchange(failure):
      if text:
        raise Unusable(text)
    self._manager.reload()

  def _refuse_not_finite(self, record: verification.Record) -> None:
    """Raises Unusable where a state has a NaN or an infinity."""
    names = [name for name, leaf in record.state.items() if not leaf.is_finite]
    if not names:
      return
    shown = ", ".join(names[:3])
    raise Unusable(
      f"the state after step {record.step} is not finite ({len(names)} arrays: {shown}) and is not "
      f"saved; the checkpoints in {self._folder} stay as they are"
    )

  def _save_failed(self, error: BaseException) -> SaveFailed:
    """Returns what is raised where a save has failed; nothing is read back from then on."""
    self._stop.set()
    return SaveFailed(
      f"a checkpoint could not be written to {self._folder}: {verification.short(error)}; the "
      "complete ones there stay, and the same command resumes from the last"
    )

  def _verify(self, step: int) -> None:
    """Reads a checkpoint back when it is complete, and then removes older ones.

    Raises:
      SaveFailed: It is not what was saved.
    """
    while self._manager.is_saving_in_progress():
      time.sleep(_POLL_SECONDS)
    path = self._folder / str(step)
    share = (jax.process_index(), jax.process_count())
    problem = self._problem_after_writing(path, share)
    for pause in _RETRY_SECONDS:
      if problem and not self._stop.wait(pause):
        problem = self._problem_after_writing(path, share)
    occasion = f"verified/{self._number}/{step}"
    texts = multihost.exchange(problem, occasion)
    if _STOPPED in texts:
      return
    problems = [text for text in texts if text]
    if problems:
      raise SaveFailed(
        f"the checkpoint {path} is not what was saved: {problems[0]}; older ones stay, and the "
        "same command resumes from the last good one"
      )
    if jax.process_index() == 0:
      self._remove_before(step)

  def _problem_after_writing(
    self, path: epath.Path, share: tuple[int, int]
  ) -> str:
    """Returns what is wrong with a checkpoint that has just been written, "" if nothing is."""
    if self._stop.is_set():
      return _STOPPED
    try:
      verification.check(path, share=share, stop=self._stop)
    except verification.Stopped:
      return _STOPPED
    except (verification.Damaged, verification.Unreadable) as error:
      return str(error)
    return ""

  def _remove_before(self, step: int) -> None:
    """Removes the checkpoints that are older than the last `keep` up to a verified one."""
    steps = [old for old in complete_steps(self._folder) if old <= step]
    for old in steps[: -self._keep]:
      (self._folder / str(old)).rmtree()

  def check(self) -> None:
    """Raises SaveFailed if a save, or the reading of what it wrote, has failed; does not wait."""
    self._raise_failure()
    if not self._manager.is_saving_in_progress():
      self.wait()
    done = [task for task in self._verifications if task.done()]
    for task in done:
      self._verifications.remove(task)
      task.result()

  def wait(self) -> None:
    """Blocks until all started saves are complete.

    Raises:
      SaveFailed: One has failed.
    """
    while self._manager.is_saving_in_progress():
      # Where this process's own write has failed, Orbax waits for the others and they for it.
      self._raise_failure()
      time.sleep(_POLL_SECONDS)
    try:
      self._manager.wait_until_finished()
    except _WRITE_ERRORS as error:
      raise self._save_failed(error) from error

  def _raise_failure(self) -> None:
    """Raises SaveFailed if a write of this process has failed."""
    error = self._failures.first
    if error:
      raise self._save_failed(error) from error

  def stop_reading(self) -> None:
    """Leaves the last checkpoints unread and the older ones in place: the process must end soon.

    The next start reads them.
    """
    self._stop.set()

  def close(self) -> None:
    """Completes all started saves, reads what they wrote, and ends the threads.

    Raises:
      SaveFailed: A save has failed.
    """
    self.wait()
    self._manager.close()
    self._pool.shutdown()
    if not self._stop.is_set():
      self.check()


def _agree(path: epath.Path, problem: Exception | None) -> None:
  """Raises on every process where one of them has a problem with a checkpoint.

  Args:
    path: Folder of the checkpoint.
    problem: This process's own, Damaged or Unreadable, if it has one.

  Raises:
    Damaged: It is damaged, as one of the processes has read.
    Unusable: One of the processes cannot read it now.
  """
  is_damaged = isinstance(problem, verification.Damaged)
  verdict = {"is_damaged": is_damaged, "problem": str(problem or "")}
  verdicts = [json.loads(x) for x in multihost.exchange(json.dumps(verdict))]
  verdicts = [verdict for verdict in verdicts if verdict["problem"]]
  for verdict in verdicts:
    if not verdict["is_damaged"]:
      raise Unusable(f"the checkpoint {path}: {verdict['problem']}")
  for verdict in verdicts:
    raise verification.Damaged(verdict["problem"])


def _free_name(path: epath.Path) -> epath.Path:
  """Returns PATH.damaged, or PATH.damaged-2 and so on, where that exists."""
  aside = path.parent / f"{path.name}.damaged"
  number = 1
  while aside.exists():
    number += 1
    aside = path.parent / f"{path.name}.damaged-{number}"
  return aside


def _refuse_other_run(
  path: epath.Path, record: verification.Record, config: Mapping[str, str]
) -> None:
  """Raises Unusable where a checkpoint was copied from a run with another config.

  Keys that only one of the two has are of another version of r3jax; `config_guard` compares them.
  """
  differences = [
    f"{key} is {record.config[key]} there and {value} here"
    for key, value in config.items()
    if record.config.get(key, value) != value
  ]
  if differences:
    shown = "; ".join(differences[:3])
    raise Unusable(
      f"the checkpoint {path} must be of this run, and is of one with another config "
      f"({len(differences)} keys: {shown}): move it away"
    )


def _refuse_other_shapes(
  path: epath.Path, record: verification.Record, abstract_state: PyTree
) -> None:
  """Raises Unusable, with how the arrays of a checkpoint differ from those of a config."""
  expected = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract_state)[0]:
    expected[digests.leaf_name(keys)] = tuple(leaf.shape)
  actual = {name: leaf.shape for name, leaf in record.state.items()}
  problems = mismatch.differences("leaf", expected, actual)
  try:
    mismatch.refuse(f"the checkpoint {path}", problems)
  except ValueError as error:
    raise Unusable(str(error)) from None


def _compare(record: verification.Record, state: PyTree) -> None:
  """Raises Damaged where restored arrays are not those that were saved."""
  for name, leaf in digests.of_tree(state).items():
    saved = record.state[name]
    # Where a config asks for another dtype, the numbers are rounded.
    if leaf.dtype == saved.dtype and leaf != saved:
      raise verification.Damaged(f"{name} is restored with other numbers")
