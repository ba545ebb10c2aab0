"""Builds the evaluation that a config describes."""

import json

import jax
import ml_collections

from r3jax.agent import actors
from r3jax.agent import rollout_settings
from r3jax.costs import count
from r3jax.data import records
from r3jax.evaluation import chains
from r3jax.evaluation import evaluate
from r3jax.evaluation import questions
from r3jax.run import setup
from r3jax.worlds import registry

_NOT_THE_RESULT = ("batch_size", "every")  # keys of config.eval
# keys of config.reward that change scores; services say more
_REWARD = ("name", "value", "image_format", "judge")


def evaluation(
  config: ml_collections.ConfigDict,
  experiment: setup.Experiment,
  mesh: jax.sharding.Mesh,
) -> evaluate.Evaluation:
  """Returns the evaluation that a config describes.

  Raises:
    ValueError: the config cannot be used; the message says what must hold.
  """
  e = config.eval
  # What the world sees counts only where its verifier is the reward.
  verifies = config.reward.name == registry.OF_WORLD
  world = experiment.world if verifies else None
  if e.images_per_prompt < 1:
    raise ValueError(
      f"eval.images_per_prompt must be at least 1; got {e.images_per_prompt}"
    )
  settings = setup.evaluation_settings(config, experiment.rollout)
  sampler = chains.Sampler(
    experiment.modules,
    settings,
    experiment.reward.on(mesh),
    experiment.parse(mesh),
    mesh,
    e.rounds,
    e.batch_size,
    e.seed,
    e.question_tokens,
  )
  return evaluate.Evaluation(
    sampler=sampler,
    records=experiment.heldout,
    prompts=experiment.encode(experiment.heldout),
    images_per_prompt=e.images_per_prompt,
    questionnaire=questions.Questionnaire(
      tuple(e.ask), world.quiz if world else None, e.seed
    ),
    segments=experiment.segments,
    decode=experiment.decode,
    boxes=world.boxes if world else None,
    flush=experiment.reward.raise_together,
    flops=_flops(experiment.modules, settings),
    settings=_settings(config, experiment.heldout),
  )


def _settings(
  config: ml_collections.ConfigDict, heldout: tuple[records.Prompt, ...]
) -> dict:
  """Returns what an evaluation's results depend on beside the model, as JSON gives it back."""
  used = {
    name: config[name].to_dict()
    for name in ("image", "sequence", "text", "reason", "refine")
  }
  used["eval"] = {
    key: value
    for key, value in config.eval.to_dict().items()
    if key not in _NOT_THE_RESULT
  }
  used["reward"] = {
    key: value
    for key, value in config.reward.to_dict().items()
    if key in _REWARD
  }
  # Evaluations on two worlds differ, although both configs say "world".
  if config.reward.name == registry.OF_WORLD:
    used["reward"]["name"] = config.world
  source = config.data.heldout
  used["heldout"] = {
    "source": config.world if source == registry.OF_WORLD else source,
    "sha256": records.sha256(heldout),
  }
  return json.loads(json.dumps(used))


def _flops(
  modules: actors.Modules, settings: rollout_settings.RolloutSettings
) -> tuple[float, float]:
  found = count.rollouts(
    modules, settings, {"data": 1, "fsdp": 1, "tensor": 1}, 1, 1
  )
  total = lambda *names: sum(found[name].flops for name in names)
  return total("reason: think", "reason: draft"), total("reflect", "refine")
