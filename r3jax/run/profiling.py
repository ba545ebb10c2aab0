"""Traces some iterations of a run with XLA's profiler, for XProf or TensorBoard.

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


def check(start: int, steps: int, total_steps: int) -> None:
  """Checks that the iterations to trace, start .. start + steps - 1, are all in 1 .. total_steps.

  Zero steps trace nothing, whatever `start` is.

  Raises:
    ValueError: They are not.
  """
  if start < 0 or steps < 0:
    raise ValueError(
      f"profile.start and profile.steps must not be negative; got {start} and {steps}"
    )
  last = start + steps - 1
  if steps and (start < 1 or last > total_steps):
    raise ValueError(
      "profile.start .. profile.start + profile.steps - 1 must be in "
      f"1..{total_steps} (total_steps); got {start}..{last}"
    )


class Profiler:
  """Traces the iterations start .. start + steps - 1 on process 0.

  A run that resumes between them traces the remaining ones.
  """

  def __init__(self, folder: epath.Path, start: int, steps: int):
    """Initializes the profiler; no trace is started yet.

    Args:
      folder: Gets plugins/profile/TIME/, where XProf looks for traces.
      start: First iteration to trace, from 1.
      steps: Number of iterations to trace; 0 traces none.
    """
    self._folder = folder
    self._traced = range(start, start + steps)
    # Where the profiler writes the running trace; None while no trace runs.
    self._local_folder: str | None = None

  @contextlib.contextmanager
  def iteration(self, number: int) -> Iterator[None]:
    """Marks an iteration; its results must have been computed when the block ends."""
    is_tracing = self._local_folder is not None
    if number in self._traced and not is_tracing and not jax.process_index():
      self._start()
    with jax.profiler.StepTraceAnnotation("iteration", step_num=number):
      yield
    if number + 1 not in self._traced:
      self.close()

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    # Every Python call would be an event, and would slow down what is measured.
    options.python_tracer_level = 0
    # The profiler cannot write to every store that a workdir may be in.
    self._local_folder = tempfile.mkdtemp(prefix="r3jax-profile-")
    jax.profiler.start_trace(self._local_folder, profiler_options=options)

  def close(self) -> None:
    """Ends the running trace, if there is one, and writes it to the folder."""
    if self._local_folder is None:
      return
    jax.profiler.stop_trace()
    local_folder = pathlib.Path(self._local_folder)
    for path in local_folder.rglob("*"):
      if path.is_file():
        target = self._folder / str(path.relative_to(local_folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    shutil.rmtree(local_folder)
    self._local_folder = None
    logging.info("trace is in %s", self._folder)
