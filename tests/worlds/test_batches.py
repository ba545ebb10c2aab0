"""Tests of batches of supervised examples."""

import collections

import numpy as np
import pytest

from r3jax.sequence import layouts
from r3jax.sequence import tokenization
from r3jax.sft import small_bagel
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import vocabulary


class TestEncoder:
  def test_draws_reflect_tags_by_weight_and_the_others_evenly(self):
    tokenizer = tokenization.TextTokenizer(vocabulary.build_tokenizer())
    capacities = layouts.Capacities(
      system=3,
      latent_grid=(3, 3),
      vit_grid=(3, 3),
      **small_bagel.TEXT_CAPACITIES,
    )
    mix = batches.Mix(0.5, 0.3, 0.0, 0.0, {"position": 6.0, "color_attr": 2.0})
    records = prompts.by_tag(prompts.train_records())
    encoder = batches.Encoder(records, tokenizer, capacities, mix, seed=0)
    tags = {record.text: record.tag for record in prompts.train_records()}
    reasoned, reflected = collections.Counter(), collections.Counter()
    for i in range(1200):
      batch = encoder(i)

      def text(rows):
        return tokenizer.decode(rows.ids[1 : rows.lengths - 1].tolist())

      reasoned[tags[text(batch.reason.prompt)]] += 1
      reflected[tags[_asked(text(batch.reflect.question), tags)]] += 1
    assert [reasoned[tag] / 1200 for tag in prompts.TAGS] == pytest.approx(
      [1 / 6] * 6, abs=0.04
    )
    expected = np.array([1, 1, 1, 1, 6, 2]) / 12
    assert [reflected[tag] / 1200 for tag in prompts.TAGS] == pytest.approx(
      expected, abs=0.04
    )


def _asked(question: str, known: dict) -> str:
  """Returns the prompt that a question quotes: the longest that is in it."""
  return max((prompt for prompt in known if prompt in question), key=len)
