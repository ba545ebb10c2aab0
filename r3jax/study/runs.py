"""Runs the arms of a study one after the other, as the ordinary train command; resumes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import math
import sys

from absl import logging
from etils import epath
import jax
import ml_collections

from r3jax.costs import count
from r3jax.data import records
from r3jax.evaluation import finished
from r3jax.files import atomic
from r3jax.files import config_files
from r3jax.files import damage
from r3jax.files import jsonl
from r3jax.files import rules
from r3jax.run import config_rules
from r3jax.run import model_setup
from r3jax.run import stage_settings
from r3jax.run import workdir
from r3jax.study import declarations
from r3jax.worlds import registry

# Runs a command; returns its exit code.
Runner = Callable[[Sequence[str]], int]


class Failed(Exception):
  """A run has ended with another exit code than 0.

  Attributes:
    code: That exit code.
  """

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


@dataclasses.dataclass(frozen=True)
class Plan:
  """A study that can be run.

  Attributes:
    study: What is compared.
    folder: Gets everything.
    config_name: Config of all runs, by name or path.
    overrides: Keys that the user sets in all runs; those of the study and its arms come on top.
    seeds: Seeds of the runs of every arm.
  """

  study: declarations.Study
  folder: epath.Path
  config_name: str
  overrides: Mapping[str, object]
  seeds: Sequence[int]

  def workdir(self, arm: declarations.Arm, seed: int) -> epath.Path:
    """Returns the workdir of a run."""
    return self.folder / "runs" / arm.name / f"seed_{seed}"

  def config(self, arm: declarations.Arm) -> ml_collections.ConfigDict:
    """Returns the config of an arm with the first seed.

    Raises:
      ValueError: A value breaks its rule; the message names the arm.
    """
    config = config_files.load(self.config_name)
    # Every key exists: the front door and `declarations` name keys of this config.
    config.update_from_flattened_dict(self.overrides_of_arm(arm))
    try:
      config_rules.check(config)
    except ValueError as error:
      raise ValueError(f"arm {arm.name!r}: {error}") from error
    return config

  def overrides_of_arm(self, arm: declarations.Arm) -> dict[str, object]:
    """Returns the keys that all runs of an arm set, apart from those that are computed."""
    return {**self.overrides, **self.study.overrides, **arm.overrides}

  def identity(self) -> dict:
    """Returns what a later start must find unchanged, as JSON values."""
    arms = {arm.name: self.overrides_of_arm(arm) for arm in self.study.arms}
    return {
      "study": self.study.title,
      "config": self.config_name,
      "arms": json.loads(json.dumps(arms)),
      "seeds": list(self.seeds),
    }


# Keys of the identity that may differ: further seeds are added to a study.
MAY_DIFFER = ("seeds",)


def overrides_of(
  config: ml_collections.ConfigDict, name: str
) -> dict[str, object]:
  """Returns the keys whose values differ from those of a config's file, by dotted key."""
  values = rules.leaves(config, config_rules.RULES)
  defaults = rules.leaves(config_files.load(name), config_rules.RULES)
  return {
    key: value for key, value in values.items() if value != defaults.get(key)
  }


def operations(config: ml_collections.ConfigDict) -> float:
  """Returns the operations of an iteration, with texts at their longest.

  What is computed twice to save memory counts once.
  """
  model = model_setup.build(config)
  costs = count.iteration(
    model.modules,
    model.rollout,
    stage_settings.for_iteration(config),
    {"data": 1, "fsdp": 1, "tensor": 1},
    remat=False,
    freeze_und=config.optimizer.freeze_und,
  )
  return math.fsum(cost.flops for cost in costs.values())


def computed_overrides(plan: Plan, arm: declarations.Arm) -> dict[str, object]:
  """Returns the keys of an arm that follow from another arm, or from files of the study.

  Raises:
    ValueError: The config names no world, but the arm trains on some tags of one.
  """
  result = {}
  if arm.as_costly_as:
    (other,) = [x for x in plan.study.arms if x.name == arm.as_costly_as]
    config = plan.config(arm)
    share = operations(plan.config(other)) / operations(config)
    result["total_steps"] = max(1, round(config.total_steps * share))
  if arm.train_tags:
    result["data.train"] = str(_write_prompts(plan, arm))
  return result


def _write_prompts(plan: Plan, arm: declarations.Arm) -> epath.Path:
  """Writes the world's training prompts of an arm's tags; returns the file."""
  config = plan.config(arm)
  world = registry.needed(
    registry.find_if_named(config.world), f"the arm {arm.name!r}"
  )
  prompts: list[records.Prompt] = [
    prompt for prompt in world.records("train") if prompt.tag in arm.train_tags
  ]
  path = plan.folder / "prompts" / f"{arm.name}.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(prompt.to_json()) for prompt in prompts]
  atomic.write_text(path, "\n".join(lines) + "\n")
  return path


def command(
  plan: Plan,
  arm: declarations.Arm,
  seed: int,
  computed: Mapping[str, object],
) -> list[str]:
  """Returns the command of a run.

  Args:
    plan: The study.
    arm: Arm of the run.
    seed: Seed of the run.
    computed: Keys that `computed_overrides` has returned.
  """
  overrides = {**plan.overrides_of_arm(arm), **computed, "seed": seed}
  values = [
    f"--config.{key}={_flag_value(value)}" for key, value in overrides.items()
  ]
  return [
    sys.executable,
    "-m",
    "r3jax",
    "train",
    f"--config={plan.config_name}",
    f"--workdir={plan.workdir(arm, seed)}",
    *values,
  ]


def _flag_value(value: object) -> str:
  """Returns a value as the flags of a config read it."""
  return value if isinstance(value, str) else repr(value)


def is_finished(folder: epath.Path) -> bool:
  """Returns whether the run of a workdir has finished."""
  return workdir.Workdir(folder).summary.exists()


def run_missing(plan: Plan, runner: Runner) -> Iterator[None]:
  """Runs what has not finished; yields after every run, and once before the first.

  Every seed runs all arms before the next one does, so that what is there can be compared.

  Raises:
    Failed: A run has failed, or was asked to end.
  """
  yield
  for seed in plan.seeds:
    for arm in plan.study.arms:
      folder = plan.workdir(arm, seed)
      if is_finished(folder):
        continue
      logging.info("arm %s, seed %d: %s", arm.name, seed, arm.meaning)
      computed = computed_overrides(plan, arm)
      code = runner(command(plan, arm, seed, computed))
      if code:
        raise Failed(
          f"the run of arm {arm.name!r} with seed {seed} ended with exit code {code}; the same "
          f"command continues it ({folder})",
          code,
        )
      if not is_finished(folder):
        raise Failed(f"the run in {folder} has left no summary.json", 1)
      yield


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run of a study.

  Attributes:
    arm: Name of its arm.
    seed: Its seed.
    folder: Its workdir.
    before: Evaluation before training.
    after: Evaluation after training.
    metrics: Metrics of its iterations.
    seconds: Median time of an iteration; None if it is not known.
  """

  arm: str
  seed: int
  folder: epath.Path
  before: finished.FinishedEvaluation
  after: finished.FinishedEvaluation
  metrics: Sequence[dict]
  seconds: float | None


def read_finished(plan: Plan) -> list[Run]:
  """Returns the finished runs of a study, arm by arm.

  Raises:
    ValueError: Files of a run are damaged.
  """
  result = []
  for arm in plan.study.arms:
    for seed in plan.seeds:
      folder = plan.workdir(arm, seed)
      if is_finished(folder):
        result.append(_read(arm.name, seed, folder))
  return result


def _read(arm: str, seed: int, folder: epath.Path) -> Run:
  """Returns the run of a workdir."""
  files = workdir.Workdir(folder)
  evaluations = finished.read(str(folder))
  remedy = "Delete it, and give the command of the study again"
  with damage.explained(files.summary, "the summary of a run", remedy):
    seconds = damage.read_object(files.summary)["seconds"]
  return Run(
    arm=arm,
    seed=seed,
    folder=folder,
    before=evaluations[0],
    after=evaluations[-1],
    metrics=jsonl.read(files.metrics),
    seconds=seconds.get("median iteration"),
  )


def leave_devices() -> None:
  """Keeps this process off accelerators, which its runs need for themselves."""
  jax.config.update("jax_platforms", "cpu")
