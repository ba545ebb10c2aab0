"""The main job: evaluate, iterate, checkpoint, evaluate again, report."""

from collections.abc import Iterator
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import re
import resource
import sys
import time

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import evaluate
from r3jax import experiment as experiment_lib
from r3jax import metrics as metrics_lib
from r3jax import observe
from r3jax import profiling
from r3jax import sinks
from r3jax import types
from r3jax.data import pipeline
from r3jax.io import checkpoints as checkpoints_lib
from r3jax.io import config_guard
from r3jax.io import jsonl
from r3jax.io import programs as programs_lib
from r3jax.io import report
from r3jax.models import policy as policy_lib
from r3jax.parallel import mesh as mesh_lib
from r3jax.parallel import multihost
from r3jax.parallel import rules
from r3jax.rewards import budget as budget_lib
from r3jax.rewards import format as format_lib
from r3jax.rl import rollout as rollout_lib
from r3jax.rl import state as state_lib
from r3jax.rl import step as step_lib

# Keys of the config that do not change what an iteration computes.
MAY_DIFFER = (
    "mesh", "sharding", "total_steps", "log", "eval", "checkpoint", "step", "profile", "data.heldout",
    *(f"reward.{key}" for key in (
        "endpoints", "token_env", "batch", "cache", "client", "max_failed_fraction", "failure_window",
    )),
)
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


def _shuffled(reward: step_lib.Reward, seed: int) -> step_lib.Reward:
  """Deals the scores of all replicas' samples out anew: the control in which images do not matter.

  The order is drawn for the images themselves, so it is another one every time and does not depend
  on the number of replicas. Format, and stopping at what a score calls perfect, still pay.
  """

  def shuffled(images, target):
    rows = images.shape[0]
    gather = lambda x: jax.lax.all_gather(x, step_lib.AXIS, tiled=True)
    score = jax.tree.map(gather, reward(images, target))
    digest = jax.lax.psum(jnp.sum(images, dtype=jnp.uint32), step_lib.AXIS)
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), digest), len(score.value))
    mine = jax.lax.dynamic_slice_in_dim(order, jax.lax.axis_index(step_lib.AXIS) * rows, rows)
    return jax.tree.map(lambda x: x[mine], score)

  return shuffled


def _iteration(config, experiment: experiment_lib.Experiment, mesh) -> step_lib.Iteration:
  iteration = experiment.iteration(mesh)
  if not config.reward.shuffle:
    return iteration
  return dataclasses.replace(iteration, reward=_shuffled(iteration.reward, config.seed))


def _evaluator(config, experiment: experiment_lib.Experiment, mesh) -> evaluate.Evaluator:
  e = config.eval
  return evaluate.Evaluator(
      experiment.modules,
      experiment_lib.evaluation_settings(config, experiment.settings),
      experiment.reward.on(mesh),
      experiment.parse(mesh),
      mesh,
      e.rounds,
      e.batch_size,
      e.seed,
  )


def _samples(experiment, step: int, rows: np.ndarray, samples: step_lib.Samples, number: int) -> Iterator:
  """Yields report samples: the first sample of the first `number` groups of the edit half."""
  size, decode = experiment.settings.group_size, experiment.pretrained.tokenizer.decode
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
    answer = text(edits.text, i)
    thought, close, rest = answer.rpartition(format_lib.CLOSE)
    source = edits.source.images[i * edits.source.images.shape[0] // edits.row.shape[0]]
    yield report.RolloutSample(
        step=step, prompt=record["prompt"], tag=record["tag"], thought="(drawn from the pool)",
        draft=source, draft_score=float(edits.before[i]), reflection=thought if close else rest,
        instruction=format_lib.edit_instruction(answer),
        refined=edits.refined.images[i], refined_score=value(samples.edit_score, i),
    )


def _return_freed_memory():
  """Gives the system back what the compiler has freed: glibc would keep 2 GiB of it."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
  if trim:
    trim(0)


def _parameters(session: "Session", policy: types.Params) -> dict[str, int]:
  """Returns how many numbers training changes, and how many the model has."""
  sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  und = jax.tree.map(lambda leaf, expert: leaf if expert == "und" else (), policy, state_lib.expert_labels(policy))
  kept = sizes(und) if session.config.optimizer.freeze_und else 0
  return {
      "trainable": sizes(policy) - kept,
      "all": sizes(session.frozen.whole(policy)) + sizes(session.frozen.towers),
  }


def _versions() -> dict[str, str]:
  names = ("r3jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
  found = {name: importlib.metadata.version(name) for name in names[1:]}
  return found | {"device": jax.devices()[0].device_kind, "devices": str(jax.device_count())}


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The files of a run."""

  path: epath.Path

  @property
  def checkpoints(self) -> epath.Path:
    """Folder of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def report(self) -> epath.Path:
    """Folder of the page."""
    return self.path / "report"

  @property
  def profile(self) -> epath.Path:
    """Folder of the trace."""
    return self.path / "profile"

  @property
  def rewards(self) -> epath.Path:
    """Folder of what host rewards answered."""
    return self.path / "rewards"

  def evaluation(self, step: int) -> epath.Path:
    """File of an evaluation's result."""
    return self.path / "evaluation" / f"step_{step:06d}.json"

  def save_evaluation(self, step: int, found: evaluate.Result, settings: dict):
    """Writes a result and what it was evaluated with; complete or not at all. Only process 0 does."""
    if jax.process_index():
      return
    path = self.evaluation(step)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found.to_json() | {"settings": settings}))
    partial.replace(path)

  def load_evaluation(self, step: int, settings: dict) -> evaluate.Result | None:
    """Returns a result, None where there is none or it was evaluated with other settings."""
    path = self.evaluation(step)
    obj = json.loads(path.read_text()) if path.exists() else {"settings": None}
    return evaluate.Result.from_json(obj) if obj["settings"] == settings else None


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
    heldout: of the held-out set.
    frozen: parameters that the step reads; the reference is the policy before training.
    evaluator: on the same mesh.
  """

  config: ml_collections.ConfigDict
  files: Workdir
  experiment: experiment_lib.Experiment
  mesh: jax.sharding.Mesh
  iteration: step_lib.Iteration
  prompts: rollout_lib.Prompts
  heldout: rollout_lib.Prompts
  frozen: step_lib.Frozen
  evaluator: evaluate.Evaluator

  def init(self, policy) -> state_lib.TrainState:
    """Returns the state before the first iteration; it shares no buffer with `policy`."""
    abstract = jax.eval_shape(self.iteration.optimizer.init, policy)
    shardings = rules.like_parameters(abstract, policy_lib.shardings(self.experiment.modules.bagel, self.mesh), self.mesh)
    moments = jax.jit(self.iteration.optimizer.init, out_shardings=shardings)(policy)
    step = jax.device_put(np.int32(0), rules.replicated(self.mesh))
    return state_lib.TrainState(jax.tree.map(jnp.copy, policy), moments, step)

  def compile(self, state: state_lib.TrainState, programs: epath.Path | None):
    """Returns the step, (state, rows of the training set) -> (state, metrics, samples).

    It consumes the state. In split mode the stages are compiled when they first run. With a folder
    of programs the fused step is traced only if it is not there yet.
    """
    seed, shardings = np.uint32(self.config.seed), jax.tree.map(lambda x: x.sharding, state)
    batch = lambda rows: jax.tree.map(lambda x: x[rows], self.prompts)
    if self.config.step.mode == "split":
      split = step_lib.split(self.iteration, self.mesh, shardings)
      return lambda state, rows: step_lib.run_timed(split, state, self.frozen, batch(rows), seed)
    fused = step_lib.fused(self.iteration, self.mesh)
    arguments = (state, self.frozen, batch(np.zeros(self.config.groups_per_step, np.int32)), seed)
    if programs and not self.experiment.on_host:
      fused = programs_lib.load_or_export(programs, self._constants(), fused, arguments)
    fused = jax.jit(fused, donate_argnums=0, out_shardings=(shardings, None, None))
    # LLVM's costly passes take long on CPU and were not seen to make the step faster.
    options = {"xla_llvm_disable_expensive_passes": True} if jax.default_backend() == "cpu" else None
    compiled = fused.lower(*arguments).compile(compiler_options=options)
    return lambda state, rows: compiled(state, self.frozen, batch(rows), seed)

  def _constants(self) -> list[str]:
    """Returns what the step computes with beside its arguments: the config and the model's description."""
    used = {key: value for key, value in self.config.to_dict().items() if key not in (*MAY_DIFFER, "seed")}
    folder = self.experiment.pretrained.folder
    described = sorted([*folder.glob("*.json"), *folder.glob("*.txt")])  # sizes and tokenizer
    return [json.dumps(used, sort_keys=True), *(path.read_text() for path in described)]

  def evaluate(self, policy) -> evaluate.Result:
    """Evaluates a policy on the held-out prompts; raises BudgetExceeded where too few images have a score."""
    images = self.config.eval.images_per_prompt
    rounds = self.evaluator.run(self.frozen.whole(policy), self.frozen.towers, self.heldout, images)
    self.experiment.reward.raise_together()
    labels = lambda key: [record[key] for record in self.experiment.heldout for _ in range(images)]
    found = evaluate.result(rounds, labels("tag"), labels("prompt"))
    budget_lib.check_evaluation(found.missing, self.config.reward.max_failed_fraction)
    return found


def _check(config: ml_collections.ConfigDict, files: Workdir):
  """Raises ValueError for what only this module reads."""
  if config.step.mode not in ("fused", "split"):
    raise ValueError(f"step.mode must be 'fused' or 'split'; got {config.step.mode!r}")
  for section, key in (("checkpoint", "every"), ("checkpoint", "keep"), ("eval", "images_per_prompt")):
    if config[section][key] < 1:
      raise ValueError(f"{section}.{key} must be at least 1; got {config[section][key]}")
  profiling.check(config.profile.start, config.profile.steps, config.total_steps)
  sinks.check(sinks.WandbSettings(**config.log.wandb))
  done = checkpoints_lib.latest_step(files.checkpoints) or 0
  if config.total_steps < done:
    raise ValueError(f"total_steps ({config.total_steps}) must be at least the iterations done there ({done})")


def prepare(config: ml_collections.ConfigDict, workdir: str) -> tuple[Session, types.Params]:
  """Checks everything that can be checked before compilation, loads the model, opens the workdir.

  Args:
    config: see `configs/r3_geneval.py`.
    workdir: of a new run, or of one to go on with; see `run`.

  Returns:
    What a run computes with, and the starting policy.

  Raises:
    ValueError: the config, the model or the workdir cannot be used; the workdir is as it was.
  """
  files = Workdir(epath.Path(workdir))
  _check(config, files)
  experiment = experiment_lib.build(config)
  mesh = mesh_lib.make_mesh(**config.mesh)
  iteration = _iteration(config, experiment, mesh)
  evaluator = _evaluator(config, experiment, mesh)
  prompts, heldout = experiment.encode(experiment.train), experiment.encode(experiment.heldout)
  policy, frozen = experiment.start(mesh, config.seed)
  config_guard.check_writable(workdir)
  constants = {
      "weights": experiment.pretrained.fingerprint(),  # the reference of the KL
      "training_prompts": hashlib.sha256(json.dumps(experiment.train).encode()).hexdigest(),
  }
  if services := experiment.reward.describe():
    constants["reward_services"] = services
  config_guard.write_or_check(workdir, config.to_dict() | constants, MAY_DIFFER)
  return Session(config, files, experiment, mesh, iteration, prompts, heldout, frozen, evaluator), policy


def run(session: Session, policy: types.Params, programs: epath.Path | None = None) -> dict:
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
    _return_freed_memory()
    clock.lap("compile")
    logging.info("compiled the step in %.1f s", clock.seconds["compile"])
    reward, settings = session.experiment.reward, config.eval.to_dict() | {"heldout": config.data.heldout}
    before = files.load_evaluation(0, settings)
    done = checkpoints_lib.latest_step(files.checkpoints) or 0
    reward.log_to(files.rewards, done if before else -1)  # without what is asked again
    if before is None:
      before = session.evaluate(policy)
      files.save_evaluation(0, before, settings)
      clock.lap("evaluate before")
    reward.metrics()  # those of the iterations begin here, in the first start as in any other
    state = _iterate(session, step, state, clock)
    reward.begin(config.total_steps + 1)
    after = session.evaluate(state.policy)
  files.save_evaluation(config.total_steps, after, settings)
  clock.lap("evaluate after")
  summary = _summary(session, clock, before, after) | {"parameters": parameters}
  _write_summary(files, summary)
  return summary


def _save_samples(
    session: Session, step: int, rows: np.ndarray, samples: step_lib.Samples, writer: metrics_lib.MetricWriter
):
  """Keeps an iteration's first samples for the report, and shows them where metrics are shown."""
  if not jax.process_index():
    shown = list(_samples(session.experiment, step, rows, samples, session.config.log.samples))
    report.append_samples(session.files.report, shown)
    writer.write_pictures(step, observe.pictures(shown))


def _iterate(session: Session, step, state: state_lib.TrainState, clock: Clock) -> state_lib.TrainState:
  """Runs the iterations that are left; saves, logs and samples on the way."""
  config, files, reward, stop = session.config, session.files, session.experiment.reward, False
  prompts = pipeline.prompt_iterator(len(session.experiment.train), config.groups_per_step, config.seed)
  checkpoints = checkpoints_lib.Checkpoints(files.checkpoints, config.checkpoint.every, config.checkpoint.keep)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  restored = checkpoints.restore(abstract, prompts)
  done, state = (restored[0], restored[1]) if restored else (0, state)
  wandb = sinks.WandbSettings(**config.log.wandb)
  writer = metrics_lib.MetricWriter(sinks.open_all(files.path, done if restored else None, wandb, config.to_dict()))
  if not jax.process_index():
    report.drop_samples_after(files.report, done if restored else None)
  progress = metrics_lib.Progress(config.total_steps, done)
  budget = budget_lib.Budget(config.reward.max_failed_fraction, config.reward.failure_window)
  profiler = profiling.Profiler(files.profile, config.profile.start, config.profile.steps)
  stopwatch = metrics_lib.Stopwatch()
  clock.lap("setup")
  for number in range(done + 1, config.total_steps + 1):
    rows = next(prompts)
    reward.begin(number)
    with profiler.iteration(number), stopwatch.part("step"):
      state, metrics, samples = step(state, rows)
      metrics = multihost.fetch(metrics)
    reward.raise_together()
    metrics |= reward.metrics() | observe.metrics(session.experiment, state, rows, samples)
    metrics |= stopwatch.read() | {"seconds/iteration": clock.lap("train")}
    with stopwatch.part("log"):
      writer.write(number, metrics)
      progress.report(number, {"draft": metrics["reason/score"], "edited": metrics.get("edit/score", np.nan)})
      if config.log.samples_every and (number % config.log.samples_every == 0 or number == 1):
        _save_samples(session, number, rows, multihost.fetch(samples), writer)
    stop = budget.add(budget_lib.failed_share(metrics))
    with stopwatch.part("checkpoint"):
      checkpoints.save(number, state, prompts, {}, force=stop or number == config.total_steps)
    if stop:
      break
  profiler.close()
  checkpoints.close()
  writer.close()
  clock.lap("train")
  if stop:
    raise budget.error()
  return state


def _peak_memory() -> int:
  """Returns the most bytes of memory that this process has held.

  Not `ru_maxrss` where there is another figure: on Linux a process starts with that of its parent.
  """
  status = pathlib.Path("/proc/self/status")
  found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
  if found:
    return int(found[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _summary(session: Session, clock: Clock, before: evaluate.Result, after: evaluate.Result) -> dict:
  config, files, contamination = session.config, session.files, session.experiment.contamination
  metrics = jsonl.read(files.path / "metrics.jsonl")
  iterations = [row["seconds/iteration"] for row in metrics[1:] or metrics]
  return {
      "title": f"r3jax: {config.total_steps} iterations, seed {config.seed}"
               + (" (CONTAMINATED: trained on test prompts)" if contamination.contaminated else ""),
      "scores": evaluate.compare(before, after, config.seed),
      "last round minus draft": {
          "before": evaluate.refinement(before, config.seed), "after": evaluate.refinement(after, config.seed)
      },
      "images without a score": {"before": before.missing, "after": after.missing},
      "behaviour": {"before": evaluate.behaviour(before), "after": evaluate.behaviour(after)},
      "contamination": contamination.to_json(),
      "iterations": config.total_steps,
      "seed": config.seed,
      "seconds": clock.seconds | ({"median iteration": float(np.median(iterations))} if iterations else {}),
      "compile_seconds": clock.seconds["compile"],
      "peak_memory_gib": _peak_memory() / 2**30,
      "versions": _versions(),
  }


def _write_summary(files: Workdir, summary: dict):
  if jax.process_index():
    return
  partial = files.path / "summary.json.partial"
  partial.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
  metrics = jsonl.read(files.path / "metrics.jsonl")
  report.write_report(files.report, summary, metrics, report.read_samples(files.report), _CHARTS)
  partial.replace(files.path / "summary.json")
