"""Tests of positions and masks on golden packs and small layouts (golden mask: tests/parity)."""

import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.parity import packing
from r3jax.parity import rules
from r3jax.sequence import layouts
from r3jax.sequence import segments
from tests import goldens_lib


def _names(layout: segments.Layout) -> tuple[str, ...]:
  return tuple(segment.name for segment in layout.segments)


class TestVisibility:
  def test_is_the_same_whatever_the_split_into_queries_and_keys(self):
    for layout in rules.mask_layouts(goldens_lib.GOLDEN, "j_mask", "clean"):
      names = _names(layout)
      order = packing.order(layout, names)
      whole = np.zeros((len(order), len(order)), bool)
      whole[np.ix_(order, order)] = segments.visibility(layout, names, names)
      starts = np.cumsum(
        [0] + [segment.capacity for segment in layout.segments]
      )
      for i, query in enumerate(names):
        for j, key in enumerate(names):
          part = whole[starts[i] : starts[i + 1], starts[j] : starts[j + 1]]
          rows, columns = (
            packing.order(layout, (query,)),
            packing.order(layout, (key,)),
          )
          found = segments.visibility(layout, (query,), (key,))
          np.testing.assert_array_equal(found, part[np.ix_(rows, columns)])


GRID = (1, 2)
STORY = segments.Layout(
  (
    segments.text("system", 4),
    segments.image("siglip", "vit", GRID, ("system",)),
    segments.image("source", "clean", GRID, ("system", "siglip")),
    segments.text("answer", 3, ("system", "siglip", "source")),
    segments.image(
      "draft", "noise", GRID, ("system", "siglip", "source", "answer")
    ),
    segments.image(
      "later", "noise", GRID, ("system", "siglip", "source", "answer")
    ),
  )
)
LENGTHS = {"system": jnp.array([4, 2]), "answer": jnp.array([1, 3])}


class TestPositions:
  def test_text_counts_on_and_an_image_takes_one(self):
    texts = segments.positions(STORY, ("system", "answer"), LENGTHS, 2)
    np.testing.assert_array_equal(
      texts, [[0, 1, 2, 3, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6]]
    )
    image = segments.positions(STORY, ("source",), LENGTHS, 2)
    np.testing.assert_array_equal(image, [[5] * 4, [3] * 4])

  def test_noisy_latents_share_a_position(self):
    noise = segments.positions(STORY, ("draft", "later"), LENGTHS, 2)
    np.testing.assert_array_equal(noise, [[7] * 8] * 2)

  @pytest.mark.parametrize("sample", [0, 1])
  def test_equal_golden_in_a_packed_reason_sample(self, sample):
    arrays = goldens_lib.case("j_pack_gen")
    capacities = layouts.Capacities(
      len(arrays["system_ids"]) + 2,
      len(arrays[f"prompt_ids_{sample}"]) + 2,
      len(arrays[f"generated_ids_{sample}"]),
      2,
      2,
      2,
      goldens_lib.towers().latent_grid,
      (1, 1),
    )
    layout = layouts.reason(capacities)
    first = int(arrays["sample_lens"][: 2 * sample].sum())
    second = first + int(arrays["sample_lens"][2 * sample])
    for start, names in (
      (first, ("system", "prompt", "thought", "draft")),
      (second, ("system", "draft_without_text")),
    ):
      self._assert_packed(layout, names, arrays["packed_position_ids"][start:])

  @pytest.mark.parametrize("sample", [0, 1])
  def test_equal_golden_in_a_packed_edit_sample(self, sample):
    arrays, tower = (
      goldens_lib.case("j_pack_edit"),
      goldens_lib.towers(goldens_lib.case("j_pack_edit")["image"].shape[:2]),
    )
    capacities = layouts.Capacities(
      len(arrays["system_ids"]) + 2,
      2,
      2,
      len(arrays["reflection_ids"]) + 2,
      len(arrays[f"generated_ids_{sample}"]),
      len(arrays[f"edit_ids_{sample}"]) + 2,
      tower.latent_grid,
      tower.vit_grid,
    )
    reflect, refine = layouts.reflect(capacities), layouts.refine(capacities)
    starts = np.cumsum([0, *arrays["sample_lens"]])[4 * sample :]
    packed = arrays["packed_position_ids"]
    self._assert_packed(reflect, _names(reflect), packed[starts[0] :])
    self._assert_packed(
      refine, ("source", "siglip", "instruction", "edit"), packed[starts[1] :]
    )
    self._assert_packed(
      refine, ("source", "siglip", "edit_without_text"), packed[starts[2] :]
    )
    self._assert_packed(
      refine, ("instruction_alone", "edit_without_image"), packed[starts[3] :]
    )

  def _assert_packed(self, layout, names, packed):
    texts = [segment for segment in layout.segments if segment.kind == "text"]
    lengths = {segment.name: jnp.array([segment.capacity]) for segment in texts}
    found = segments.positions(layout, names, lengths, 1)[0]
    np.testing.assert_array_equal(found, packed[packing.order(layout, names)])


class TestFilled:
  def test_is_the_length_of_text_and_all_of_an_image(self):
    found = segments.filled(STORY, ("system", "siglip"), LENGTHS, 2)
    np.testing.assert_array_equal(
      found, [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1, 1]]
    )


class TestMask:
  def test_hides_empty_slots_from_everybody(self):
    found = segments.mask(STORY, ("answer",), ("system",), LENGTHS, 2).dense()
    np.testing.assert_array_equal(found[0], np.ones((3, 4)))
    np.testing.assert_array_equal(found[1], [[1, 1, 0, 0]] * 3)

  def test_hides_noise_from_other_segments(self):
    found = segments.mask(
      STORY, ("later",), ("draft", "later"), LENGTHS, 2
    ).dense()
    key = STORY.slots(("draft", "later"))
    np.testing.assert_array_equal(
      found, np.broadcast_to(key.segment == STORY.index("later"), found.shape)
    )


class TestSlots:
  def test_puts_und_slots_first(self):
    slots = STORY.slots(("system", "source"))
    assert slots.num_und == 6
    np.testing.assert_array_equal(slots.segment, [0, 0, 0, 0, 2, 2, 2, 2])
    np.testing.assert_array_equal(slots.offset, [0, 1, 2, 3, 0, 3, 1, 2])
    assert slots.ranges == {
      "system": (slice(0, 4), slice(0, 0)),
      "source": (slice(4, 6), slice(0, 2)),
    }

  def test_of_the_same_names_are_one_object(self):
    assert STORY.slots(("system",)) is STORY.slots(["system"])


class TestLayout:
  def test_refuses_to_see_a_later_segment(self):
    with pytest.raises(ValueError, match=r"'a' sees \['b'\]"):
      segments.Layout((segments.text("a", 2, ("b",)), segments.text("b", 2)))

  def test_refuses_a_repeated_name(self):
    with pytest.raises(ValueError, match="must have a new name"):
      segments.Layout((segments.text("a", 2), segments.text("a", 2)))
