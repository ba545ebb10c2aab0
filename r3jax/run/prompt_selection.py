"""Selects the prompts of a run: how often every tag occurs among them."""

from collections.abc import Sequence

import numpy as np

from r3jax.data import records


def balanced(prompts: Sequence[records.Prompt]) -> tuple[records.Prompt, ...]:
  """Repeats the prompts of rare tags, so that all tags occur equally often."""
  by_tag: dict[str, list[records.Prompt]] = {}
  for prompt in prompts:
    by_tag.setdefault(prompt.tag, []).append(prompt)
  largest = max(len(group) for group in by_tag.values())
  return _cycled(by_tag, largest)


def evenly(
  prompts: Sequence[records.Prompt], number: int, seed: int
) -> tuple[records.Prompt, ...]:
  """Selects a fixed subset with the same number of prompts of every tag.

  Args:
    prompts: Prompts to select from.
    number: Size of the subset, rounded up to a multiple of the number of tags; 0 selects all.
    seed: Seed of the choice.
  """
  if not number:
    return tuple(prompts)
  by_tag: dict[str, list[records.Prompt]] = {}
  for i in np.random.default_rng(seed).permutation(len(prompts)):
    prompt = prompts[i]
    by_tag.setdefault(prompt.tag, []).append(prompt)
  number_per_tag = -(-number // len(by_tag))
  return _cycled(by_tag, number_per_tag)


def _cycled(
  by_tag: dict[str, list[records.Prompt]], number_per_tag: int
) -> tuple[records.Prompt, ...]:
  """Returns the first prompts of every tag; a tag with too few of them starts over."""
  selected = []
  for group in by_tag.values():
    selected += [group[i % len(group)] for i in range(number_per_tag)]
  return tuple(selected)
