"""Builds the evaluation that a config describes."""

from collections.abc import Mapping, Sequence
import json

from absl import logging
from etils import epath
import jax
import ml_collections

from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import rollout_settings
from r3jax.costs import count
from r3jax.data import labelled_images
from r3jax.data import records
from r3jax.evaluation import chains
from r3jax.evaluation import evaluate
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import questions
from r3jax.files import texts
from r3jax.rewards.remote import judge
from r3jax.run import program_cache
from r3jax.run import setup
from r3jax.run import stage_settings
from r3jax.worlds import base as worlds_base
from r3jax.worlds import registry

# Keys of config.eval that do not change what an evaluation returns, and those whose content stands
# in the identity in their place.
_LEFT_OUT_KEYS = ("batch_size", "every", "labelled_images")
# Keys of config.reward that change scores; a service describes itself.
_SCORING_KEYS = (
  "name",
  "value",
  "members",
  "clutter_weight",
  "image_format",
  "judge",
  "unirl",
)

# Keys that name files of a judge: they are compared by content, which the descriptions of services
# and the settings of an evaluation have. Descriptions of former versions have the paths, too.
JUDGE_FILES = tuple(
  f"{section}.{name}"
  for section in (
    "reward.judge",
    "reward.members.*.judge",
    "reward_services.*",
    "evaluation_services.*",
  )
  for name in judge.FILES
)


def build(
  config: ml_collections.ConfigDict,
  experiment: setup.Experiment,
  mesh: jax.sharding.Mesh,
  program_folder: epath.Path | None = None,
) -> evaluate.Evaluation:
  """Returns the evaluation that a config describes.

  Args:
    config: Config of the run.
    experiment: What the config describes.
    mesh: Mesh of the parameters.
    program_folder: Keeps traced programs between starts, see `program_cache`; None keeps nothing.

  Raises:
    ValueError: The config cannot be used; the message has what must hold.
  """
  section = config.eval
  if section.images_per_prompt < 1:
    raise ValueError(
      f"eval.images_per_prompt must be at least 1; got {section.images_per_prompt}"
    )
  reward = experiment.evaluation_reward
  # What the world sees counts only where its verifier is the reward.
  verifies = config.reward.name == registry.OF_WORLD
  world = experiment.world if verifies else None
  settings = stage_settings.for_evaluation(config, experiment.rollout)
  sampler = chains.Sampler(
    experiment.modules,
    settings,
    reward.on(mesh),
    experiment.parse(mesh),
    mesh,
    section.rounds,
    section.batch_size,
    section.seed,
    section.question_tokens,
    section.never_stop,
    _keep(config, experiment, program_folder),
  )
  questionnaire = questions.Questionnaire(
    tuple(section.ask), world.quiz if world else None, section.seed
  )
  prompts = experiment.encode(experiment.heldout, reward)
  images = _labelled_images(config, experiment.world)
  labelled = None
  if images:
    labelled = _labelled_questionnaire(experiment, sampler, prompts, images)
  return evaluate.Evaluation(
    sampler=sampler,
    records=experiment.heldout,
    prompts=prompts,
    images_per_prompt=section.images_per_prompt,
    questionnaire=questionnaire,
    segments=experiment.segments,
    decode=experiment.decode,
    boxes=world.boxes if world else None,
    flush=reward.raise_together,
    flops=_flops(experiment.modules, settings),
    settings=_identity(config, experiment.heldout, images),
    labelled=labelled,
  )


def _keep(
  config: ml_collections.ConfigDict,
  experiment: setup.Experiment,
  program_folder: epath.Path | None,
) -> chains.Keep | None:
  """Returns what keeps the traced rounds between starts; None where they cannot be kept."""
  reward = experiment.evaluation_reward
  calls_host = experiment.parses_on_host or bool(reward.scorers)
  if not program_folder:
    return None
  if not program_cache.may_keep(config.world, calls_host):
    return None
  constants = program_cache.constants(
    config.to_dict(),
    experiment.pretrained.folder,
    program_cache.NOT_EVALUATED,
  )
  return program_cache.Keeper(program_folder, "evaluations", constants)


def _labelled_images(
  config: ml_collections.ConfigDict, world: worlds_base.World | None
) -> Sequence[labelled_images.LabelledImage]:
  """Returns the labelled images that a config names, none where it or its world has none.

  Raises:
    ValueError: The file or an image cannot be used.
  """
  source = config.eval.labelled_images
  size = (config.image.height, config.image.width)
  if source != registry.OF_WORLD:
    return labelled_images.read(source, size) if source else ()
  world = registry.needed(world, "eval.labelled_images")
  if world.labelled is None:
    logging.info(
      "no labelled images are asked about: the world %s has none", world.name
    )
    return ()
  images = world.labelled()
  if world.canvas != size:
    raise ValueError(
      "image.height and image.width must be the canvas of the world's labelled images, "
      f"{world.canvas}; got {size}. eval.labelled_images='' asks about none"
    )
  return images


def _labelled_questionnaire(
  experiment: setup.Experiment,
  sampler: chains.Sampler,
  prompts: experience.Prompts,
  images: Sequence[labelled_images.LabelledImage],
) -> labelled_questions.Questionnaire:
  """Returns the questions about labelled images.

  Raises:
    ValueError: A question has more tokens than `eval.question_tokens`.
  """
  world = experiment.world
  quiz = world.quiz if world else None
  all_questions = labelled_questions.questions_about(
    images, lambda prompt: questions.match_question(prompt, quiz)
  )
  texts_of_questions = [question.text for question in all_questions]
  try:
    ids, lengths = experiment.segments(
      texts_of_questions, sampler.question_tokens
    )
  except ValueError as error:
    raise ValueError(
      "eval.question_tokens must hold every question about eval.labelled_images: "
      f"{error}"
    ) from error
  return labelled_questions.Questionnaire(
    images=images,
    questions=all_questions,
    ids=ids,
    lengths=lengths,
    prompts=prompts,
    sampler=sampler,
    decode=experiment.decode,
  )


def _identity(
  config: ml_collections.ConfigDict,
  heldout: tuple[records.Prompt, ...],
  labelled: Sequence[labelled_images.LabelledImage] = (),
) -> dict:
  """Returns what the results of an evaluation depend on beside the model.

  Returns:
    JSON values as they are read back: lists for tuples.
  """
  identity = {}
  for section in ("image", "sequence", "text", "reason", "refine"):
    identity[section] = config[section].to_dict()
  evaluation = config.eval.to_dict()
  for key in _LEFT_OUT_KEYS:
    del evaluation[key]
  identity["eval"] = evaluation
  reward = {
    key: value
    for key, value in config.reward.to_dict().items()
    if key in _SCORING_KEYS
  }
  if _asks_judge(reward):  # otherwise nobody reads its files
    reward = _with_hashes(reward)
  source = config.data.heldout
  # Evaluations on two worlds differ, although both configs say "world".
  if reward["name"] == registry.OF_WORLD:
    reward["name"] = config.world
  if source == registry.OF_WORLD:
    source = config.world
  identity["reward"] = reward
  identity["heldout"] = {"source": source, "sha256": records.sha256(heldout)}
  if labelled:
    identity["labelled"] = {
      "source": config.eval.labelled_images,
      "sha256": labelled_images.sha256(labelled),
    }
  return json.loads(json.dumps(identity))


def _asks_judge(section: Mapping) -> bool:
  """Returns whether a reward's section, or a member of it, is a judge."""
  members = section.get("members", {})
  return section.get("name") == "judge" or any(
    map(_asks_judge, members.values())
  )


def _with_hashes(section: Mapping) -> dict:
  """Returns a reward's section with hashes of a judge's files in place of their paths.

  Args:
    section: the config's `reward`, or a member of a sum with the keys that it changes.
  """
  hashed = dict(section)
  if "judge" in section:
    files = dict(section["judge"])
    for name in judge.FILES:
      if files.get(name):
        files[name] = judge.sha256(texts.read(files[name]))
    hashed["judge"] = files
  if "members" in section:
    hashed["members"] = {
      name: _with_hashes(member) for name, member in section["members"].items()
    }
  return hashed


def _flops(
  modules: actors.Modules, settings: rollout_settings.RolloutSettings
) -> tuple[float, float]:
  """Returns the operations of drafting and of revising one image, with texts at their longest."""
  one_chip = {"data": 1, "fsdp": 1, "tensor": 1}
  costs = count.rollouts(modules, settings, one_chip, 1, 1)
  draft = sum(costs[name].flops for name in count.DRAFT_STAGES)
  revision = sum(costs[name].flops for name in count.REVISION_STAGES)
  return draft, revision
