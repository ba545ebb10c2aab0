"""The main job: evaluate, iterate, checkpoint, evaluate again, report."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import resource
import time
from typing import Iterator

from absl import logging
import jax
import ml_collections
import numpy as np

from r3jax import evaluate
from r3jax import experiment as experiment_lib
from r3jax import metrics as metrics_lib
from r3jax.data import pipeline
from r3jax.io import checkpoints as checkpoints_lib
from r3jax.io import config_guard
from r3jax.io import jsonl
from r3jax.io import report
from r3jax.parallel import mesh as mesh_lib
from r3jax.parallel import rules
from r3jax.rl import rollout as rollout_lib
from r3jax.rl import state as state_lib
from r3jax.rl import step as step_lib

# Keys of the config that do not change what an iteration computes.
MAY_DIFFER = ("mesh", "total_steps", "log", "eval", "checkpoint", "step", "data.heldout")
_CHARTS = (
    "reason/score", "reason/strict", "edit/before", "edit/score", "edit/improvement", "edit/edit_rate",
    "edit/stop_when_right", "edit/stop_when_wrong", "reason/format", "edit/format", "reason/tokens",
    "edit/tokens", "reason/gradient_norm", "edit/gradient_norm", "reason/text_kl", "edit/text_kl",
    "mismatch/reason_text", "mismatch/reason_image", "mismatch/edit_text", "mismatch/edit_image",
)


class Clock:
  """Seconds spent in the named stages of a run."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._last = time.monotonic()

  def lap(self, stage: str) -> float:
    """Books the time since the last lap on a stage; returns it."""
    now = time.monotonic()
    spent, self._last = now - self._last, now
    self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
    return spent


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled step and what it is called with."""

  step: object  # (state, frozen, prompts, seed) -> (state, metrics, Samples)
  frozen: step_lib.Frozen
  prompts: rollout_lib.Prompts  # of the whole training set, numpy
  seed: int

  def __call__(self, state: state_lib.TrainState, rows: np.ndarray):
    """Runs one iteration on the prompts of the given rows."""
    batch = jax.tree.map(lambda x: x[rows], self.prompts)
    return self.step(state, self.frozen, batch, np.uint32(self.seed))


def _shuffled(reward: step_lib.Reward) -> step_lib.Reward:
  """Gives every sample the score of another one: the control in which nothing can be learned."""

  def shuffled(images, target):
    score = reward(images, target)
    order = jax.random.permutation(jax.random.key(score.value.shape[0]), score.value.shape[0])
    return jax.tree.map(lambda x: x[order], score)

  return shuffled


def _iteration(config, experiment: experiment_lib.Experiment, mesh) -> step_lib.Iteration:
  iteration = experiment.iteration(mesh)
  if not config.reward.shuffle:
    return iteration
  return dataclasses.replace(iteration, reward=_shuffled(iteration.reward))


def _compiled(config, iteration: step_lib.Iteration, mesh, arguments):
  """Returns the step in the configured mode, compiled where that is one program."""
  if config.step.mode == "split":
    split = step_lib.Split(iteration, mesh)
    return lambda *args: step_lib.run(split, *args)
  fused = jax.jit(step_lib.fused(iteration, mesh), donate_argnums=0)
  return fused.lower(*arguments).compile()


def _evaluator(config, experiment: experiment_lib.Experiment, mesh) -> evaluate.Evaluator:
  e = config.eval
  return evaluate.Evaluator(
      experiment.modules,
      experiment_lib.evaluation_settings(config, experiment.settings),
      experiment.reward(mesh),
      experiment.parse(mesh),
      mesh,
      e.rounds,
      e.batch_size,
      e.seed,
  )


def _evaluate(config, experiment, evaluator: evaluate.Evaluator, policy, towers) -> evaluate.Result:
  images = config.eval.images_per_prompt
  rounds = evaluator.run(policy, towers, experiment.encode(experiment.heldout), images)
  tags = [record["tag"] for record in experiment.heldout for _ in range(images)]
  return evaluate.result(rounds, tags)


def _samples(experiment, step: int, rows: np.ndarray, samples: step_lib.Samples, number: int) -> Iterator:
  """Yields report samples: the first sample of the first `number` groups of the edit half."""
  size, decode = experiment.settings.group_size, experiment.tokenizer.decode
  text = lambda rollout, i: decode(rollout.ids[i, 1 : rollout.lengths[i] - 1].tolist())
  value = lambda score, i: float(score.value[i]) if score.valid[i] else float("nan")
  drafts, edits = samples.drafts, samples.edits
  for i in range(0, min(number * size, len(rows) * size), size):
    record = experiment.train[rows[i // size]]
    shown = dict(
        step=step, prompt=record["prompt"], tag=record["tag"], thought=text(drafts.rollout.text, i),
        draft=drafts.rollout.images[i], draft_score=value(samples.draft_score, i),
    )
    yield report.RolloutSample(**shown)
    if edits is None:
      continue
    record = experiment.train[rows[edits.row[i]]]
    answer, _, instruction = text(edits.text, i).rpartition("</think>")
    source = edits.source.images[i * edits.source.images.shape[0] // edits.row.shape[0]]
    yield report.RolloutSample(
        step=step, prompt=record["prompt"], tag=record["tag"], thought="(drawn from the pool)",
        draft=source, draft_score=float(edits.before[i]), reflection=answer, instruction=instruction.strip(),
        refined=edits.refined.images[i], refined_score=value(samples.edit_score, i),
    )


def _versions() -> dict[str, str]:
  names = ("r3jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
  found = {name: importlib.metadata.version(name) for name in names[1:]}
  return found | {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The files of a run."""

  path: pathlib.Path

  @property
  def report(self) -> pathlib.Path:
    """Folder of the page."""
    return self.path / "report"

  def evaluation(self, step: int) -> pathlib.Path:
    """File of an evaluation's result."""
    return self.path / "evaluation" / f"step_{step:06d}.json"

  def save_evaluation(self, step: int, found: evaluate.Result):
    """Writes a result; complete or not at all."""
    path = self.evaluation(step)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found.to_json()))
    partial.replace(path)


def _restore(config, checkpoints, abstract_state, iterator, init):
  restored = checkpoints.restore(abstract_state, iterator)
  if restored is None:
    return 0, init(), None
  step, state, _ = restored
  logging.info("resuming after iteration %d of %d", step, config.total_steps)
  return step, state, step


def run(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Runs the main job; resumes where a run in the same workdir stopped.

  Args:
    config: see `configs/r3_geneval.py`.
    workdir: gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, evaluation/,
      report/index.html and summary.json.

  Returns:
    The summary.

  Raises:
    ValueError: the config, the model or the workdir cannot be used; before anything is compiled.
  """
  clock = Clock()
  files = Workdir(pathlib.Path(workdir))
  experiment = experiment_lib.build(config)
  mesh = mesh_lib.make_mesh(**config.mesh)
  iteration = _iteration(config, experiment, mesh)
  train_prompts, heldout = experiment.encode(experiment.train), experiment.encode(experiment.heldout)
  del heldout  # encoded here only to refuse what does not fit before anything is compiled
  with jax.set_mesh(mesh):
    policy, towers = experiment.load(mesh)
    config_guard.check_writable(workdir)
    config_guard.write_or_check(workdir, config.to_dict(), MAY_DIFFER)
    return _run(config, files, clock, experiment, iteration, mesh, train_prompts, policy, towers)


def _run(config, files, clock, experiment, iteration, mesh, train_prompts, policy, towers) -> dict:
  shardings = rules.like_parameters(
      jax.eval_shape(lambda: state_lib.init_state(policy, iteration.optimizer)),
      experiment.policy_shardings(mesh), mesh,
  )
  init = jax.jit(lambda: state_lib.init_state(policy, iteration.optimizer), out_shardings=shardings)
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init), shardings
  )
  prompts = pipeline.prompt_iterator(len(experiment.train), config.groups_per_step, config.seed)
  checkpoints = checkpoints_lib.Checkpoints(files.path / "checkpoints", config.checkpoint.every, config.checkpoint.keep)
  step, state, restored_step = _restore(config, checkpoints, abstract, prompts, init)
  writer = metrics_lib.MetricWriter(files.path, restored_step)
  report.drop_samples_after(files.report, restored_step)
  clock.lap("setup")

  reference = policy if experiment.settings.loss.needs_reference else None
  frozen = step_lib.Frozen(towers, reference)
  example = jax.tree.map(lambda x: x[: config.groups_per_step], train_prompts)
  compiled = _compiled(config, iteration, mesh, (abstract, frozen, example, np.uint32(config.seed)))
  program = Program(compiled, frozen, train_prompts, config.seed)
  compile_seconds = clock.lap("compile")
  logging.info("compiled the step in %.1f s", compile_seconds)

  evaluator = _evaluator(config, experiment, mesh)
  if not files.evaluation(0).exists():
    files.save_evaluation(0, _evaluate(config, experiment, evaluator, policy, towers))
    clock.lap("evaluate before")
  progress = metrics_lib.Progress(config.total_steps, step)
  while step < config.total_steps:
    rows = next(prompts)
    state, found, samples = program(state, rows)
    found = jax.device_get(found)
    step += 1
    found["seconds/iteration"] = clock.lap("train")
    writer.write(step, found)
    progress.report(step, {"draft": found["reason/score"], "edited": found.get("edit/score", np.nan)})
    if config.log.samples_every and (step % config.log.samples_every == 0 or step == 1):
      shown = jax.device_get(samples)
      report.append_samples(files.report, list(_samples(experiment, step, rows, shown, config.log.samples)))
    checkpoints.save(step, state, prompts, {}, force=step == config.total_steps)
  checkpoints.close()
  writer.close()
  clock.lap("train")
  found = _evaluate(config, experiment, evaluator, state.policy, towers)
  files.save_evaluation(step, found)
  clock.lap("evaluate after")
  summary = _summary(config, files, clock, found, step)
  _write_summary(files, summary)
  return summary


def _summary(config, files: Workdir, clock: Clock, after: evaluate.Result, step: int) -> dict:
  before = evaluate.Result.from_json(json.loads(files.evaluation(0).read_text()))
  metrics = jsonl.read(files.path / "metrics.jsonl")
  iterations = [row["seconds/iteration"] for row in metrics[1:]] or [float("nan")]
  return {
      "title": f"r3jax: {config.total_steps} iterations, seed {config.seed}",
      "scores": evaluate.compare(before, after, config.seed),
      "last round minus draft": {
          "before": evaluate.refinement(before, config.seed), "after": evaluate.refinement(after, config.seed)
      },
      "behaviour": {"before": evaluate.behaviour(before), "after": evaluate.behaviour(after)},
      "iterations": step,
      "seed": config.seed,
      "seconds": clock.seconds | {"median iteration": float(np.median(iterations))},
      "compile_seconds": clock.seconds["compile"],
      "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
      "versions": _versions(),
  }


def _write_summary(files: Workdir, summary: dict):
  if jax.process_index():
    return
  partial = files.path / "summary.json.partial"
  partial.write_text(json.dumps(summary, indent=1) + "\n")
  metrics = jsonl.read(files.path / "metrics.jsonl")
  report.write_report(files.report, summary, metrics, report.read_samples(files.report), _CHARTS)
  os.replace(partial, files.path / "summary.json")
