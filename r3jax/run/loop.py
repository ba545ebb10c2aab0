"""The main job: evaluate, iterate, checkpoint, evaluate again, report."""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import time

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import experience
from r3jax.checkpoint import training
from r3jax.data import contamination
from r3jax.data import pipeline
from r3jax.evaluation import evaluate as evaluate_lib
from r3jax.evaluation import numbers
from r3jax.evaluation import result
from r3jax.evaluation import summary as summary_lib
from r3jax.files import atomic
from r3jax.files import config_guard
from r3jax.files import jsonl
from r3jax.model import parameters as parameters_lib
from r3jax.parallel import meshes
from r3jax.parallel import multihost
from r3jax.parallel import sharding
from r3jax.report import page
from r3jax.rewards import control
from r3jax.rewards import outcome
from r3jax.rewards.from_host import budget as budget_lib
from r3jax.rl import iteration as iteration_lib
from r3jax.rl import programs as programs_lib
from r3jax.rl import train_state
from r3jax.run import held_out
from r3jax.run import machine
from r3jax.run import profiling
from r3jax.run import program_cache
from r3jax.run import setup
from r3jax.run import workdir as workdir_lib
from r3jax.run.logging import metrics as metrics_lib
from r3jax.run.logging import observe
from r3jax.run.logging import sinks
from r3jax.sequence import thoughts

# Keys of the config that do not change what an iteration computes.
MAY_DIFFER = (
  "mesh",
  "sharding",
  "total_steps",
  "log",
  "eval",
  "checkpoint",
  "step",
  "profile",
  "data.heldout",
  *(
    f"reward.{key}"
    for key in (
      "endpoints",
      "token_env",
      "batch",
      "cache",
      "client",
      "max_failed_fraction",
      "failure_window",
    )
  ),
)
_CHARTS = (
  "reason/score",
  "reason/strict",
  "edit/before",
  "edit/score",
  "edit/improvement",
  "edit/edit_rate",
  "edit/stop_when_right",
  "edit/stop_when_wrong",
  "reason/format",
  "edit/format",
  "reason/tokens",
  "edit/tokens",
  "reason/gradient_norm",
  "edit/gradient_norm",
  "reason/text_kl",
  "edit/text_kl",
  "mismatch/reason_text",
  "mismatch/reason_image",
  "mismatch/edit_text",
  "mismatch/edit_image",
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


def _iteration(
  config, experiment: setup.Experiment, mesh
) -> iteration_lib.Iteration:
  iteration = experiment.iteration(mesh)
  if not config.reward.shuffle:
    return iteration
  return dataclasses.replace(
    iteration,
    reward=control.shuffled(iteration.reward, config.seed, iteration_lib.AXIS),
  )


def _samples(
  experiment,
  step: int,
  rows: np.ndarray,
  samples: iteration_lib.Samples,
  number: int,
) -> Iterator[tuple[dict, list]]:
  """Yields report samples of the first sample of the first `number` groups of both halves, and their images."""
  size, drafts, edits = (
    experiment.settings.group_size,
    samples.drafts,
    samples.edits,
  )
  text = lambda rollout, i: experiment.decode(
    rollout.ids[i : i + 1], rollout.lengths[i : i + 1]
  )[0]
  for group in range(min(number, len(rows))):
    i = group * size
    facts = dict(
      step=step,
      key=f"{step:06d}-{group}",
      **_asked(experiment.train[rows[group]]),
    )
    thought = dict(
      **outcome.as_json(samples.draft_score, i),
      text=text(drafts.rollout.text, i),
      instruction="",
      stop=False,
    )
    yield facts | {"turns": [thought]}, [drafts.rollout.images[i]]
    if edits is None:
      continue
    answer, before = text(edits.text, i), float(edits.before[i])
    facts = dict(
      step=step,
      key=f"{step:06d}-{group}-edit",
      **_asked(experiment.train[rows[edits.row[i]]]),
    )
    source = dict(
      label="from the pool",
      score=before if edits.before_valid[i] else None,
      text="",
      instruction="",
      stop=False,
    )
    edit = dict(
      label="edited",
      **outcome.as_json(samples.edit_score, i),
      text=answer,
      instruction=thoughts.edit_instruction(answer),
      stop=bool(edits.parsed.stop[i]),
    )
    image = edits.source.images[
      i * edits.source.images.shape[0] // edits.row.shape[0]
    ]
    yield facts | {"turns": [source, edit]}, [image, edits.refined.images[i]]


def _asked(record: dict) -> dict:
  return {"prompt": record["prompt"], "tag": record["tag"]}


def _parameters(session: "Session", policy: types.Params) -> dict[str, int]:
  """Returns how many numbers training changes, and how many the model has."""
  sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  und = jax.tree.map(
    lambda leaf, expert: leaf if expert == "und" else (),
    policy,
    train_state.expert_labels(policy),
  )
  kept = sizes(und) if session.config.optimizer.freeze_und else 0
  return {
    "trainable": sizes(policy) - kept,
    "all": sizes(session.frozen.whole(policy)) + sizes(session.frozen.towers),
  }


@dataclasses.dataclass(frozen=True)
class Session:
  """A run's constants, checked and loaded.

  Attributes:
    config: of the run.
    files: its workdir.
    experiment: what the config says.
    mesh: all devices.
    iteration: the stages of the step.
    prompts: of the training set, one row per record (numpy).
    frozen: parameters that the step reads; the reference is the policy before training.
    exam: on the held-out set, on the same mesh.
    leaked: which of the held-out prompts are trained on, or were before.
  """

  config: ml_collections.ConfigDict
  files: workdir_lib.Workdir
  experiment: setup.Experiment
  mesh: jax.sharding.Mesh
  iteration: iteration_lib.Iteration
  prompts: experience.Prompts
  frozen: iteration_lib.Frozen
  exam: evaluate_lib.Exam
  leaked: contamination.Leaked

  def init(self, policy) -> train_state.TrainState:
    """Returns the state before the first iteration; it shares no buffer with `policy`."""
    abstract = jax.eval_shape(self.iteration.optimizer.init, policy)
    shardings = sharding.like_parameters(
      abstract,
      parameters_lib.shardings(self.experiment.modules.bagel, self.mesh),
      self.mesh,
    )
    moments = jax.jit(self.iteration.optimizer.init, out_shardings=shardings)(
      policy
    )
    step = jax.device_put(np.int32(0), sharding.replicated(self.mesh))
    return train_state.TrainState(jax.tree.map(jnp.copy, policy), moments, step)

  def compile(self, state: train_state.TrainState, programs: epath.Path | None):
    """Returns the step, (state, rows of the training set) -> (state, metrics, samples).

    It consumes the state. In split mode the stages are compiled when they first run. With a folder
    of programs the fused step is traced only if it is not there yet.
    """
    seed, shardings = (
      np.uint32(self.config.seed),
      jax.tree.map(lambda x: x.sharding, state),
    )
    batch = lambda rows: jax.tree.map(lambda x: x[rows], self.prompts)
    if self.config.step.mode == "split":
      split = programs_lib.split(self.iteration, self.mesh, shardings)
      return lambda state, rows: programs_lib.run_timed(
        split, state, self.frozen, batch(rows), seed
      )
    fused = programs_lib.fused(self.iteration, self.mesh)
    arguments = (
      state,
      self.frozen,
      batch(np.zeros(self.config.groups_per_step, np.int32)),
      seed,
    )
    if programs and not self.experiment.on_host:
      fused = program_cache.load_or_export(
        programs, self._constants(), fused, arguments
      )
    fused = jax.jit(
      fused, donate_argnums=0, out_shardings=(shardings, None, None)
    )
    # LLVM's costly passes take long on CPU and were not seen to make the step faster.
    options = (
      {"xla_llvm_disable_expensive_passes": True}
      if jax.default_backend() == "cpu"
      else None
    )
    compiled = fused.lower(*arguments).compile(compiler_options=options)
    return lambda state, rows: compiled(state, self.frozen, batch(rows), seed)

  def _constants(self) -> list[str]:
    """Returns what the step computes with beside its arguments: the config and the model's description."""
    used = {
      key: value
      for key, value in self.config.to_dict().items()
      if key not in (*MAY_DIFFER, "seed")
    }
    folder = self.experiment.pretrained.folder
    # sizes and tokenizer
    described = sorted([*folder.glob("*.json"), *folder.glob("*.txt")])
    return [
      json.dumps(used, sort_keys=True),
      *(path.read_text() for path in described),
    ]

  def evaluate(
    self, policy, step: int, writer: metrics_lib.MetricWriter
  ) -> list[dict]:
    """Evaluates a policy on the held-out prompts, unless that has been done; returns the samples.

    Raises:
      budget.BudgetExceeded: too few images have a score.
    """
    samples = summary_lib.finished(
      self.exam, self.files.evaluation(step)
    ) or self._evaluate(policy, step)
    writer.write_evaluation(step, numbers.numbers(result.of_samples(samples)))
    return samples

  def _evaluate(self, policy, step: int) -> list[dict]:
    folder = self.files.evaluation(step)
    facts = summary_lib.Facts(
      f"r3jax: evaluation of iteration {step}",
      step,
      self.leaked,
      self.exam.flops,
      self.config.seed,
    )
    reward = self.experiment.reward
    reward.begin(step)
    with reward.logging_to(folder / "rewards"):
      samples = self.exam.sit(
        self.frozen.whole(policy), self.frozen.towers, folder, step
      )
    reward.metrics()  # so that those of the iterations go on
    budget_lib.check_evaluation(
      result.of_samples(samples).missing, self.config.reward.max_failed_fraction
    )
    summary_lib.conclude(folder, samples, facts)
    return samples


def _check(config: ml_collections.ConfigDict, files: workdir_lib.Workdir):
  """Raises ValueError for what only this module reads."""
  if config.step.mode not in ("fused", "split"):
    raise ValueError(
      f"step.mode must be 'fused' or 'split'; got {config.step.mode!r}"
    )
  for section, key, least in (
    ("checkpoint", "every", 1),
    ("checkpoint", "keep", 1),
    ("eval", "every", 0),
  ):
    if config[section][key] < least:
      raise ValueError(
        f"{section}.{key} must be at least {least}; got {config[section][key]}"
      )
  profiling.check(
    config.profile.start, config.profile.steps, config.total_steps
  )
  sinks.check(sinks.WandbSettings(**config.log.wandb))
  done = training.latest_step(files.checkpoints) or 0
  if config.total_steps < done:
    raise ValueError(
      f"total_steps ({config.total_steps}) must be at least the iterations done there ({done})"
    )


def prepare(
  config: ml_collections.ConfigDict, workdir: str
) -> tuple[Session, types.Params]:
  """Checks everything that can be checked before compilation, loads the model, opens the workdir.

  Args:
    config: see `configs/r3_geneval.py`.
    workdir: of a new run, or of one to go on with; see `run`.

  Returns:
    What a run computes with, and the starting policy.

  Raises:
    ValueError: the config, the model or the workdir cannot be used; the workdir is as it was.
  """
  files = workdir_lib.Workdir(epath.Path(workdir))
  _check(config, files)
  experiment = setup.build(config)
  mesh = meshes.make_mesh(**config.mesh)
  iteration = _iteration(config, experiment, mesh)
  exam, prompts = (
    held_out.exam(config, experiment, mesh),
    experiment.encode(experiment.train),
  )
  policy, frozen = experiment.start(mesh, config.seed)
  config_guard.check_writable(workdir)
  constants = {
    "weights": experiment.pretrained.fingerprint(),  # the reference of the KL
    "training_prompts": hashlib.sha256(
      json.dumps(experiment.train).encode()
    ).hexdigest(),
  }
  if services := experiment.reward.describe():
    constants["reward_services"] = services
  config_guard.write_or_check(workdir, config.to_dict() | constants, MAY_DIFFER)
  before, complete = workdir_lib.trained_on(config.model.folder)
  leaked = contamination.leaked(
    [*before, *experiment.train], experiment.heldout, complete
  )
  if not jax.process_index():
    workdir_lib.write_training_prompts(files.path, experiment.train)
  return Session(
    config, files, experiment, mesh, iteration, prompts, frozen, exam, leaked
  ), policy


def run(
  session: Session, policy: types.Params, programs: epath.Path | None = None
) -> dict:
  """Runs the main job; resumes where a run in the same workdir stopped.

  The workdir gets metrics.jsonl, TensorBoard events, checkpoints/, evaluation/, report/index.html
  and summary.json, beside the config.json that is there; rewards/ where Python computes the reward,
  profile/ where iterations are traced.

  Args:
    session, policy: as `prepare` returns them.
    programs: folder that keeps the traced step between starts, see `io/programs.py`; None keeps none.

  Returns:
    The summary.

  Raises:
    budget.BudgetExceeded: too many images got no score; the run is saved and can go on.
  """
  clock, config, files = Clock(), session.config, session.files
  parameters = _parameters(session, policy)
  logging.info("training %(trainable)d of %(all)d parameters", parameters)
  with jax.set_mesh(session.mesh):
    state = session.init(policy)
    clock.lap("setup")
    step = session.compile(state, programs)
    machine.return_freed_memory()
    clock.lap("compile")
    logging.info("compiled the step in %.1f s", clock.seconds["compile"])
    done = training.latest_step(files.checkpoints)
    session.experiment.reward.log_to(files.rewards, done or 0)
    wandb = sinks.WandbSettings(**config.log.wandb)
    with contextlib.closing(
      metrics_lib.MetricWriter(
        sinks.open_all(files.path, done, wandb, config.to_dict())
      )
    ) as writer:
      before = session.evaluate(policy, 0, writer)
      clock.lap("evaluate before")
      state = _iterate(session, step, state, clock, writer)
      after = session.evaluate(state.policy, config.total_steps, writer)
  clock.lap("evaluate after")
  summary = _summary(
    session, clock, result.of_samples(before), result.of_samples(after)
  )
  summary |= {"parameters": parameters}
  _write_summary(files, summary)
  return summary


def _save_samples(
  session: Session,
  step: int,
  rows: np.ndarray,
  samples: iteration_lib.Samples,
  writer: metrics_lib.MetricWriter,
):
  """Keeps an iteration's first samples for the report, and shows them where metrics are shown."""
  if jax.process_index():
    return
  shown, files = [], {}
  for sample, images in _samples(
    session.experiment, step, rows, samples, session.config.log.samples
  ):
    paths = [
      f"images/{sample['key']}_{turn}.png" for turn in range(len(images))
    ]
    files |= dict(zip(paths, images))
    shown.append(
      sample
      | {
        "turns": [
          {"image": path, **turn} for path, turn in zip(paths, sample["turns"])
        ]
      }
    )
  page.append_samples(session.files.report, shown, files)
  writer.write_pictures(step, observe.pictures(shown, files))


def _do(
  session: Session, step, state: train_state.TrainState, rows: np.ndarray
):
  """Does one iteration; returns its state, metrics (numpy) and samples."""
  reward = session.experiment.reward
  state, metrics, samples = step(state, rows)
  metrics = multihost.fetch(metrics)
  reward.raise_together()
  return (
    state,
    metrics
    | reward.metrics()
    | observe.metrics(session.experiment, state, rows, samples),
    samples,
  )


def _iterate(
  session: Session,
  step,
  state: train_state.TrainState,
  clock: Clock,
  writer: metrics_lib.MetricWriter,
) -> train_state.TrainState:
  """Runs the iterations that are left; saves, logs and samples on the way."""
  config, files, reward, stop = (
    session.config,
    session.files,
    session.experiment.reward,
    False,
  )
  prompts = pipeline.prompt_iterator(
    len(session.experiment.train), config.groups_per_step, config.seed
  )
  checkpoints = training.Checkpoints(
    files.checkpoints, config.checkpoint.every, config.checkpoint.keep
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  restored = checkpoints.restore(abstract, prompts)
  done, state = (restored[0], restored[1]) if restored else (0, state)
  if not jax.process_index():
    page.drop_samples_after(files.report, done if restored else None)
    files.drop_evaluations_after(done)
  progress = metrics_lib.Progress(config.total_steps, done)
  budget = budget_lib.Budget(
    config.reward.max_failed_fraction, config.reward.failure_window
  )
  profiler = profiling.Profiler(
    files.profile, config.profile.start, config.profile.steps
  )
  stopwatch = metrics_lib.Stopwatch()
  due = lambda number: (
    config.eval.every
    and number % config.eval.every == 0
    and 0 < number < config.total_steps
  )
  if due(done):  # the last start may have ended before it
    session.evaluate(state.policy, done, writer)
  clock.lap("setup")
  with contextlib.closing(checkpoints), contextlib.closing(profiler):
    for number in range(done + 1, config.total_steps + 1):
      rows = next(prompts)
      reward.begin(number)
      with profiler.iteration(number), stopwatch.part("step"):
        state, metrics, samples = _do(session, step, state, rows)
      metrics |= stopwatch.read() | {"seconds/iteration": clock.lap("train")}
      with stopwatch.part("log"):
        writer.write(number, metrics)
        progress.report(
          number,
          {
            "draft": metrics["reason/score"],
            "edited": metrics.get("edit/score", np.nan),
          },
        )
        if config.log.samples_every and (
          number % config.log.samples_every == 0 or number == 1
        ):
          _save_samples(session, number, rows, multihost.fetch(samples), writer)
      stop = budget.add(budget_lib.failed_share(metrics))
      with stopwatch.part("checkpoint"):
        checkpoints.save(
          number,
          state,
          prompts,
          {},
          force=stop or due(number) or number == config.total_steps,
        )
      if stop:
        break
      if due(number):
        # what is evaluated is what a later start goes on from
        checkpoints.wait()
        clock.lap("train")
        session.evaluate(state.policy, number, writer)
        clock.lap("evaluate between")
  clock.lap("train")
  if stop:
    raise budget.error()
  return state


def _summary(
  session: Session, clock: Clock, before: result.Result, after: result.Result
) -> dict:
  config, files, found = (
    session.config,
    session.files,
    session.experiment.contamination,
  )
  metrics = jsonl.read(files.path / "metrics.jsonl")
  iterations = [row["seconds/iteration"] for row in metrics[1:] or metrics]
  return {
    "title": f"r3jax: {config.total_steps} iterations, seed {config.seed}"
    + (
      " (CONTAMINATED: trained on test prompts)"
      if session.leaked.contaminated
      else ""
    ),
    "scores": numbers.compare(before, after, config.seed),
    "last round minus draft": {
      "before": numbers.refinement(before, config.seed),
      "after": numbers.refinement(after, config.seed),
    },
    "images without a score": {
      "before": before.missing,
      "after": after.missing,
    },
    "behaviour": {
      "before": numbers.behaviour(before),
      "after": numbers.behaviour(after),
    },
    "leaked": dataclasses.asdict(session.leaked),
    "contamination": found.to_json(),
    "iterations": config.total_steps,
    "seed": config.seed,
    "seconds": clock.seconds
    | (
      {"median iteration": float(np.median(iterations))} if iterations else {}
    ),
    "compile_seconds": clock.seconds["compile"],
    "peak_memory_gib": machine.peak_memory() / 2**30,
    "versions": machine.versions(),
  }


def _write_summary(files: workdir_lib.Workdir, summary: dict):
  if jax.process_index():
    return
  text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
  metrics = jsonl.read(files.path / "metrics.jsonl")
  page.write_report(
    files.report, summary, metrics, page.read_samples(files.report), _CHARTS
  )
  # Last: a run with a summary is complete.
  atomic.write_text(files.path / "summary.json", text)
