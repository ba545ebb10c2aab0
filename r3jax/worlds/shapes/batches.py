"""Batches of supervised examples as arrays, for SFT (Grain pipeline)."""

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
  """Text segments."""

  ids: jax.Array  # [B, T]
  lengths: jax.Array  # [B]


@flax.struct.dataclass
class ReasonRows:
  """Prompt, thought, image of the thought."""

  prompt: TextRows
  thought: TextRows
  scene: scenes.Scene


@flax.struct.dataclass
class ReflectRows:
  """Image, question, answer."""

  scene: scenes.Scene
  question: TextRows
  answer: TextRows


@flax.struct.dataclass
class RefineRows:
  """Image, instruction, edited image."""

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
  """What examples are drawn from.

  Attributes:
    plan_flaws: share of flawed plans.
    instruction_flaws: share of instructions that do not help.
    questions: share of reflect examples that are other questions about the image.
    descriptions: share of reflect examples that ask what is there.
    reflect_tags: how often a tag is drawn for reflect examples, relative to the others; 1 where none
      is given.
  """

  plan_flaws: float
  instruction_flaws: float
  questions: float
  descriptions: float
  reflect_tags: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    unknown = sorted(set(self.reflect_tags) - set(prompts.TAGS))
    if unknown:
      raise ValueError(
        f"mix.reflect_tags must name tags of {prompts.TAGS}; got {unknown}"
      )


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Makes the arrays of example number i."""

  # every tag is drawn equally often, but see `Mix`
  records_by_tag: tuple[tuple[records_lib.Prompt, ...], ...]
  tokenizer: tokenization.TextTokenizer
  capacities: layouts.Capacities
  mix: Mix
  seed: int

  def __call__(self, index: int) -> Batch:
    """Returns one example of each kind, without a batch axis; depends on (seed, index) only."""
    rng = np.random.default_rng((self.seed, index))
    return Batch(self._reason(rng), self._reflect(rng), self._refine(rng))

  def _record(
    self, rng: np.random.Generator, weights: Mapping[str, float]
  ) -> dict:
    shares = np.array(
      [weights.get(records[0].tag, 1.0) for records in self.records_by_tag]
    )
    records = self.records_by_tag[
      rng.choice(len(shares), p=shares / shares.sum())
    ]
    return records[rng.integers(len(records))]

  def _text(self, text: str, capacity: int) -> TextRows:
    ids, length = self.tokenizer.segment(text, capacity)
    return TextRows(ids, np.int32(length))

  def _reason(self, rng: np.random.Generator) -> ReasonRows:
    example = examples.reason_example(
      self._record(rng, {}), rng, self.mix.plan_flaws
    )
    c = self.capacities
    return ReasonRows(
      self._text(example.prompt, c.prompt),
      self._text(example.thought, c.thought),
      example.scene,
    )

  def _reflect(self, rng: np.random.Generator) -> ReflectRows:
    record, kind = self._record(rng, self.mix.reflect_tags), rng.random()
    if kind < self.mix.descriptions:
      example = examples.description_example(rng)
    elif kind < self.mix.descriptions + self.mix.questions:
      example = examples.question_example(record, rng)
    else:
      example = examples.reflect_example(
        record, rng, self.mix.instruction_flaws
      )
    c = self.capacities
    return ReflectRows(
      example.scene,
      self._text(example.question, c.question),
      self._text(example.answer, c.answer),
    )

  def _refine(self, rng: np.random.Generator) -> RefineRows:
    example = examples.refine_example(self._record(rng, {}), rng)
    return RefineRows(
      example.scene,
      self._text(example.instruction, self.capacities.instruction),
      example.target,
    )


def iterate(
  example: Callable[[int], object], batch_size: int, num_steps: int
) -> Iterator:
  """Returns an iterator over `num_steps` stacked batches of the examples 0, 1, 2, ...

  Args:
    example: maps an index to a pytree of numpy arrays.
    batch_size: examples per batch.
    num_steps: batches.
  """
  data = grain.MapDataset.range(num_steps * batch_size).map(example)
  stack = lambda rows: jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
  batches = data.batch(batch_size, drop_remainder=True, batch_fn=stack)
  return iter(
    batches.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    )
  )


def dense_scene(index: int, seed: int) -> scenes.Scene:
  """Returns dense scene number `index`, for the autoencoder and the ViT."""
  return examples.dense_scene(np.random.default_rng((seed, index)))
