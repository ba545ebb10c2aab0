"""Writes a run's numbers and pictures to metrics.jsonl, TensorBoard and Weights & Biases.

A sink is opened, gets scalars and pictures step by step, and is closed. Only process 0 has any.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import math
import os
import tempfile
import types
import typing
import uuid

from clu import asynclib
from etils import epath
import jax
import numpy as np

from r3jax.files import jsonl
from r3jax.run.logging import event_files

_EVALUATION_PREFIX = "evaluation/"  # of the names of an evaluation's scores


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image and its caption.

  Attributes:
    image: uint8 [H, W, 3].
    caption: One line of text.
  """

  image: np.ndarray
  caption: str


class Sink(typing.Protocol):
  """A destination of what a run logs."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the numbers of an iteration; they may be NaN or infinite."""

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the scores of an evaluation after `step` iterations.

    A resumed run writes those of its earlier evaluations again.
    """

  def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
    """Writes the pictures of an iteration by name."""

  def close(self) -> None:
    """Flushes and closes the sink."""


class JsonLines:
  """Writes workdir/metrics.jsonl and workdir/evaluation.jsonl.

  Every step has one object, {"step": k, name: number or null, ...}. After a restart the files equal
  those of an uninterrupted run.
  """

  def __init__(self, workdir: epath.Path, restored_step: int | None):
    """Opens the files.

    Args:
      workdir: Folder of the run.
      restored_step: Lines of later steps are dropped, and all lines if it is None.
    """
    self._metrics = workdir / "metrics.jsonl"
    self._evaluations = workdir / "evaluation.jsonl"
    workdir.mkdir(parents=True, exist_ok=True)
    for path in (self._metrics, self._evaluations):
      jsonl.drop_after(path, restored_step)
    self._evaluation_lines = {
      line["step"]: line for line in jsonl.read(self._evaluations)
    }

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """See `Sink`; the line is on disk when it returns."""
    jsonl.append(self._metrics, [_line(step, values)])

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """See `Sink`; a repeated evaluation replaces the former one of its step."""
    line = _line(step, values)
    former = self._evaluation_lines.get(step)
    if line == former:
      return
    self._evaluation_lines[step] = line
    if former is None:
      jsonl.append(self._evaluations, [line])
      return
    lines = [line for _, line in sorted(self._evaluation_lines.items())]
    jsonl.drop_after(self._evaluations, None)
    jsonl.append(self._evaluations, lines)

  def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
    """Writes none: the report has its own, see `report_samples`."""

  def close(self) -> None:
    """See `Sink`."""


def _line(step: int, values: Mapping[str, float]) -> dict:
  """Returns a step's object; JSON has neither NaN nor infinities."""
  line: dict[str, float | None] = {"step": step}
  for name, value in values.items():
    line[name] = value if math.isfinite(value) else None
  return line


class TensorBoard:
  """Writes workdir/tensorboard, in a thread of its own; a caption is a text beside its picture.

  After a restart the curves are those of an uninterrupted run. What fails is raised by the next
  call.
  """

  def __init__(self, workdir: epath.Path, restored_step: int | None):
    """Opens event files.

    Args:
      workdir: Folder of the run.
      restored_step: Events of later steps are dropped, and all events if it is None.

    """
    folder = workdir / "tensorboard"
    event_files.drop_after(folder, restored_step)
    self._evaluations = event_files.scalars(folder, _EVALUATION_PREFIX)
    writer = event_files.Writer(folder)
    # One thread, in which events keep their order.
    self._pool = asynclib.Pool("tensorboard", max_workers=1)
    self._write_scalars = self._pool(writer.write_scalars)
    self._write_images = self._pool(writer.write_images)
    self._write_texts = self._pool(writer.write_texts)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """See `Sink`."""
    with _errors_of_the_thread():
      self._write_scalars(step, values)

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """See `Sink`; scores that an earlier start has written are not written again."""
    stored = self._evaluations.get(step, {})
    if not event_files.same_numbers(stored, dict(values)):
      self.scalars(step, values)

  def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
    """See `Sink`."""
    images = {name: picture.image for name, picture in pictures.items()}
    captions = {
      f"{name}/caption": picture.caption for name, picture in pictures.items()
    }
    with _errors_of_the_thread():
      self._write_images(step, images)
      self._write_texts(step, captions)

  def close(self) -> None:
    """See `Sink`."""
    with _errors_of_the_thread():
      self._pool.close()


@contextlib.contextmanager
def _errors_of_the_thread() -> Iterator[None]:
  """Raises what has failed in another thread as itself: a full disk is no fault of the code."""
  try:
    yield
  except asynclib.AsyncError as error:
    cause = error.__cause__
    if cause is None:
      raise
    raise cause from None


@dataclasses.dataclass(frozen=True)
class WandbSettings:
  """The run of Weights & Biases that gets what is logged.

  Attributes:
    project: Project of the run; with an empty one nothing is logged there.
    name: Name of the run; W&B chooses one if it is empty.
    mode: "online", or "offline": files in the workdir, for `wandb sync`.
  """

  project: str
  name: str
  mode: str


def check(settings: WandbSettings) -> None:
  """Checks before compilation that W&B can be used.

  Raises:
    ValueError: There is no such mode, or the process that logs lacks the package or a key.
  """
  if settings.mode not in ("online", "offline"):
    raise ValueError(
      f"log.wandb.mode must be 'online' or 'offline'; got {settings.mode!r}"
    )
  if not settings.project or jax.process_index():
    return
  _import_wandb()
  if settings.mode == "online" and not os.environ.get("WANDB_API_KEY"):
    raise ValueError(
      "log.wandb.mode 'online' needs the environment variable WANDB_API_KEY, which is not set"
    )


def _import_wandb() -> types.ModuleType:
  try:
    import wandb  # an optional extra, and slow to import
  except ImportError as error:
    raise ValueError(
      f"log.wandb.project needs Weights & Biases: pip install r3jax[wandb] ({error})"
    ) from error
  return wandb


class Wandb:
  """Writes to a run of Weights & Biases, whose id is kept in workdir/wandb_id.

  A resumed run continues it. W&B ignores the steps that are repeated: it has their numbers already.
  """

  def __init__(
    self, workdir: epath.Path, settings: WandbSettings, config: dict
  ):
    """Starts or continues the run.

    Args:
      workdir: Folder of the run.
      settings: Project, name and mode.
      config: Config that W&B shows beside the run.
    """
    self._wandb = _import_wandb()
    id_file = workdir / "wandb_id"
    if not id_file.exists():
      id_file.write_text(uuid.uuid4().hex)
    folder = str(workdir)
    if "://" in folder:
      # W&B writes with open(), which does not reach buckets.
      folder = tempfile.mkdtemp(prefix="r3jax-wandb-")
    self._run = self._wandb.init(
      project=settings.project,
      name=settings.name or None,
      mode=settings.mode,
      id=id_file.read_text(),
      resume="allow",
      dir=folder,
      config=config,
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """See `Sink`."""
    self._run.log(dict(values), step=step)

  evaluation = scalars

  def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
    """See `Sink`."""
    images = {
      name: self._wandb.Image(picture.image, caption=picture.caption)
      for name, picture in pictures.items()
    }
    self._run.log(images, step=step)

  def close(self) -> None:
    """See `Sink`."""
    self._run.finish()


def open_all(
  workdir: epath.PathLike,
  restored_step: int | None,
  wandb: WandbSettings | None = None,
  config: dict | None = None,
  tensorboard: bool = True,
) -> list[Sink]:
  """Opens the sinks of a run on process 0; other processes have none.

  Args:
    workdir: Folder of the run.
    restored_step: Step that the run resumes after; None if it starts from the beginning.
    wandb: Settings of W&B; None, or settings without a project, leave it out.
    config: Config of the run, for sinks that show it.
    tensorboard: Whether metrics go to TensorBoard too.
  """
  if jax.process_index():
    return []
  workdir = epath.Path(workdir)
  opened: list[Sink] = [JsonLines(workdir, restored_step)]
  if tensorboard:
    opened.append(TensorBoard(workdir, restored_step))
  if wandb and wandb.project:
    opened.append(Wandb(workdir, wandb, config or {}))
  return opened
