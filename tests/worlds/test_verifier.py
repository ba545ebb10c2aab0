"""Tests r3jax.rewards.shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes as scenes_lib
from r3jax.worlds.shapes import verifier
from tests.worlds import cases
from tests.worlds import numpy_verifier

RECORDS = prompts.train_records() + prompts.heldout_records()
SIDES = ("top", "bottom", "left", "right")
DETECT = jax.jit(verifier.detect)
VERIFY = jax.jit(verifier.verify)
RENDER = jax.jit(scenes_lib.render)


def _stack(scenes):
  """Batches scenes."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)


def _objects(*found):
  """Returns Objects of one image: (class, color, cell) each, 12 pixels wide, mid-cell."""
  shape, color, box = (
    np.full((1, 9), -1),
    np.full((1, 9), -1),
    np.zeros((1, 9, 4), np.float32),
  )
  for name, paint, cell in found:
    y, x = 16 * (cell // 3) + 2, 16 * (cell % 3) + 2
    shape[0, cell], color[0, cell] = (
      scenes_lib.SHAPES.index(name),
      scenes_lib.COLORS.index(paint),
    )
    box[0, cell] = y, x, y + 12, x + 12
  return verifier.Objects(
    shape=jnp.asarray(shape),
    color=jnp.asarray(color),
    box=jnp.asarray(box),
    error=jnp.zeros((1, 9)),
  )


def _judge(record, *found):
  """Returns (value, strict, correct) of hand-made objects."""
  score = verifier.score(
    _objects(*found), verifier.encode_records([cases.prompt_of(record)])
  )
  return tuple(
    float(x[0])
    for x in (score.value, score.parts["strict"], score.parts["correct"])
  )


@functools.cache
def _every_stamp():
  """Returns images of every class, colour, size and offset, 9 to an image, and their Scene."""
  rows = [
    (shape, color, size, dy, dx)
    for size in scenes_lib.SIZES
    for low, high in [scenes_lib.jitter_range(size)]
    for dy in range(low, high + 1)
    for dx in range(low, high + 1)
    for shape in range(6)
    for color in range(6)
  ]
  fields = np.array(rows, np.int32).T.reshape(5, -1, 9)
  scene = scenes_lib.Scene(
    **dict(zip(("shape", "color", "size", "dy", "dx"), fields)),
    ghost_shape=np.full_like(fields[0], -1),
    ghost_color=np.zeros_like(fields[0]),
  )
  return np.asarray(RENDER(scene)), scene


def _half(scene, cell, side):
  """Returns the slices of the half (rounded down) of an object's square on one side."""
  size = scene.size[cell]
  y = 16 * (cell // 3) + (16 - size) // 2 + scene.dy[cell]
  x = 16 * (cell % 3) + (16 - size) // 2 + scene.dx[cell]
  h = size // 2
  return {
    "top": np.s_[y : y + h, x : x + size],
    "bottom": np.s_[y + size - h : y + size, x : x + size],
    "left": np.s_[y : y + size, x : x + h],
    "right": np.s_[y : y + size, x + size - h : x + size],
  }[side]


class TestEncodeRecords:
  def test_fills_arrays_by_hand(self):
    record = {
      "include": [
        {"class": "bow", "count": 2, "color": "blue"},
        {"class": "ring", "count": 1, "position": ["above", 0]},
      ],
      "exclude": [{"class": "heart", "count": 1}],
    }
    target = verifier.encode_records([cases.prompt_of(record)])
    expected = {
      "item_shape": [4, 1, -1],
      "item_color": [2, -1, -1],
      "item_count": [2, 1, 0],
      "item_relation": [-1, 2, -1],
      "item_other": [0, 0, 0],
      "exclude_shape": [5, -1],
      "exclude_count": [1, 0],
    }
    for name, value in expected.items():
      np.testing.assert_array_equal(getattr(target, name), [value], name)
      assert getattr(target, name).dtype == np.int32

  @pytest.mark.parametrize(
    "include,exclude,message",
    [
      ([{"class": "dog", "count": 1}], [], "'dog' must be one of"),
      (
        [{"class": "bow", "count": 1, "color": "pink"}],
        [],
        "'pink' must be one of",
      ),
      ([{"class": "bow", "count": 0}], [], "at least 1, got 0"),
      (
        [{"class": "bow", "count": 1, "position": ["left of", 0]}],
        [],
        "another item, got index 0",
      ),
      (
        [{"class": "bow", "count": 1, "position": ["left of", 1]}],
        [],
        "another item, got index 1",
      ),
      (
        [
          {"class": "bow", "count": 1},
          {"class": "ring", "count": 1, "position": ["near", 0]},
        ],
        [],
        "'near' must be one of",
      ),
      (
        [{"class": "bow", "count": 3}],
        [{"class": "bow", "count": 3}],
        "excludes 3 of bow",
      ),
      ([], [], "the field include is missing"),
      ([{"class": "bow", "count": 1}] * 4, [], "got 4 and 0"),
    ],
  )
  def test_names_the_record_it_cannot_encode(self, include, exclude, message):
    record = {"prompt": "the culprit", "include": include, "exclude": exclude}
    with pytest.raises(ValueError, match=f"the culprit.*{message}"):
      verifier.encode_records([RECORDS[0], cases.prompt_of(record)])


class TestDetect:
  def test_reads_every_stamp(self):
    images, scene = _every_stamp()
    objects = DETECT(images)
    np.testing.assert_array_equal(objects.shape, scene.shape)
    np.testing.assert_array_equal(objects.color, scene.color)
    assert objects.error.max() < 1e-5
    top = 16 * (np.arange(9) // 3) + (16 - scene.size) // 2 + scene.dy
    left = 16 * (np.arange(9) % 3) + (16 - scene.size) // 2 + scene.dx
    np.testing.assert_array_equal(
      objects.box,
      np.stack([top, left, top + scene.size, left + scene.size], -1),
    )

  @pytest.mark.parametrize("side", SIDES)
  def test_finds_nothing_in_half_erased_objects(self, side):
    images, scene = _every_stamp()
    images = images.copy()
    for i, cell in np.ndindex(scene.shape.shape):
      images[i][
        _half(jax.tree.map(lambda x, row=i: x[row], scene), cell, side)
      ] = scenes_lib.BACKGROUND
    objects = DETECT(images)
    assert np.all(objects.shape == -1) and np.all(objects.color == -1)
    assert np.all(objects.error > 2 * verifier.THRESHOLDS[scene.color])

  @pytest.mark.parametrize(
    "color",
    [
      *scenes_lib.PALETTE,
      scenes_lib.BACKGROUND,
      (0, 0, 0),
      (255, 255, 255),
      (128, 128, 128),
    ],
  )
  def test_finds_nothing_in_blank(self, color):
    objects = DETECT(np.full((1, 48, 48, 3), color, np.uint8))
    assert np.all(objects.shape == -1)
    assert objects.error.min() > 3 * verifier.THRESHOLDS.max()

  def test_finds_nothing_in_noise(self):
    rng = np.random.default_rng(0)
    uniform = rng.integers(0, 256, (300, 48, 48, 3))
    sigma = rng.uniform(5, 120, (300, 1, 1, 1))
    around_background = 240 + sigma * rng.normal(0, 1, (300, 48, 48, 3))
    around_color = np.array(scenes_lib.PALETTE)[rng.integers(0, 6, 300)][
      :, None, None
    ] + rng.normal(0, 40, (300, 48, 48, 3))
    blotches = np.kron(
      rng.integers(0, 256, (300, 12, 12, 3)), np.ones((1, 4, 4, 1))
    )
    for noise in (uniform, around_background, around_color, blotches):
      objects = DETECT(np.uint8(np.clip(noise, 0, 255)))
      assert np.all(objects.shape == -1)
      assert objects.error.min() > verifier.THRESHOLDS.max()

  def test_reads_few_smudges(self):
    rng = np.random.default_rng(3)

    def place():
      return scenes_lib.place(
        [(*rng.integers(6, size=2), cell) for cell in range(9)], rng
      )

    scenes = [scenes_lib.smudge(place(), range(9), rng) for _ in range(300)]
    assert 0.05 < np.mean(DETECT(RENDER(_stack(scenes))).shape >= 0) < 0.1

  @pytest.mark.parametrize("rms", (0.04, 0.06, 0.08))
  def test_reads_every_stamp_behind_noise(self, rms):
    images, scene = _every_stamp()
    noise = np.random.default_rng(0).normal(0, 255 * rms, images.shape)
    objects = DETECT(np.uint8(np.clip(images + noise, 0, 255)))
    np.testing.assert_array_equal(objects.shape, scene.shape)
    np.testing.assert_array_equal(objects.color, scene.color)

  def test_reads_every_stamp_behind_blur(self):
    images, scene = _every_stamp()
    blurred = images.astype(np.float32)
    for axis in (1, 2):
      blurred = 0.76 * blurred + 0.12 * (
        np.roll(blurred, 1, axis) + np.roll(blurred, -1, axis)
      )
    rms = np.sqrt(np.mean((blurred - images) ** 2)) / 255
    assert 0.04 < rms < 0.06
    objects = DETECT(np.uint8(blurred))
    np.testing.assert_array_equal(objects.shape, scene.shape)
    np.testing.assert_array_equal(objects.color, scene.color)


class TestRelations:
  @pytest.mark.parametrize(
    "d,expected",
    [
      ((0, 16), "right of"),
      ((0, -16), "left of"),
      ((16, 0), "below"),
      ((-16, 0), "above"),
      # Diagonal: (16 - 2.4) / (16 √2) = .60, both hold.
      ((16, 16), "right of below"),
      ((-16, 16), "right of above"),
      # (16 - 2.4) / √(16² + 32²) = .38: only the longer axis, (32 - 2.4) / 35.8 = .83.
      ((32, 16), "below"),
      ((16, -32), "left of"),
      # Shrunk to nothing: |d| ≤ .1 (12 + 12) on both axes.
      ((2.4, -2.4), ""),
      ((0, 0), ""),
      # Along y (4.7 - 2.4) / 4.7 = .49, just in the dead zone; (4.9 - 2.4) / 4.9 = .51, just out.
      ((4.7, 0), ""),
      ((4.9, 0), "below"),
    ],
  )
  def test_holds_by_hand(self, d, expected):
    box = jnp.float32(
      [[[20, 20, 32, 32], [20 + d[0], 20 + d[1], 32 + d[0], 32 + d[1]]]]
    )
    holds = np.asarray(verifier.relations(box))[0]
    assert [
      name for name, hold in zip(prompts.RELATIONS, holds[:, 1, 0]) if hold
    ] == [name for name in prompts.RELATIONS if name in expected]
    assert not holds[:, 0, 0].any() and not holds[:, 1, 1].any()


class TestScore:
  def test_counting_wants_exactly_n_and_official_fewer_than_the_exclude(self):
    record = {
      "include": [{"class": "bow", "count": 2}],
      "exclude": [{"class": "bow", "count": 4}],
    }
    bows = [("bow", "red", cell) for cell in range(6)]
    values = [_judge(record, *bows[:n]) for n in range(7)]
    assert values == [
      (0, 0, 0),
      (0.5, 0, 0),
      (1, 1, 1),
      (0.5, 0, 1),
      (0, 0, 0),
      (0, 0, 0),
      (0, 0, 0),
    ]

  def test_extra_objects_divide_the_value_and_leave_official_alone(self):
    record = {"include": [{"class": "bow", "count": 1}]}
    assert _judge(record, ("bow", "red", 0), ("ring", "red", 1)) == (0.5, 0, 1)
    found = ("bow", "red", 0), ("ring", "red", 1), ("heart", "red", 2)
    value, strict, correct = _judge(record, *found)
    assert value == pytest.approx(1 / 3) and (strict, correct) == (0, 1)

  def test_exclude_of_another_class(self):
    record = {
      "include": [{"class": "bow", "count": 1}],
      "exclude": [{"class": "ring", "count": 1}],
    }
    assert _judge(record, ("bow", "red", 0)) == (1, 1, 1)
    assert _judge(record, ("bow", "red", 0), ("ring", "red", 1)) == (0.5, 0, 0)
    assert _judge(record, ("bow", "red", 0), ("heart", "red", 1)) == (0.5, 0, 1)

  def test_color_is_a_clause_of_its_own(self):
    record = {"include": [{"class": "bow", "count": 1, "color": "red"}]}
    assert _judge(record, ("bow", "red", 0)) == (1, 1, 1)
    # Count holds, colour does not.
    assert _judge(record, ("bow", "blue", 0)) == (0.5, 0, 0)
    assert _judge(record, ("bow", "blue", 0), ("bow", "red", 1)) == (0.5, 0, 1)
    assert _judge(record, ("ring", "red", 0)) == (0, 0, 0)

  def test_swapped_colors_keep_the_count_clauses_only(self):
    record = {
      "include": [
        {"class": "bow", "count": 1, "color": "red"},
        {"class": "ring", "count": 1, "color": "blue"},
      ]
    }
    assert _judge(record, ("bow", "red", 0), ("ring", "blue", 5)) == (1, 1, 1)
    assert _judge(record, ("bow", "blue", 0), ("ring", "red", 5)) == (0.5, 0, 0)

  def test_position_is_one_of_three_clauses(self):
    record = {
      "include": [
        {"class": "bow", "count": 1},
        {"class": "ring", "count": 1, "position": ["left of", 0]},
      ]
    }
    assert _judge(record, ("ring", "red", 3), ("bow", "red", 4)) == (1, 1, 1)
    value, strict, correct = _judge(
      record, ("ring", "red", 4), ("bow", "red", 3)
    )
    assert value == pytest.approx(2 / 3) and (strict, correct) == (0, 0)
    value, strict, correct = _judge(record, ("ring", "red", 0))
    assert value == pytest.approx(1 / 3) and (strict, correct) == (0, 0)

  def test_position_holds_for_any_pair_of_the_asked_colors(self):
    record = {
      "include": [
        {"class": "bow", "count": 1, "color": "red"},
        {"class": "ring", "count": 1, "position": ["left of", 0]},
      ]
    }
    rings = ("ring", "red", 3), ("ring", "red", 5)
    assert _judge(record, *rings, ("bow", "red", 4))[2] == 1
    assert _judge(record, *rings, ("bow", "blue", 4))[2] == 0

  def test_items_of_one_class_count_together(self):
    record = {
      "include": [
        {"class": "bow", "count": 2, "color": "red"},
        {"class": "bow", "count": 1, "color": "blue"},
      ]
    }
    red, blue = [("bow", "red", 0), ("bow", "red", 1)], [("bow", "blue", 2)]
    assert _judge(record, *red, *blue) == (1, 1, 1)
    # Two of three bows, two of two red, none of one blue.
    value, strict, correct = _judge(record, *red)
    assert value == pytest.approx((2 / 3 + 1 + 2 / 3 + 0) / 4) and (
      strict,
      correct,
    ) == (0, 0)

  def test_is_valid_and_zero_when_nothing_is_found(self):
    score = verifier.score(_objects(), verifier.encode_records(RECORDS[:1]))
    assert score.valid.all() and score.valid.dtype == bool
    assert score.value == 0 and score.value.dtype == jnp.float32


class TestVerify:
  def test_scores_ten_thousand_true_scenes_one(self):
    rng = np.random.default_rng(0)
    by_tag = [
      [record for record in RECORDS if record.tag == tag]
      for tag in prompts.TAGS
    ]
    for _ in range(20):
      records = [
        pool[rng.integers(len(pool))]
        for i in range(500)
        for pool in [by_tag[i % 6]]
      ]
      images = RENDER(
        _stack([prompts.scene_for(record, rng) for record in records])
      )
      score = VERIFY(images, verifier.encode_records(records))
      assert np.all(score.value == 1)
      assert np.all(score.parts["strict"] == 1) and np.all(
        score.parts["correct"] == 1
      )

  def test_agrees_with_plain_numpy_on_perturbed_scenes(self):
    rng = np.random.default_rng(1)
    records = [
      _random_record(rng) if i % 2 else RECORDS[rng.integers(len(RECORDS))]
      for i in range(600)
    ]
    scenes = [_perturbed_scene(record, rng) for record in records]
    images = np.array(RENDER(_stack(scenes)))
    for image, scene in zip(images[::3], scenes[::3]):
      cell, side = (
        rng.choice(np.flatnonzero(scene.shape >= 0)),
        SIDES[rng.integers(4)],
      )
      image[_half(scene, cell, side)] = scenes_lib.BACKGROUND
    images[::4] = np.clip(
      images[::4] + rng.normal(0, 10, images[::4].shape), 0, 255
    )
    objects = DETECT(images)
    score = VERIFY(images, verifier.encode_records(records))
    seen = []
    for i, (image, record) in enumerate(zip(images, records)):
      expected = numpy_verifier.read(image)
      found = [
        (
          scenes_lib.SHAPES[objects.shape[i, cell]],
          scenes_lib.COLORS[objects.color[i, cell]],
          cell,
          tuple(np.asarray(objects.box[i, cell])),
        )
        for cell in np.flatnonzero(np.asarray(objects.shape[i]) >= 0)
      ]
      assert found == [
        tuple(o[key] for key in ("class", "color", "cell", "box"))
        for o in expected
      ]
      value, flawless, correct = numpy_verifier.judge(expected, record)
      clutter = numpy_verifier.clutter(image, expected)
      assert float(score.value[i]) == pytest.approx(value, abs=1e-6)
      assert flawless == (float(score.value[i]) == 1)
      assert float(score.parts["clutter"][i]) == pytest.approx(clutter)
      # `strict` wants no clutter either, which the value ignores.
      assert bool(score.parts["strict"][i]) == (flawless and not clutter)
      assert bool(score.parts["correct"][i]) == correct
      seen.append((flawless, clutter > 0, correct))
    assert {*seen} == {
      (flawless, cluttered, correct)
      for flawless in (False, True)
      for cluttered in (False, True)
      for correct in (False, True)
      if correct or not flawless
    }

  def test_strict_refuses_what_cannot_be_read(self):
    rng = np.random.default_rng(5)
    single = [record for record in RECORDS if record.tag == "single_object"]
    scenes = [prompts.scene_for(record, rng) for record in single]
    images = np.array(RENDER(_stack(scenes)))
    targets = verifier.encode_records(single)
    # A grey patch in a cell that is blank.
    for image, scene in zip(images, scenes, strict=True):
      cell = int(np.flatnonzero(scene.shape < 0)[0])
      y, x = 16 * (cell // 3), 16 * (cell % 3)
      image[y + 4 : y + 12, x + 4 : x + 12] = 128
    score = VERIFY(images, targets)
    assert np.all(score.value == 1) and np.all(score.parts["correct"] == 1)
    np.testing.assert_allclose(score.parts["clutter"], 1 / 9, rtol=1e-6)
    assert np.all(score.parts["strict"] == 0)

  def test_is_the_same_under_jit(self):
    image = RENDER(
      _stack([prompts.scene_for(RECORDS[-1], np.random.default_rng(2))])
    )
    targets = verifier.encode_records(RECORDS[:1])
    jax.tree.map(
      np.testing.assert_array_equal,
      verifier.verify(image, targets),
      VERIFY(image, targets),
    )


def _random_record(rng):
  """Returns a record of one to three items with random clauses."""
  include = []
  for k, shape in enumerate(rng.permutation(6)[: rng.integers(1, 4)]):
    item = {"class": scenes_lib.SHAPES[shape], "count": int(rng.integers(1, 3))}
    if rng.random() < 0.5:
      item["color"] = scenes_lib.COLORS[rng.integers(6)]
    if k and rng.random() < 0.6:
      item["position"] = [
        prompts.RELATIONS[rng.integers(4)],
        int(rng.integers(k)),
      ]
    include.append(item)
  exclude = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
  return cases.prompt_of(
    {"include": include, "exclude": exclude if rng.random() < 0.5 else []}
  )


def _perturbed_scene(record, rng):
  """Returns a scene of what `record` asks for in random cells, with up to two random changes."""
  kinds = []
  for item in record.include:
    color = (
      rng.integers(6)
      if item.color is None
      else scenes_lib.COLORS.index(item.color)
    )
    kinds += [(scenes_lib.SHAPES.index(item.class_name), color)] * item.count
  for _ in range(rng.integers(3)):
    change, i = rng.integers(4), rng.integers(len(kinds))
    if change == 0 and len(kinds) > 1:
      kinds.pop(i)
    elif change == 1:
      kinds.append((rng.integers(6), rng.integers(6)))
    elif change == 2:
      kinds[i] = (kinds[i][0], rng.integers(6))
    elif change == 3:
      kinds[i] = (rng.integers(6), kinds[i][1])
  cells = rng.permutation(9)[: len(kinds)]
  return scenes_lib.place(
    [(*kind, cell) for kind, cell in zip(kinds, cells)], rng
  )
