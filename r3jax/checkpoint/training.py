"""Saves and restores the training state with Orbax, from any number of hosts."""

from typing import Any

from absl import logging
from etils import epath
import grain
import orbax.checkpoint as ocp

from r3jax.files import paths

PyTree = Any


def latest_step(folder: epath.PathLike) -> int | None:
  """Returns the step of the last complete checkpoint, or None; changes no file."""
  folder = paths.absolute(folder)
  if not folder.exists():
    return None
  complete = ocp.utils.checkpoint_steps_paths(folder)
  # A copy such as "best_3" is none of the run's checkpoints.
  return max(
    (int(path.name) for path in complete if path.name.isdecimal()), default=None
  )


class Checkpoints:
  """The checkpoints of a run: folder/<step>/{state, data}.

  A save copies the arrays to the host, so that the caller may donate them, and writes in the
  background. A step's folder gets its name only when it is complete; the next start removes the
  incomplete ones that a crash leaves.
  """

  def __init__(self, folder: epath.PathLike, every: int, keep: int):
    """Opens the folder, and makes it if needed.

    Args:
      folder: Folder of the checkpoints.
      every: A save is due at the multiples of this many steps.
      keep: Number of latest checkpoints to keep.

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
      preservation_policy=policies.preservation_policy.LatestN(keep),
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      paths.absolute(folder), options=options
    )

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
    """
    if step == self._manager.latest_step():
      return False
    # The iterator's position is global, so it goes in as plain JSON: Grain's own handler writes a
    # file per process and would tie the checkpoint to the number of hosts.
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(iterator.get_state()),
    )
    return self._manager.save(step, args=items, force=force)

  def restore(
    self, abstract_state: PyTree, iterator: grain.DatasetIterator
  ) -> tuple[int, PyTree] | None:
    """Restores the last complete checkpoint, and moves `iterator` to its position.

    Items of older checkpoints that this one does not have are ignored.

    Args:
      abstract_state: Pytree of jax.ShapeDtypeStructs with the shardings that the state shall have.
      iterator: New iterator with the same arguments as the saved one.

    Returns:
      (number of completed iterations, state), or None if there is no checkpoint.

    Raises:
      ValueError: A saved array has another shape, or the trees differ.
    """
    self.wait()
    step = self._manager.latest_step()
    if step is None:
      return None
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state),
        data=ocp.args.JsonRestore(),
      ),
    )
    iterator.set_state(items.data)
    logging.info("restored step %d from %s", step, self._manager.directory)
    return step, items.state

  def wait(self) -> None:
    """Blocks until all started saves are complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Completes all started saves and ends the threads."""
    self._manager.close()
