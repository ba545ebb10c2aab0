"""Cases f, g and h: guided velocities, ODE and SDE sampling."""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax.model import layers
from r3jax.model import network
from r3jax.parity import case_arrays
from r3jax.parity import goldens
from r3jax.parity import passes
from r3jax.parity import perception
from r3jax.parity import results
from r3jax.parity import scenes
from r3jax.sampling import classifier_free
from r3jax.sampling import flow_matching
from r3jax.sampling import schedules
from r3jax.sequence import segments

Golden = goldens.Golden
Result = results.Result
Scene = scenes.Scene
_BRANCHES = ("v_cond", "v_cfg_text", "v_cfg_img")
_RENORMS = ("global", "channel", "text_channel")


def draft_velocities(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case f, generation round."""
  scene = scenes.draft(golden, case)
  text, image, text_low = golden.arrays(case)["scales"].tolist()
  yield from _positions(scene)
  grid = scene.layout[scene.noise[0]].grid
  ids = layers.grid_positions(*grid, golden.config.max_latent_side)
  yield Result("latent_position_ids", np.tile(ids, scene.rows))
  scales = {"": (text, image), "_low": (text_low, image)}
  yield from _velocities(golden, case, scales)


def edit_velocities(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case f, edit round."""
  scene = scenes.edit(golden, case)
  config = golden.config
  text, image, text_low, image_low = golden.arrays(case)["scales"].tolist()
  images = case_arrays.images(golden, case)
  for name, transform in (
    ("vae_tensor", config.autoencoder_transform),
    ("vit_tensor", config.vision_transform),
  ):
    yield Result(name, perception.transformed(golden, images, transform))
  yield from _context(golden, case, scene, images)
  yield from _positions(scene)
  scales = {
    "": (text, image),
    "_low": (text_low, image_low),
    "_noimg": (text, 1.0),
  }
  yield from _velocities(golden, case, scales)


def _positions(scene: Scene) -> Iterator[Result]:
  """Yields the positions of the noise, and of every branch (filled slots, next position)."""
  layout = scene.layout
  rows = scene.rows
  positions = segments.positions(layout, scene.noise[:1], scene.lengths, rows)
  yield Result("query_position_ids", np.asarray(positions).reshape(-1))
  counters = []
  for noise in scene.noise:
    cached = scene.output.cache.names
    context = [name for name in layout[noise].sees if name in cached]
    filled = segments.filled(layout, context, scene.lengths, rows)
    start = segments.start(layout, noise, scene.lengths)
    counters.append([filled.sum(axis=1), np.broadcast_to(start, rows)])
  yield Result("kv_lens_ropes", np.asarray(counters))


def _context(
  golden: Golden, case: str, scene: Scene, images: jax.Array
) -> Iterator[Result]:
  """Yields the hidden states of the context's blocks.

  Those of the ViT and the text block come from the reference's static cache
  (docs/reference_defects.md, defect 1): there the ViT block sees only itself, and the text what was
  left of the VAE block. The velocities check the keys and values of the intended context.
  """
  markers = scene.output.text("source")
  latents = scene.output.latent("source")
  block = jnp.concatenate([markers[:, :1], latents, markers[:, 1:]], axis=1)
  yield Result("hidden_vae_block", case_arrays.packed(block))

  features, _ = passes.look(golden, images)
  vit = passes.run(golden, scene.layout, {"siglip": features}, scene.lengths)
  yield Result("hidden_vit_block", case_arrays.packed(vit.text("siglip")))

  ids, lengths = case_arrays.texts(golden, case, "edit_ids")
  past = (_overwritten_source(scene), vit.cache)
  inputs = {"instruction": ids}
  output = passes.run(golden, scene.layout, inputs, scene.lengths, past)
  text_block = case_arrays.filled(output.text("instruction"), lengths)
  yield Result("hidden_text_block", text_block)


def _overwritten_source(scene: Scene) -> network.Cache:
  """Returns the cache of the clean latents as the reference's static cache leaves it.

  The ViT block is written over them from the first slot on. The context keeps the length of both
  blocks, so that as many zeros follow as slots were overwritten. Keys and values remain only of
  latents beyond the ViT block's length.
  """
  cache = scene.output.cache
  slots = scene.layout.slots(cache.names)
  is_source = slots.segment == scene.layout.index("source")
  remains = slots.offset[is_source] >= scene.layout["siglip"].capacity
  remains = jnp.asarray(remains)[None, None, :, None, None]
  key = jnp.where(remains, cache.key[:, :, is_source], 0)
  value = jnp.where(remains, cache.value[:, :, is_source], 0)
  return network.Cache(key, value, ("source",))


def _velocities(
  golden: Golden, case: str, scales: dict[str, tuple[float, float]]
) -> Iterator[Result]:
  """Yields the branches at the recorded latent and every recorded combination of them.

  Args:
    golden: the folder of goldens.
    case: name of the case.
    scales: suffix of an array's name -> text and image scale.
  """
  arrays = golden.arrays(case)
  scene = scenes.scene(golden, case)
  latent = case_arrays.unpacked(arrays["x_t"], scene.rows)
  branches = scene.branches(latent, float(arrays["t"]))
  # A draft has no branch without image.
  for name, velocity in zip(_BRANCHES, branches, strict=False):
    yield Result(name, case_arrays.packed(velocity))

  guidances = {}
  for suffix, (text, image) in scales.items():
    for renorm in _RENORMS:
      guidance = classifier_free.Guidance(text, image, renorm)
      guidances[f"v_{renorm}{suffix}"] = guidance
  text, image = scales[""]
  guidances["v_channel_min09"] = classifier_free.Guidance(
    text, image, "channel", renorm_min=0.9
  )
  guidances["v_textscale1_imgscale"] = classifier_free.Guidance(
    1.0, image, "global"
  )
  for name, guidance in guidances.items():
    if name in arrays:
      yield Result(name, _combined(guidance, branches))


def _combined(
  guidance: classifier_free.Guidance, branches: tuple[jax.Array, ...]
) -> np.ndarray:
  """Returns the guided velocity, [B * N, C]."""
  velocity = branches[0]
  if guidance.uses_text:
    num_branches = 2 + guidance.uses_image
    velocity = classifier_free.combine(guidance, *branches[:num_branches])
  return case_arrays.packed(velocity)


def ode(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case g: an ODE with its images, and a run with an inner guidance interval."""
  yield from _ode_steps(golden, case)
  scene = scenes.scene(golden, case)
  trajectory = _sampled(golden, case, scene.guidance)
  yield Result("x_final", case_arrays.packed(trajectory.latent))
  images = passes.decode(golden, trajectory.latent, scene.size)
  yield Result("image_uint8", images)

  low, high = golden.arrays(case)["interval2"].tolist()
  inner = dataclasses.replace(scene.guidance, interval=(low, high))
  guided = _guided(inner, _schedule(golden, golden.constants["ode_points"]))
  yield Result("interval2_cfg_active", guided)
  trajectory = _sampled(golden, case, inner)
  yield Result("interval2_x_final", case_arrays.packed(trajectory.latent))


def _ode_steps(golden: Golden, case: str) -> Iterator[Result]:
  """Yields every state and velocity of an ODE, step by step."""
  scene = scenes.scene(golden, case)
  schedule = _schedule(golden, len(golden.arrays(case)["timesteps"]))
  times = schedule.times()
  guided = _guided(scene.guidance, schedule)
  latent = _initial(golden, case)
  latents = []
  velocities = []
  for step in range(schedule.num_steps):
    t = times[step]
    if guided[step]:
      branches = scene.branches(latent, t, scene.active)
      velocity = classifier_free.combine(scene.guidance, *branches)
    else:
      (velocity,) = scene.branches(latent, t, scene.active[:1])
    latents.append(case_arrays.packed(latent))
    velocities.append(case_arrays.packed(velocity))
    dt = jnp.full(scene.rows, t - times[step + 1])
    latent = flow_matching.ode_step(latent, velocity, dt)
  yield Result("timesteps", times)
  yield Result("cfg_active", guided)
  yield Result("x_traj", np.stack(latents))
  yield Result("v_traj", np.stack(velocities))


def mixed(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case h: an ODE with one SDE step."""
  arrays = golden.arrays(case)
  scene = scenes.scene(golden, case)
  step = SDEStep(
    index=jnp.full(scene.rows, int(arrays["sde_idx"][0])),
    noise=case_arrays.unpacked(arrays["sde_noise"], scene.rows),
    eta=schedules.Eta("monotonic", float(arrays["constant_eta"])),
  )
  trajectory = _sampled(golden, case, scene.guidance, step)
  yield Result("timestep", trajectory.t[:1])
  yield Result("dt", trajectory.dt[:1])
  yield Result("x_final", case_arrays.packed(trajectory.latent))

  before = trajectory.before
  branches = scene.branches(before, trajectory.t[0], scene.active)
  velocity = classifier_free.combine(scene.guidance, *branches)
  yield Result("v_sde_step", case_arrays.packed(velocity))
  eta = step.eta(trajectory.t)
  mean, std = flow_matching.sde_moments(
    before, velocity, trajectory.t, trajectory.dt, eta
  )
  logprobs = flow_matching.token_logprob(trajectory.after, mean, std)
  for row in range(scene.rows):
    states = jnp.stack([before[row], trajectory.after[row]])
    yield Result(f"latents_{row}", states)
    yield Result(f"log_prob_{row}", logprobs[row : row + 1])


@flax.struct.dataclass
class SDEStep:
  """The recorded SDE step of a trajectory.

  Attributes:
    index: the step.
    noise: standard normal.
    eta: noise scale.
  """

  index: jax.Array  # [B] int32
  noise: jax.Array  # [B, N, C]
  eta: schedules.Eta = flax.struct.field(pytree_node=False)


def _sampled(
  golden: Golden,
  case: str,
  guidance: classifier_free.Guidance,
  sde_step: SDEStep | None = None,
) -> flow_matching.Trajectory:
  """Samples the scene of a case with another guidance."""
  scene = scenes.scene(golden, case)
  sample = _compiled_sample(golden, scene.layout, scene.active, guidance)
  initial = _initial(golden, case)
  return sample(golden.policy, initial, scene.lengths, scene.past, sde_step)


@functools.cache
def _compiled_sample(
  golden: Golden,
  layout: segments.Layout,
  names: tuple[str, ...],
  guidance: classifier_free.Guidance,
) -> Callable[..., flow_matching.Trajectory]:
  """Returns (policy, initial, lengths, past, sde_step or None) -> trajectory."""
  schedule = _schedule(golden, golden.constants["ode_points"])

  @jax.jit
  def sample(policy, initial, lengths, past, sde_step):
    def velocity(latent, t, is_guided):
      active = names if is_guided else names[:1]
      branches = passes.velocities(
        golden, policy, layout, active, latent, t, lengths, past
      )
      if not is_guided:
        return branches[0]
      return classifier_free.combine(guidance, *branches)

    plan = None
    if sde_step is not None:
      plan = flow_matching.SDEPlan(
        sde_step.index, lambda _: sde_step.noise, sde_step.eta
      )
    guided = _guided(guidance, schedule)
    return flow_matching.sample(velocity, initial, schedule, guided, plan)

  return sample


def _initial(golden: Golden, case: str) -> jax.Array:
  """Returns the recorded noise for every row, [B, N, C]."""
  noise = jnp.asarray(golden.arrays(case)["initial_noise"])
  rows = scenes.scene(golden, case).rows
  return jnp.broadcast_to(noise, (rows, *noise.shape))


def _guided(
  guidance: classifier_free.Guidance, schedule: schedules.Schedule
) -> np.ndarray:
  """Returns which steps are guided."""
  return np.asarray(guidance.active(schedule.times()[:-1]))


def _schedule(golden: Golden, points: int) -> schedules.Schedule:
  return schedules.Schedule(points, golden.constants["timestep_shift"])


def sde(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case h: moments, log-probs and KLs of single steps, and the schedules."""
  arrays = golden.arrays(case)
  for name in arrays:
    if name.startswith("schedule") and name.endswith("_t"):
      times = _schedule(golden, len(arrays[name]) + 1).times()
      yield Result(name, times[:-1])
      yield Result(name.replace("_t", "_dt"), times[:-1] - times[1:])
  yield from _single_steps(arrays)
  yield from _batch_of_steps(arrays)


def _single_steps(arrays: dict[str, np.ndarray]) -> Iterator[Result]:
  """Yields steps of one latent at several times, with either mode of the noise scale."""
  latent = jnp.asarray(arrays["x_t"])[None]
  velocity = jnp.asarray(arrays["v"])[None]
  reference_velocity = jnp.asarray(arrays["v_ref"])[None]
  next_latent = jnp.asarray(arrays["x_prev"])[None]
  columns = {"eta": [], "std": [], "mean": [], "log_prob": [], "kl": []}
  for i, mode in enumerate(arrays["eta_mode"]):
    t = jnp.asarray([arrays["t"][i]])
    dt = jnp.asarray([arrays["dt"][i]])
    mode_name = ("constant", "monotonic")[mode]
    eta = schedules.Eta(mode_name, float(arrays["eta_scale"][i]))(t)
    mean, std = flow_matching.sde_moments(latent, velocity, t, dt, eta)
    reference_mean, _ = flow_matching.sde_moments(
      latent, reference_velocity, t, dt, eta
    )
    logprob = flow_matching.token_logprob(next_latent, mean, std)
    kl = flow_matching.token_kl(mean, reference_mean, std)
    columns["eta"].append(eta[0])
    columns["std"].append(std[0, 0, 0])
    columns["mean"].append(mean[0])
    columns["log_prob"].append(logprob[0])
    columns["kl"].append(kl[0])
  for name, values in columns.items():
    yield Result(name, np.stack(values))


def _batch_of_steps(arrays: dict[str, np.ndarray]) -> Iterator[Result]:
  """Yields steps of single tokens, each at a time of its own."""
  latent = jnp.asarray(arrays["x_t"])[:, None]
  velocity = jnp.asarray(arrays["v"])[:, None]
  next_latent = jnp.asarray(arrays["x_prev"])[:, None]
  t = jnp.asarray(arrays["vec_t"])
  dt = jnp.asarray(arrays["vec_dt"])
  eta = schedules.Eta("monotonic", 0.7)(t)
  mean, std = flow_matching.sde_moments(latent, velocity, t, dt, eta)
  logprob = flow_matching.token_logprob(next_latent, mean, std)
  yield Result("vec_mean", mean[:, 0])
  yield Result("vec_std", std[:, 0])
  yield Result("vec_log_prob", logprob[:, 0])
