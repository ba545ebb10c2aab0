"""Compiled rounds of an evaluation: a draft, then reflections and edits of it.

Noise comes from (seed, prompt, image, round), so that nothing depends on the batch size or the number
of devices but the order in which numbers are added up.

A sample that says "no further edit" is finished and keeps its image and score. Beside what it keeps,
its chain goes on as if it had not stopped, which costs nothing in a batch that others go on in, and
tells what stopping is worth.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout
from r3jax.agent import rollout_settings
from r3jax.parallel import multihost
from r3jax.rl import iteration
from r3jax.rl import placement

_ASKED = 1_000  # beyond every round, in the randomness of answers


@flax.struct.dataclass
class Drawn:
  """Images and what they earned; leaves are [B, ...]."""

  images: types.Images
  score: types.Score


@flax.struct.dataclass
class Standing:
  """Where a batch stands after a round; leaves are [B, ...]."""

  kept: Drawn  # where finished, that of the round before
  chain: Drawn  # as if nothing had ever stopped
  stop: jax.Array  # finished in this round or before


@flax.struct.dataclass
class Round:
  """One round of a batch; leaves are [B, ...]."""

  standing: Standing
  format: jax.Array
  says_stop: jax.Array  # in this round; False for drafts
  text: experience.Text
  instruction_tokens: jax.Array  # 0 for drafts

  @property
  def kept(self) -> Drawn:
    """What a sample that is finished keeps, and others have drawn."""
    return self.standing.kept

  @property
  def chain(self) -> Drawn:
    """What would be there if nothing had ever stopped."""
    return self.standing.chain

  @property
  def stop(self) -> jax.Array:
    """Whether samples have finished in this round or before, [B]."""
    return self.standing.stop


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Compiled rounds on a mesh.

  Attributes:
    modules: the model.
    settings: how to sample (see `experiment.evaluation_settings`).
    reward, parse: as in `rl.step.Iteration`.
    mesh: rows are split over its `data` axis.
    rounds: images in a chain, the draft included.
    batch_size: rows per call.
    seed: of all noise.
    question_tokens: slots of the questions of `ask`.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings
  reward: iteration.Reward
  parse: iteration.Parse
  mesh: jax.sharding.Mesh
  rounds: int
  batch_size: int
  seed: int
  question_tokens: int = 0

  def __post_init__(self):
    for name in ("rounds", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"eval.{name} must be at least 1; got {getattr(self, name)}"
        )
    replicas = self.mesh.shape[placement.AXIS]
    if self.batch_size % replicas:
      raise ValueError(
        f"eval.batch_size ({self.batch_size}) must be divisible by the number of data replicas ({replicas})"
      )
    one, many = (
      jax.sharding.PartitionSpec(),
      jax.sharding.PartitionSpec(placement.AXIS),
    )
    # of results too: a round is the next one's argument
    split = jax.sharding.NamedSharding(self.mesh, many)
    compiled = lambda function, rows: jax.jit(
      jax.shard_map(
        function,
        mesh=self.mesh,
        in_specs=(one, one) + (many,) * rows,
        out_specs=many,
        axis_names={placement.AXIS},
        check_vma=False,
      ),
      out_shardings=split,
    )
    object.__setattr__(self, "draft", compiled(self._draft, 2))
    object.__setattr__(self, "revise", compiled(self._revise, 3))
    object.__setattr__(self, "answer", compiled(self._answer, 3))
    object.__setattr__(self, "_programs", {})  # compiled for the batches

  def _keys(self, ids: jax.Array) -> random_keys.Keys:
    """Returns the keys of rows; ids are [B, 3] (prompt, image, round)."""
    return random_keys.numbered_keys(self.seed, ids)

  def _actor(self, policy, towers) -> actors.Actor:
    return actors.sampler(self.modules, policy, towers, self.settings)

  def _draft(self, policy, towers, prompts: experience.Prompts, ids) -> Round:
    made = rollout.reason(self._actor(policy, towers), prompts, self._keys(ids))
    parsed = self.parse(made.text.ids, made.text.lengths, "reason")
    drawn = Drawn(made.images, self.reward(made.images, prompts.target))
    open_ = jnp.zeros_like(drawn.score.valid)
    return Round(
      Standing(drawn, drawn, open_),
      parsed.format,
      open_,
      made.text,
      jnp.zeros_like(made.text.lengths),
    )

  def _revise(
    self, policy, towers, prompts: experience.Prompts, ids, last: Standing
  ) -> Round:
    actor = self._actor(policy, towers)
    reflect_keys, refine_keys = random_keys.split_keys(self._keys(ids))
    source = rollout.look(actor, last.chain.images)
    text = rollout.reflect(actor, prompts, source, reflect_keys)
    parsed = self.parse(text.ids, text.lengths, "reflect")
    never = jnp.zeros_like(last.stop)
    told = experience.Instruction(
      parsed.instruction, parsed.instruction_length, never
    )
    images = rollout.refine(actor, source, told, refine_keys).images
    chain = Drawn(images, self.reward(images, prompts.target))
    stop = parsed.stop | last.stop
    keep = lambda old, new: jnp.where(
      stop.reshape(-1, *[1] * (new.ndim - 1)), old, new
    )
    kept = jax.tree.map(keep, last.kept, chain)
    return Round(
      Standing(kept, chain, stop),
      parsed.format,
      parsed.stop,
      text,
      parsed.instruction_length,
    )

  def _answer(
    self, policy, towers, asked: experience.Prompts, ids, images: types.Images
  ) -> experience.Text:
    """Answers a question, in place of the reflection question, about every image."""
    capacities = dataclasses.replace(
      self.settings.capacities, question=self.question_tokens
    )
    actor = actors.sampler(
      self.modules,
      policy,
      towers,
      dataclasses.replace(self.settings, capacities=capacities),
    )
    return rollout.reflect(
      actor, asked, rollout.look(actor, images), self._keys(ids)
    )

  def run(
    self, policy, towers, prompts: experience.Prompts, images: Sequence[int]
  ) -> list[tuple[Round, float]]:
    """Draws one batch.

    Args:
      policy, towers: parameters on the mesh.
      prompts: numpy, one row per image of the batch.
      images: the number of each among those of its prompt.

    Returns:
      Every round (numpy), and the seconds that it took, compilation not included.
    """
    found, ids = [], self._ids(prompts, images)
    for turn in range(self.rounds):
      arguments = (
        policy,
        towers,
        prompts,
        ids(turn),
        *([found[-1][0].standing] if turn else []),
      )
      found.append(self._timed("revise" if turn else "draft", *arguments))
    return [(multihost.fetch(made), seconds) for made, seconds in found]

  def ask(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    images: Sequence[int],
    number: int,
    pictures: np.ndarray,
  ) -> experience.Text:
    """Asks a question about every picture of a batch; returns the answers (numpy).

    Args:
      policy, towers, prompts, images: as for `run`; the question stands in place of that of reflection.
      number: of the question among those about the same picture.
      pictures: uint8 [B, H, W, 3].
    """
    ids = self._ids(prompts, images)(_ASKED + number)
    return multihost.fetch(
      self._timed("answer", policy, towers, prompts, ids, pictures)[0]
    )

  def _ids(self, prompts: experience.Prompts, images: Sequence[int]):
    images = np.asarray(images, np.int32)
    return lambda turn: np.stack(
      [prompts.index, images, np.full_like(images, turn)], axis=1
    )

  def _timed(self, name: str, *arguments):
    """Runs one of the compiled functions; returns what it found and its seconds."""
    if name not in self._programs:
      self._programs[name] = getattr(self, name).lower(*arguments).compile()
    start = time.monotonic()
    found = jax.block_until_ready(self._programs[name](*arguments))
    return found, time.monotonic() - start


def batches(
  rows: Sequence[tuple[int, int]], size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields int32 [size, 2] of (prompt, image) and how many of them count; the last batch repeats its last row."""
  for start in range(0, len(rows), size):
    batch = np.array(rows[start : start + size], np.int32)
    yield (
      np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)]),
      len(batch),
    )
