"""Cases j_pack_gen, j_pack_edit and k: scoring passes, losses, gradients.

The goldens hold two versions: what the reference's trainer computes (`apply_cfg`, `log_prob`,
`k_*_onpolicy`, `k_*_perturbed`; here `compat.reference_loss`) and what was sampled (`FIXED_*`,
`k_*_consistent`; the default).
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

from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import rollout as rollout_lib
from r3jax.agent import rollout_settings
from r3jax.agent import scoring
from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_headers
from r3jax.parity import goldens
from r3jax.parity import model
from r3jax.parity import seen
from r3jax.rl import iteration_settings
from r3jax.rl import losses
from r3jax.rl import objective
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import flow_matching
from r3jax.sampling import schedules
from r3jax.sequence import layouts

Golden, Seen = goldens.Golden, seen.Seen
_UNUSED = 2  # capacity of a text segment that a pack does not have
_SPARE = 1  # empty slots: the other stage's system prompt may be longer
# of every matrix of the layers, in the goldens' reference policy
_REFERENCE_SCALE = 0.95


@flax.struct.dataclass
class Outputs:
  """What a scoring pass gives."""

  logprob: jax.Array  # [B, T - 1]
  velocity: jax.Array  # [B, N, C] combined
  logits: jax.Array  # [B, T - 1, V]
  branches: tuple[jax.Array, ...]  # each [B, N, C]


@dataclasses.dataclass(frozen=True)
class Pack:
  """A golden pack as r3jax's scoring passes want it."""

  golden: Golden
  case: str
  literal: bool

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """Of the pack."""
    return self.golden.arrays(self.case)

  @functools.cached_property
  def rows(self) -> int:
    """Samples."""
    return len(model.numbered(self.golden, self.case, "generated_ids"))

  def segment(self, body: np.ndarray) -> np.ndarray:
    """Returns ids with begin and end."""
    ids = self.golden.config.special_ids
    return np.array([ids.text_begin, *body, ids.text_end])

  def segments(self, array: str) -> tuple[jax.Array, jax.Array]:
    """Returns ids and lengths of numbered bodies."""
    bodies = model.numbered(self.golden, self.case, array)
    return model.padded([self.segment(body) for body in bodies])

  def flow(
    self, image_scale: float, renorm: str
  ) -> rollout_settings.FlowSettings:
    """Returns how the pack's images were sampled."""
    c = self.golden.constants
    guidance = classifier_free.Guidance(
      float(self.arrays["scales"][0]), image_scale, renorm
    )
    schedule = schedules.Schedule(c["ode_points"], c["timestep_shift"])
    eta = schedules.Eta(c["eta"]["mode"], float(self.arrays["constant_eta"]))
    return rollout_settings.FlowSettings(schedule, guidance, eta, 1)

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
  c = golden.constants
  return iteration_settings.LossSettings(
    c["text_weight"],
    c["image_weight"],
    c["kl_weight_text"],
    c["kl_weight_image"],
    c["clip_range"],
    False,
    1.0,
  )


@functools.cache
def _recorded(golden: Golden, pack: str, case: str) -> experience.Recorded:
  """Returns the rollout of a pack with the behaviour of a k case."""
  behavior = golden.arrays(case)
  ids, lengths = model.texts(golden, pack, "generated_ids")
  logprob = np.zeros((len(ids), ids.shape[1] - 1), np.float32)
  logprob[np.asarray(losses.token_mask(lengths, ids.shape[1]))] = np.log(
    behavior["inference_probs"]
  )
  latents = jnp.stack(
    [jnp.asarray(x) for x in model.numbered(golden, pack, "latents")]
  )
  t, dt = jnp.asarray(np.stack(model.numbered(golden, pack, "t_dt"))).T
  per_image = behavior["behavior_log_probs"].reshape(len(ids), -1).mean(axis=1)
  trajectory = flow_matching.Trajectory(
    latents[:, 1], latents[:, 0], latents[:, 1], t, dt, jnp.asarray(per_image)
  )
  return experience.Recorded(
    experience.Text(ids, lengths, jnp.asarray(logprob)), trajectory
  )


def _outputs(
  actor: actors.Actor,
  recorded: experience.Recorded,
  hidden,
  run: scoring.Pass,
  names,
) -> Outputs:
  logits = actor.modules.bagel.apply(
    {"params": actor.policy}, hidden[:, :-1], method="logits"
  )
  branches = actor.velocities(run.output, run.flow.branches(names))
  velocity = scoring.scored_velocity(actor, run, names, recorded.trajectory.t)
  return Outputs(
    actor.logprob(hidden, recorded.text.ids), velocity, logits, branches
  )


def _actor(
  pack: Pack, policy, towers, capacities: layouts.Capacities
) -> actors.Actor:
  modules = actors.Modules(pack.golden.bagel, towers)
  return actors.Actor(
    modules, policy, pack.golden.frozen, pack.settings(capacities)
  )


def _score_drafts(pack: Pack, policy, recorded: experience.Recorded) -> Outputs:
  """Scores two groups of one draft each."""
  ids, lengths = pack.segments("prompt_ids")
  towers = pack.golden.towers()
  capacities = layouts.Capacities(
    pack.system_capacity,
    ids.shape[1],
    recorded.text.ids.shape[1],
    _UNUSED,
    _UNUSED,
    _UNUSED,
    towers.latent_grid,
    (1, 1),
  )
  actor = _actor(pack, policy, towers, capacities)
  prompts = experience.Prompts(ids, lengths, None, None, None, None)
  run = scoring.reason_pass(actor, prompts, recorded)
  return _outputs(
    actor, recorded, run.output.text("thought"), run, layouts.DRAFT
  )


def _score_edits(pack: Pack, policy, recorded: experience.Recorded) -> Outputs:
  """Scores one group of edits of one image."""
  golden = pack.golden
  question, question_length = model.padded(
    [pack.segment(pack.arrays["reflection_ids"])]
  )
  ids, lengths = pack.segments("edit_ids")
  image = jnp.asarray(pack.arrays["image"])[None]
  towers = golden.towers(image.shape[1:3])
  capacities = layouts.Capacities(
    pack.system_capacity,
    _UNUSED,
    _UNUSED,
    question.shape[1],
    recorded.text.ids.shape[1],
    ids.shape[1],
    towers.latent_grid,
    towers.vit_grid,
  )
  actor = _actor(pack, policy, towers, capacities)
  source = rollout_lib.look(actor, image)
  prompts = experience.Prompts(
    question, None, question, question_length, None, None
  )
  instruction = experience.Instruction(ids, lengths, jnp.zeros(pack.rows, bool))
  reflected = scoring.reflect_pass(actor, prompts, source, recorded.text)
  run = scoring.refine_pass(actor, source, instruction, recorded.trajectory)
  return _outputs(actor, recorded, reflected.text("answer"), run, layouts.EDIT)


@flax.struct.dataclass
class Outcome:
  """What the objective of a k case gives."""

  value: jax.Array
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
  loss, valid, flow = (
    loss_settings(pack.golden),
    jnp.ones(pack.rows, bool),
    pack.flow(1.0, "global"),
  )

  def objective_of(policy):
    outputs = score(pack, policy, recorded)
    texts = objective.text_terms(
      outputs.logprob,
      reference[0],
      recorded.text,
      text_advantage,
      valid,
      loss.clip_range,
    )
    images = objective.flow_terms(
      outputs.velocity,
      reference[1],
      recorded.trajectory,
      flow,
      image_advantage,
      valid,
      loss.clip_range,
    )
    value = objective.total(
      texts, images, texts.num_tokens, images.num_images, loss
    )
    return value, Outcome(value, texts, images, outputs)

  (_, outcome), gradient = jax.value_and_grad(objective_of, has_aux=True)(
    policy
  )
  return outcome, gradient


def _reference(policy):
  """Returns the goldens' reference policy."""
  scaled = lambda path, x: (
    _REFERENCE_SCALE * x if path[-1].key == "kernel" else x
  )
  return policy | {
    "layers": jax.tree_util.tree_map_with_path(scaled, policy["layers"])
  }


def _pack_of(golden: Golden, case: str) -> tuple[Pack, experience.Recorded]:
  """Returns pack and recorded rollout of a k case."""
  _, _, stage, variant = case.split("_")
  pack = Pack(golden, f"j_pack_{stage}", variant != "consistent")
  return pack, _recorded(golden, pack.case, case)


@functools.cache
def outcome(golden: Golden, case: str) -> tuple[Outcome, Outcome, dict]:
  """Returns the outcome of a k case, that of the reference policy, and the gradient."""
  pack, recorded = _pack_of(golden, case)
  advantages = [
    jnp.asarray(pack.arrays[f"in_{kind}_advantages"][:, 0])
    for kind in ("text", "image")
  ]
  unused = recorded.text.behavior_logprob, recorded.trajectory.before
  anchor, _ = _step(
    pack, _reference(golden.policy), unused, recorded, *advantages
  )
  reference = anchor.outputs.logprob, anchor.outputs.velocity
  found, gradient = _step(pack, golden.policy, reference, recorded, *advantages)
  return found, anchor, gradient


def _scored(recorded: experience.Recorded, x) -> np.ndarray:
  """Returns the entries [B, T - 1, ...] that carry loss, sample after sample."""
  text = recorded.text
  return np.asarray(x)[
    np.asarray(losses.token_mask(text.lengths, text.ids.shape[1]))
  ]


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


def scores(golden: Golden, case: str) -> Iterator[Seen]:
  """Case j: logits, velocities of every branch, and both versions of what is trained."""
  for variant in ("consistent", "onpolicy"):
    k_case = f"k_loss_{case.removeprefix('j_pack_')}_{variant}"
    pack, recorded = _pack_of(golden, k_case)
    outputs = outcome(golden, k_case)[0].outputs
    mean, std, logprob = _image_logprob(pack, recorded, outputs.velocity)
    if variant == "consistent":
      yield Seen("logits", _scored(recorded, outputs.logits))
      yield Seen("token_logps", _scored(recorded, outputs.logprob))
      yield Seen("packed_mse_preds", _in_packed_order(outputs.branches))
      yield Seen("FIXED_velocity", model.packed(outputs.velocity))
      yield Seen("FIXED_log_prob", logprob.reshape(-1))
    else:
      yield Seen("apply_cfg", model.packed(outputs.velocity))
      yield Seen("sde_mean", model.packed(mean))
      yield Seen(
        "sde_std", np.repeat(std.reshape(-1, 1), logprob.shape[1], axis=0)
      )
      yield Seen("log_prob", logprob.reshape(-1))


def _in_packed_order(branches: tuple[jax.Array, ...]) -> np.ndarray:
  """Returns the branches [B, N, C] sample after sample, as [B * branches * N, C]."""
  return model.packed(jnp.stack(branches, axis=1))


def _released(golden: Golden, gradient) -> dict[str, np.ndarray]:
  """Returns gradients under BAGEL's parameter names."""
  frozen = jax.tree.map(np.zeros_like, golden.frozen)
  with tempfile.TemporaryDirectory() as folder:
    bagel_files.save({"policy": gradient, **frozen}, golden.config, folder)
    return safetensors.numpy.load_file(
      f"{folder}/{bagel_headers.MODEL_FILES[0]}"
    )


def loss(golden: Golden, case: str) -> Iterator[Seen]:
  """Case k: losses, ratios, reference and gradients."""
  pack, recorded = _pack_of(golden, case)
  found, anchor, gradient = outcome(golden, case)
  texts, images = found.texts, found.images
  tokens, count = texts.num_tokens, images.num_images
  yield Seen("tokens", tokens, pack.arrays["total_text_grad_tokens"], "exact")
  yield Seen("images", count, pack.arrays["total_image_num"], "exact")
  yield Seen("text_policy_loss", texts.policy / (tokens + losses.EPSILON))
  yield Seen("text_kl", texts.kl / (tokens + losses.EPSILON))
  yield Seen("img_policy_loss", images.policy / (count + losses.EPSILON))
  yield Seen("img_kl", images.kl / count)
  yield Seen("total_loss", found.value)
  ratio = jnp.exp(found.outputs.logprob - recorded.text.behavior_logprob)
  yield Seen("text_ratio", _scored(recorded, ratio))
  per_image = _image_logprob(pack, recorded, found.outputs.velocity)[2].mean(
    axis=-1
  )
  yield Seen("log_prob_per_image", per_image)
  yield Seen(
    "img_ratio", jnp.exp(per_image - recorded.trajectory.behavior_logprob)
  )
  yield Seen("ref_token_logps", _scored(recorded, anchor.outputs.logprob))
  yield Seen("ref_velocity", model.packed(anchor.outputs.velocity))
  yield from _gradients(golden, case, gradient)


def _gradients(golden: Golden, case: str, gradient) -> Iterator[Seen]:
  arrays, released = golden.arrays(case), _released(golden, gradient)
  yield Seen("grad_norm", optax.tree.norm(gradient))
  names = arrays["grad_names"].tolist()
  yield Seen(
    "grad_names",
    np.array([name in released for name in names]),
    np.ones(len(names), bool),
    "exact",
  )
  yield Seen(
    "grad_norms", np.array([np.linalg.norm(released[name]) for name in names])
  )
  for array in (array for array in arrays if array.startswith("grad::")):
    value = released[array.removeprefix("grad::")]
    if "embed_tokens" in array:
      rows = arrays["grad_rows_embed_tokens"]
      yield Seen(
        "grad_rows_embed_tokens", np.flatnonzero(np.abs(value).sum(axis=1))
      )
      yield Seen(array, value[rows])
    else:
      # of large parameters the first rows are recorded
      yield Seen(array, value[: len(arrays[array])])
