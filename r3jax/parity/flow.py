"""Cases f, g and h: guided velocities, ODE and SDE sampling."""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.model import layers
from r3jax.model import network
from r3jax.parity import goldens
from r3jax.parity import model
from r3jax.parity import perception
from r3jax.parity import scenes
from r3jax.parity import seen
from r3jax.sampling import classifier_free
from r3jax.sampling import flow_matching
from r3jax.sampling import schedules
from r3jax.sequence import segments

Golden, Seen, Scene = goldens.Golden, seen.Seen, scenes.Scene
_BRANCHES = ("v_cond", "v_cfg_text", "v_cfg_img")


def _positions(scene: Scene) -> Iterator[Seen]:
  layout, rows = scene.layout, scene.rows
  positions = segments.positions(layout, scene.noise[:1], scene.lengths, rows)
  yield Seen("query_position_ids", np.asarray(positions).reshape(-1))
  counters = []
  for noise in scene.noise:
    context = [
      name for name in layout[noise].sees if name in scene.output.cache.names
    ]
    held = segments.filled(layout, context, scene.lengths, rows).sum(axis=1)
    counters.append(
      [
        held,
        np.broadcast_to(segments.start(layout, noise, scene.lengths), rows),
      ]
    )
  yield Seen("kv_lens_ropes", np.asarray(counters))


def _combined(guidance: classifier_free.Guidance, branches) -> np.ndarray:
  needed = 1 + guidance.uses_text + guidance.uses_image
  return model.packed(
    classifier_free.combine(guidance, *branches[:needed])
    if guidance.uses_text
    else branches[0]
  )


def _velocities(
  golden: Golden, case: str, scales: dict[str, tuple[float, float]]
) -> Iterator[Seen]:
  """Yields the branches at the recorded latent and every recorded combination of them.

  Args:
    golden, case: what is checked.
    scales: suffix of an array's name -> text and image scale.
  """
  arrays, scene = golden.arrays(case), scenes.scene(golden, case)
  branches = scene.branches(
    model.unpacked(arrays["x_t"], scene.rows), float(arrays["t"])
  )
  for name, velocity in zip(_BRANCHES, branches):
    yield Seen(name, model.packed(velocity))
  for renorm in ("global", "channel", "text_channel"):
    for suffix, pair in scales.items():
      if f"v_{renorm}{suffix}" in arrays:
        yield Seen(
          f"v_{renorm}{suffix}",
          _combined(classifier_free.Guidance(*pair, renorm), branches),
        )
  if "v_channel_min09" in arrays:
    guidance = classifier_free.Guidance(*scales[""], "channel", renorm_min=0.9)
    yield Seen("v_channel_min09", _combined(guidance, branches))
  if "v_textscale1_imgscale" in arrays:
    yield Seen(
      "v_textscale1_imgscale",
      _combined(
        classifier_free.Guidance(1.0, scales[""][1], "global"), branches
      ),
    )


def draft_velocities(golden: Golden, case: str) -> Iterator[Seen]:
  """Case f, generation round."""
  scene = scenes.draft(golden, case)
  text, image, low = (float(x) for x in golden.arrays(case)["scales"])
  yield from _positions(scene)
  ids = layers.grid_positions(
    *scene.layout[scene.noise[0]].grid, golden.config.max_latent_side
  )
  yield Seen("latent_position_ids", np.tile(ids, scene.rows))
  yield from _velocities(
    golden, case, {"": (text, image), "_low": (low, image)}
  )


def edit_velocities(golden: Golden, case: str) -> Iterator[Seen]:
  """Case f, edit round."""
  scene, config = scenes.edit(golden, case), golden.config
  text, image, text_low, image_low = (
    float(x) for x in golden.arrays(case)["scales"]
  )
  pictures = model.images(golden, case)
  yield Seen(
    "vae_tensor", perception.transformed(pictures, config.autoencoder_transform)
  )
  yield Seen(
    "vit_tensor", perception.transformed(pictures, config.vision_transform)
  )
  yield from _context(golden, case, scene, pictures)
  yield from _positions(scene)
  scales = {
    "": (text, image),
    "_low": (text_low, image_low),
    "_noimg": (text, 1.0),
  }
  yield from _velocities(golden, case, scales)


def _context(
  golden: Golden, case: str, scene: Scene, pictures: jax.Array
) -> Iterator[Seen]:
  """Yields the hidden states of the context's blocks.

  Those of the ViT and the text block come from the reference's static cache (R3.md 8, defect 1):
  there the ViT block sees only itself, and the text zeros in the place of the VAE block. The keys
  and values of the intended context are held by the velocities.
  """
  markers = scene.output.text("source")
  block = [markers[:, :1], scene.output.latent("source"), markers[:, 1:]]
  yield Seen("hidden_vae_block", model.packed(jnp.concatenate(block, axis=1)))
  ids, lengths = model.texts(golden, case, "edit_ids")
  vit = model.run(
    golden,
    scene.layout,
    {"vision": model.look(golden, pictures)[0]},
    scene.lengths,
  )
  yield Seen("hidden_vit_block", model.packed(vit.text("vision")))
  depth, rows, _, *entry = vit.cache.key.shape
  zeros = jnp.zeros(
    (depth, rows, scene.layout["source"].capacity, *entry), vit.cache.key.dtype
  )
  past = (network.Cache(zeros, zeros, ("source",)), vit.cache)
  output = model.run(
    golden, scene.layout, {"instruction": ids}, scene.lengths, past
  )
  yield Seen(
    "hidden_text_block", model.filled(output.text("instruction"), lengths)
  )


def _initial(golden: Golden, case: str) -> jax.Array:
  noise = jnp.asarray(golden.arrays(case)["initial_noise"])
  return jnp.broadcast_to(
    noise, (scenes.scene(golden, case).rows, *noise.shape)
  )


def _guided(
  guidance: classifier_free.Guidance, schedule: schedules.Schedule
) -> np.ndarray:
  return np.array([guidance.active(t) for t in schedule.times()[:-1]], bool)


def _schedule(golden: Golden, points: int) -> schedules.Schedule:
  return schedules.Schedule(points, golden.constants["timestep_shift"])


@functools.partial(
  jax.jit,
  static_argnames=("golden", "layout", "names", "guidance", "schedule", "eta"),
)
def _sample(
  golden,
  policy,
  initial,
  lengths,
  past,
  index,
  sde_noise,
  *,
  layout,
  names,
  guidance,
  schedule,
  eta,
):
  """Samples a scene; `sde_noise` [B, N, C] is the noise of the SDE step, None for none."""

  def velocity(latent, t, guided):
    active = names if guided else names[:1]
    found = model.velocities(
      golden, policy, layout, active, latent, t, lengths, past
    )
    return classifier_free.combine(guidance, *found) if guided else found[0]

  plan = (
    None
    if sde_noise is None
    else flow_matching.SDEPlan(index, lambda step: sde_noise, eta)
  )
  return flow_matching.sample(
    velocity, initial, schedule, _guided(guidance, schedule), plan
  )


def _sampled(
  golden, case, interval=(0.4, 1.0), index=None, sde_noise=None, eta=None
) -> flow_matching.Trajectory:
  scene = scenes.scene(golden, case)
  return _sample(
    golden,
    golden.policy,
    _initial(golden, case),
    scene.lengths,
    scene.past,
    index,
    sde_noise,
    layout=scene.layout,
    names=scene.active,
    guidance=dataclasses.replace(scene.guidance, interval=interval),
    schedule=_schedule(golden, golden.constants["ode_points"]),
    eta=eta,
  )


def _steps(golden: Golden, case: str) -> Iterator[Seen]:
  """Yields every state and velocity of an ODE, step by step."""
  scene = scenes.scene(golden, case)
  schedule = _schedule(golden, len(golden.arrays(case)["timesteps"]))
  times, guided = schedule.times(), _guided(scene.guidance, schedule)
  latent, latents, velocities = _initial(golden, case), [], []
  for t, following, is_guided in zip(times, times[1:], guided):
    branches = scene.branches(
      latent, t, scene.active if is_guided else scene.active[:1]
    )
    v = (
      classifier_free.combine(scene.guidance, *branches)
      if is_guided
      else branches[0]
    )
    latents.append(model.packed(latent))
    velocities.append(model.packed(v))
    latent = flow_matching.ode_step(
      latent, v, jnp.full(scene.rows, t - following)
    )
  yield Seen("timesteps", times)
  yield Seen("cfg_active", guided)
  yield Seen("x_traj", np.stack(latents))
  yield Seen("v_traj", np.stack(velocities))


def ode(golden: Golden, case: str) -> Iterator[Seen]:
  """Case g: an ODE with its images, and a run with an inner guidance interval."""
  yield from _steps(golden, case)
  scene, latent = scenes.scene(golden, case), _sampled(golden, case).latent
  yield Seen("x_final", model.packed(latent))
  yield Seen("image_uint8", model.decode(golden, latent, scene.size))
  interval = tuple(float(x) for x in golden.arrays(case)["interval2"])
  inner = dataclasses.replace(scene.guidance, interval=interval)
  yield Seen(
    "interval2_cfg_active",
    _guided(inner, _schedule(golden, golden.constants["ode_points"])),
  )
  yield Seen(
    "interval2_x_final", model.packed(_sampled(golden, case, interval).latent)
  )


def mixed(golden: Golden, case: str) -> Iterator[Seen]:
  """Case h: an ODE with one SDE step."""
  arrays, scene = golden.arrays(case), scenes.scene(golden, case)
  index = jnp.full(scene.rows, int(arrays["sde_idx"][0]))
  eta = schedules.Eta("monotonic", float(arrays["constant_eta"]))
  noise = model.unpacked(arrays["sde_noise"], scene.rows)
  found = _sampled(golden, case, index=index, sde_noise=noise, eta=eta)
  yield Seen("timestep", found.t[:1])
  yield Seen("dt", found.dt[:1])
  yield Seen("x_final", model.packed(found.latent))
  branches = scene.branches(found.before, found.t[0], scene.active)
  velocity = classifier_free.combine(scene.guidance, *branches)
  yield Seen("v_sde_step", model.packed(velocity))
  mean, std = flow_matching.sde_moments(
    found.before, velocity, found.t, found.dt, eta(found.t)
  )
  tokens = flow_matching.token_logprob(found.after, mean, std)
  for row in range(scene.rows):
    yield Seen(
      f"latents_{row}", jnp.stack([found.before[row], found.after[row]])
    )
    yield Seen(f"log_prob_{row}", tokens[row : row + 1])


def sde(golden: Golden, case: str) -> Iterator[Seen]:
  """Case h: moments, log-probs and KLs of single steps, and the schedules."""
  arrays = golden.arrays(case)
  for name in (
    name
    for name in arrays
    if name.startswith("schedule") and name.endswith("_t")
  ):
    times = _schedule(golden, len(arrays[name]) + 1).times()
    yield Seen(name, times[:-1])
    yield Seen(name.replace("_t", "_dt"), times[:-1] - times[1:])
  x, v, v_ref, x_next = (
    jnp.asarray(arrays[name])[None] for name in ("x_t", "v", "v_ref", "x_prev")
  )
  found = {name: [] for name in ("eta", "std", "mean", "log_prob", "kl")}
  for t, dt, mode, scale in zip(
    *(arrays[name] for name in ("t", "dt", "eta_mode", "eta_scale"))
  ):
    t, dt = jnp.asarray([t]), jnp.asarray([dt])
    eta = schedules.Eta(("constant", "monotonic")[mode], float(scale))(t)
    mean, std = flow_matching.sde_moments(x, v, t, dt, eta)
    reference_mean, _ = flow_matching.sde_moments(x, v_ref, t, dt, eta)
    logprob, kl = (
      flow_matching.token_logprob(x_next, mean, std),
      flow_matching.token_kl(mean, reference_mean, std),
    )
    for name, value in zip(found, (eta, std[:, 0, 0], mean, logprob, kl)):
      found[name].append(np.asarray(value)[0])
  yield from (Seen(name, np.stack(values)) for name, values in found.items())
  x, v, x_next = (
    jnp.asarray(arrays[name])[:, None] for name in ("x_t", "v", "x_prev")
  )
  t, dt = jnp.asarray(arrays["vec_t"]), jnp.asarray(arrays["vec_dt"])
  mean, std = flow_matching.sde_moments(
    x, v, t, dt, schedules.Eta("monotonic", 0.7)(t)
  )
  yield Seen("vec_mean", mean[:, 0])
  yield Seen("vec_std", std[:, 0])
  yield Seen(
    "vec_log_prob", flow_matching.token_logprob(x_next, mean, std)[:, 0]
  )
