"""Evaluates a model on held-out prompts, compares evaluations, swaps the judge.

  python launch/evaluate.py --config=configs/r3_geneval.py:shapes --workdir=DIR [--checkpoint=FOLDER] [--config.KEY=VALUE ...]
  python launch/evaluate.py compare A B ... --workdir=DIR
  python launch/evaluate.py rescore DIR --config=... --judge=NAME [--config.reward.KEY=VALUE ...]

The first draws `eval.rounds` images in a chain, `eval.images_per_prompt` times for every prompt of
`data.heldout` (or `eval.prompts` of them), and asks what `eval.ask` names about the drafts. The same
command goes on where it was stopped. --checkpoint is a folder in BAGEL's format, a converted one, or the
workdir of a run, whose last checkpoint is evaluated; without it the config's model is.

`compare` takes evaluations, or workdirs of runs: of one, all its evaluations are compared with the first,
of several the last of each. `rescore` scores the images of an evaluation by the config's reward.
docs/evaluation.md says what the files are.
"""

import os
import re
import sys

from absl import app
from absl import flags
from etils import epath
import jax
import ml_collections
from ml_collections import config_flags

from r3jax.checkpoint import training
from r3jax.cli import startup
from r3jax.data import contamination
from r3jax.evaluation import finished
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import second_judge
from r3jax.evaluation import summary as summary_lib
from r3jax.files import config_guard
from r3jax.parallel import meshes
from r3jax.parallel import multihost
from r3jax.report import comparison_report
from r3jax.report import evaluation_report
from r3jax.report import judge_report
from r3jax.rewards import registry
from r3jax.rewards.from_host import budget
from r3jax.run import evaluation_setup
from r3jax.run import prompt_selection
from r3jax.run import setup
from r3jax.run import workdir
from r3jax.worlds import registry as worlds_registry

# config files import each other
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

startup.define_flags()
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with its variant.", lock_config=True
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  "",
  "Folder of the model, or workdir of a run. Default: model.folder.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder to write.")
_JUDGE = flags.DEFINE_string(
  "judge", None, "rescore: what the other reward is called in files and tables."
)


def _config() -> ml_collections.ConfigDict:
  """Returns the config with the model to evaluate in it; adapters of a run are merged, not added."""
  if _CONFIG.value is None:
    raise ValueError("--config must name a config file")
  config = _CONFIG.value.copy_and_resolve_references()
  config.model.lora.rank = 0
  if _CHECKPOINT.value:
    config.model.folder = _CHECKPOINT.value
  return config


def _prepare(config: ml_collections.ConfigDict, folder: epath.Path):
  """Checks the config, opens the folder, loads the model."""
  experiment = setup.build_to_evaluate(config)
  mesh = meshes.make_mesh(**config.mesh)
  evaluation = evaluation_setup.build(config, experiment, mesh)
  config_guard.check_writable(folder)
  described = {
    "model": config.model.to_dict(),
    "weights": experiment.pretrained.fingerprint(),
  }
  services = experiment.reward.describe()
  described |= evaluation.settings | (
    {"reward_services": services} if services else {}
  )
  config_guard.write_or_check(folder, described, may_differ=())
  bagel = experiment.modules.bagel
  policy, towers = experiment.pretrained.load(bagel, mesh, bagel.dtype)
  return experiment, mesh, evaluation, policy, towers


def _context(
  config: ml_collections.ConfigDict, experiment: setup.Experiment, evaluation
) -> summary_lib.Context:
  folder = config.model.folder
  trained_on, complete = workdir.trained_on(folder)
  leaked = contamination.leaked(trained_on, experiment.heldout, complete)
  step = (
    training.latest_step(workdir.Workdir(epath.Path(folder)).checkpoints) or 0
  )
  return summary_lib.Context(
    f"r3jax: evaluation of {folder}",
    step,
    leaked,
    evaluation.flops,
    config.eval.seed,
  )


def _evaluate():
  config, folder = startup.together(_config), epath.Path(_WORKDIR.value)
  experiment, mesh, evaluation, policy, towers = startup.together(
    _prepare, config, folder
  )
  reward = experiment.reward
  context = _context(config, experiment, evaluation)
  reward.begin(context.step)
  with jax.set_mesh(mesh), reward.logging_to(folder / "rewards"):
    samples = evaluation.run(policy, towers, folder, context.step)
  budget.check_evaluation(
    sample_table.of_samples(samples).missing, config.reward.max_failed_fraction
  )
  summary = evaluation_report.conclude(folder, samples, context)
  if not jax.process_index():
    print(evaluation_report.console_text(summary))
    print(f"\npage: {folder / 'index.html'}")


def _compare(paths: list[str]):
  groups = [finished.read(path) for path in paths]
  print(comparison_report.write(groups, epath.Path(_WORKDIR.value), seed=0))


def _rescore(path: str):
  """Scores the images of an evaluation by the config's reward."""
  config, folder = _config(), epath.Path(path)
  if not re.fullmatch(r"[\w.-]+", _JUDGE.value or ""):
    raise ValueError(
      f"--judge must say what the other reward is called, in letters, digits, '.', '-' and '_'; got {_JUDGE.value!r}"
    )
  if not sample_log.exists(folder):
    raise ValueError(
      f"rescore must be given the folder of an evaluation; there are no samples in {path}"
    )
  if jax.process_count() > 1:
    raise ValueError(
      f"images are scored again in one process; there are {jax.process_count()}"
    )
  (evaluation,) = finished.read(path)
  heldout = setup.load_heldout(config)
  records = prompt_selection.evenly(
    heldout, config.eval.prompts, config.eval.seed
  )
  mesh, reward = (
    meshes.make_mesh(**config.mesh),
    registry.build(
      config.reward,
      worlds_registry.find_if_named(config.world),
      (config.image.height, config.image.width),
    ),
  )
  scores = second_judge.rescore(
    reward, mesh, folder, evaluation.samples, records, config.eval.batch_size
  )
  missing = sum(score.score is None for score in scores) / len(scores)
  agreements = second_judge.by_tag(
    second_judge.scores_of(evaluation.samples), scores, config.eval.seed
  )
  print(
    judge_report.write(
      folder, _JUDGE.value, scores, agreements, evaluation.summary.notes()
    )
  )
  budget.check_evaluation(missing, config.reward.max_failed_fraction)


def main(argv):
  startup.log_ours()
  _, *words = argv
  if words[:1] != ["rescore"] and not _WORKDIR.value:
    raise app.UsageError("--workdir must name the folder to write")
  if words[:1] == ["compare"]:
    return startup.together(_compare, words[1:])
  if words and (words[0] != "rescore" or len(words) != 2):
    raise app.UsageError(
      f"the command must be none, 'compare A B ...' or 'rescore DIR'; got {words}"
    )
  config = _CONFIG.value
  if config is not None:
    startup.start(config.mesh, config.eval.batch_size)
    startup.keep_programs(config.mesh)
  with multihost.ending_together():
    try:
      startup.together(_rescore, words[1]) if words else _evaluate()
    except budget.BudgetExceeded as error:
      sys.exit(f"r3jax: {error}")


if __name__ == "__main__":
  flags.FLAGS.set_gnu_getopt()  # flags may stand behind words
  app.run(main)
