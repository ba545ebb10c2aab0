"""The reference's packed order, written out from r3jax's layouts (case j_pack_multi).

The reference concatenates samples, each padded to a multiple of 128 by a causal text of end tokens;
r3jax keeps segments apart. That both are the same sequence is what this shows: everything here
comes from layouts and their positions.
"""

from collections.abc import Iterator
import dataclasses

import jax.numpy as jnp
import numpy as np

from r3jax.model import layers
from r3jax.parity import goldens
from r3jax.parity import model
from r3jax.sequence import segments as segments_lib

_MULTIPLE = 128
_MODES = {"text": 0, "vit": 1, "clean": 1, "noise": 2}


def order(layout: segments_lib.Layout, names: tuple[str, ...]) -> np.ndarray:
  """Returns the place of every slot in a sequence that has not been sorted by expert."""
  starts = np.cumsum([0] + [layout[name].capacity for name in names])[:-1]
  starts = {layout.index(name): start for name, start in zip(names, starts)}
  slots = layout.slots(names)
  return np.array([starts[segment] for segment in slots.segment]) + slots.offset


@dataclasses.dataclass(frozen=True)
class Sample:
  """One packed sample: segments of a layout in order, all of them full.

  Attributes:
    layout: of the segments.
    ids: text segment -> its ids.
    times: noise segment -> its flow time.
    scored: the text segment whose tokens carry loss, None for a copy.
  """

  layout: segments_lib.Layout
  ids: dict[str, np.ndarray]
  times: dict[str, float]
  scored: str | None

  @property
  def names(self) -> tuple[str, ...]:
    """Of the segments."""
    return tuple(segment.name for segment in self.layout.segments)

  @property
  def filled(self) -> int:
    """Tokens before the padding."""
    return sum(segment.capacity for segment in self.layout.segments)

  @property
  def padding(self) -> int:
    """End tokens after them: up to the next multiple, a whole one if nothing is missing."""
    return _MULTIPLE - self.filled % _MULTIPLE

  def starts(self) -> Iterator[tuple[segments_lib.Segment, int]]:
    """Yields every segment with its place in the sample."""
    place = 0
    for segment in self.layout.segments:
      yield segment, place
      place += segment.capacity

  def positions(self) -> np.ndarray:
    """Returns the rotary positions of all tokens, padding included."""
    lengths = {name: jnp.array([len(ids)]) for name, ids in self.ids.items()}
    found = np.zeros(self.filled, np.int64)
    found[order(self.layout, self.names)] = segments_lib.positions(
      self.layout, self.names, lengths, 1
    )[0]
    context = [
      segment.name
      for segment in self.layout.segments
      if segment.kind != "noise"
    ]
    end = segments_lib.Layout(
      (
        *self.layout.segments,
        segments_lib.text("padding", self.padding, context),
      )
    )
    first = int(segments_lib.start(end, "padding", lengths)[0])
    return np.concatenate([found, first + np.arange(self.padding)])


def _texts(sample: Sample, special_ids) -> Iterator[tuple[int, int]]:
  """Yields (place, id) of all tokens with an id, in order."""
  for segment, start in sample.starts():
    if segment.kind == "text":
      yield from (
        (start + i, token) for i, token in enumerate(sample.ids[segment.name])
      )
    else:
      yield start, special_ids.image_begin
      yield start + segment.capacity - 1, special_ids.image_end
  yield from (
    (sample.filled + i, special_ids.text_end) for i in range(sample.padding)
  )


def _layout(
  texts: dict[str, np.ndarray], noise: list[str], grid: tuple[int, int]
) -> segments_lib.Layout:
  """Returns causal texts, one after another, with noise segments that see all of them."""
  names = list(texts)
  segments = [
    segments_lib.text(name, len(ids), names[:i])
    for i, (name, ids) in enumerate(texts.items())
  ]
  return segments_lib.Layout(
    (
      *segments,
      *(segments_lib.image(name, "noise", grid, names) for name in noise),
    )
  )


def _samples(
  golden: goldens.Golden, case: str, times: np.ndarray, grid
) -> Iterator[Sample]:
  """Yields for every draft the conditional sample and its copy without the prompt."""
  arrays, special = golden.arrays(case), golden.config.special_ids
  segment = lambda body: np.array([special.text_begin, *body, special.text_end])
  prompts, thoughts = (
    model.numbered(golden, case, name)
    for name in ("prompt_ids", "generated_ids")
  )
  for prompt, thought, of_draft in zip(prompts, thoughts, times):
    system = segment(arrays["system_ids"])
    ids = {"system": system, "prompt": segment(prompt), "thought": thought}
    noise = {f"draft{i}": float(t) for i, t in enumerate(of_draft)}
    # As the reference's trainer: closed at both ends.
    copies = {
      name: t
      for name, t in noise.items()
      if np.float32(0.4) <= np.float32(t) <= 1
    }
    yield Sample(_layout(ids, list(noise), grid), ids, noise, "thought")
    yield Sample(
      _layout({"system": system}, list(copies), grid),
      {"system": system},
      copies,
      None,
    )


def multi(golden: goldens.Golden, case: str) -> dict[str, np.ndarray]:
  """Returns the arrays of a pack with several scored times per draft.

  What the recorded arrays repeat per token (times, steps, advantages) is taken once per image or
  sample from them: the inputs are not recorded apart.
  """
  arrays, grid = (
    golden.arrays(case),
    tuple(golden.arrays(case)["patchified_vae_latent_shapes"][0].tolist()),
  )
  tokens, drafts = (
    grid[0] * grid[1],
    len(model.numbered(golden, case, "generated_ids")),
  )
  per_image = lambda name: arrays[name][::tokens]
  times = per_image("loss_packed_timesteps_for_loss").reshape(drafts, -1)
  samples = list(_samples(golden, case, times, grid))
  starts = np.cumsum(
    [0] + [sample.filled + sample.padding for sample in samples]
  )
  found = _tokens(golden, samples, starts) | _latents(
    golden, samples, starts, grid
  )
  advantage = np.unique(arrays["loss_text_advantages"], return_index=True)[1]
  by_draft = arrays["loss_text_advantages"][np.sort(advantage)]
  scored = [len(sample.ids["thought"]) - 2 for sample in samples[::2]]
  images = times.shape[1]
  return found | {
    "loss_text_advantages": np.repeat(by_draft, scored),
    "loss_dts": np.repeat(per_image("loss_dts"), tokens),
    "loss_packed_timesteps_for_loss": np.repeat(times.reshape(-1), tokens),
    "loss_image_advantages": np.repeat(
      arrays["loss_image_advantages"][::images], images
    ),
    "loss_patchified_vae_latent_shapes_for_loss": np.tile(
      grid, (times.size, 1)
    ),
  }


def _tokens(
  golden: goldens.Golden, samples: list[Sample], starts: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns what is known of text, splits and positions."""
  texts = [
    (start + place, token)
    for sample, start in zip(samples, starts)
    for place, token in _texts(sample, golden.config.special_ids)
  ]
  places, ids = (np.array(column) for column in zip(*texts))
  splits = [
    split
    for sample in samples
    for split in [
      *((s.capacity, _MODES[s.kind]) for s in sample.layout.segments),
      (sample.padding, 0),
    ]
  ]
  lengths, modes = (np.array(column) for column in zip(*splits))
  scored, labels = [], []
  for sample, start in zip(samples, starts):
    for segment, place in sample.starts():
      if segment.name == sample.scored:
        # each predicts the next
        scored.extend(start + place + np.arange(segment.capacity - 2))
        labels.extend(sample.ids[segment.name][1:-1])
  return {
    "sequence_length": starts[-1],
    "sample_lens": np.diff(starts),
    "split_lens": lengths,
    "attn_modes": modes,
    "packed_text_ids": ids,
    "packed_text_indexes": places,
    "packed_position_ids": np.concatenate(
      [sample.positions() for sample in samples]
    ),
    "ce_loss_indexes": np.array(scored),
    "loss_packed_label_ids": np.array(labels),
  }


def _latents(
  golden: goldens.Golden, samples: list[Sample], starts: np.ndarray, grid
) -> dict[str, np.ndarray]:
  """Returns what is known of the latents; copies are found by the name of their draft."""
  tokens, places, times, ranges = grid[0] * grid[1], [], [], []
  for i, (sample, start) in enumerate(zip(samples, starts)):
    for segment, place in sample.starts():
      if segment.kind == "noise":
        ranges.append((i, segment.name))
        places.append(start + place + 1 + np.arange(tokens))
        times.append(np.full(tokens, sample.times[segment.name]))
  place_of = {
    key: (number * tokens, (number + 1) * tokens)
    for number, key in enumerate(ranges)
  }
  conditions = [
    [place_of[i, name], place_of.get((i + 1, name), (-1, -1)), (-1, -1)]
    for i, name in ranges
    if i % 2 == 0
  ]
  ids = layers.grid_positions(*grid, golden.config.max_latent_side)
  return {
    "patchified_vae_latent_shapes": np.tile(grid, (len(ranges), 1)),
    "packed_latent_position_ids": np.tile(ids, len(ranges)),
    "packed_vae_token_indexes": np.concatenate(places),
    "packed_timesteps": np.concatenate(times),
    "mse_loss_indexes": np.concatenate(places),
    "mse_condition_token_indexes": np.array(conditions),
  }
