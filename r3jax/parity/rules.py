"""Cases l, o, j_mask and j_pack_multi: advantages, the pool, visibility, packed order."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.parity import goldens
from r3jax.parity import packing
from r3jax.parity import results
from r3jax.rl import pools
from r3jax.rl import returns
from r3jax.sampling import classifier_free
from r3jax.sequence import segments
from r3jax.sequence import thoughts

Golden = goldens.Golden
Result = results.Result
_NUM_DRAWS = 100_000
# Attention modes of the reference's packs.
_CAUSAL = 0
_FULL = 1
_NOISE = 2


def returns_and_advantages(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case l. Of the reference's other flags r3jax has the division by the deviation."""
  rules = golden.rules(case)
  tolerance = rules["tol"]
  for i, recorded in enumerate(rules["cases"]):
    expected = recorded["out"]
    text_returns, is_edited = _text_returns(recorded)
    score = jnp.asarray(recorded["rewards"], jnp.float32)
    image_advantage = np.where(is_edited, _advantage(score[None])[0], 0)
    computed = {
      "total_rewards": text_returns,
      "text_advantages": _advantage(text_returns[None])[0],
      "image_advantages": image_advantage,
    }
    for name, value in computed.items():
      yield Result(f"{i}/{name}", value, np.array(expected[name]), tolerance)
    if "image_adv_mask" in expected:
      mask = np.array(expected["image_adv_mask"], bool)
      yield Result(f"{i}/image_adv_mask", is_edited, mask, "exact")

  direct = rules["compute_advantages_direct"]
  by_name = {recorded["name"]: recorded for recorded in direct}
  for name in ("divide_std", "single_sample"):
    group = np.ravel(by_name[name]["rewards"])[None]
    value = _advantage(group, divide_by_std=name == "divide_std")[0]
    expected = np.ravel(by_name[name]["advantages"])
    yield Result(name, value, expected, tolerance)

  groups = rules["policy_groups"]  # two groups over two ranks each
  value = _advantage(np.reshape(groups["rewards_per_rank"], (2, -1)))
  expected = np.reshape(groups["advantages_per_rank"], value.shape)
  yield Result("policy_groups", value, expected, tolerance)


def _text_returns(recorded: dict) -> tuple[jax.Array, np.ndarray]:
  """Returns the text returns of a recorded stage, and which samples were edited."""
  score = jnp.asarray(recorded["rewards"], jnp.float32)
  format_reward = jnp.asarray(recorded["format_rewards"], jnp.float32)
  weight = recorded["format_reward_weight"]
  if recorded["stage"] == "gen":
    value = returns.reason_return(score, format_reward, weight)
    return value, np.ones(score.shape, bool)
  stop = np.array(
    [thoughts.says_stop(text) for text in recorded["edit_operations"]]
  )
  before = jnp.full(score.shape, recorded["last_reward"], jnp.float32)
  value = returns.reflect_return(
    score, before, jnp.asarray(stop), format_reward, weight
  )
  return value, ~stop


def _advantage(values, divide_by_std: bool = False) -> jax.Array:
  """Returns the advantages of groups [G, M]."""
  values = jnp.asarray(values, jnp.float32)
  valid = jnp.ones(values.shape, bool)
  return returns.group_advantage(values, valid, divide_by_std)


def pool(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case o: the perfect fraction of many draws, and both empty sides."""
  checks = golden.rules(case)["checks"]
  score = jnp.array([1.0, 0.0, 0.5, 1.0, 0.999, 1.0])
  keys = jax.random.split(jax.random.key(0), _NUM_DRAWS)
  rate = checks["bernoulli"]

  def perfect_fraction(valid) -> np.ndarray:
    def draw(key: jax.Array) -> jax.Array:
      return pools.draw(key, score, jnp.asarray(valid), rate)

    drawn = score[jax.vmap(draw)(keys)]
    return np.mean(np.asarray(drawn) == 1)

  standard_error = (rate * (1 - rate) / _NUM_DRAWS) ** 0.5
  for name, valid, tolerance in (
    ("bernoulli", np.ones(6, bool), 4 * standard_error),
    ("only_perfect_pool", score == 1, "exact"),
    ("only_bad_pool", score != 1, "exact"),
  ):
    expected = np.array(checks[name])
    yield Result(name, perfect_fraction(valid), expected, tolerance)


def mask_layouts(
  golden: Golden, case: str, full_kind: segments.Kind
) -> list[segments.Layout]:
  """Returns the layouts of the recorded mask's samples; full segments are of `full_kind`."""
  arrays = golden.arrays(case)
  lengths = arrays["split_lens"].tolist()
  modes = arrays["attn_modes"].tolist()
  splits = iter(zip(lengths, modes, strict=True))
  layouts = []
  for sample_length in arrays["sample_lens"].tolist():
    sample = []
    context = []  # everything but noise is seen by later segments
    num_slots = 0
    while num_slots < sample_length:
      length, mode = next(splits)
      name = f"{len(sample)}"
      kind = _kind(mode, length, full_kind)
      sample.append(segments.Segment(name, kind, length, tuple(context)))
      if mode != _NOISE:
        context.append(name)
      num_slots += length
    layouts.append(segments.Layout(tuple(sample)))
  return layouts


def _kind(mode: int, length: int, full_kind: segments.Kind) -> segments.Kind:
  """Returns the kind of segment that a recorded attention mode stands for."""
  if mode == _CAUSAL:
    return "text"
  if mode == _FULL:
    return full_kind
  # A single slot has no markers around it.
  return "noise" if length > 1 else "vit"


def visibility(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case j_mask, with full segments as ViT patches and as clean latents."""
  for full_kind in ("vit", "clean"):
    mask = np.zeros(golden.arrays(case)["mask"].shape, bool)
    start = 0
    for layout in mask_layouts(golden, case, full_kind):
      names = tuple(segment.name for segment in layout.segments)
      places = start + packing.order(layout, names)
      visible = segments.visibility(layout, names, names)
      mask[np.ix_(places, places)] = visible
      start += len(places)
    yield Result("mask", mask)


def packs(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case j_pack_multi: the packed order of the layouts, and the trainer's guidance."""
  arrays = golden.arrays(case)
  for name, value in packing.multi(golden, case).items():
    # Only folders of images that are not square have FIXED_ arrays.
    if name in arrays or not name.startswith("FIXED_"):
      yield Result(name, value)
  predicted = jnp.asarray(arrays["cfg_v_pred"])
  text_scale, image_scale = arrays["cfg_scales"].tolist()
  for renorm in ("global", "channel", "text_channel"):
    guidance = classifier_free.Guidance(text_scale, image_scale, renorm)
    velocities = []
    for ranges in arrays["cfg_index"]:
      copies = [
        predicted[None, start:stop] for start, stop in ranges if start >= 0
      ]
      # The reference's trainer guides only where all three copies are there.
      velocity = copies[0]
      if len(copies) == 3:
        velocity = classifier_free.combine(guidance, *copies)
      velocities.append(velocity[0])
    yield Result(f"cfg_out_{renorm}", np.concatenate(velocities))
