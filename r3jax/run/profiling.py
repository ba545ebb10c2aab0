"""Traces some iterations of a run with XLA's profiler, for XProf or TensorBoard to read.

The stages of the step name their operations by `jax.named_scope`: reason, score, pool, reflect,
refine and update, and inside of them towers, decode and flow.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import shutil
import tempfile

from absl import logging
from etils import epath
import jax


def check(start: int, steps: int, total_steps: int):
  """Raises ValueError where iterations start .. start + steps - 1 are not all of 1 .. total_steps.

  Zero steps trace nothing, wherever they start.
  """
  if start < 0 or steps < 0:
    raise ValueError(
      f"profile.start and profile.steps must not be negative; got {start} and {steps}"
    )
  if steps and (start < 1 or start + steps - 1 > total_steps):
    raise ValueError(
      f"profile.start .. profile.start + profile.steps - 1 must be in 1..{total_steps} (total_steps); "
      f"got {start}..{start + steps - 1}"
    )


class Profiler:
  """Traces the iterations start .. start + steps - 1 on process 0; does nothing at others.

  A run that resumes in their midst traces those that are left.
  """

  def __init__(self, folder: epath.Path, start: int, steps: int):
    """Gets ready.

    Args:
      folder: gets plugins/profile/<time>/, which XProf looks for.
      start: first traced iteration, from 1.
      steps: how many are traced; 0 is none.
    """
    self._folder, self._traced = folder, range(start, start + steps)
    # where the trace that is under way will be written first
    self._local: str | None = None

  @contextlib.contextmanager
  def iteration(self, number: int) -> Iterator[None]:
    """Marks an iteration, whose results must be there when the block ends."""
    if (
      number in self._traced and self._local is None and not jax.process_index()
    ):
      self._start()
    with jax.profiler.StepTraceAnnotation("iteration", step_num=number):
      yield
    if number + 1 not in self._traced:
      self.close()

  def _start(self):
    options = jax.profiler.ProfileOptions()
    # every Python call would be an event, and slow what is measured
    options.python_tracer_level = 0
    # Not into the folder itself: the profiler cannot write to every store that a workdir may be in.
    self._local = tempfile.mkdtemp(prefix="r3jax-profile-")
    jax.profiler.start_trace(self._local, profiler_options=options)

  def close(self):
    """Writes the trace that is under way, if there is one."""
    if self._local is None:
      return
    jax.profiler.stop_trace()
    local = pathlib.Path(self._local)
    for file in (path for path in local.rglob("*") if path.is_file()):
      target = self._folder / str(file.relative_to(local))
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(file.read_bytes())
    shutil.rmtree(local)
    self._local = None
    logging.info("trace is in %s", self._folder)
