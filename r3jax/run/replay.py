"""Repeats an iteration whose update was skipped, and finds where its numbers stop to be finite."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.data import records
from r3jax.files import config_files
from r3jax.files import damage
from r3jax.files import paths
from r3jax.parallel import multihost
from r3jax.rl import diagnostics
from r3jax.rl import inspection
from r3jax.rl import mapped
from r3jax.rl import nonfinite
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run import config_rules
from r3jax.run import health
from r3jax.run import sessions
from r3jax.run import skipped_batches
from r3jax.run import workdir

_MOST_ROWS = 5  # samples of a quantity in the report
_MOST_TENSORS = 10  # gradients of a stage in the report


@dataclasses.dataclass(frozen=True)
class Batch:
  """An iteration whose update was skipped, as its file names it.

  Attributes:
    step: number of the iteration.
    stages: whose update was skipped.
    indices: [G] training prompts of the iteration.
    config_sha256: hash of the run's config then.
  """

  step: int
  stages: Sequence[str]
  indices: np.ndarray
  config_sha256: str


def read(folder: epath.Path) -> Batch:
  """Reads the file of a skipped batch.

  Raises:
    ValueError: it is not there, or is damaged.
  """
  path = folder / skipped_batches.FILE
  remedy = f"Give WORKDIR/skipped/{health.folder_name(1)} or the like, as the run wrote it"
  with damage.explained(path, "the batch of a skipped update", remedy):
    values = damage.read_object(path)
    batch = Batch(
      step=values["step"],
      stages=values["stages"],
      indices=np.asarray(values["indices"], np.int32),
      config_sha256=values["config_sha256"],
    )
    if type(batch.step) is not int or batch.step < 1:
      raise ValueError(f"step must be at least 1; got {batch.step!r}")
    if not _are_texts(batch.stages):
      raise ValueError("stages must be names")
    if batch.indices.ndim != 1:
      raise ValueError("indices must be a list of numbers")
  return batch


def _are_texts(values: object) -> bool:
  return isinstance(values, list) and all(isinstance(x, str) for x in values)


def check_exists(folder: epath.PathLike) -> None:
  """Checks that there is a folder of a skipped batch; raises a ValueError."""
  path = paths.of_user(folder)
  if not path.is_dir():
    raise ValueError(
      "replay must be given WORKDIR/skipped/step_NNNNNN of a run; there is no folder "
      f"{path}{paths.did_you_mean(path)}"
    )


def config_of_run(folder: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config that a workdir was last started with.

  Raises:
    ValueError: it has no readable config.json.
  """
  path = folder / "config.json"
  with damage.explained(path, "the config of a run", "Restore it"):
    saved = damage.read_object(path)
    defaults = config_files.load("r3_geneval")
    # The file holds more than the config: what identifies weights and prompts.
    values = {key: _with_tuples(saved[key]) for key in defaults if key in saved}
    config = ml_collections.ConfigDict(defaults.to_dict() | values)
    if "model_path" in saved:
      config.model.folder = saved["model_path"]
    config_rules.check(config)
  return config.lock()


def _with_tuples(value: Any) -> Any:
  """Returns JSON values with tuples in place of lists, as configs have them."""
  if isinstance(value, dict):
    return {key: _with_tuples(part) for key, part in value.items()}
  if isinstance(value, list):
    return tuple(map(_with_tuples, value))
  return value


def run(folder: epath.PathLike) -> list[str]:
  """Repeats a skipped iteration; returns the lines of its report, the first finding first.

  The workdir is only read. Iterations after the last checkpoint before it are repeated too, by the
  program of the run, so that the state is what it was; a reward that is not repeatable (a service)
  may make another one of it, and the report says so.

  Args:
    folder: WORKDIR/skipped/step_NNNNNN.

  Raises:
    ValueError: the folder, or the workdir, cannot be used.
  """
  folder = paths.of_user(folder)
  batch = read(folder)
  files = workdir.Workdir(folder.parent.parent)
  config = config_of_run(files.path)
  session, policy = sessions.load(config, files)
  _check_indices(batch, session)
  with jax.set_mesh(session.mesh):
    state, done = _state_before(session, policy, batch.step)
    state = _advanced(session, state, done, batch.step)
    state_counts = _counts_of_state(state)
    metrics, samples = _inspected(session, state, batch)
    lines = [f"iteration {batch.step}, repeated from iteration {done}"]
    # The checkpoint's name has the config in its file only; the digest is of people's interest.
    digest = skipped_batches.config_digest(config)
    if digest != batch.config_sha256:
      lines.append("the config of the workdir has changed since, in part")
    lines += _compared(batch, metrics)
    prompts = [session.experiment.train[index] for index in batch.indices]
    lines += _findings(state_counts, metrics, samples, prompts)
  return lines


def _check_indices(batch: Batch, session: sessions.Session) -> None:
  """Raises a ValueError where the prompts of a batch are not those of a run's iteration."""
  num_groups = session.config.groups_per_step
  num_prompts = len(session.experiment.train)
  is_valid = (batch.indices >= 0) & (batch.indices < num_prompts)
  if len(batch.indices) != num_groups or not is_valid.all():
    raise ValueError(
      f"{skipped_batches.FILE} must name {num_groups} of the {num_prompts} training prompts; its "
      f"indices are {batch.indices[:10].tolist()}"
    )


def _state_before(
  session: sessions.Session, policy: Any, number: int
) -> tuple[train_state.TrainState, int]:
  """Returns the latest state before an iteration that still exists, and its iterations done."""
  state = session.init(policy)
  saved = session.files.checkpoints
  done = training.newest_sound(saved, before=number)
  if done is None:
    return state, 0
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  # Not by `training.Checkpoints`, which removes what a run is just writing.
  path = paths.absolute(saved / str(done) / "state")
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, abstract), done


def _advanced(
  session: sessions.Session,
  state: train_state.TrainState,
  done: int,
  number: int,
) -> train_state.TrainState:
  """Repeats the iterations from `done` to the one before `number`."""
  if done + 1 == number:
    return state
  batches = pipeline.prompt_iterator(
    len(session.experiment.train),
    session.config.groups_per_step,
    session.config.seed,
  )
  step = session.compile(state)
  reward = session.experiment.reward
  for i in range(1, number):
    indices = next(batches)
    if i > done:
      reward.begin(i)
      state, _, _ = step(state, indices)
      reward.raise_together()
  return state


def _inspected(
  session: sessions.Session, state: train_state.TrainState, batch: Batch
) -> tuple[dict[str, Any], stage_outputs.Samples]:
  """Runs the iteration by stages that count what is not finite; returns metrics and samples."""
  stages = inspection.InspectedStages(**vars(session.stages))
  program = jax.jit(mapped.fused(stages, session.mesh))
  prompts = jax.tree.map(lambda column: column[batch.indices], session.prompts)
  seed = np.uint32(session.config.seed)
  session.experiment.reward.begin(batch.step)
  _, metrics, samples = program(state, session.frozen, prompts, seed)
  session.experiment.reward.raise_together()
  return multihost.fetch(metrics), samples


@jax.jit
def _count_leaves(tree: Any) -> Any:
  return jax.tree.map(nonfinite.count, tree)


def _counts_of_state(state: train_state.TrainState) -> list[str]:
  """Returns a line for every leaf of weights and moments that is not finite."""
  trees = {"weights": state.policy, "optimizer": state.opt_state}
  counts = multihost.fetch(_count_leaves(trees))
  return [
    f"before the iteration, {jax.tree_util.keystr(path)}: {count} numbers"
    for path, count in jax.tree_util.tree_leaves_with_path(counts)
    if count
  ]


def _compared(batch: Batch, metrics: Mapping[str, Any]) -> list[str]:
  """Returns a line about whether the iteration came out as it did in the run."""
  stages = health.skipped_stages(metrics)
  if stages == list(batch.stages):
    return [f"as in the run, the update of {', '.join(stages)} is not finite"]
  return [
    f"in the run the update of {', '.join(batch.stages)} was not finite; now that of "
    f"{', '.join(stages) or 'no stage'} is not: the iteration did not repeat itself"
  ]


def _findings(
  state_counts: Sequence[str],
  metrics: Mapping[str, Any],
  samples: stage_outputs.Samples,
  prompts: Sequence[records.Prompt],
) -> list[str]:
  """Returns a line for everything that is not finite, in the order in which it is computed."""
  sampled = multihost.fetch(skipped_batches.count_samples(samples))
  indices = {"reason": multihost.fetch(samples.drafts.prompt_index)}
  if samples.edits is not None:
    indices["edit"] = multihost.fetch(samples.edits.prompt_index)
  lines = list(state_counts)
  for stage in _stages_in(metrics):
    # The samples of an iteration are those of the first and of the last stage.
    kind = "reason" if stage == "reason" else "edit"
    counts = metrics[f"{stage}/{inspection.COUNTS}"]
    rows = dict(counts["scored"])
    if stage in ("reason", _stages_in(metrics)[-1]):
      rows = nonfinite.in_order(sampled[kind]) | rows
    for quantity, by_row in rows.items():
      of_prompts = [prompts[index] for index in indices[kind]]
      lines += _row_lines(f"{stage}, {quantity}", by_row, of_prompts)
    lines += _term_lines(stage, metrics)
    lines += _gradient_lines(stage, counts["gradients"])
  return lines or ["every number is finite"]


def _stages_in(metrics: Mapping[str, Any]) -> list[str]:
  """Returns the stages of an iteration in their order: "reason", "edit", "edit2", ..."""
  suffix = f"/{inspection.COUNTS}"
  stages = [
    name.removesuffix(suffix) for name in metrics if name.endswith(suffix)
  ]
  # Dictionaries that come out of a compiled program are sorted.
  return sorted(
    stages, key=lambda stage: (stage != "reason", len(stage), stage)
  )


def _row_lines(
  name: str, counts: np.ndarray, prompts: Sequence[records.Prompt]
) -> list[str]:
  """Returns a line for each of the first samples with numbers that are not finite."""
  rows = np.flatnonzero(counts)
  lines = [
    f"{name}: sample {row} ({prompts[row].text[:80]!r}): {counts[row]} numbers"
    for row in rows[:_MOST_ROWS]
  ]
  if len(rows) > _MOST_ROWS:
    lines.append(f"{name}: {len(rows)} samples of {len(counts)} in all")
  return lines


def _term_lines(stage: str, metrics: Mapping[str, Any]) -> list[str]:
  """Returns a line with the measurements of an update that are not finite."""
  names = [
    name
    for name in diagnostics.UPDATE_METRICS
    if not np.isfinite(metrics[f"{stage}/{name}"])
  ]
  return [f"{stage}, of the update: {', '.join(names)}"] if names else []


def _gradient_lines(stage: str, counts: Any) -> list[str]:
  """Returns a line for each of the first gradients that are not finite."""
  leaves = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), int(count))
    for path, count in jax.tree_util.tree_leaves_with_path(counts)
    if count
  ]
  lines = [
    f"{stage}, gradient of {name}: {count} numbers"
    for name, count in leaves[:_MOST_TENSORS]
  ]
  if len(leaves) > _MOST_TENSORS:
    lines.append(f"{stage}, gradients: {len(leaves)} tensors in all")
  return lines
