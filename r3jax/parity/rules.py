"""Cases l, o, j_mask and j_pack_multi: advantages, the pool, visibility, packed order."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.parity import goldens
from r3jax.parity import packing
from r3jax.parity import seen
from r3jax.rl import pools
from r3jax.rl import returns
from r3jax.sampling import classifier_free
from r3jax.sequence import segments as segments_lib

Golden, Seen = goldens.Golden, seen.Seen
_DRAWS = 100_000
_CAUSAL, _FULL, _NOISE = 0, 1, 2


def _advantage(values, divide_by_std: bool = False) -> jax.Array:
  """Returns the advantages of groups [G, K]."""
  values = jnp.asarray(values, jnp.float32)
  return returns.group_advantage(
    values, jnp.ones(values.shape, bool), divide_by_std
  )


def _returns(case: dict, score, form) -> tuple[jax.Array, np.ndarray]:
  """Returns the text returns of a recorded stage, and which samples were edited."""
  weight = case["format_reward_weight"]
  if case["stage"] == "gen":
    return returns.reason_return(score, form, weight), np.ones(
      score.shape, bool
    )
  stop = jnp.array(
    ["no further edit" in text.lower() for text in case["edit_operations"]]
  )
  before = jnp.full(score.shape, case["last_reward"], jnp.float32)
  return returns.reflect_return(score, before, stop, form, weight), ~np.asarray(
    stop
  )


def returns_and_advantages(golden: Golden, case: str) -> Iterator[Seen]:
  """Case l. Of the reference's other flags r3jax has the division by the deviation."""
  rules = golden.rules(case)
  for i, recorded in enumerate(rules["cases"]):
    score, form = (
      jnp.asarray(recorded[name], jnp.float32)
      for name in ("rewards", "format_rewards")
    )
    total, edited = _returns(recorded, score, form)
    out = recorded["out"]
    images = np.where(edited, _advantage(score[None])[0], 0)
    found = {
      "total_rewards": total,
      "text_advantages": _advantage(total[None])[0],
      "image_advantages": images,
    }
    for name, value in found.items():
      yield Seen(f"{i}/{name}", value, np.array(out[name]), rules["tol"])
    if "image_adv_mask" in out:
      yield Seen(
        f"{i}/image_adv_mask",
        edited,
        np.array(out["image_adv_mask"], bool),
        "exact",
      )
  direct = {
    recorded["name"]: recorded
    for recorded in rules["compute_advantages_direct"]
  }
  for name in ("divide_std", "single_sample"):
    value = _advantage(
      np.ravel(direct[name]["rewards"])[None], name == "divide_std"
    )[0]
    yield Seen(name, value, np.ravel(direct[name]["advantages"]), rules["tol"])
  groups = rules["policy_groups"]  # two groups over two ranks each
  value = _advantage(np.reshape(groups["rewards_per_rank"], (2, -1)))
  yield Seen(
    "policy_groups",
    value,
    np.reshape(groups["advantages_per_rank"], value.shape),
    rules["tol"],
  )


def pool(golden: Golden, case: str) -> Iterator[Seen]:
  """Case o: the perfect fraction of many draws, and both empty sides."""
  checks = golden.rules(case)["checks"]
  score = jnp.array([1.0, 0.0, 0.5, 1.0, 0.999, 1.0])
  keys = jax.random.split(jax.random.key(0), _DRAWS)
  rate = checks["bernoulli"]

  def perfect_fraction(valid) -> np.ndarray:
    draw = jax.vmap(
      lambda key: pools.draw(key, score, jnp.asarray(valid), rate)
    )
    return np.mean(np.asarray(score)[np.asarray(draw(keys))] == 1)

  error = 4 * (rate * (1 - rate) / _DRAWS) ** 0.5  # four standard errors
  yield Seen(
    "bernoulli", perfect_fraction(np.ones(6, bool)), np.array(rate), error
  )
  yield Seen(
    "only_perfect_pool",
    perfect_fraction(score == 1),
    np.array(checks["only_perfect_pool"]),
    "exact",
  )
  yield Seen(
    "only_bad_pool",
    perfect_fraction(score != 1),
    np.array(checks["only_bad_pool"]),
    "exact",
  )


def mask_layouts(
  golden: Golden, case: str, full_kind: str
) -> list[segments_lib.Layout]:
  """Returns the layouts of the recorded mask's samples; full segments are of `full_kind`."""
  arrays = golden.arrays(case)
  splits = iter(
    zip(arrays["split_lens"].tolist(), arrays["attn_modes"].tolist())
  )
  layouts = []
  for sample_length in arrays["sample_lens"].tolist():
    segments, context, filled = [], [], 0
    while filled < sample_length:
      length, mode = next(splits)
      name = f"{len(segments)}"
      kind = {
        _CAUSAL: "text",
        _FULL: full_kind,
        _NOISE: "noise" if length > 1 else "vit",
      }[mode]
      segments.append(segments_lib.Segment(name, kind, length, tuple(context)))
      context += [name] if mode != _NOISE else []
      filled += length
    layouts.append(segments_lib.Layout(tuple(segments)))
  return layouts


def visibility(golden: Golden, case: str) -> Iterator[Seen]:
  """Case j_mask, with full segments seen by the ViT or as clean latents."""
  for full_kind in ("vit", "clean"):
    mask = np.zeros(golden.arrays(case)["mask"].shape, bool)
    start = 0
    for layout in mask_layouts(golden, case, full_kind):
      names = tuple(segment.name for segment in layout.segments)
      place = start + packing.order(layout, names)
      mask[np.ix_(place, place)] = segments_lib.visibility(layout, names, names)
      start += len(place)
    yield Seen("mask", mask)


def packs(golden: Golden, case: str) -> Iterator[Seen]:
  """Case j_pack_multi: the packed order that the layouts stand for, and the trainer's guidance."""
  arrays = golden.arrays(case)
  for name, value in packing.multi(golden, case).items():
    yield Seen(name, value)
  predicted = jnp.asarray(arrays["cfg_v_pred"])
  for renorm in ("global", "channel", "text_channel"):
    guidance = classifier_free.Guidance(
      *(float(x) for x in arrays["cfg_scales"]), renorm
    )
    found = []
    for ranges in arrays["cfg_index"]:
      copies = [
        predicted[None, start:stop] for start, stop in ranges if start >= 0
      ]
      # The reference's trainer guides only where all three copies are there.
      found.append(
        (
          classifier_free.combine(guidance, *copies)
          if len(copies) == 3
          else copies[0]
        )[0]
      )
    yield Seen(f"cfg_out_{renorm}", np.concatenate(found))
