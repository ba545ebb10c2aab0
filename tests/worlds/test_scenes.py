"""Tests r3jax.worlds.shapes."""

import jax
import numpy as np
import pytest

from r3jax.worlds.shapes import scenes as scenes_lib


def _scene(cell=4, shape=0, color=0, size=12, dy=0, dx=0):
  """Returns a scene of one object."""

  def full(value):
    return np.full(9, value, np.int32)

  kind = full(-1)
  kind[cell] = shape
  return scenes_lib.Scene(
    shape=kind,
    color=full(color),
    size=full(size),
    dy=full(dy),
    dx=full(dx),
    ghost_shape=full(-1),
    ghost_color=full(0),
  )


class TestJitterRange:
  @pytest.mark.parametrize(
    "size,expected",
    [(10, (-2, 2)), (11, (-2, 2)), (12, (-2, 2)), (13, (-1, 2))],
  )
  def test_object_stays_in_cell_for_size(self, size, expected):
    low, high = scenes_lib.jitter_range(size)
    assert (low, high) == expected
    assert scenes_lib.margin(size) + low >= 0
    assert scenes_lib.margin(size) + high + size <= scenes_lib.CELL


class TestRender:
  def test_is_background_when_empty(self):
    image = np.asarray(scenes_lib.render(_scene(shape=-1)))
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    assert np.all(image == scenes_lib.BACKGROUND)

  def test_square_covers_its_pixels_by_hand(self):
    image = np.asarray(
      scenes_lib.render(_scene(cell=5, shape=0, color=2, size=12, dy=1, dx=-2))
    )
    expected = np.full((48, 48, 3), scenes_lib.BACKGROUND, np.uint8)
    expected[16 + 3 : 16 + 15, 32 : 32 + 12] = scenes_lib.PALETTE[2]
    np.testing.assert_array_equal(image, expected)

  @pytest.mark.parametrize("shape", range(len(scenes_lib.SHAPES)))
  def test_fills_the_box_of_its_size(self, shape):
    image = np.asarray(
      scenes_lib.render(
        _scene(cell=0, shape=shape, color=5, size=13, dy=2, dx=-1)
      )
    )
    ink = np.any(image != scenes_lib.BACKGROUND, -1)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (3, 15, 0, 12)

  def test_keeps_batch_dimensions_under_jit_and_vmap(self):
    scenes = jax.tree.map(
      lambda *x: np.stack(x).reshape(2, 3, 9),
      *[_scene(cell=i, shape=i) for i in range(6)],
    )
    images = jax.jit(scenes_lib.render)(scenes)
    assert images.shape == (2, 3, 48, 48, 3)
    np.testing.assert_array_equal(images, jax.vmap(scenes_lib.render)(scenes))
    np.testing.assert_array_equal(
      images[1, 2], scenes_lib.render(_scene(cell=5, shape=5))
    )

  def test_colors_are_far_apart(self):
    points = np.float32((*scenes_lib.PALETTE, scenes_lib.BACKGROUND))
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e3 * np.eye(
      7
    )
    assert distance.min() > 170


class TestPlace:
  def test_inverts_objects_of(self):
    objects = [(1, 2, 0), (0, 5, 4), (5, 0, 8)]
    scene = scenes_lib.place(objects[::-1], np.random.default_rng(0))
    assert scenes_lib.objects_of(scene) == objects

  def test_draws_every_legal_size_and_offset_and_no_other(self):
    rng = np.random.default_rng(0)
    scenes = jax.tree.map(
      lambda *x: np.concatenate(x),
      *[scenes_lib.place([(0, 0, 0)], rng) for _ in range(400)],
    )
    seen = set(
      zip(scenes.size.tolist(), scenes.dy.tolist(), scenes.dx.tolist())
    )
    legal = {
      (size, dy, dx)
      for size in scenes_lib.SIZES
      for low, high in [scenes_lib.jitter_range(size)]
      for dy in range(low, high + 1)
      for dx in range(low, high + 1)
    }
    assert seen == legal

  def test_same_rng_gives_same_scene(self):
    first, second = (
      scenes_lib.place([(0, 0, 0)], np.random.default_rng(7)) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)

  @pytest.mark.parametrize(
    "objects,message",
    [
      ([(0, 0, 3), (1, 1, 3)], "left-side twice"),
      ([(6, 0, 0)], "shape < 6"),
      ([(0, -1, 0)], "color < 6"),
      ([(0, 0, 9)], "cell < 9"),
    ],
  )
  def test_refuses_illegal_objects(self, objects, message):
    with pytest.raises(ValueError, match=message):
      scenes_lib.place(objects, np.random.default_rng(0))


class TestSmudge:
  def test_fades_from_one_object_into_the_other_along_the_diagonal(self):
    scene = _scene(cell=0, shape=0, color=0, size=12)
    ghost = np.where(np.arange(9) == 0, 0, -1).astype(np.int32)
    image = np.asarray(
      scenes_lib.render(
        scene.replace(ghost_shape=ghost, ghost_color=scene.color + 2)
      )
    )
    assert tuple(image[3, 3]) == scenes_lib.PALETTE[0]
    assert tuple(image[13, 13]) == scenes_lib.PALETTE[2]
    middle = np.add(scenes_lib.PALETTE[0], scenes_lib.PALETTE[2]) / 2
    np.testing.assert_allclose(image[7, 8], middle, atol=1)
    np.testing.assert_array_equal(
      image[16:], np.broadcast_to(scenes_lib.BACKGROUND, (32, 48, 3))
    )

  def test_is_no_object_and_leaves_the_others(self):
    rng = np.random.default_rng(0)
    scene = scenes_lib.place([(1, 2, 0), (0, 5, 4), (5, 0, 8)], rng)
    smudged = scenes_lib.smudge(scene, [4], rng)
    assert scenes_lib.objects_of(smudged) == [(1, 2, 0), (5, 0, 8)]
    assert scenes_lib.smudges_of(smudged) == [4]
    assert scenes_lib.smudges_of(scene) == []
    before, after = (np.array(scenes_lib.render(x)) for x in (scene, smudged))
    assert (before != after)[16:32, 16:32].any()
    before[16:32, 16:32] = after[16:32, 16:32]
    np.testing.assert_array_equal(before, after)
