"""Where a run's numbers and pictures go: metrics.jsonl, TensorBoard, Weights & Biases.

A sink is opened, gets scalars and pictures step by step, and is closed. Only process 0 has any.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import tempfile
import types as types_lib
import typing
import uuid

from absl import logging
from etils import epath
import jax
import numpy as np

from r3jax.files import jsonl


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image and what is said under it."""

  image: np.ndarray  # uint8 [H, W, 3]
  caption: str


class Sink(typing.Protocol):
  """A place that keeps what a run logs."""

  def scalars(self, step: int, values: Mapping[str, float]):
    """Takes the numbers of a step; they may be NaN or infinite."""

  def evaluation(self, step: int, values: Mapping[str, float]):
    """Takes the numbers of an evaluation after a step; again, where a run is resumed."""

  def pictures(self, step: int, pictures: Mapping[str, Picture]):
    """Takes pictures of a step by name."""

  def close(self):
    """Completes what is still being written."""


class JsonLines:
  """workdir/metrics.jsonl and evaluation.jsonl: one object a step, {"step": k, name: number or null, ...}.

  After a restart the files equal those of an uninterrupted run.
  """

  def __init__(self, workdir: epath.Path, restored_step: int | None):
    """Opens the files; drops the lines of steps after `restored_step`, all of them if it is None."""
    self._path, self._evaluations = (
      workdir / "metrics.jsonl",
      workdir / "evaluation.jsonl",
    )
    workdir.mkdir(parents=True, exist_ok=True)
    for path in (self._path, self._evaluations):
      jsonl.drop_after(path, restored_step)
    self._evaluated = {
      row["step"]: row for row in jsonl.read(self._evaluations)
    }

  def scalars(self, step: int, values: Mapping[str, float]):
    """See `Sink`; the line is on disk when it returns."""
    jsonl.append(self._path, [_line(step, values)])

  def evaluation(self, step: int, values: Mapping[str, float]):
    """See `Sink`; an evaluation that is made anew takes the place of the former."""
    line, former = _line(step, values), self._evaluated.get(step)
    if line == former:
      return
    self._evaluated[step] = line
    if former is None:
      jsonl.append(self._evaluations, [line])
    else:
      jsonl.drop_after(self._evaluations, None)
      jsonl.append(
        self._evaluations,
        [self._evaluated[one] for one in sorted(self._evaluated)],
      )

  def pictures(self, step: int, pictures: Mapping[str, Picture]):
    """Keeps none: the report has its own, see `io/report.py`."""

  def close(self):
    """See `Sink`."""


def _line(step: int, values: Mapping[str, float]) -> dict:
  return {"step": step} | {
    name: value if math.isfinite(value) else None
    for name, value in values.items()
  }


class TensorBoard:
  """workdir/tensorboard; a caption is a text beside its picture."""

  def __init__(self, workdir: epath.Path):
    """Opens event files.

    Raises:
      ImportError: TensorFlow is not installed.
    """
    # Here, for it imports TensorFlow, which takes seconds.
    from clu import metric_writers

    self._writer = metric_writers.AsyncWriter(
      metric_writers.SummaryWriter(str(workdir / "tensorboard"))
    )

  def scalars(self, step: int, values: Mapping[str, float]):
    """See `Sink`."""
    self._writer.write_scalars(step, values)

  evaluation = scalars

  def pictures(self, step: int, pictures: Mapping[str, Picture]):
    """See `Sink`."""
    self._writer.write_images(
      step, {name: picture.image for name, picture in pictures.items()}
    )
    self._writer.write_texts(
      step,
      {
        f"{name}/caption": picture.caption for name, picture in pictures.items()
      },
    )

  def close(self):
    """See `Sink`."""
    self._writer.close()


@dataclasses.dataclass(frozen=True)
class WandbSettings:
  """Which run of Weights & Biases gets what is logged.

  Attributes:
    project: that the run belongs to; empty for none.
    name: of the run; empty leaves the choice to W&B.
    mode: "online", or "offline": files in the workdir, for `wandb sync`.
  """

  project: str
  name: str
  mode: str


def check(settings: WandbSettings):
  """Checks what a run would else find out after it has compiled.

  Raises:
    ValueError: there is no such mode, or the process that logs lacks the package or a key.
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


def _import_wandb() -> types_lib.ModuleType:
  try:
    import wandb  # an extra, and slow to import
  except ImportError as error:
    raise ValueError(
      f"log.wandb.project needs Weights & Biases: pip install r3jax[wandb] ({error})"
    ) from error
  return wandb


class Wandb:
  """A run of Weights & Biases, that a resumed run goes on with: workdir/wandb_id has its id.

  Steps that a resumed run repeats are there already, with the same numbers; W&B ignores them.
  """

  def __init__(
    self, workdir: epath.Path, settings: WandbSettings, config: dict
  ):
    """Starts or continues the run; `config` is shown beside it."""
    self._wandb = _import_wandb()
    kept = workdir / "wandb_id"
    if not kept.exists():
      kept.write_text(uuid.uuid4().hex)
    # W&B writes with open(): beside the run where that is on a disk.
    folder = (
      tempfile.mkdtemp(prefix="r3jax-wandb-")
      if "://" in str(workdir)
      else str(workdir)
    )
    self._run = self._wandb.init(
      project=settings.project,
      name=settings.name or None,
      mode=settings.mode,
      id=kept.read_text(),
      resume="allow",
      dir=folder,
      config=config,
    )

  def scalars(self, step: int, values: Mapping[str, float]):
    """See `Sink`."""
    self._run.log(dict(values), step=step)

  evaluation = scalars

  def pictures(self, step: int, pictures: Mapping[str, Picture]):
    """See `Sink`."""
    shown = {
      name: self._wandb.Image(picture.image, caption=picture.caption)
      for name, picture in pictures.items()
    }
    self._run.log(shown, step=step)

  def close(self):
    """See `Sink`."""
    self._run.finish()


def open_all(
  workdir: epath.PathLike,
  restored_step: int | None,
  wandb: WandbSettings | None = None,
  config: dict | None = None,
) -> list[Sink]:
  """Opens the sinks of a run on process 0; the others have none.

  Args:
    workdir: the run's folder.
    restored_step: the step that the run goes on from; None if it starts from the beginning.
    wandb: None, or without a project, for none of it.
    config: of the run, for those that show it.
  """
  if jax.process_index():
    return []
  workdir = epath.Path(workdir)
  opened: list[Sink] = [JsonLines(workdir, restored_step)]
  try:
    opened.append(TensorBoard(workdir))
  except ImportError as error:
    logging.info("metrics do not go to TensorBoard: %s", error)
  if wandb and wandb.project:
    opened.append(Wandb(workdir, wandb, config or {}))
  return opened
