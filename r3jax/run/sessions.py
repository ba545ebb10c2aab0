"""Prepares a run: checks its config, loads the model, opens the workdir, compiles the step."""

from collections.abc import Callable, Mapping
import dataclasses

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from r3jax import types
from r3jax.agent import experience
from r3jax.checkpoint import training
from r3jax.data import contamination
from r3jax.data import records
from r3jax.evaluation import estimates
from r3jax.evaluation import evaluate
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import sample_log
from r3jax.evaluation import sample_table
from r3jax.evaluation import summary
from r3jax.files import config_guard
from r3jax.files import hub
from r3jax.files import ownership
from r3jax.files import paths
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.parallel import sharding
from r3jax.report import evaluation_report
from r3jax.rewards import control
from r3jax.rewards.from_host import budget
from r3jax.rl import diagnostics
from r3jax.rl import mapped
from r3jax.rl import placement
from r3jax.rl import replica_stages
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run import config_rules
from r3jax.run import evaluation_setup
from r3jax.run import profiling
from r3jax.run import program_cache
from r3jax.run import setup
from r3jax.run import workdir
from r3jax.run.logging import metric_writer
from r3jax.run.logging import sinks
from r3jax.worlds import registry as worlds_registry

# Keys of the config that may change when a run resumes: they do not change what an iteration
# computes. Paths are compared by the fingerprints of what they name: `weights`, `training_prompts`
# and the wordings in `reward_services`.
MAY_DIFFER = (
  "model.folder",
  "model_path",
  "hub",  # the fingerprints of weights and prompts must be the same all the same
  "data.train",
  "data.more_tests",
  workdir.DISTINCT_PROMPTS,
  "mesh",
  "sharding",
  "total_steps",
  "log",
  "eval",
  "checkpoint",
  "preemption",
  "health",
  "step.mode",
  "step.quick_compile",
  "step.micro_batches",
  "profile",
  "data.heldout",
  "reward.endpoints",
  "reward.token_env",
  "reward.batch",
  "reward.cache",
  "reward.client",
  "reward.max_failed_fraction",
  "reward.failure_window",
  *evaluation_setup.JUDGE_FILES,
)

# What `check_resume` knows.
RESUME_MODES = ("auto", "must", "never")

# (state, indices of training prompts [G]) -> (state, metrics, samples)
Step = Callable[
  [train_state.TrainState, np.ndarray],
  tuple[train_state.TrainState, diagnostics.Metrics, stage_outputs.Samples],
]


def compiler_options() -> dict[str, bool] | None:
  """Returns the options that the step is compiled with; None for those of the compiler."""
  if jax.default_backend() != "cpu":
    return None
  # LLVM's expensive passes take long and do not make the step measurably faster.
  return {"xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """What an evaluation of a policy has measured.

  Attributes:
    samples: Chains of images and their scores.
    labelled: Answers about labelled images.
  """

  samples: list[sample_log.Sample]
  labelled: list[labelled_questions.Answer]

  @property
  def table(self) -> sample_table.SampleTable:
    """The samples as arrays."""
    return sample_table.of_samples(self.samples)

  @property
  def answers(self) -> sample_table.AnswerTable:
    """The answers about labelled images as a table."""
    return labelled_estimates.table_of(self.labelled)


@dataclasses.dataclass(frozen=True)
class Session:
  """The constants of a run, checked and loaded.

  Attributes:
    config: Config of the run, locked.
    files: Workdir of the run.
    experiment: What the config describes: prompts, reward, model and settings.
    mesh: All devices.
    stages: Stages of an iteration, on one replica.
    prompts: Training prompts as numpy arrays, one row per record.
    frozen: Parameters that an iteration reads; its reference is the policy before training.
    evaluation: Evaluation on the held-out prompts, on the same mesh.
    leaked: Held-out prompts that this run or the model's earlier runs train on.
    identity: What a resumed run must find unchanged, as config.json has it.
    program_folder: Keeps traced programs between starts, see `program_cache`; None keeps nothing.
  """

  config: ml_collections.ConfigDict
  files: workdir.Workdir
  experiment: setup.Experiment
  mesh: jax.sharding.Mesh
  stages: replica_stages.ReplicaStages
  prompts: experience.Prompts
  frozen: train_state.Frozen
  evaluation: evaluate.Evaluation
  leaked: contamination.Leaked
  identity: Mapping[str, object] = dataclasses.field(default_factory=dict)
  program_folder: epath.Path | None = None

  def init(self, policy: types.Params) -> train_state.TrainState:
    """Returns the state before the first iteration; it shares no buffer with `policy`."""
    optimizer = self.stages.optimizer
    bagel = self.experiment.modules.bagel
    shardings = sharding.like_parameters(
      jax.eval_shape(optimizer.init, policy),
      parameters.shardings(bagel, self.mesh),
      self.mesh,
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(policy)
    iterations_done = jax.device_put(
      np.int32(0), sharding.replicated(self.mesh)
    )
    # A copy, because the step donates its state.
    copied_policy = jax.tree.map(jnp.copy, policy)
    return train_state.TrainState(copied_policy, opt_state, iterations_done)

  def compile(self, state: train_state.TrainState) -> Step:
    """Returns the step of the training loop.

    The step donates the state: its buffers must not be read afterwards. In split mode nothing is
    kept between starts, and a stage compiles when it first runs.

    Args:
      state: State with the shapes, dtypes and shardings that the step will be called with.
    """
    if self.config.step.mode == "split":
      return self._split_step(state)
    return self._fused_step(state)

  def _split_step(self, state: train_state.TrainState) -> Step:
    """Returns a step that runs the stages as separate programs and times them."""
    seed = np.uint32(self.config.seed)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    programs = mapped.split(self.stages, self.mesh, shardings)

    def step(state, indices):
      batch = self._batch(indices)
      return mapped.run_timed(programs, state, self.frozen, batch, seed)

    return step

  def _fused_step(self, state: train_state.TrainState) -> Step:
    """Returns a step that runs the whole iteration as one program, compiled now."""
    seed = np.uint32(self.config.seed)
    compiled = self.fused_program(state)

    def step(state, indices):
      return compiled(state, self.frozen, self._batch(indices), seed)

    return step

  def fused_program(self, state: train_state.TrainState) -> jax.stages.Compiled:
    """Returns the whole iteration as one compiled program; for the arguments see `compile`.

    It takes (state, frozen, prompts, seed), donates the state, and returns what `iteration.run`
    does.
    """
    seed = np.uint32(self.config.seed)
    # Compilation reads the shapes of the batch, not its values.
    any_batch = self._batch(np.zeros(self.config.groups_per_step, np.int32))
    arguments = (state, self.frozen, any_batch, seed)
    program = mapped.fused(self.stages, self.mesh)
    if self.program_folder and self._can_be_kept():
      constants = program_cache.constants(
        self.config.to_dict(), self.experiment.pretrained.folder
      )
      program = program_cache.load_or_export(
        self.program_folder, "the step", constants, program, arguments
      )
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    program = jax.jit(
      program, donate_argnums=0, out_shardings=(state_shardings, None, None)
    )
    lowered = program.lower(*arguments)
    return lowered.compile(compiler_options=compiler_options())

  def _can_be_kept(self) -> bool:
    """Returns whether the traced step may serve later starts."""
    return program_cache.may_keep(self.config.world, self.experiment.on_host)

  def _batch(self, indices: np.ndarray) -> experience.Prompts:
    """Returns the training prompts of an iteration, one row per group."""
    return jax.tree.map(lambda column: column[indices], self.prompts)

  def evaluate(
    self,
    policy: types.Params,
    step: int,
    writer: metric_writer.MetricWriter,
  ) -> Evaluated:
    """Evaluates a policy on the held-out prompts and logs its scores.

    An evaluation that this run has already finished is read from its folder.

    Args:
      policy: Trained parameters.
      step: Number of completed iterations.
      writer: Gets the scores of the evaluation.

    Returns:
      What the evaluation has measured.

    Raises:
      budget.BudgetExceeded: Too many images have no score.
    """
    folder = self.files.evaluation(step)
    samples = self.evaluation.finished(folder)
    labelled = self.evaluation.finished_labelled(folder)
    if samples is None or labelled is None:
      evaluated = self._evaluate(policy, step)
    else:
      evaluated = Evaluated(samples, labelled)
    scores = estimates.curve_values(evaluated.table)
    scores |= labelled_estimates.curve_values(evaluated.answers)
    writer.write_evaluation(step, scores)
    return evaluated

  def _evaluate(self, policy: types.Params, step: int) -> Evaluated:
    """Draws and scores the samples of an evaluation, and writes its summary."""
    folder = self.files.evaluation(step)
    reward = self.experiment.evaluation_reward
    reward.begin(step)
    with reward.logging_to(folder / "rewards"):
      whole_policy = self.frozen.whole(policy)
      towers = self.frozen.towers
      samples = self.evaluation.run(whole_policy, towers, folder, step)
      labelled = self.evaluation.ask_labelled(
        whole_policy, towers, folder, step
      )
    # Reading the counters resets them: the next iteration's must not include the evaluation.
    reward.metrics()
    evaluated = Evaluated(samples, labelled)
    budget.check_evaluation(
      evaluated.table.missing,
      self.config.reward.max_failed_fraction,
    )
    context = summary.Context(
      title=f"r3jax: evaluation of iteration {step}",
      step=step,
      leaked=self.leaked,
      flops=self.evaluation.flops,
      seed=self.config.seed,
    )
    evaluation_report.conclude(folder, samples, context, labelled)
    return evaluated


def check(config: ml_collections.ConfigDict, files: workdir.Workdir) -> None:
  """Checks the values of a config, and what only the training loop reads.

  Raises:
    ValueError: A value breaks its rule, or the workdir holds more iterations than the config asks
      for.
  """
  config_rules.check(config)
  profiling.check(
    config.profile.start, config.profile.steps, config.total_steps
  )
  sinks.check(sinks.WandbSettings(**config.log.wandb))
  files.check_kinds()
  done = training.latest_step(files.checkpoints) or 0
  if config.total_steps < done:
    raise ValueError(
      f"total_steps ({config.total_steps}) must be at least the iterations done there ({done})"
    )


def check_resume(mode: str, files: workdir.Workdir) -> None:
  """Checks that there is a checkpoint, or that there is none, where the user asks for that.

  Args:
    mode: "auto" resumes a run where there is one, "must" only resumes, "never" only starts anew.
    files: Workdir of the run.

  Raises:
    ValueError: The mode is another word, or forbids what would happen.
  """
  if mode not in RESUME_MODES:
    raise ValueError(
      f"resume must be one of {', '.join(RESUME_MODES)}; got {mode!r}"
    )
  step = training.latest_step(files.checkpoints)
  if mode == "must" and step is None:
    raise ValueError(
      f"--resume=must needs a complete checkpoint, and there is none in {files.checkpoints}; "
      "--resume=auto starts anew there"
    )
  if mode == "never" and step is not None:
    raise ValueError(
      f"--resume=never needs a workdir without checkpoints, and {files.checkpoints} has that of "
      f"step {step}; choose another workdir, or resume with --resume=auto"
    )


def prepare(
  config: ml_collections.ConfigDict,
  folder: epath.PathLike,
  resume: str = "auto",
  program_folder: epath.Path | None = None,
) -> tuple[Session, types.Params]:
  """Checks everything that can be checked before compilation, loads the model, opens the workdir.

  The workdir is this run's own from then on, see `ownership.releasing`.

  Args:
    config: Config of the run, see `configs/r3_geneval.py`.
    folder: Workdir of a new run, or of one to resume, see `loop.run`.
    resume: Whether the run may or must be a resumed one, see `check_resume`.
    program_folder: See `Session`.

  Returns:
    The constants of the run, and the policy before training.

  Raises:
    ValueError: The config, the model or the workdir cannot be used, or another run writes there;
      the workdir is unchanged.
  """
  program_cache.code_version()  # before the source may be edited
  folder = paths.of_user(folder)
  files = workdir.Workdir(folder)
  check(config, files)
  check_resume(resume, files)
  ownership.check(folder)  # before weights are read for minutes
  session, policy = load(config, files, program_folder)

  # Nothing has been written up to here.
  config_guard.check_writable(folder, "workdir")
  ownership.claim(folder)
  # The claim may have waited for a run that has saved meanwhile.
  check_resume(resume, files)
  config_guard.write_or_check(folder, session.identity, MAY_DIFFER)
  if not jax.process_index():
    workdir.write_training_prompts(files.path, session.experiment.train)
  return session, policy


def load(
  config: ml_collections.ConfigDict,
  files: workdir.Workdir,
  program_folder: epath.Path | None = None,
) -> tuple[Session, types.Params]:
  """Does what `prepare` does without writing anything.

  Args:
    config: Config of the run, whose values have been checked.
    files: Workdir of a run, new or not.
    program_folder: See `Session`.

  Returns:
    The constants of the run, and the policy before training.

  Raises:
    ValueError: As `prepare`.
  """
  experiment = setup.build(config)
  mesh = meshes.make_mesh(**config.mesh)
  # The stages, the evaluation and the prompts check the config once more, against the mesh and the
  # capacities of the segments.
  stages = _stages(config, experiment, mesh)
  evaluation = evaluation_setup.build(config, experiment, mesh, program_folder)
  prompts = experiment.encode(experiment.train)
  leaked = _leaked(config, experiment)
  identity = config.to_dict() | _inputs(config, experiment)
  config_guard.check(files.path, identity, MAY_DIFFER)
  # The checks that need no weights come first: weights take minutes to read.
  policy, frozen = experiment.start(mesh, config.seed)
  session = Session(
    config=config,
    files=files,
    experiment=experiment,
    mesh=mesh,
    stages=stages,
    prompts=prompts,
    frozen=frozen,
    evaluation=evaluation,
    leaked=leaked,
    identity=identity,
    program_folder=program_folder,
  )
  return session, policy


def _stages(
  config: ml_collections.ConfigDict,
  experiment: setup.Experiment,
  mesh: jax.sharding.Mesh,
) -> replica_stages.ReplicaStages:
  """Returns the stages of an iteration, with shuffled rewards in the control experiment."""
  stages = experiment.stages(mesh)
  if not config.reward.shuffle:
    return stages
  shuffled = control.shuffled(stages.reward, config.seed, placement.AXIS)
  return dataclasses.replace(stages, reward=shuffled)


def _inputs(
  config: ml_collections.ConfigDict, experiment: setup.Experiment
) -> dict[str, object]:
  """Returns what a resumed run must find unchanged beside its config, as JSON values."""
  inputs = {
    "weights": experiment.pretrained.fingerprint(),  # the KL's reference
    "training_prompts": records.sha256(experiment.train),
    workdir.DISTINCT_PROMPTS: records.sha256(
      workdir.distinct(experiment.train)
    ),
  }
  if config.model.folder != worlds_registry.OF_WORLD:
    model_folder = paths.of_user(config.model.folder)
    inputs["model_path"] = str(paths.absolute(model_folder))
  if hub.commits():
    inputs["hub"] = hub.commits()
  reward_services = experiment.reward.describe()
  if reward_services:
    inputs["reward_services"] = reward_services
  if experiment.own_evaluation_reward:
    inputs["evaluation_services"] = experiment.own_evaluation_reward.describe()
  return inputs


def _leaked(
  config: ml_collections.ConfigDict, experiment: setup.Experiment
) -> contamination.Leaked:
  """Compares the held-out prompts with those of this run and of the model's earlier runs."""
  earlier, complete = workdir.trained_on(config.model.folder)
  return contamination.leaked(
    [*earlier, *experiment.train], experiment.heldout, complete
  )
