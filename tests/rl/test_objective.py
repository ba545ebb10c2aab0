"""Tests of the scoring passes, the objective and its gradient against golden cases j and k.

The reference's trainer is wrong in two places: it scores drafts without guidance and edits with the
global renorm. The goldens hold both versions; r3jax computes what was sampled (`consistent`), and
other guidance settings give the literal one (`onpolicy`, `perturbed`).
"""

import dataclasses
import functools
import tempfile

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from r3jax.io import bagel_checkpoint
from r3jax.rl import losses
from r3jax.rl import objective
from r3jax.rl import rollout as rollout_lib
from r3jax.rl import settings as settings_lib
from r3jax.sampling import flow as flow_lib
from r3jax.sampling import guidance as guidance_lib
from r3jax.sampling import schedule as schedule_lib
from r3jax.sampling import text as text_lib
from r3jax.sequence import stages
from tests import goldens_lib

UNUSED = 2
ROWS = 2
SPARE = 1  # empty slots: the other stage's system prompt may be longer


def _scales(name: str) -> tuple[float, float]:
  return tuple(float(x) for x in goldens_lib.case(name)["scales"])


def _guidance(name: str, variant: str) -> guidance_lib.Guidance:
  text, image = _scales(name)
  if name == "j_pack_gen":
    return guidance_lib.Guidance(text if variant == "consistent" else 1.0, 1.0, "global")
  return guidance_lib.Guidance(text, image, "text_channel" if variant == "consistent" else "global")


def _flow(name: str, variant: str) -> settings_lib.FlowSettings:
  eta = schedule_lib.Eta("monotonic", float(goldens_lib.case(name)["constant_eta"]))
  return settings_lib.FlowSettings(
      schedule_lib.Schedule(goldens_lib.constants()["ode_points"]), _guidance(name, variant), eta, 1
  )


def _loss() -> settings_lib.LossSettings:
  c = goldens_lib.constants()
  return settings_lib.LossSettings(
      c["text_weight"],
      c["image_weight"],
      c["kl_weight_text"],
      c["kl_weight_image"],
      c["clip_range"],
      False,
      1.0,
  )


def _segment(body: np.ndarray) -> np.ndarray:
  ids = goldens_lib.config().special_ids
  return np.array([ids.text_begin, *body, ids.text_end])


def _system_capacity(name: str) -> int:
  return len(goldens_lib.case(name)["system_ids"]) + 2 + SPARE


def _bodies(name: str, array: str):
  arrays = goldens_lib.case(name)
  return goldens_lib.padded([_segment(arrays[f"{array}_{row}"]) for row in range(ROWS)])


def _actor(name: str, variant: str, capacities: stages.Capacities, tower) -> rollout_lib.Actor:
  system, flow = tuple(_segment(goldens_lib.case(name)["system_ids"]).tolist()), _flow(
      name, variant
  )
  plain = text_lib.TextSampling(1.0)
  settings = settings_lib.Settings(
      groups=1,
      group_size=ROWS,
      capacities=capacities,
      reason_text=plain,
      reflect_text=plain,
      reason_flow=flow,
      refine_flow=flow,
      loss=_loss(),
      pool_perfect=0.15,
      system_reason=system,
      system_reflect=system,
  )
  modules = settings_lib.Modules(goldens_lib.bagel_model(), tower)
  return rollout_lib.Actor(modules, goldens_lib.weights()["policy"], goldens_lib.frozen(), settings)


@dataclasses.dataclass(frozen=True)
class Pack:
  """A golden pack as r3jax's scoring passes want it."""

  actor: rollout_lib.Actor
  text: rollout_lib.Text
  trajectory: flow_lib.Trajectory
  forward: object  # (actor, text, trajectory) -> (logprob [B, T - 1], velocity [B, N, C])


def _recorded(name: str, case: str) -> tuple[rollout_lib.Text, flow_lib.Trajectory]:
  """Returns what the rollout of a pack recorded, with the behaviour of a k case."""
  arrays, behavior = goldens_lib.case(name), goldens_lib.case(case)
  ids, lengths = goldens_lib.texts(name, "generated_ids")
  logprob = np.zeros((ROWS, ids.shape[1] - 1), np.float32)
  logprob[np.asarray(losses.token_mask(lengths, ids.shape[1]))] = np.log(
      behavior["inference_probs"]
  )
  latents = jnp.stack([jnp.asarray(arrays[f"latents_{row}"]) for row in range(ROWS)])
  t, dt = jnp.asarray(np.stack([arrays[f"t_dt_{row}"] for row in range(ROWS)])).T
  per_image = behavior["behavior_log_probs"].reshape(ROWS, -1).mean(axis=1)
  trajectory = flow_lib.Trajectory(
      latents[:, 1], latents[:, 0], latents[:, 1], t, dt, jnp.asarray(per_image)
  )
  return rollout_lib.Text(ids, lengths, jnp.asarray(logprob)), trajectory


def _gen_pack(case: str, variant: str) -> Pack:
  """Returns two groups of one draft each."""
  name = "j_pack_gen"
  text, trajectory = _recorded(name, case)
  ids, lengths = _bodies(name, "prompt_ids")
  tower = goldens_lib.towers()
  capacities = stages.Capacities(
      _system_capacity(name),
      ids.shape[1],
      text.ids.shape[1],
      UNUSED,
      UNUSED,
      UNUSED,
      tower.latent_grid,
      (1, 1),
  )
  prompts = rollout_lib.Prompts(ids, lengths, None, None, None, None)

  def forward(actor, text, trajectory):
    return rollout_lib.score_reason(actor, prompts, rollout_lib.Reason(text, trajectory, None))

  return Pack(_actor(name, variant, capacities, tower), text, trajectory, forward)


def _edit_pack(case: str, variant: str) -> Pack:
  """Returns one group of two edits of one image."""
  name = "j_pack_edit"
  text, trajectory = _recorded(name, case)
  question, question_length = goldens_lib.padded(
      [_segment(goldens_lib.case(name)["reflection_ids"])]
  )
  ids, lengths = _bodies(name, "edit_ids")
  image = jnp.asarray(goldens_lib.case(name)["image"])[None]
  tower = goldens_lib.towers(image.shape[1:3])
  capacities = stages.Capacities(
      _system_capacity(name),
      UNUSED,
      UNUSED,
      question.shape[1],
      text.ids.shape[1],
      ids.shape[1],
      tower.latent_grid,
      tower.vit_grid,
  )
  source = rollout_lib.Source(image, *goldens_lib.look(image))
  prompts = rollout_lib.Prompts(question, None, question, question_length, None, None)
  instruction = rollout_lib.Instruction(ids, lengths, jnp.zeros(ROWS, bool))

  def forward(actor, text, trajectory):
    logprob = rollout_lib.score_reflect(actor, prompts, source, text)
    return logprob, rollout_lib.score_refine(
        actor, source, instruction, rollout_lib.Refine(trajectory, None)
    )

  return Pack(_actor(name, variant, capacities, tower), text, trajectory, forward)


def _reference(policy):
  """Returns the goldens' reference: every matrix of the layers times 0.95."""
  kernel = lambda path, x: 0.95 * x if path[-1].key == "kernel" else x
  return policy | {"layers": jax.tree_util.tree_map_with_path(kernel, policy["layers"])}


@functools.cache
def _step(name: str, variant: str):
  """Returns the compiled objective of a pack under a guidance."""
  make = _gen_pack if name == "j_pack_gen" else _edit_pack
  pack = make(f"k_loss_{name.removeprefix('j_pack_')}_onpolicy", variant)
  flow, loss, valid = _flow(name, variant), _loss(), jnp.ones(ROWS, bool)

  @jax.jit
  def step(policy, reference, text, trajectory, text_advantage, image_advantage):
    def objective_of(policy):
      logprob, velocity = pack.forward(
          dataclasses.replace(pack.actor, policy=policy), text, trajectory
      )
      texts = objective.text_terms(
          logprob, reference[0], text, text_advantage, valid, loss.clip_range
      )
      images = objective.flow_terms(
          velocity, reference[1], trajectory, flow, image_advantage, valid, loss.clip_range
      )
      value = objective.total(texts, images, texts.tokens, images.images, loss)
      return value, Outcome(value, texts, images, logprob, velocity, reference)

    (_, outcome), gradient = jax.value_and_grad(objective_of, has_aux=True)(policy)
    return outcome.replace(gradient=gradient)

  return step


@flax.struct.dataclass
class Outcome:
  """What the objective of a k case gives."""

  value: jax.Array
  texts: objective.TextTerms
  images: objective.FlowTerms
  logprob: jax.Array
  velocity: jax.Array
  reference: tuple[jax.Array, jax.Array]  # log-prob and velocity
  gradient: dict | None = None


@functools.cache
def _outcome(stage: str, variant: str) -> tuple[rollout_lib.Text, flow_lib.Trajectory, Outcome]:
  """Returns the recorded rollout of a k case and its outcome."""
  name, case = f"j_pack_{stage}", f"k_loss_{stage}_{variant}"
  text, trajectory = _recorded(name, case)
  arrays, policy = goldens_lib.case(name), goldens_lib.weights()["policy"]
  advantages = [jnp.asarray(arrays[f"in_{kind}_advantages"][:, 0]) for kind in ("text", "image")]
  step = _step(name, "consistent" if variant == "consistent" else "literal")
  unused = text.behavior_logprob, trajectory.before
  scored = step(_reference(policy), unused, text, trajectory, *advantages)
  reference = scored.logprob, scored.velocity
  return text, trajectory, step(policy, reference, text, trajectory, *advantages)


def _scored(text: rollout_lib.Text, logprob) -> np.ndarray:
  """Returns the entries that carry loss, sample after sample."""
  return np.asarray(logprob)[np.asarray(losses.token_mask(text.lengths, text.ids.shape[1]))]


def _packed(x) -> np.ndarray:
  return np.asarray(x).reshape(-1, x.shape[-1])


def _released(gradient) -> dict[str, np.ndarray]:
  """Returns gradients under BAGEL's parameter names."""
  frozen = jax.tree.map(np.zeros_like, goldens_lib.frozen())
  with tempfile.TemporaryDirectory() as folder:
    bagel_checkpoint.save({"policy": gradient, **frozen}, goldens_lib.config(), folder)
    return safetensors.numpy.load_file(f"{folder}/{bagel_checkpoint.MODEL_FILES[0]}")


LITERAL = [
    pytest.param(stage, variant, marks=pytest.mark.slow)
    for stage in ("gen", "edit")
    for variant in ("onpolicy", "perturbed")
]
CASES = [("gen", "consistent"), ("edit", "consistent"), *LITERAL]


@pytest.mark.parametrize("stage, variant", CASES)
class TestScores:

  def test_velocity_and_logprob_equal_golden(self, stage, variant):
    name = f"j_pack_{stage}"
    text, trajectory, outcome = _outcome(stage, variant)
    velocity = outcome.velocity
    goldens_lib.assert_close(name, "token_logps", _scored(text, outcome.logprob))
    fixed = variant == "consistent"
    goldens_lib.assert_close(name, "FIXED_velocity" if fixed else "apply_cfg", _packed(velocity))
    eta = _flow(name, variant).eta(trajectory.t)
    mean, std = flow_lib.sde_moments(trajectory.before, velocity, trajectory.t, trajectory.dt, eta)
    tokens = flow_lib.token_logprob(trajectory.after, mean, std)
    goldens_lib.assert_close(name, "FIXED_log_prob" if fixed else "log_prob", tokens.reshape(-1))
    if not fixed:
      goldens_lib.assert_close(name, "sde_mean", _packed(mean))
      goldens_lib.assert_close(
          name, "sde_std", np.repeat(std.reshape(-1, 1), tokens.shape[1], axis=0)
      )

  def test_reference_equals_golden(self, stage, variant):
    name = f"k_loss_{stage}_{variant}"
    text, _, outcome = _outcome(stage, variant)
    logprob, velocity = outcome.reference
    goldens_lib.assert_close(name, "ref_token_logps", _scored(text, logprob))
    goldens_lib.assert_close(name, "ref_velocity", _packed(velocity))


@pytest.mark.parametrize("stage, variant", CASES)
class TestTotal:

  def test_terms_equal_golden(self, stage, variant):
    name, pack = f"k_loss_{stage}_{variant}", goldens_lib.case(f"j_pack_{stage}")
    text, trajectory, outcome = _outcome(stage, variant)
    texts, images, velocity = outcome.texts, outcome.images, outcome.velocity
    assert int(texts.tokens) == int(pack["total_text_grad_tokens"])
    assert int(images.images) == int(pack["total_image_num"])
    tokens, count = texts.tokens + losses.EPSILON, images.images
    goldens_lib.assert_close(name, "text_policy_loss", texts.policy / tokens)
    goldens_lib.assert_close(name, "text_kl", texts.kl / tokens)
    goldens_lib.assert_close(name, "img_policy_loss", images.policy / (count + losses.EPSILON))
    goldens_lib.assert_close(name, "img_kl", images.kl / count)
    goldens_lib.assert_close(name, "total_loss", outcome.value)
    ratio = np.exp(_scored(text, outcome.logprob - text.behavior_logprob))
    goldens_lib.assert_close(name, "text_ratio", ratio)
    eta = _flow(f"j_pack_{stage}", variant).eta(trajectory.t)
    mean, std = flow_lib.sde_moments(trajectory.before, velocity, trajectory.t, trajectory.dt, eta)
    per_image = flow_lib.token_logprob(trajectory.after, mean, std).mean(axis=-1)
    goldens_lib.assert_close(name, "log_prob_per_image", per_image)
    image_ratio = np.exp(per_image - trajectory.behavior_logprob)
    goldens_lib.assert_close(name, "img_ratio", image_ratio)
    left = lambda ratio: int((np.abs(ratio - 1) > _loss().clip_range).sum())
    assert (int(texts.clipped), int(images.clipped)) == (left(ratio), left(image_ratio))

  def test_gradient_equals_golden(self, stage, variant):
    name = f"k_loss_{stage}_{variant}"
    arrays, gradient = goldens_lib.case(name), _outcome(stage, variant)[-1].gradient
    goldens_lib.assert_close(name, "grad_norm", optax.tree.norm(gradient))
    released = _released(gradient)
    norms = [np.linalg.norm(released[parameter]) for parameter in arrays["grad_names"].tolist()]
    goldens_lib.assert_close(name, "grad_norms", np.array(norms))
    for array in (array for array in arrays if array.startswith("grad::")):
      seen = released[array.removeprefix("grad::")]
      rows = slice(len(arrays[array]))  # of large parameters the golden holds the first rows
      if "embed_tokens" in array:
        rows = arrays["grad_rows_embed_tokens"]
        np.testing.assert_array_equal(np.flatnonzero(np.abs(seen).sum(axis=1)), rows)
      goldens_lib.assert_close(name, array, seen[rows])


class TestOnPolicy:

  @pytest.mark.parametrize("stage", ["gen", "edit"])
  def test_ratios_are_1_for_what_was_sampled(self, stage):
    texts, images = (
        getattr(_outcome(stage, "consistent")[-1], name) for name in ("texts", "images")
    )
    assert float(texts.mismatch) < 1e-4 and float(images.mismatch) < 1e-3
    assert int(texts.clipped) == int(images.clipped) == 0


TEXT = rollout_lib.Text(
    ids=jnp.zeros((2, 4), jnp.int32),
    lengths=jnp.array([4, 3]),
    behavior_logprob=jnp.full((2, 3), -1.0),
)


class TestTextTerms:

  def test_sums_over_scored_tokens_of_valid_samples(self):
    logprob = jnp.array([[-1.0, -0.5, 9.0], [-2.0, 9.0, 9.0]])  # 9: begin and end side, unscored
    found = objective.text_terms(
        logprob, logprob - 1, TEXT, jnp.array([1.0, 2.0]), jnp.array([True, True]), 0.2
    )
    np.testing.assert_allclose(found.policy, -1 - 1.2 - 2 * np.exp(-1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, 3 * np.exp(-1), rtol=1e-5)
    assert (int(found.tokens), int(found.clipped)) == (3, 2)
    np.testing.assert_allclose(found.mismatch, np.exp(0.5) - 1, rtol=1e-5)

  def test_leaves_invalid_samples_out(self):
    logprob = jnp.array([[-1.0, -1.0, 9.0], [jnp.nan, jnp.nan, 9.0]])
    found = objective.text_terms(
        logprob, logprob, TEXT, jnp.array([1.0, 2.0]), jnp.array([True, False]), 0.2
    )
    np.testing.assert_allclose(found.policy, -2, rtol=1e-6)
    assert int(found.tokens) == 2 and float(found.kl) == 0

  def test_gradient_is_finite_for_an_invalid_sample(self):
    logprob = jnp.array([[-1.0, -1.0, 0.0], [-200.0, -200.0, 0.0]])
    valid = jnp.array([True, False])
    policy = lambda x: objective.text_terms(x, jnp.zeros_like(x), TEXT, jnp.ones(2), valid, 0.2)
    gradient = jax.grad(lambda x: policy(x).policy + policy(x).kl)(logprob)
    assert bool(jnp.isfinite(gradient).all()) and not np.any(gradient[1])

  def test_keeps_and_counts_an_extreme_kl(self):
    logprob = jnp.array([[-1.0, -4.0, 0.0], [-1.0, 0.0, 0.0]])
    found = objective.text_terms(
        logprob, jnp.full((2, 3), -1.0), TEXT, jnp.ones(2), jnp.ones(2, bool), 0.2
    )
    np.testing.assert_allclose(found.kl, np.exp(3) - 4, rtol=1e-5)
    assert int(found.extreme_kl) == 1
