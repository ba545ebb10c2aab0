"""The files of a run."""

import dataclasses
import json

from etils import epath

from r3jax.checkpoint import pretrained
from r3jax.data import records
from r3jax.files import atomic
from r3jax.worlds import registry

TRAINED_ON = "training_prompts.jsonl"


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Where the parts of a run are."""

  path: epath.Path

  @property
  def metrics(self) -> epath.Path:
    """Log of the metrics, one JSON object per iteration."""
    return self.path / "metrics.jsonl"

  @property
  def summary(self) -> epath.Path:
    """Summary of a finished run."""
    return self.path / "summary.json"

  @property
  def checkpoints(self) -> epath.Path:
    """Folder of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def report(self) -> epath.Path:
    """Folder of the page."""
    return self.path / "report"

  @property
  def profile(self) -> epath.Path:
    """Folder of the trace."""
    return self.path / "profile"

  @property
  def rewards(self) -> epath.Path:
    """Folder of what host rewards answered."""
    return self.path / "rewards"

  def evaluation(self, step: int) -> epath.Path:
    """Folder of an evaluation."""
    return self.path / "evaluation" / f"step_{step:06d}"

  def drop_evaluations_after(self, step: int) -> None:
    """Removes the evaluations of iterations that a resumed run repeats."""
    folders = self.path / "evaluation"
    for folder in folders.iterdir() if folders.exists() else ():
      if int(folder.name.removeprefix("step_")) > step:
        folder.rmtree()


def write_training_prompts(
  path: epath.Path, prompts: tuple[records.Prompt, ...]
) -> None:
  """Keeps what a run trains on, so that a later evaluation can tell which of its prompts are among it."""
  # Of a prompt that is repeated to balance the tags one line is enough.
  lines = dict.fromkeys(json.dumps(prompt.to_json()) for prompt in prompts)
  text = "".join(f"{line}\n" for line in lines)
  if not (path / TRAINED_ON).exists():
    atomic.write_text(path / TRAINED_ON, text)


def trained_on(folder: str) -> tuple[list[records.Prompt], bool]:
  """Returns the prompts that the model of a folder was trained on by R3, run after run.

  A world's own model was trained on no held-out prompt.

  Args:
    folder: see `pretrained.find`.

  Returns:
    Prompts, and whether they are all: what a model was trained on that comes from no run is not known.
  """
  if folder == registry.OF_WORLD:
    return [], True
  path = epath.Path(folder)
  prompts, config = path / TRAINED_ON, path / "config.json"
  if not prompts.exists() or not config.exists():
    return [], False
  started_from, _ = pretrained.model_of_run(json.loads(config.read_text()))
  before, complete = trained_on(started_from)
  lines = prompts.read_text().splitlines()
  trained = [records.Prompt.from_json(json.loads(line)) for line in lines]
  return before + trained, complete
