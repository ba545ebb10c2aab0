"""An exam out of a config."""

import jax
import ml_collections

from r3jax import experiment as experiment_lib
from r3jax.aot import costs
from r3jax.evaluation import questions
from r3jax.evaluation import rounds
from r3jax.evaluation import run
from r3jax.rewards import seen
from r3jax.rl import settings as settings_lib

_NOT_THE_RESULT = ("batch_size", "every")  # keys of config.eval


def exam(config: ml_collections.ConfigDict, experiment: experiment_lib.Experiment, mesh: jax.sharding.Mesh) -> run.Exam:
  """Returns the evaluation that a config describes.

  Raises:
    ValueError: the config cannot be used; the message says what must hold.
  """
  e, embedded = config.eval, config.reward.name == "shapes"
  if e.images_per_prompt < 1:
    raise ValueError(f"eval.images_per_prompt must be at least 1; got {e.images_per_prompt}")
  settings = experiment_lib.evaluation_settings(config, experiment.settings)
  evaluator = rounds.Evaluator(
      experiment.modules, settings, experiment.reward.on(mesh), experiment.parse(mesh), mesh, e.rounds, e.batch_size,
      e.seed, e.question_tokens)
  used = {key: value for key, value in e.to_dict().items() if key not in _NOT_THE_RESULT}
  return run.Exam(
      evaluator=evaluator,
      records=experiment.heldout,
      prompts=experiment.encode(experiment.heldout),
      images_per_prompt=e.images_per_prompt,
      examiner=questions.Examiner(tuple(e.ask), embedded, e.seed),
      segments=experiment.segments,
      decode=experiment.decode,
      boxes=seen.boxes if embedded else None,
      flush=experiment.reward.raise_together,
      flops=_flops(experiment.modules, settings),
      settings=used | {"ask": list(e.ask), "heldout": config.data.heldout},
  )


def _flops(modules: settings_lib.Modules, settings: settings_lib.Settings) -> tuple[float, float]:
  found = costs.rollouts(modules, settings, {"data": 1, "fsdp": 1, "tensor": 1}, 1, 1)
  total = lambda *names: sum(found[name].flops for name in names)
  return total("reason: think", "reason: draft"), total("reflect", "refine")
