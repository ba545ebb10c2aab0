"""A command in one of several processes, in which one process meets a fault at a named phase.

python -m tests.parallel.faulty_job HOW PHASE NUMBER PROCESS COMMAND FLAGS OF r3jax COMMAND

HOW: "killed" (SIGKILL), "raises" (an exception), "full" (no room on its disk), "none".
PHASE, of iteration NUMBER of the run: "rollout", when the step has just been called, "update", when
most of the time of the step before has passed, "save" or "evaluation", after its first batch.

A full disk is planted as OSError(ENOSPC) where the main thread could write. In the phase "save"
the size of files is limited instead (RLIMIT_FSIZE), so that Orbax fails to write in its threads.
"""

import dataclasses
import errno
import os
import resource
import signal
import sys
import time

import jax

from r3jax.checkpoint import training
from r3jax.cli import main
from r3jax.evaluation import evaluate
from r3jax.rewards import combine
from r3jax.run import loop

_MAX_BYTES = 2**15  # logs are smaller, the files of a checkpoint are not
_SHARE_BEFORE_UPDATE = 0.7  # of the time of a step


class Planted(Exception):
  """The exception of "raises"."""


@dataclasses.dataclass
class Fault:
  """What happens once, in one process.

  Attributes:
    how: See the module.
    phase: See the module.
    number: Of the iteration.
    process: Which process meets it.
    iteration: The current one.
  """

  how: str
  phase: str
  number: int
  process: int
  iteration: int = 0

  def strike(self, phase: str) -> None:
    """Lets the fault happen where it is due."""
    where = (phase, self.iteration, jax.process_index())
    if where != (self.phase, self.number, self.process):
      return
    if self.how == "killed":
      os.kill(os.getpid(), signal.SIGKILL)
    if self.how == "raises":
      raise Planted(f"in {phase}")
    if self.how == "full":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"DISK/{phase}")


def plant(fault: Fault) -> None:
  """Makes a fault happen in this process, if it is the one."""
  begin = combine.GraphReward.begin
  advance = loop._advance
  save = training.Checkpoints.save
  samples_of = evaluate.Evaluation.samples_of
  step_seconds = 0.0

  def faulty_begin(self, step):
    fault.iteration = step
    begin(self, step)

  def faulty_advance(session, train_step, state, indices):
    nonlocal step_seconds
    start = time.monotonic()

    def faulty_step(*arguments):
      result = train_step(*arguments)
      # It is called, and computes in other threads.
      fault.strike("rollout")
      if fault.phase == "update":
        time.sleep(_SHARE_BEFORE_UPDATE * step_seconds)
        fault.strike("update")
      return result

    result = advance(session, faulty_step, state, indices)
    step_seconds = time.monotonic() - start
    return result

  def faulty_save(self, step, *arguments, **options):
    fault.iteration = step
    if fault.how == "full" and fault.phase == "save":
      if (step, jax.process_index()) == (fault.number, fault.process):
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_BYTES, _MAX_BYTES))
      return save(self, step, *arguments, **options)
    is_started = save(self, step, *arguments, **options)
    # It goes on in the background.
    fault.strike("save")
    return is_started

  def faulty_samples_of(self, batch, count):
    fault.strike("evaluation")
    return samples_of(self, batch, count)

  combine.GraphReward.begin = faulty_begin
  loop._advance = faulty_advance
  training.Checkpoints.save = faulty_save
  evaluate.Evaluation.samples_of = faulty_samples_of


if __name__ == "__main__":
  how, phase, number, process, command, *flags = sys.argv[1:]
  plant(Fault(how, phase, int(number), int(process)))
  main.run_command(command, flags)
