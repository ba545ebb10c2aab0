"""Cases j_pack_gen, j_pack_edit and k: scoring passes, losses, gradients.

The goldens hold two versions: what the reference's trainer computes (`apply_cfg`, `log_prob`,
`k_*_onpolicy`, `k_*_perturbed`; here `compat.reference_loss`) and what was sampled (`FIXED_*`,
`k_*_consistent`; the default). Folders of images that are not square have both versions of the
latent positions and of the velocities of all branches, too, because the trainer transposes the
copies for guidance; in square folders they are the same, and recorded once.
"""

from collections.abc import Iterator
import dataclasses
import functools
import tempfile

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import contexts
from r3jax.agent import experience
from r3jax.agent import reference_loss
from r3jax.agent import rollout as rollout_lib
from r3jax.agent import rollout_settings
from r3jax.agent import scoring
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_headers
from r3jax.model import network
from r3jax.parity import case_arrays
from r3jax.parity import goldens
from r3jax.parity import packing
from r3jax.parity import results
from r3jax.rl import iteration_settings
from r3jax.rl import losses
from r3jax.rl import objective
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import flow_matching
from r3jax.sampling import schedules
from r3jax.sequence import layouts

Golden = goldens.Golden
Result = results.Result
_UNUSED = 2  # capacity of a text segment that a pack does not have
_SPARE = 1  # empty slots: the other stage's system prompt may be longer
_REFERENCE_SCALE = (
  0.95  # of every matrix of the layers, in the goldens' reference policy
)


@flax.struct.dataclass
class Outputs:
  """Results of a scoring pass.

  Attributes:
    logprob: log-probs of the text.
    velocity: combined velocity at the SDE step.
    logits: of the text.
    branches: velocities with full context, without text and, of an edit, without image.
  """

  logprob: jax.Array  # [B, T - 1]
  velocity: jax.Array  # [B, N, C]
  logits: jax.Array  # [B, T - 1, V]
  branches: tuple[jax.Array, ...]  # each [B, N, C]


@dataclasses.dataclass(frozen=True)
class Pack:
  """A golden pack as r3jax's scoring passes read it.

  Attributes:
    golden: the folder of goldens.
    case: name of the pack.
    literal: scores as the reference's trainer does, see `compat.reference_loss`.
  """

  golden: Golden
  case: str
  literal: bool

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The arrays of the pack."""
    return self.golden.arrays(self.case)

  @functools.cached_property
  def rows(self) -> int:
    """Samples."""
    return len(case_arrays.numbered(self.golden, self.case, "generated_ids"))

  def segment(self, body: np.ndarray) -> np.ndarray:
    """Returns ids with begin and end."""
    ids = self.golden.config.special_ids
    return np.array([ids.text_begin, *body, ids.text_end])

  def segments(self, array: str) -> tuple[jax.Array, jax.Array]:
    """Returns ids and lengths of numbered bodies."""
    bodies = case_arrays.numbered(self.golden, self.case, array)
    return case_arrays.padded([self.segment(body) for body in bodies])

  def flow(
    self, image_scale: float, renorm: str
  ) -> rollout_settings.FlowSettings:
    """Returns the settings with which the pack's images were sampled."""
    constants = self.golden.constants
    eta_mode = constants["eta"]["mode"]
    text_scale = float(self.arrays["scales"][0])
    return rollout_settings.FlowSettings(
      schedules.Schedule(constants["ode_points"], constants["timestep_shift"]),
      classifier_free.Guidance(text_scale, image_scale, renorm),
      schedules.Eta(eta_mode, float(self.arrays["constant_eta"])),
      1,
    )

  def settings(
    self, capacities: layouts.Capacities
  ) -> rollout_settings.RolloutSettings:
    """Returns the settings that sample as the pack was sampled."""
    image_scale = float(self.arrays["scales"][1])
    system = tuple(self.segment(self.arrays["system_ids"]).tolist())
    return rollout_settings.RolloutSettings(
      capacities=capacities,
      reason_text=decoding.TextSampling(1.0),
      reflect_text=decoding.TextSampling(1.0),
      reason_flow=self.flow(1.0, "global"),
      refine_flow=self.flow(image_scale, "text_channel"),
      system_reason=system,
      system_reflect=system,
      reference_loss=self.literal,
    )

  @property
  def system_capacity(self) -> int:
    """Slots of the system prompt."""
    return len(self.arrays["system_ids"]) + 2 + _SPARE


def loss_settings(golden: Golden) -> iteration_settings.LossSettings:
  """Returns the recorded weights of the objective."""
  constants = golden.constants
  # The reference clips texts and images alike.
  return iteration_settings.LossSettings(
    text_weight=constants["text_weight"],
    image_weight=constants["image_weight"],
    text_kl=constants["kl_weight_text"],
    image_kl=constants["kl_weight_image"],
    clip_range=constants["clip_range"],
    image_clip_range=constants["clip_range"],
    divide_by_std=False,
    format_weight=1.0,
  )


@functools.cache
def _recorded(golden: Golden, pack: str, case: str) -> experience.Recorded:
  """Returns the rollout of a pack with the behavior log-probs of a k case."""
  behavior = golden.arrays(case)
  ids, lengths = case_arrays.texts(golden, pack, "generated_ids")
  rows, capacity = ids.shape
  text_logprob = np.zeros((rows, capacity - 1), np.float32)
  mask = np.asarray(losses.token_mask(lengths, capacity))
  text_logprob[mask] = np.log(behavior["inference_probs"])
  text = experience.Text(ids, lengths, jnp.asarray(text_logprob))

  latents = np.stack(case_arrays.numbered(golden, pack, "latents"))
  before = jnp.asarray(latents[:, 0])
  after = jnp.asarray(latents[:, 1])
  steps = np.stack(case_arrays.numbered(golden, pack, "t_dt"))
  token_logprobs = behavior["behavior_log_probs"].reshape(rows, -1)
  trajectory = flow_matching.Trajectory(
    latent=after,  # no loss reads the end of the trajectory
    before=before,
    after=after,
    t=jnp.asarray(steps[:, 0]),
    dt=jnp.asarray(steps[:, 1]),
    behavior_logprob=jnp.asarray(token_logprobs.mean(axis=1)),
  )
  return experience.Recorded(text, trajectory)


def _outputs(
  actor: actors.Actor,
  recorded: experience.Recorded,
  hidden: jax.Array,
  run: scoring.Pass,
  names: tuple[str, ...],
) -> Outputs:
  """Returns the outputs of a pass.

  Args:
    actor: the policy.
    recorded: the scored rollout.
    hidden: [B, T, D] of the scored text.
    run: the pass over the images.
    names: the noise segments.
  """
  logits = actor.modules.bagel.apply(
    {"params": actor.policy}, hidden[:, :-1], method="logits"
  )
  branches = actor.velocities(run.output, run.flow.branches(names))
  velocity = scoring.scored_velocity(actor, run, names, recorded.trajectory.t)
  logprob = actor.logprob(hidden, recorded.text.ids)
  return Outputs(logprob, velocity, logits, branches)


def _actor(
  pack: Pack, policy, towers, capacities: layouts.Capacities
) -> actors.Actor:
  modules = actors.Modules(pack.golden.bagel, towers)
  return actors.Actor(
    modules, policy, pack.golden.frozen, pack.settings(capacities)
  )


def _draft_actor(
  pack: Pack, policy, recorded: experience.Recorded
) -> tuple[actors.Actor, experience.Prompts]:
  """Returns the actor of drafts and their prompts."""
  ids, lengths = pack.segments("prompt_ids")
  towers = pack.golden.towers()
  capacities = layouts.Capacities(
    system=pack.system_capacity,
    prompt=ids.shape[1],
    thought=recorded.text.ids.shape[1],
    question=_UNUSED,
    answer=_UNUSED,
    instruction=_UNUSED,
    latent_grid=towers.latent_grid,
    vit_grid=(1, 1),
  )
  prompts = experience.Prompts(ids, lengths, None, None, None, None)
  return _actor(pack, policy, towers, capacities), prompts


def _score_drafts(pack: Pack, policy, recorded: experience.Recorded) -> Outputs:
  """Scores groups of one draft each."""
  actor, prompts = _draft_actor(pack, policy, recorded)
  run = scoring.reason_pass(actor, prompts, recorded)
  hidden = run.output.text("thought")
  return _outputs(actor, recorded, hidden, run, layouts.DRAFT)


def _score_edits(pack: Pack, policy, recorded: experience.Recorded) -> Outputs:
  """Scores one group of edits of one image."""
  golden = pack.golden
  question_ids = pack.segment(pack.arrays["reflection_ids"])
  question, question_length = case_arrays.padded([question_ids])
  ids, lengths = pack.segments("edit_ids")
  image = jnp.asarray(pack.arrays["image"])[None]
  towers = golden.towers(image.shape[1:3])
  capacities = layouts.Capacities(
    system=pack.system_capacity,
    prompt=_UNUSED,
    thought=_UNUSED,
    question=question.shape[1],
    answer=recorded.text.ids.shape[1],
    instruction=ids.shape[1],
    latent_grid=towers.latent_grid,
    vit_grid=towers.vit_grid,
  )
  actor = _actor(pack, policy, towers, capacities)
  source = rollout_lib.look(actor, image)
  prompts = experience.Prompts(
    question, None, question, question_length, None, None
  )
  instruction = experience.Instruction(ids, lengths, jnp.zeros(pack.rows, bool))
  reflected = scoring.reflect_pass(actor, prompts, source, recorded.text)
  run = scoring.refine_pass(actor, source, instruction, recorded.trajectory)
  hidden = reflected.text("answer")
  return _outputs(actor, recorded, hidden, run, layouts.EDIT)


@flax.struct.dataclass
class Outcome:
  """The objective of a k case.

  Attributes:
    value: the total loss.
    texts: terms of the texts.
    images: terms of the images.
    outputs: results of the scoring pass.
  """

  value: jax.Array  # []
  texts: objective.TextTerms
  images: objective.FlowTerms
  outputs: Outputs


@functools.partial(jax.jit, static_argnames="pack")
def _step(
  pack: Pack,
  policy,
  reference,
  recorded: experience.Recorded,
  text_advantage,
  image_advantage,
):
  """Returns the outcome of a pack and its gradient; `reference` is (logprob, velocity)."""
  score = _score_drafts if pack.case == "j_pack_gen" else _score_edits
  settings = loss_settings(pack.golden)
  flow = pack.flow(1.0, "global")
  valid = jnp.ones(pack.rows, bool)
  reference_logprob, reference_velocity = reference

  def total_loss(policy):
    outputs = score(pack, policy, recorded)
    texts = objective.text_terms(
      outputs.logprob,
      reference_logprob,
      recorded.text,
      text_advantage,
      valid,
      settings.clip_range,
    )
    images = objective.flow_terms(
      outputs.velocity,
      reference_velocity,
      recorded.trajectory,
      flow,
      image_advantage,
      valid,
      settings.image_clip_range,
    )
    value = objective.total(
      texts, images, texts.num_tokens, images.num_images, settings
    )
    return value, Outcome(value, texts, images, outputs)

  value_and_gradient = jax.value_and_grad(total_loss, has_aux=True)
  (_, outcome), gradient = value_and_gradient(policy)
  return outcome, gradient


def _reference_policy(policy: types.Params) -> types.Params:
  """Returns the goldens' reference policy."""

  def scaled(path, x: jax.Array) -> jax.Array:
    return _REFERENCE_SCALE * x if path[-1].key == "kernel" else x

  layers = jax.tree_util.tree_map_with_path(scaled, policy["layers"])
  return policy | {"layers": layers}


def _pack_of(golden: Golden, case: str) -> tuple[Pack, experience.Recorded]:
  """Returns pack and recorded rollout of a k case."""
  _, _, stage, variant = case.split("_")
  pack = Pack(golden, f"j_pack_{stage}", variant != "consistent")
  return pack, _recorded(golden, pack.case, case)


@functools.cache
def outcome(golden: Golden, case: str) -> tuple[Outcome, Outcome, dict]:
  """Returns the outcome of a k case, that of the reference policy, and the gradient."""
  pack, recorded = _pack_of(golden, case)
  advantages = (
    jnp.asarray(pack.arrays["in_text_advantages"][:, 0]),
    jnp.asarray(pack.arrays["in_image_advantages"][:, 0]),
  )
  # The reference policy is scored by the same program; its own KL is not read.
  unused = (recorded.text.behavior_logprob, recorded.trajectory.before)
  reference_policy = _reference_policy(golden.policy)
  anchor, _ = _step(pack, reference_policy, unused, recorded, *advantages)
  reference = (anchor.outputs.logprob, anchor.outputs.velocity)
  result, gradient = _step(
    pack, golden.policy, reference, recorded, *advantages
  )
  return result, anchor, gradient


def _scored(recorded: experience.Recorded, x: jax.Array) -> np.ndarray:
  """Returns the entries of [B, T - 1, ...] that carry loss, sample after sample."""
  text = recorded.text
  mask = losses.token_mask(text.lengths, text.ids.shape[1])
  return np.asarray(x)[np.asarray(mask)]


def _image_logprob(
  pack: Pack, recorded: experience.Recorded, velocity
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns mean [B, N, C], std [B, 1, 1] and log-prob [B, N] of the recorded SDE step."""
  step = recorded.trajectory
  eta = pack.flow(1.0, "global").eta(step.t)
  mean, std = flow_matching.sde_moments(
    step.before, velocity, step.t, step.dt, eta
  )
  return mean, std, flow_matching.token_logprob(step.after, mean, std)


def scores(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case j: logits, velocities of every branch, and both versions of what is trained."""
  arrays = golden.arrays(case)
  has_both = "FIXED_packed_mse_preds" in arrays
  yield from _latent_positions(golden, case)
  for variant in ("consistent", "onpolicy"):
    k_case = f"k_loss_{case.removeprefix('j_pack_')}_{variant}"
    pack, recorded = _pack_of(golden, k_case)
    result, _, _ = outcome(golden, k_case)
    outputs = result.outputs
    mean, std, logprob = _image_logprob(pack, recorded, outputs.velocity)
    if variant == "consistent":
      yield Result("logits", _scored(recorded, outputs.logits))
      yield Result("token_logps", _scored(recorded, outputs.logprob))
      name = "FIXED_packed_mse_preds" if has_both else "packed_mse_preds"
      yield Result(name, _in_packed_order(outputs.branches))
      yield Result("FIXED_velocity", case_arrays.packed(outputs.velocity))
      yield Result("FIXED_log_prob", logprob.reshape(-1))
    else:
      yield Result("apply_cfg", case_arrays.packed(outputs.velocity))
      yield Result("sde_mean", case_arrays.packed(mean))
      token_std = np.repeat(std.reshape(-1, 1), logprob.shape[1], axis=0)
      yield Result("sde_std", token_std)
      yield Result("log_prob", logprob.reshape(-1))
      if has_both:
        branches = outputs.branches
        if case == "j_pack_gen":
          branches = _literal_draft_branches(pack, golden.policy, recorded)
        yield Result("packed_mse_preds", _in_packed_order(branches))


def _latent_positions(golden: Golden, case: str) -> Iterator[Result]:
  """Yields positions and shapes of all latents in packed order: of every branch of every sample.

  A branch is a sequence of its own, so that the clean latents of an edit are repeated; they are
  never transposed.
  """
  arrays = golden.arrays(case)
  # the latent images of the branches: full context, without text and, of an edit, without image
  branches = (("draft",), ("copy",))
  if case == "j_pack_edit":
    branches = (("source", "edit"), ("source", "copy"), ("copy",))
  names = [name for branch in branches for name in branch]
  grid = golden.towers(_image_size(golden, case)).latent_grid
  literal_grids = [grid[::-1] if name == "copy" else grid for name in names]
  num_samples = len(case_arrays.numbered(golden, case, "generated_ids"))
  for array, grids in (
    ("packed_latent_position_ids", literal_grids),
    ("FIXED_packed_latent_position_ids", [grid] * len(names)),
  ):
    if array in arrays:
      ids = packing.latent_position_ids(golden, grids)
      yield Result(array, np.tile(ids, num_samples))
  if "patchified_vae_latent_shapes" in arrays:
    shapes = np.tile(literal_grids, (num_samples, 1))
    yield Result("patchified_vae_latent_shapes", shapes)


def _image_size(golden: Golden, case: str) -> tuple[int, int]:
  """Returns height and width of the images of a pack: that of its image, if it has one."""
  image = golden.arrays(case).get("image")
  if image is None:
    height, width = golden.constants["image_hw"]
  else:
    height, width, _ = image.shape
  return height, width


@functools.partial(jax.jit, static_argnames="pack")
def _literal_draft_branches(
  pack: Pack, policy: types.Params, recorded: experience.Recorded
) -> tuple[jax.Array, ...]:
  """Returns the velocities of both branches of drafts, the copy transposed, each [B, N, C].

  The reference's trainer computes the copy's velocity and leaves it out of its loss, so that
  `compat.reference_loss` does not compute it.
  """
  actor, prompts = _draft_actor(pack, policy, recorded)
  context = contexts.reason_context(actor, prompts, 1)
  _, layout = reference_loss.reason(actor.settings.reason_flow, context.layout)
  step = recorded.trajectory
  noised = network.Noised(step.before, step.t)
  inputs = {
    "thought": recorded.text.ids,
    **dict.fromkeys(layouts.DRAFT, noised),
  }
  lengths = {**context.lengths, "thought": recorded.text.lengths}
  output = actor.run(layout, inputs, lengths, (context.cache,))
  return actor.velocities(output, layouts.DRAFT)


def _in_packed_order(branches: tuple[jax.Array, ...]) -> np.ndarray:
  """Returns the branches [B, N, C] sample after sample, as [B * branches * N, C]."""
  return case_arrays.packed(jnp.stack(branches, axis=1))


def _released(golden: Golden, gradient) -> dict[str, np.ndarray]:
  """Returns gradients under BAGEL's parameter names."""
  frozen = jax.tree.map(np.zeros_like, golden.frozen)
  with tempfile.TemporaryDirectory() as folder:
    bagel_files.save({"policy": gradient, **frozen}, golden.config, folder)
    return safetensors.numpy.load_file(
      f"{folder}/{bagel_headers.MODEL_FILES[0]}"
    )


def loss(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case k: losses, ratios, reference and gradients."""
  pack, recorded = _pack_of(golden, case)
  result, anchor, gradient = outcome(golden, case)
  texts = result.texts
  images = result.images
  num_tokens = texts.num_tokens
  num_images = images.num_images
  expected_tokens = pack.arrays["total_text_grad_tokens"]
  expected_images = pack.arrays["total_image_num"]
  yield Result("tokens", num_tokens, expected_tokens, "exact")
  yield Result("images", num_images, expected_images, "exact")
  yield Result("text_policy_loss", texts.policy / (num_tokens + losses.EPSILON))
  yield Result("text_kl", texts.kl / (num_tokens + losses.EPSILON))
  yield Result("img_policy_loss", images.policy / (num_images + losses.EPSILON))
  yield Result("img_kl", images.kl / num_images)
  yield Result("total_loss", result.value)

  log_ratio = result.outputs.logprob - recorded.text.behavior_logprob
  yield Result("text_ratio", _scored(recorded, jnp.exp(log_ratio)))
  _, _, token_logprob = _image_logprob(pack, recorded, result.outputs.velocity)
  image_logprob = token_logprob.mean(axis=-1)
  yield Result("log_prob_per_image", image_logprob)
  log_ratio = image_logprob - recorded.trajectory.behavior_logprob
  yield Result("img_ratio", jnp.exp(log_ratio))
  yield Result("ref_token_logps", _scored(recorded, anchor.outputs.logprob))
  yield Result("ref_velocity", case_arrays.packed(anchor.outputs.velocity))
  yield from _gradients(golden, case, gradient)


def _gradients(
  golden: Golden, case: str, gradient: types.Params
) -> Iterator[Result]:
  """Yields the norms of all gradients, and (the first rows of) some gradients."""
  arrays = golden.arrays(case)
  released = _released(golden, gradient)
  yield Result("grad_norm", optax.tree.norm(gradient))
  names = arrays["grad_names"].tolist()
  exists = np.array([name in released for name in names])
  yield Result("grad_names", exists, np.ones(len(names), bool), "exact")
  norms = [np.linalg.norm(released[name]) for name in names]
  yield Result("grad_norms", np.array(norms))
  for array in arrays:
    if not array.startswith("grad::"):
      continue
    value = released[array.removeprefix("grad::")]
    if "embed_tokens" in array:
      rows = np.flatnonzero(np.abs(value).sum(axis=1))
      yield Result("grad_rows_embed_tokens", rows)
      yield Result(array, value[arrays["grad_rows_embed_tokens"]])
    else:
      # Of large parameters the first rows are recorded.
      yield Result(array, value[: len(arrays[array])])
