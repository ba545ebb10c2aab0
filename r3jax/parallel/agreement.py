"""Ends all processes of a run after the same iteration when one of them is asked to end.

A process that was asked says so in JAX's coordination service, where every other one looks twice a
second. Each then writes its position, see `preemption.Ending`: whoever knows all positions knows
after which iteration all end. Iterations therefore exchange nothing as long as nobody asks.

A process that is done would wait in JAX's clean-up for one that ends early, until it is aborted.
The end of the work is therefore a common one too: all have done everything, or all end early.
"""

from collections.abc import Iterator
import contextlib
import threading
import time

from absl import logging
import jax

from r3jax.parallel import multihost
from r3jax.parallel import preemption

# Folders of the coordination service, with an entry per process.
_ASKED = "r3jax/ending/asked/"
_POSITION = "r3jax/ending/position/"
_LEFT = "r3jax/ending/left/"
_DONE = "r3jax/ending/done/"
# Key of how all processes end: the first one to know writes it.
_OUTCOME = "r3jax/ending/outcome"
_ALL_DONE = "all are done"
_EARLY = "early"
_LOOK_SECONDS = 0.5  # between two looks while nobody has asked
_POLL_SECONDS = 0.1  # between two looks afterwards
# How long a process that ends waits until all others end too.
_FAREWELL_SECONDS = 3.0
# How long process 0 outlives the others: they would be aborted without its service.
_LAST_SECONDS = 0.5


@contextlib.contextmanager
def ending_when_asked() -> Iterator[None]:
  """Ends the processes of the block together when one of them is asked to end.

  With one process the block just runs.
  """
  if jax.process_count() == 1:
    yield
    return
  preemption.ENDING.join_others()
  block_has_ended = threading.Event()
  thread = threading.Thread(
    target=_agree, args=(preemption.ENDING, block_has_ended), daemon=True
  )
  thread.start()
  try:
    try:
      yield
    except SystemExit:
      # All processes raise it, see `multihost.ending_together`.
      _wait_until_all_are_done()
      raise
    _wait_until_all_are_done()
  finally:
    block_has_ended.set()
    thread.join()


def _wait_until_all_are_done() -> None:
  """Waits for the other processes; if one of them ends early, the thread ends this one too."""
  multihost.write_text(_DONE)
  while True:
    num_done = len(multihost.read_texts(_DONE))
    if num_done == jax.process_count() and _agree_on(_ALL_DONE):
      return
    time.sleep(_POLL_SECONDS)


def _agree_on(outcome: str) -> bool:
  """Proposes how all processes end; returns whether that is how they end."""
  return multihost.write_first(_OUTCOME, outcome) == outcome


def _agree(ending: preemption.Ending, block_has_ended: threading.Event) -> None:
  """Talks to the other processes until the block has ended."""
  try:
    if not _wait_until_asked(ending, block_has_ended):
      return
    _decide(ending, block_has_ended)
    while not block_has_ended.wait(_POLL_SECONDS):
      if multihost.read_texts(_LEFT):
        ending.end_at_once()
      if ending.ends_at_once():
        if not _agree_on(_EARLY):
          return
        _take_leave()
        ending.exit()
  except jax.errors.JaxRuntimeError as error:
    # JAX ends a process whose coordinator is gone, and `ending` one that was asked to end.
    logging.error("process 0 does not answer: %s", error)
    if ending.wait_until_asked(0):
      ending.end_at_once()


def _wait_until_asked(
  ending: preemption.Ending, block_has_ended: threading.Event
) -> bool:
  """Waits until a process is asked to end; returns False if the block ends before."""
  while not block_has_ended.is_set():
    if ending.wait_until_asked(_LOOK_SECONDS):
      multihost.write_text(_ASKED)
      return True
    processes = multihost.read_texts(_ASKED)
    if processes:
      ending.ask(f"process {min(processes)}")
      return True
  return False


def _decide(
  ending: preemption.Ending, block_has_ended: threading.Event
) -> None:
  """Decides with the others when all end."""
  multihost.write_text(_POSITION, str(ending.position()))
  while not block_has_ended.wait(_POLL_SECONDS):
    texts = multihost.read_texts(_POSITION)
    positions = [int(text) for text in texts.values()]
    is_complete = len(positions) == jax.process_count()
    if is_complete or preemption.AT_ONCE in positions:
      ending.decide(positions)
    if is_complete or ending.ends_at_once():
      return


def _take_leave() -> None:
  """Waits until all processes end, each of which says so first."""
  multihost.write_text(_LEFT)
  end = time.monotonic() + _FAREWELL_SECONDS
  while time.monotonic() < end:
    if len(multihost.read_texts(_LEFT)) == jax.process_count():
      break
    time.sleep(_POLL_SECONDS)
  if jax.process_index() == 0:
    time.sleep(_LAST_SECONDS)
