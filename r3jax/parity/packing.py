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
from r3jax.parity import case_arrays
from r3jax.parity import goldens
from r3jax.sequence import protocol
from r3jax.sequence import segments

_MULTIPLE = 128  # samples are padded to this
_MODES = {"text": 0, "vit": 1, "clean": 1, "noise": 2}  # attention modes
_NO_RANGE = (-1, -1)  # of a copy that does not exist


def order(layout: segments.Layout, names: tuple[str, ...]) -> np.ndarray:
  """Returns the place of every slot in a sequence that has not been sorted by expert."""
  starts = {}
  start = 0
  for name in names:
    starts[layout.index(name)] = start
    start += layout[name].capacity
  slots = layout.slots(names)
  segment_starts = np.array([starts[segment] for segment in slots.segment])
  return segment_starts + slots.offset


@dataclasses.dataclass(frozen=True)
class Sample:
  """One packed sample: segments of a layout in order, all of them full.

  Attributes:
    layout: of the segments.
    ids: text segment -> its ids.
    times: noise segment -> its flow time.
    scored: the text segment whose tokens carry loss, None for a copy.
  """

  layout: segments.Layout
  ids: dict[str, np.ndarray]
  times: dict[str, float]
  scored: str | None

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the segments."""
    return tuple(segment.name for segment in self.layout.segments)

  @property
  def num_filled(self) -> int:
    """Tokens before the padding."""
    return sum(segment.capacity for segment in self.layout.segments)

  @property
  def num_padding(self) -> int:
    """End tokens after them: up to the next multiple, a whole one if nothing is missing."""
    return _MULTIPLE - self.num_filled % _MULTIPLE

  def starts(self) -> Iterator[tuple[segments.Segment, int]]:
    """Yields every segment with its place in the sample."""
    place = 0
    for segment in self.layout.segments:
      yield segment, place
      place += segment.capacity

  def positions(self) -> np.ndarray:
    """Returns the rotary positions of all tokens, padding included."""
    lengths = {name: jnp.array([len(ids)]) for name, ids in self.ids.items()}
    by_expert = segments.positions(self.layout, self.names, lengths, 1)[0]
    positions = np.zeros(self.num_filled, np.int64)
    positions[order(self.layout, self.names)] = by_expert
    # The padding is a text that sees everything but noise.
    context = [
      segment.name
      for segment in self.layout.segments
      if segment.kind != "noise"
    ]
    padding = segments.text("padding", self.num_padding, context)
    padded = segments.Layout((*self.layout.segments, padding))
    (start,) = np.asarray(segments.start(padded, "padding", lengths))
    return np.concatenate([positions, start + np.arange(self.num_padding)])


def multi(golden: goldens.Golden, case: str) -> dict[str, np.ndarray]:
  """Returns the arrays of a pack with several scored times per draft.

  What the recorded arrays repeat per token (times, steps, advantages) is taken once per image or
  sample from them: the inputs are not recorded apart.
  """
  arrays = golden.arrays(case)
  rows, columns = arrays["patchified_vae_latent_shapes"][0].tolist()
  grid = (rows, columns)
  num_tokens = rows * columns
  num_drafts = len(case_arrays.numbered(golden, case, "generated_ids"))
  image_times = arrays["loss_packed_timesteps_for_loss"][::num_tokens]
  image_dts = arrays["loss_dts"][::num_tokens]
  times = image_times.reshape(num_drafts, -1)
  samples = list(_samples(golden, case, times, grid))
  sizes = [sample.num_filled + sample.num_padding for sample in samples]
  starts = np.cumsum([0, *sizes])

  token_advantages = arrays["loss_text_advantages"]
  _, first_tokens = np.unique(token_advantages, return_index=True)
  draft_advantages = token_advantages[np.sort(first_tokens)]
  # Samples alternate between drafts and their copies.
  num_scored = [len(sample.ids["thought"]) - 2 for sample in samples[::2]]
  images_per_draft = times.shape[1]
  draft_image_advantages = arrays["loss_image_advantages"][::images_per_draft]
  losses = {
    "loss_text_advantages": np.repeat(draft_advantages, num_scored),
    "loss_dts": np.repeat(image_dts, num_tokens),
    "loss_packed_timesteps_for_loss": np.repeat(times.reshape(-1), num_tokens),
    "loss_image_advantages": np.repeat(
      draft_image_advantages, images_per_draft
    ),
    "loss_patchified_vae_latent_shapes_for_loss": np.tile(
      grid, (times.size, 1)
    ),
  }
  tokens = _tokens(golden, samples, starts)
  latents = _latents(golden, samples, starts, grid)
  return tokens | latents | losses


def _samples(
  golden: goldens.Golden, case: str, times: np.ndarray, grid: tuple[int, int]
) -> Iterator[Sample]:
  """Yields for every draft the conditional sample and its copy without the prompt."""
  special_ids = golden.config.special_ids
  prompts = case_arrays.numbered(golden, case, "prompt_ids")
  thoughts = case_arrays.numbered(golden, case, "generated_ids")
  system = _text_segment(golden.arrays(case)["system_ids"], special_ids)
  for prompt, thought, draft_times in zip(
    prompts, thoughts, times, strict=True
  ):
    ids = {
      "system": system,
      "prompt": _text_segment(prompt, special_ids),
      "thought": thought,
    }
    noise = {f"draft{i}": float(t) for i, t in enumerate(draft_times)}
    yield Sample(_layout(ids, list(noise), grid), ids, noise, "thought")
    # As in the reference's trainer the guided interval is closed at both ends.
    copies = {}
    for name, t in noise.items():
      if np.float32(0.4) <= np.float32(t) <= 1:
        copies[name] = t
    ids = {"system": system}
    yield Sample(_layout(ids, list(copies), grid), ids, copies, None)


def _text_segment(
  body: np.ndarray, special_ids: protocol.SpecialIds
) -> np.ndarray:
  """Returns ids with begin and end."""
  return np.array([special_ids.text_begin, *body, special_ids.text_end])


def _layout(
  texts: dict[str, np.ndarray], noise: list[str], grid: tuple[int, int]
) -> segments.Layout:
  """Returns causal texts, one after another, with noise segments that see all of them."""
  names = list(texts)
  sequence = []
  for i, name in enumerate(names):
    sequence.append(segments.text(name, len(texts[name]), names[:i]))
  for name in noise:
    sequence.append(segments.image(name, "noise", grid, names))
  return segments.Layout(tuple(sequence))


def _tokens(
  golden: goldens.Golden, samples: list[Sample], starts: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the pack's text, splits and positions."""
  ids = []
  places = []
  split_lengths = []
  modes = []
  scored_places = []
  labels = []
  for sample, sample_start in zip(samples, starts[:-1], strict=True):
    for place, token in _tokens_with_ids(sample, golden.config.special_ids):
      ids.append(token)
      places.append(sample_start + place)
    for segment, place in sample.starts():
      split_lengths.append(segment.capacity)
      modes.append(_MODES[segment.kind])
      if segment.name == sample.scored:
        # Each slot but the last two predicts the next token.
        slots = np.arange(segment.capacity - 2)
        scored_places.extend(sample_start + place + slots)
        labels.extend(sample.ids[segment.name][1:-1])
    split_lengths.append(sample.num_padding)
    modes.append(_MODES["text"])
  positions = [sample.positions() for sample in samples]
  return {
    "sequence_length": starts[-1],
    "sample_lens": np.diff(starts),
    "split_lens": np.array(split_lengths),
    "attn_modes": np.array(modes),
    "packed_text_ids": np.array(ids),
    "packed_text_indexes": np.array(places),
    "packed_position_ids": np.concatenate(positions),
    "ce_loss_indexes": np.array(scored_places),
    "loss_packed_label_ids": np.array(labels),
  }


def _tokens_with_ids(
  sample: Sample, special_ids: protocol.SpecialIds
) -> Iterator[tuple[int, int]]:
  """Yields (place, id) of all tokens with an id, in order."""
  for segment, start in sample.starts():
    if segment.kind == "text":
      for offset, token in enumerate(sample.ids[segment.name]):
        yield start + offset, token
    else:
      yield start, special_ids.image_begin
      yield start + segment.capacity - 1, special_ids.image_end
  for offset in range(sample.num_padding):
    yield sample.num_filled + offset, special_ids.text_end


def _latents(
  golden: goldens.Golden,
  samples: list[Sample],
  starts: np.ndarray,
  grid: tuple[int, int],
) -> dict[str, np.ndarray]:
  """Returns the pack's latents; a copy has the name of its draft, one sample later."""
  num_tokens = grid[0] * grid[1]
  places = []
  times = []
  ranges = {}  # (sample, segment) -> start and stop among the latent tokens
  for i, sample in enumerate(samples):
    for segment, place in sample.starts():
      if segment.kind != "noise":
        continue
      first = len(ranges) * num_tokens
      ranges[i, segment.name] = (first, first + num_tokens)
      places.append(starts[i] + place + 1 + np.arange(num_tokens))
      times.append(np.full(num_tokens, sample.times[segment.name]))
  conditions = []
  grids = []
  for (i, name), draft_range in ranges.items():
    is_copy = i % 2 == 1
    # The reference gives copies (width, height) for (height, width).
    grids.append(grid[::-1] if is_copy else grid)
    if not is_copy:
      copy_range = ranges.get((i + 1, name), _NO_RANGE)
      conditions.append([draft_range, copy_range, _NO_RANGE])
  right_grids = [grid] * len(grids)
  return {
    "patchified_vae_latent_shapes": np.array(grids),
    "packed_latent_position_ids": latent_position_ids(golden, grids),
    "FIXED_packed_latent_position_ids": latent_position_ids(
      golden, right_grids
    ),
    "packed_vae_token_indexes": np.concatenate(places),
    "packed_timesteps": np.concatenate(times),
    "mse_loss_indexes": np.concatenate(places),
    "mse_condition_token_indexes": np.array(conditions),
  }


def latent_position_ids(
  golden: goldens.Golden, grids: list[tuple[int, int]]
) -> np.ndarray:
  """Returns the position ids of latent images of these (rows, columns), one after another."""
  side = golden.config.max_latent_side
  return np.concatenate([layers.grid_positions(*grid, side) for grid in grids])
