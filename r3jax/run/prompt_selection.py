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


def describe(prompts: Sequence[records.Prompt]) -> str:
  """Returns a table of a training set: what it holds of every tag, and how often it is drawn.

  Args:
    prompts: Training set; a prompt that it holds n times is drawn n times an epoch.

  Returns:
    A line per tag: its different prompts, its share of what is drawn, and how often an epoch draws
    each of them.
  """
  by_tag: dict[str, list[records.Prompt]] = {}
  for prompt in prompts:
    by_tag.setdefault(prompt.tag, []).append(prompt)
  width = max(len(tag) for tag in by_tag)
  lines = [f"  {'tag':{width}}  prompts   share  times an epoch"]
  for tag, drawn in sorted(by_tag.items()):
    num_different = len(set(drawn))
    share = len(drawn) / len(prompts)
    times = len(drawn) / num_different
    lines.append(
      f"  {tag:{width}}  {num_different:7d}  {share:6.3f}  {times:.3g}"
    )
  return "\n".join(lines)


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
