"""Saves and restores the training state with Orbax: asynchronous, atomic, any number of hosts."""

from typing import Any

from absl import logging
from etils import epath
import grain
import orbax.checkpoint as ocp

from r3jax.files import paths

PyTree = Any


def latest_step(folder: epath.PathLike) -> int | None:
  """Returns the step of the last complete checkpoint, None where there is none; changes nothing."""
  folder = paths.absolute(folder)
  steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else ()
  return max(steps, default=None)


class Checkpoints:
  """The checkpoints of a run: folder/<step>/{state, data}.

  A save copies the arrays to the host, so that the caller may donate them, and writes in the
  background. A step's folder gets its name only when it is complete; what a crash leaves behind
  is removed on the next start.
  """

  def __init__(self, folder: epath.PathLike, every: int, keep: int):
    """Opens the folder, making it if needed.

    Args:
      folder: where the checkpoints are.
      every: `save` saves at the multiples of this many steps, and when the machine is about to be
        taken away (where the platform tells JAX so).
      keep: the number of latest checkpoints that are kept.

    Raises:
      ValueError: if `every` or `keep` is below 1.
    """
    if every < 1 or keep < 1:
      raise ValueError(
        f"checkpoint every and keep must be at least 1, got {every} and {keep}"
      )
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
      save_decision_policy=policies.AnySavePolicy(
        [
          policies.FixedIntervalPolicy(every),
          policies.PreemptionCheckpointingPolicy(),
        ]
      ),
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
    """Starts to save what a run needs to go on after `step`, if a save is due.

    Args:
      step: the number of completed iterations.
      state: the training state, a pytree of arrays.
      iterator: the prompt iterator, having yielded the prompts of `step`.
      force: saves even where none is due, for the last step. A step that is there already is
        not written again.

    Returns:
      Whether it saves.
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
    """Restores the last complete checkpoint and moves `iterator` to where it was.

    Args:
      abstract_state: jax.ShapeDtypeStructs with the shardings that the state shall have.
      iterator: a new iterator with the same arguments as the saved one.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ValueError: if a saved array has another shape or the trees differ.
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
    """Blocks until the saves under way are complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Completes the saves under way and frees the threads."""
    self._manager.close()
