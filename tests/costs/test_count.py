"""Tests of the analytic costs against numbers worked out by hand."""

import pytest

from r3jax.costs import chips
from r3jax.costs import count
from r3jax.model import architecture
from r3jax.parallel import sharding
from r3jax.sequence import segments

SMALL = architecture.LLMConfig(
  hidden_size=8,
  intermediate_size=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  vocab_size=10,
)
EXPERT = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16  # q, k, v, o; gate, up, down
LAYOUT = segments.Layout(
  (
    segments.text("prompt", 3),
    segments.image("draft", "noise", (1, 2), ("prompt",)),
  )
)


class TestForward:
  def test_counts_products_and_visible_pairs(self):
    found = count.forward(
      SMALL, LAYOUT, ("draft",), ("prompt",), rows=5, copies=2
    )
    pairs = 4 * (3 + 4)  # four slots see the prompt and each other
    assert found.flops == 3 * 5 * (2 * EXPERT * 4 + 4 * 8 * pairs)
    # both experts, bfloat16, two copies
    assert found.read == 3 * 2 * 2 * EXPERT * 2

  def test_text_is_causal_and_reads_one_expert(self):
    found = count.forward(SMALL, LAYOUT, ("prompt",), (), rows=1, copies=1)
    assert found.flops == 3 * (2 * EXPERT * 3 + 4 * 8 * 6)
    assert found.read == 3 * 2 * EXPERT


class TestCost:
  def test_seconds_are_those_of_the_slower_part(self):
    chip = chips.Chip(1, 100.0, 10.0, 1.0, ())
    assert count.Cost(400.0, 10.0).seconds(chip, 2) == 2.0
    assert count.Cost(400.0, 100.0).seconds(chip, 2) == 5.0


class TestCopies:
  @pytest.mark.parametrize(
    "mlp, number", [((), 64), (("tensor",), 16), (("fsdp", "tensor"), 8)]
  )
  def test_are_the_chips_that_rules_do_not_split_over(self, mlp, number):
    assert (
      count.copies(
        sharding.Rules.of({"mlp": mlp}), {"data": 8, "fsdp": 2, "tensor": 4}
      )
      == number
    )
