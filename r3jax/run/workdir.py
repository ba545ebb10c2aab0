"""The files of a run, and the prompts that it was trained on."""

from collections.abc import Sequence
import dataclasses
import json

from absl import logging
from etils import epath

from r3jax.checkpoint import pretrained
from r3jax.data import records
from r3jax.evaluation import evaluate
from r3jax.evaluation import finished
from r3jax.files import atomic
from r3jax.files import damage
from r3jax.files import paths
from r3jax.files import texts
from r3jax.worlds import registry

TRAINED_ON = "training_prompts.jsonl"
DISTINCT_PROMPTS = (
  "distinct_training_prompts"  # hash of that file's prompts, in config.json
)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run's files.

  Attributes:
    path: Folder of the run, on a disk or in a bucket.
  """

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
    """Folder of the report page."""
    return self.path / "report"

  @property
  def profile(self) -> epath.Path:
    """Folder of the profiler's traces."""
    return self.path / "profile"

  @property
  def rewards(self) -> epath.Path:
    """Folder of the logs of rewards that are computed on hosts."""
    return self.path / "rewards"

  @property
  def skipped(self) -> epath.Path:
    """Folder of the batches whose update was skipped, one folder per iteration."""
    return self.path / "skipped"

  def evaluation(self, step: int) -> epath.Path:
    """Folder of the evaluation after `step` iterations."""
    return self.path / finished.EVALUATIONS / f"step_{step:06d}"

  def check_kinds(self) -> None:
    """Checks that no folder lies in the place of a file that a run writes, or the reverse.

    Raises:
      ValueError: It does; nothing has been compiled or written.
    """
    if "://" in str(self.path):
      return  # a store has names only
    files = [
      self.path / "config.json",
      self.path / TRAINED_ON,
      self.path / "wandb_id",
      self.metrics,
      self.path / "evaluation.jsonl",
      self.summary,
      self.report / "samples.jsonl",
      self.report / "index.html",
    ]
    folders = [
      self.checkpoints,
      self.report,
      self.report / "images",
      self.rewards,
      self.profile,
      self.path / "tensorboard",
      self.path / finished.EVALUATIONS,
    ]
    if self.rewards.is_dir():
      files += self.rewards.glob("[!.]*.jsonl")
    for folder in finished.step_paths(self.path):
      folders.append(folder)
      written_files, written_folders = evaluate.outputs(folder)
      files += written_files
      folders += written_folders
    damage.check_kinds(files, folders)

  def drop_evaluations_after(self, step: int) -> None:
    """Removes the evaluations of iterations that a resumed run repeats."""
    for number, folder in finished.step_folders(self.path).items():
      if number > step:
        folder.rmtree()


def distinct(prompts: Sequence[records.Prompt]) -> list[records.Prompt]:
  """Returns prompts once that are repeated, for example to balance the tags."""
  return list(dict.fromkeys(prompts))


def write_training_prompts(
  path: epath.Path, prompts: tuple[records.Prompt, ...]
) -> None:
  """Writes the training prompts of a run, unless it has been resumed and they are unchanged.

  A later evaluation reads them to list the held-out prompts that were trained on.
  """
  file = path / TRAINED_ON
  lines = (json.dumps(prompt.to_json()) for prompt in distinct(prompts))
  content = "".join(f"{line}\n" for line in lines).encode()
  if file.exists():
    if file.read_bytes() == content:
      return
    logging.warning(
      "%s was not what this run trains on, and is written again", file
    )
  atomic.write_bytes(file, content)


def trained_on(folder: str) -> tuple[list[records.Prompt], bool]:
  """Returns the prompts that a model was trained on by R3, run after run.

  A world's own model was trained on no held-out prompt.

  Args:
    folder: Folder of the model, see `pretrained.find`.

  Returns:
    The prompts, and whether they are complete: the training prompts of a model that does not come
    from a run are unknown.

  Raises:
    ValueError: The file of prompts is not the one that the run wrote, or the model that the run
      started from is not found.
  """
  if folder == registry.OF_WORLD:
    return [], True
  path = paths.of_user(folder)
  prompts_file = path / TRAINED_ON
  config_file = path / "config.json"
  if not prompts_file.exists() or not config_file.exists():
    return [], False
  with damage.explained(config_file, "the config of a run", "Restore it"):
    config = damage.read_object(config_file)
    pretrained.model_of_run(config)  # raises an error where it has none
  earlier, complete = trained_on(pretrained.base_of_run(path, config))
  remedy = "Restore it, or delete it: the prompts count as unknown then"
  with damage.explained(prompts_file, "the training prompts of a run", remedy):
    lines = texts.lines(damage.read_bytes(prompts_file))
    prompts = [
      records.Prompt.from_json(damage.parse_object(line)) for line in lines
    ]
  actual = records.sha256(prompts)
  expected = config.get(DISTINCT_PROMPTS, actual)
  if actual != expected:
    raise ValueError(
      f"{prompts_file} must hold what the run was trained on, with hash {expected}; its prompts "
      f"have {actual}. Restore the file, or delete it: the prompts count as unknown then"
    )
  return earlier + prompts, complete
