"""Evaluates a model outside of a run, and scores the images of an evaluation again."""

import dataclasses
import re

from etils import epath
import jax
import ml_collections

from r3jax import types
from r3jax.checkpoint import pretrained
from r3jax.data import contamination
from r3jax.evaluation import evaluate
from r3jax.evaluation import finished
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import second_judge
from r3jax.evaluation import summary
from r3jax.files import config_guard
from r3jax.files import damage
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.parallel import meshes
from r3jax.report import evaluation_report
from r3jax.report import judge_report
from r3jax.rewards import registry
from r3jax.rewards.from_host import budget
from r3jax.run import config_rules
from r3jax.run import evaluation_setup
from r3jax.run import program_cache
from r3jax.run import prompt_selection
from r3jax.run import setup
from r3jax.run import workdir
from r3jax.worlds import registry as worlds_registry

# Paths are compared by the fingerprints of what they name.
_MAY_DIFFER = (
  "model.folder",
  *evaluate.MAY_DIFFER,
  *evaluation_setup.JUDGE_FILES,
)


@dataclasses.dataclass(frozen=True)
class Job:
  """A checked and loaded evaluation.

  Attributes:
    config: of the evaluation.
    folder: gets its files.
    experiment: what the config describes.
    mesh: all devices.
    evaluation: on the held-out prompts.
    policy: parameters of the policy.
    towers: parameters of the image towers.
    leaked: held-out prompts that the model was trained on.
  """

  config: ml_collections.ConfigDict
  folder: epath.Path
  experiment: setup.Experiment
  mesh: jax.sharding.Mesh
  evaluation: evaluate.Evaluation
  policy: types.Params
  towers: types.Params
  leaked: contamination.Leaked


def with_checkpoint(
  config: ml_collections.ConfigDict, checkpoint: str
) -> ml_collections.ConfigDict:
  """Returns a config that evaluates a checkpoint; adapters of a run are merged, not added.

  Args:
    config: as for the main job.
    checkpoint: folder of a model, or workdir of a run; "" keeps model.folder.
  """
  config = config.copy_and_resolve_references()
  config.model.lora.rank = 0
  if checkpoint:
    config.model.folder = checkpoint
  return config


def prepare(
  config: ml_collections.ConfigDict,
  folder: str,
  checkpoint: str = "",
  program_folder: epath.Path | None = None,
) -> Job:
  """Checks the config, opens the folder of the evaluation and loads the model.

  Args:
    config: as for the main job.
    folder: of a new evaluation, or of one to resume.
    checkpoint: see `with_checkpoint`.
    program_folder: keeps traced programs between starts, see `program_cache`; None keeps nothing.

  Raises:
    ValueError: the config, the model or the folder cannot be used.
  """
  program_cache.code_version()  # before the source may be edited
  config_rules.check(config)
  config = with_checkpoint(config, checkpoint)
  path = paths.of_user(folder)
  damage.check_kinds(*evaluate.outputs(path))
  experiment = setup.build_to_evaluate(config)
  mesh = meshes.make_mesh(**config.mesh)
  evaluation = evaluation_setup.build(config, experiment, mesh, program_folder)
  identity = {
    "model": config.model.to_dict(),
    "weights": experiment.pretrained.fingerprint(),
    **evaluation.settings,
  }
  services = experiment.evaluation_reward.describe()
  if services:
    identity["reward_services"] = services
  config_guard.check(path, identity, _MAY_DIFFER)
  ownership.check(path)
  trained_on, is_complete = workdir.trained_on(config.model.folder)
  leaked = contamination.leaked(trained_on, experiment.heldout, is_complete)
  bagel = experiment.modules.bagel
  policy, towers = experiment.pretrained.load(bagel, mesh, bagel.dtype)
  # Nothing has been written up to here.
  config_guard.check_writable(path, "workdir")
  ownership.claim(path)
  config_guard.write_or_check(path, identity, _MAY_DIFFER)
  return Job(config, path, experiment, mesh, evaluation, policy, towers, leaked)


def run(job: Job) -> summary.Summary:
  """Draws and scores the images that are missing, and writes the results; returns the summary.

  Raises:
    budget.BudgetExceeded: too few images have a score.
  """
  context = _context(job)
  reward = job.experiment.evaluation_reward
  reward.begin(context.step)
  with jax.set_mesh(job.mesh), reward.logging_to(job.folder / "rewards"):
    samples = job.evaluation.run(
      job.policy, job.towers, job.folder, context.step
    )
    labelled = job.evaluation.ask_labelled(
      job.policy, job.towers, job.folder, context.step
    )
  missing = sample_table.of_samples(samples).missing
  budget.check_evaluation(missing, job.config.reward.max_failed_fraction)
  return evaluation_report.conclude(job.folder, samples, context, labelled)


def _context(job: Job) -> summary.Context:
  folder = job.config.model.folder
  files = workdir.Workdir(paths.of_user(folder))
  # The checkpoint that the model was read from.
  step = pretrained.step_of_run(files.path) or 0
  title = f"r3jax: evaluation of {folder}"
  return summary.Context(
    title, step, job.leaked, job.evaluation.flops, job.config.eval.seed
  )


@ownership.releasing()
def evaluate_model(
  config: ml_collections.ConfigDict, folder: str, checkpoint: str = ""
) -> summary.Summary:
  """Evaluates a model on the held-out prompts of a config, in one process or many.

  Args:
    config: as for the main job.
    folder: gets the results; an interrupted evaluation there is resumed.
    checkpoint: see `with_checkpoint`.

  Returns:
    The summary, as in summary.json.

  Raises:
    ValueError: the config, the model or the folder cannot be used.
    budget.BudgetExceeded: too few images have a score.
  """
  return run(prepare(config, folder, checkpoint))


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How two rewards agree on the images of an evaluation.

  Attributes:
    text: tables for people.
    missing: share of the images that the second reward gave no score.
  """

  text: str
  missing: float


@ownership.releasing()
def rescore(
  config: ml_collections.ConfigDict, folder: str, judge: str
) -> Comparison:
  """Scores the images of an evaluation by the reward of a config, and compares the two rewards.

  Args:
    config: as for the main job; its held-out prompts are those of the evaluation.
    folder: of the evaluation.
    judge: name of the reward in files and tables.

  Raises:
    ValueError: the name, the folder or the config cannot be used.
  """
  if not re.fullmatch(r"[\w.-]+", judge):
    raise ValueError(
      "--judge must name the other reward, in letters, digits, '.', '-' and '_'; "
      f"got {judge!r}"
    )
  path = paths.of_user(folder)
  if not sample_log.exists(path):
    raise ValueError(
      f"rescore must be given the folder of an evaluation; there are no samples in {folder}"
      f"{paths.did_you_mean(folder)}"
    )
  if jax.process_count() > 1:
    raise ValueError(
      f"images are scored again in one process; there are {jax.process_count()}"
    )
  config_rules.check(config)
  config = with_checkpoint(config, "")
  (evaluation,) = finished.read(folder)
  ownership.claim(path)
  heldout = setup.load_heldout(config)
  records = prompt_selection.evenly(
    heldout, config.eval.prompts, config.eval.seed
  )
  mesh = meshes.make_mesh(**config.mesh)
  world = worlds_registry.find_if_named(config.world)
  image_size = (config.image.height, config.image.width)
  reward = registry.build(config.reward, world, image_size, evaluates=True)
  scores = second_judge.rescore(
    reward, mesh, path, evaluation.samples, records, config.eval.batch_size
  )
  agreements = second_judge.by_tag(
    second_judge.scores_of(evaluation.samples), scores, config.eval.seed
  )
  text = judge_report.write(
    path, judge, scores, agreements, evaluation.summary.notes()
  )
  num_missing = sum(score.score is None for score in scores)
  return Comparison(text, num_missing / len(scores))
