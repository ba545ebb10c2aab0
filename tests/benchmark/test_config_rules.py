"""Tests of the rules of `configs/benchmark.py`."""

import pytest

from configs import benchmark
from r3jax.benchmark import config_rules


class TestCheck:
  @pytest.mark.parametrize("variant", ["peer", "1b", "7b-lora"])
  def test_variants_are_accepted(self, variant):
    config_rules.check(benchmark.get_config(variant))

  def test_unknown_variant_lists_the_known(self):
    with pytest.raises(ValueError, match="'7b-lora', 'peer'.*; got '2b'"):
      benchmark.get_config("2b")

  @pytest.mark.parametrize(
    "key, value, message",
    [
      ("sizes.hidden_size", 500, "divisible by 4 and by 2 \\* sizes.num_heads"),
      ("sizes.num_kv_heads", 3, "divisible by sizes.num_kv_heads"),
      ("sizes.vision_num_heads", 3, "divisible by sizes.vision_num_heads"),
      ("sizes.autoencoder_channels", 33, "must be divisible by 32; got 33"),
      ("sizes.autoencoder_multipliers", (1, 2), "must have 4 levels"),
      ("sizes.vocab_size", 4, "sizes.vocab_size must be a whole number in 5"),
      ("image.height", 250, "image.height must be a multiple of 16"),
      ("step.chain", "full", "step.chain must be 'tree' in a benchmark"),
      ("reflect_rounds", 0, "reflect_rounds must be 1 in a benchmark"),
    ],
  )
  def test_what_does_not_go_together_is_named(self, key, value, message):
    config = benchmark.get_config().copy_and_resolve_references()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
      config_rules.check(config)
