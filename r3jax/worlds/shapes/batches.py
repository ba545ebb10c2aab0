"""Batches of supervised examples as arrays, by a Grain pipeline."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses

import flax.struct
import grain.python as grain
import jax
import numpy as np

from r3jax.data import records as records_lib
from r3jax.sequence import layouts
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import examples
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes


@flax.struct.dataclass
class TextRows:
  """Text segments of a batch."""

  ids: jax.Array  # [B, T] int32, begin and end included
  lengths: jax.Array  # [B] int32


@flax.struct.dataclass
class ReasonRows:
  """Prompts, thoughts about them, and images of the thoughts."""

  prompt: TextRows
  thought: TextRows
  scene: scenes.Scene


@flax.struct.dataclass
class ReflectRows:
  """Images, questions about them, and answers."""

  scene: scenes.Scene
  question: TextRows
  answer: TextRows


@flax.struct.dataclass
class RefineRows:
  """Images, instructions, and the edited images."""

  scene: scenes.Scene
  instruction: TextRows
  target: scenes.Scene


@flax.struct.dataclass
class Batch:
  """One step of SFT: the same number of examples of each kind."""

  reason: ReasonRows
  reflect: ReflectRows
  refine: RefineRows


@dataclasses.dataclass(frozen=True)
class Mix:
  """Shares of the kinds of examples.

  Attributes:
    plan_flaws: share of the plans that are flawed.
    instruction_flaws: share of the instructions that do not help.
    questions: share of the reflect examples that ask something else about the image.
    descriptions: share of the reflect examples that ask what is there.
    reflect_tags: how often a tag is drawn for reflect examples, relative to the others; 1 for tags
      that are not named.
    judgement_flaws: share of wrong verdicts, of the scenes that are systematically misjudged
      (`examples.misjudged`).
    answer_flaws: share of wrong answers, of the questions that are systematically answered wrongly.
  """

  plan_flaws: float
  instruction_flaws: float
  questions: float
  descriptions: float
  reflect_tags: Mapping[str, float] = dataclasses.field(default_factory=dict)
  judgement_flaws: float = 0.0
  answer_flaws: float = 0.0

  def __post_init__(self):
    unknown = sorted(set(self.reflect_tags) - set(prompts.TAGS))
    if unknown:
      raise ValueError(
        f"mix.reflect_tags must name tags of {prompts.TAGS}; got {unknown}"
      )


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Makes the arrays of one example of each kind from its number.

  Attributes:
    records_by_tag: prompts to draw from; every tag is drawn equally often, but see `Mix`.
    tokenizer: encodes the texts.
    capacities: slots of the texts.
    mix: shares of the kinds of examples.
    seed: seed of all draws.
  """

  records_by_tag: tuple[tuple[records_lib.Prompt, ...], ...]
  tokenizer: tokenization.TextTokenizer
  capacities: layouts.Capacities
  mix: Mix
  seed: int

  def __call__(self, index: int) -> Batch:
    """Returns one example of each kind, without a batch axis; it depends on (seed, index) alone."""
    rng = np.random.default_rng((self.seed, index))
    return Batch(self._reason(rng), self._reflect(rng), self._refine(rng))

  def _record(
    self, rng: np.random.Generator, weights: Mapping[str, float]
  ) -> records_lib.Prompt:
    """Draws a tag by its weight (1 if it has none), and a prompt of it."""
    tags = [records[0].tag for records in self.records_by_tag]
    shares = np.array([weights.get(tag, 1.0) for tag in tags])
    tag_index = rng.choice(len(shares), p=shares / shares.sum())
    records = self.records_by_tag[tag_index]
    return records[rng.integers(len(records))]

  def _text(self, text: str, capacity: int) -> TextRows:
    ids, length = self.tokenizer.segment(text, capacity)
    return TextRows(ids, np.int32(length))

  def _reason(self, rng: np.random.Generator) -> ReasonRows:
    record = self._record(rng, {})
    example = examples.reason_example(record, rng, self.mix.plan_flaws)
    return ReasonRows(
      self._text(example.prompt, self.capacities.prompt),
      self._text(example.thought, self.capacities.thought),
      example.scene,
    )

  def _reflect(self, rng: np.random.Generator) -> ReflectRows:
    record = self._record(rng, self.mix.reflect_tags)
    kind = rng.random()
    if kind < self.mix.descriptions:
      example = examples.description_example(rng)
    elif kind < self.mix.descriptions + self.mix.questions:
      example = examples.question_example(record, rng, self.mix.answer_flaws)
    else:
      flaws = examples.Flaws(
        self.mix.instruction_flaws, self.mix.judgement_flaws
      )
      example = examples.reflect_example(record, rng, flaws)
    return ReflectRows(
      example.scene,
      self._text(example.question, self.capacities.question),
      self._text(example.answer, self.capacities.answer),
    )

  def _refine(self, rng: np.random.Generator) -> RefineRows:
    example = examples.refine_example(self._record(rng, {}), rng)
    return RefineRows(
      example.scene,
      self._text(example.instruction, self.capacities.instruction),
      example.target,
    )


def iterate(
  example: Callable[[int], object],
  batch_size: int,
  num_steps: int,
  first_step: int = 0,
) -> Iterator:
  """Returns an iterator over batches of the examples 0, 1, 2, ...

  Args:
    example: maps an index to a pytree of numpy arrays.
    batch_size: examples per batch.
    num_steps: number of batches, those before `first_step` included.
    first_step: batches that are left out.
  """
  numbers = grain.MapDataset.range(
    first_step * batch_size, num_steps * batch_size
  )
  batches = numbers.map(example).batch(
    batch_size, drop_remainder=True, batch_fn=_stack
  )
  # One thread prepares a few batches while the devices compute.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
  return iter(batches.to_iter_dataset(options))


def _stack(rows):
  """Stacks pytrees along a new first axis."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def dense_scene(index: int, seed: int) -> scenes.Scene:
  """Returns dense scene number `index`, for the autoencoder and the ViT."""
  return examples.dense_scene(np.random.default_rng((seed, index)))
