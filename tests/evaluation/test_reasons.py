"""Tests of evaluation/reasons.py."""

import pytest

from r3jax.data import records
from r3jax.evaluation import reasons


def prompt(*include):
  return records.Prompt.from_json(
    {"tag": "position", "prompt": "a photo", "include": list(include)}
  )


RING = {"class": "ring", "count": 1}
HEART = {"class": "heart", "count": 1}


class TestOfImage:
  @pytest.mark.parametrize(
    ("include", "labels", "parts", "expected"),
    [
      ([RING, HEART], ["red ring", "blue heart"], {}, ""),
      ([RING, HEART], ["red ring"], {}, "missing: heart"),
      (
        [RING | {"count": 3}],
        ["red ring"],
        {},
        "missing: ring (2 of 3)",
      ),
      ([RING], ["red ring", "blue ring"], {}, "too many: ring (2, not 1)"),
      (
        [RING | {"color": "blue"}],
        ["red ring"],
        {},
        "missing: blue ring, seen in red",
      ),
      (
        [RING, HEART | {"position": ["above", 0]}],
        ["red ring", "red heart"],
        {"correct": 0.0},
        "not there: heart above ring",
      ),
      (
        [RING],
        [],
        {"clutter": 0.25},
        "missing: ring; unreadable: 25% of the image",
      ),
      ([RING], ["red ring"], {"clutter": 0.001}, ""),
    ],
  )
  def test_says_what_is_wrong(self, include, labels, parts, expected):
    assert reasons.of_image(prompt(*include), labels, parts) == expected
