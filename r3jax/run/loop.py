"""The training run: evaluate, iterate, checkpoint, evaluate again, report.

`run` is the program from its start to its end, `iterate` its loop.
"""

import contextlib
import dataclasses
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np

from r3jax import types
from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.evaluation import console
from r3jax.evaluation import evaluate
from r3jax.evaluation import sample_log
from r3jax.files import config_guard
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.files import texts
from r3jax.parallel import multihost
from r3jax.parallel import preemption
from r3jax.rewards.from_host import budget
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run import health
from r3jax.run import live_report
from r3jax.run import machine
from r3jax.run import profiling
from r3jax.run import sessions
from r3jax.run import skipped_batches
from r3jax.run import summary
from r3jax.run.logging import host_metrics
from r3jax.run.logging import metric_writer
from r3jax.run.logging import report_samples
from r3jax.run.logging import sinks
from r3jax.run.logging import speed
from r3jax.run.logging import timing

_NO_TIME = timing.Evaluations()
_MAX_REMARK = 240  # characters of a reason on the line of an iteration


def run(session: sessions.Session, policy: types.Params) -> dict:
  """Trains a policy and evaluates it before and after; resumes an interrupted run.

  The workdir has config.json already. The run adds metrics.jsonl, evaluation.jsonl, TensorBoard
  events, checkpoints/, evaluation/, report/ and summary.json; rewards/ where hosts compute the
  reward, and profile/ where iterations are traced.

  Args:
    session: Constants of the run, see `sessions.prepare`.
    policy: Policy before training.

  Returns:
    The summary of the run; `summary.write` stores it as summary.json.

  Raises:
    budget.BudgetExceeded: Too many images got no score; the run is saved and can be resumed.
    SystemExit: The process was asked to end; the run is saved and can be resumed.
    training.Unusable: No checkpoint can be used, or the state is not finite.
    training.SaveFailed: A checkpoint could not be written, or is not what was saved.
    health.Unhealthy: Updates are not finite, or ratios not 1; the last checkpoint is left as it is.
  """
  config = session.config
  preemption.ENDING.grace_seconds = config.preemption.grace_s
  files = session.files
  clock = timing.PhaseClock()
  num_parameters = summary.count_parameters(session, policy)
  logging.info("training %(trainable)d of %(all)d parameters", num_parameters)
  page = paths.absolute(files.report) / "index.html"
  logging.info("report: %s (from the first iteration on)", page)
  with jax.set_mesh(session.mesh):
    # Before anything is compiled, because it may fail; logs are cut to what is restored.
    start = resume(session, session.init(policy))
    clock.lap("setup")

    train_step = _no_step
    if start.done < config.total_steps:
      train_step = _compile(session, start.state)
    clock.lap("compile")

    session.experiment.reward.log_to(files.rewards, start.done)
    wandb = sinks.WandbSettings(**config.log.wandb)
    log_sinks = sinks.open_all(
      files.path,
      start.restored_step,
      wandb,
      config.to_dict(),
      config.log.tensorboard,
    )
    with contextlib.closing(metric_writer.MetricWriter(log_sinks)) as writer:
      before = session.evaluate(policy, 0, writer)
      clock.lap("evaluate before")
      evaluations = timing.Evaluations(
        evaluate.seconds(before.samples), config.eval.every
      )
      state = iterate(session, train_step, start, clock, writer, evaluations)
      after = session.evaluate(state.policy, config.total_steps, writer)
  clock.lap("evaluate after")

  # The report is written last, from the files that the run has left.
  run_summary = summary.make(
    session,
    clock.seconds,
    before,
    after,
  )
  run_summary["parameters"] = num_parameters
  if start.done == config.total_steps:
    # This start has run no iteration, and has no times to report.
    run_summary |= summary.former_times(files)
  summary.write(session, run_summary)
  return run_summary


def _compile(
  session: sessions.Session, state: train_state.TrainState
) -> sessions.Step:
  with console.heartbeat("compiling the step", _compilation(session.config)):
    train_step = session.compile(state)
  # Training needs the memory that compilation took.
  machine.return_freed_memory()
  return train_step


def _no_step(state, indices):
  """Stands for the step of a run that has no iteration left: nothing is compiled for it."""
  del state, indices
  raise AssertionError("a run with no iteration left must not run one")


@dataclasses.dataclass(frozen=True)
class Start:
  """Where a run starts from.

  Attributes:
    state: State to continue from.
    restored_step: Number of the iterations done; None where there was no checkpoint.
    checkpoints: Checkpoints of the run.
    batches: Yields the indices of the training prompts of every iteration that is left.
  """

  state: train_state.TrainState
  restored_step: int | None
  checkpoints: training.Checkpoints
  batches: Any

  @property
  def done(self) -> int:
    """Number of the iterations done."""
    return self.restored_step or 0


def resume(session: sessions.Session, state: train_state.TrainState) -> Start:
  """Restores the last good checkpoint of the run, if there is one.

  Drops the report samples and the evaluations of iterations that will be repeated. The order of
  sources is in docs/checkpoints.md#what-a-run-starts-from.

  Args:
    session: Constants of the run.
    state: State before the first iteration.

  Raises:
    training.Unusable: All checkpoints are damaged, or one cannot be read.
  """
  config = session.config
  folder = session.files.checkpoints
  batches = pipeline.prompt_iterator(
    len(session.experiment.train), config.groups_per_step, config.seed
  )
  checkpoints = training.Checkpoints(
    folder,
    config.checkpoint.every,
    config.checkpoint.keep,
    config_guard.fixed(session.identity, sessions.MAY_DIFFER),
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  # Arrays are restored with the shardings of this start; the last one may have had another mesh.
  restored = checkpoints.restore(abstract, batches)
  restored_step = None
  if restored is None:
    logging.info(
      "starts from the model %s: no checkpoint in %s",
      config.model.folder,
      folder,
    )
  else:
    restored_step, state = restored
    logging.info("starts from the checkpoint %s", folder / str(restored_step))
  start = Start(state, restored_step, checkpoints, batches)
  if not jax.process_index():
    sample_log.drop_after(session.files.report, restored_step)
    session.files.drop_evaluations_after(start.done)
  return start


def _ended(
  checkpoints: training.Checkpoints, number: int, total: int
) -> SystemExit:
  """Returns the exception that ends the process, once its last iteration is saved."""
  checkpoints.wait()
  checkpoints.stop_reading()
  return preemption.ENDING.saved(f"after iteration {number} of {total}")


@dataclasses.dataclass(frozen=True)
class _Records:
  """Everything that an iteration is written to.

  Attributes:
    session: Constants of the run.
    writer: Gets the metrics.
    progress: The line of the console.
    report: The page of the run.
  """

  session: sessions.Session
  writer: metric_writer.MetricWriter
  progress: timing.Progress
  report: live_report.LiveReport

  def add(
    self,
    number: int,
    indices: np.ndarray,
    metrics: dict[str, float],
    samples: stage_outputs.Samples,
  ) -> None:
    """Writes an iteration.

    Args:
      number: Of the iteration.
      indices: Of its prompts.
      metrics: What it has measured.
      samples: What it has sampled.
    """
    self.writer.write(number, metrics)
    self.progress.report(
      number,
      metrics["seconds/iteration"],
      _headline_scores(metrics),
      _remark(self.session, metrics),
    )
    skipped_batches.write(self.session, number, indices, metrics, samples)
    _report_samples(self.session, number, indices, samples, self.writer)
    self.report.update(number)


def iterate(
  session: sessions.Session,
  train_step: sessions.Step,
  start: Start,
  clock: timing.PhaseClock,
  writer: metric_writer.MetricWriter,
  evaluations: timing.Evaluations = _NO_TIME,
) -> train_state.TrainState:
  """Runs the remaining iterations; logs, checkpoints and evaluates on the way.

  Args:
    session: Constants of the run.
    train_step: Compiled step.
    start: Where the run starts from; its state is donated.
    clock: Adds up the time of the phases.
    writer: Gets the metrics of every iteration.
    evaluations: Evaluations of the run, for the time left; by default they take none.

  Returns:
    The state after the last iteration.

  Raises:
    budget.BudgetExceeded: Too many images got no score; the last iteration is saved.
    SystemExit: The process was asked to end, see `preemption`; the last iteration is saved.
    training.Unusable: The state is not finite; the checkpoints stay as they are.
    training.SaveFailed: A checkpoint could not be written, or is not what was saved.
    health.Unhealthy: As in `run`.
  """
  config = session.config
  ending = preemption.ENDING
  state = start.state
  progress = timing.Progress(config.total_steps, evaluations)
  report = live_report.LiveReport(session)
  records = _Records(session, writer, progress, report)
  stopwatch = timing.Stopwatch()
  rates = speed.of(session)
  failures = _budget(config)
  watch = health.watch(config)
  profiler = profiling.Profiler(session.files.profile, **config.profile)
  if _evaluation_is_due(config, start.done):
    # The last start may have ended between this iteration's checkpoint and its evaluation.
    session.evaluate(state.policy, start.done, writer)
  clock.lap("setup")

  with contextlib.closing(start.checkpoints), contextlib.closing(profiler):
    for number in range(start.done + 1, config.total_steps + 1):
      if not _compiles(config, number - start.done):
        ending.will_save(number)
      indices = next(start.batches)
      session.experiment.reward.begin(number)
      with profiler.iteration(number), stopwatch.part("step"):
        state, metrics, samples = _advance(session, train_step, state, indices)
      # The seconds of logging and checkpoints are those of the iteration before.
      metrics |= stopwatch.read()
      metrics |= rates.compute(metrics)
      metrics["seconds/iteration"] = clock.lap("train")

      with stopwatch.part("log"):
        records.add(number, indices, metrics, samples)

      watch.add(number, metrics)
      over_budget = failures.add(budget.failed_share(metrics))
      evaluation_due = _evaluation_is_due(config, number)
      must_end = ending.is_due(number)
      is_last = must_end or over_budget or number == config.total_steps
      save_now = evaluation_due or is_last
      with stopwatch.part("checkpoint"):
        start.checkpoints.save(number, state, start.batches, force=save_now)
      if over_budget:
        raise failures.error()
      if must_end:
        raise _ended(start.checkpoints, number, config.total_steps)

      if evaluation_due:
        # A start that resumes here must restore the policy that is evaluated.
        start.checkpoints.wait()
        _evaluate_between(session, state, number, clock, writer)
  ending.nothing_to_save()
  clock.lap("train")
  return state


def _budget(config: ml_collections.ConfigDict) -> budget.Budget:
  """Returns how many scores may be missing."""
  return budget.Budget(
    config.reward.max_failed_fraction, config.reward.failure_window
  )


def _evaluate_between(
  session: sessions.Session,
  state: train_state.TrainState,
  number: int,
  clock: timing.PhaseClock,
  writer: metric_writer.MetricWriter,
) -> None:
  """Evaluates the policy of a saved iteration."""
  preemption.ENDING.nothing_to_save()
  clock.lap("train")
  session.evaluate(state.policy, number, writer)
  clock.lap("evaluate between")


def _advance(
  session: sessions.Session,
  train_step: sessions.Step,
  state: train_state.TrainState,
  indices: np.ndarray,
) -> tuple[train_state.TrainState, dict[str, Any], stage_outputs.Samples]:
  """Runs one iteration; returns its state, its metrics on the host, and its samples."""
  reward = session.experiment.reward
  state, metrics, samples = train_step(state, indices)
  metrics = multihost.fetch(metrics)
  metrics[health.SKIPPED] = health.num_skipped(metrics)
  # Where the reward runs on hosts, a bug in one process must stop them all.
  reward.raise_together()
  metrics |= reward.metrics()
  metrics |= host_metrics.compute(session.experiment, state, indices, samples)
  return state, metrics, samples


def _headline_scores(metrics: dict[str, Any]) -> dict[str, float]:
  """Returns the scores of an iteration's line in the log."""
  scores = {"draft": metrics["reason/score"]}
  if "edit/score" in metrics:
    scores["edited"] = metrics["edit/score"]
  return scores


def _remark(session: sessions.Session, metrics: dict[str, Any]) -> str:
  """Returns how many images of an iteration have no score, and why; "" where all have one."""
  share = budget.failed_share(metrics)
  reason = session.experiment.reward.failure()
  if not share and not reason:
    return ""
  explanation = f": {reason}" if reason else ""
  return texts.shorten(
    f"{share:.1%} of the images have no score{explanation}", _MAX_REMARK
  )


def _compilation(config: ml_collections.ConfigDict) -> str:
  """Returns what to expect of the compilation of the step."""
  if config.step.mode == "split":
    return "the stages compile in the first iteration, for minutes"
  return "minutes the first time, seconds where the compilation cache has it"


def _compiles(config: ml_collections.ConfigDict, count: int) -> bool:
  """Returns whether the iteration with this number since the start compiles, for minutes."""
  return config.step.mode == "split" and count == 1


def _evaluation_is_due(config: ml_collections.ConfigDict, number: int) -> bool:
  """Returns whether an iteration between the first and the last is followed by an evaluation."""
  if not 0 < number < config.total_steps:
    return False
  return config.eval.every > 0 and number % config.eval.every == 0


def _report_samples(
  session: sessions.Session,
  number: int,
  indices: np.ndarray,
  samples: stage_outputs.Samples,
  writer: metric_writer.MetricWriter,
) -> None:
  """Adds an iteration's samples to the report, where they are due."""
  every = session.config.log.samples_every
  if every and (number == 1 or number % every == 0):
    samples = multihost.fetch(samples)
    report_samples.write(session, number, indices, samples, writer)


@ownership.releasing()
def train(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Trains the model of a config in one process; resumes an interrupted run.

  Args:
    config: Config, see `configs/r3_geneval.py`.
    workdir: Folder of the run.

  Returns:
    The summary of the run; `summary.write` stores it as summary.json.

  Raises:
    ValueError: The config, the model or the workdir cannot be used.
    budget.BudgetExceeded: Too many images got no score; the run is saved and can be resumed.
    training.SaveFailed: A checkpoint could not be written, or is not what was saved.
    health.Unhealthy: Updates are not finite, or ratios not 1; the last checkpoint is left as it is.
  """
  session, policy = sessions.prepare(config, workdir)
  return run(session, policy)
