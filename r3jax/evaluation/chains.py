"""Draws chains of images in compiled rounds: a draft, then reflections and edits of it.

Noise follows from (seed, prompt, image, round). Results therefore depend on neither the batch size
nor the number of devices, except for the order in which floating-point numbers are added
(docs/algorithm.md#evaluation).

A sample that says "no further edit" is finished and keeps its image and score. The rows of a batch
are computed together, so the model goes on to edit it with the others, and the edit is dropped.
Only where `never_stop` asks for it is the edit kept apart, scored too, and edited again: the chain
as if it had never stopped measures what stopping is worth, and costs a score per image.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
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
from r3jax.rl import placement
from r3jax.sequence import thoughts

# (name, function, arguments) -> the function, without being traced where it was before
Keep = Callable[[str, Callable, tuple], Callable]

_FIRST_QUESTION = (
  1_000  # "round" of the first question's answer; above every round of a chain
)


@flax.struct.dataclass
class ScoredImages:
  """Images and their scores.

  Attributes:
    images: uint8 [B, H, W, 3].
    score: Their scores, leaves [B].
  """

  images: types.Images
  score: types.Score


@flax.struct.dataclass
class ChainState:
  """State of a batch of chains after a round.

  Attributes:
    kept: Latest images; those of a finished sample no longer change.
    chain: Latest images as if no sample had ever stopped; None unless
      `Sampler.never_stop`.
    stop: bool [B], whether the sample has finished in this round or before.
  """

  kept: ScoredImages
  chain: ScoredImages | None
  stop: jax.Array

  @property
  def latest(self) -> types.Images:
    """The images that the next round edits, uint8 [B, H, W, 3]."""
    latest = self.kept if self.chain is None else self.chain
    return latest.images


@flax.struct.dataclass
class Round:
  """One round of a batch.

  Attributes:
    state: State after the round.
    format: float32 [B], format reward of the texts.
    says_stop: bool [B], whether the text of this round says "no further edit"; False for drafts.
    text: Texts of this round.
    instruction_tokens: int32 [B], lengths of the instructions; 0 for drafts.
  """

  state: ChainState
  format: jax.Array
  says_stop: jax.Array
  text: experience.Text
  instruction_tokens: jax.Array

  @property
  def kept(self) -> ScoredImages:
    """Latest images; those of a finished sample no longer change."""
    return self.state.kept

  @property
  def chain(self) -> ScoredImages | None:
    """Latest images as if no sample had ever stopped; None unless `Sampler.never_stop`."""
    return self.state.chain

  @property
  def stop(self) -> jax.Array:
    """Whether samples have finished in this round or before, bool [B]."""
    return self.state.stop


@dataclasses.dataclass(frozen=True)
class TimedRound:
  """A round in numpy, and the seconds that it took, without compilation."""

  round: Round
  seconds: float


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Compiled rounds on a mesh.

  Attributes:
    modules: Model.
    settings: How to sample, see `stage_settings.for_evaluation`.
    reward: Scores images in the graph, see `rl.replica_stages.ReplicaStages`.
    parse: Reads format, stops and instructions of texts, see `rl.replica_stages.ReplicaStages`.
    mesh: Rows of a batch are split over its `data` axis.
    rounds: Images in a chain, the draft included.
    batch_size: Rows of a batch.
    seed: Seed of all noise.
    question_tokens: Capacity of the questions of `ask`.
    never_stop: Draws and scores every chain to its end, beside what is kept.
    keep: Keeps traced programs between starts; None traces them anew.

  Raises:
    ValueError: `rounds` or `batch_size` is below 1, or the data replicas do not divide the batch.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings
  reward: types.Scoring
  parse: thoughts.Parse
  mesh: jax.sharding.Mesh
  rounds: int
  batch_size: int
  seed: int
  question_tokens: int = 0
  never_stop: bool = False
  keep: Keep | None = None

  def __post_init__(self):
    for name in ("rounds", "batch_size"):
      value = getattr(self, name)
      if value < 1:
        raise ValueError(f"eval.{name} must be at least 1; got {value}")
    replicas = self.mesh.shape[placement.AXIS]
    if self.batch_size % replicas:
      raise ValueError(
        f"eval.batch_size ({self.batch_size}) must be divisible by the number of data "
        f"replicas ({replicas})"
      )

  @functools.cached_property
  def draft(self) -> Callable:
    """Compiled first round: (policy, towers, prompts, ids, counts) -> Round."""
    return self._on_mesh(self._draft, num_batched=3)

  @functools.cached_property
  def revise(self) -> Callable:
    """Compiled later round: (policy, towers, prompts, ids, counts, ChainState) -> Round."""
    return self._on_mesh(self._revise, num_batched=4)

  @functools.cached_property
  def answer(self) -> Callable:
    """Compiled answers: (policy, towers, prompts, ids, images) -> Text."""
    return self._on_mesh(self._answer, num_batched=3)

  @functools.cached_property
  def _programs(self) -> dict:
    """Programs compiled for the shapes of a batch, by name."""
    return {}

  def _on_mesh(self, function: Callable, num_batched: int) -> Callable:
    """Compiles a function whose last `num_batched` arguments are split over the data replicas."""
    replicated = jax.sharding.PartitionSpec()
    batched = jax.sharding.PartitionSpec(placement.AXIS)
    mapped = jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=(replicated, replicated) + (batched,) * num_batched,
      out_specs=batched,
      axis_names={placement.AXIS},
      check_vma=False,
    )
    return self._jitted(mapped)

  def _jitted(self, mapped: Callable) -> Callable:
    # Explicit for results too: the state of a round is an argument of the next.
    batched = jax.sharding.PartitionSpec(placement.AXIS)
    out_shardings = jax.sharding.NamedSharding(self.mesh, batched)
    return jax.jit(mapped, out_shardings=out_shardings)

  def _keys(self, ids: jax.Array) -> random_keys.Keys:
    """Returns the keys of rows; ids are [B, 3] (prompt, image, round)."""
    return random_keys.evaluation_keys(self.seed, ids)

  def _actor(self, policy, towers) -> actors.Actor:
    return actors.sampler(self.modules, policy, towers, self.settings)

  def _draft(
    self, policy, towers, prompts: experience.Prompts, ids, counts: jax.Array
  ) -> Round:
    """Draws the first images, and scores those of the rows that count, bool [B]."""
    actor = self._actor(policy, towers)
    reason = rollout.reason(actor, prompts, self._keys(ids))
    text = reason.text
    parsed = self.parse(text.ids, text.lengths, "reason")
    is_finite = reason.is_finite
    score = self.reward(reason.images, prompts.target, counts & is_finite)
    score = score.only_where(is_finite)
    # No draft stops: what is kept and the chain begin as the same images.
    drafts = ScoredImages(reason.images, score)
    chain = drafts if self.never_stop else None
    stop = jnp.zeros_like(score.valid)
    return Round(
      state=ChainState(kept=drafts, chain=chain, stop=stop),
      format=parsed.format,
      says_stop=stop,
      text=text,
      instruction_tokens=jnp.zeros_like(text.lengths),
    )

  def _revise(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    ids,
    counts: jax.Array,
    last: ChainState,
  ) -> Round:
    """Looks at the last images, writes instructions, edits the images, and scores the edits."""
    actor = self._actor(policy, towers)
    reflect_keys, refine_keys = random_keys.split_keys(self._keys(ids))
    source = rollout.look(actor, last.latest)
    text = rollout.reflect(actor, prompts, source, reflect_keys)
    parsed = self.parse(text.ids, text.lengths, "reflect")

    # The chain ignores stops, and what is kept is chosen below, so nothing is masked here.
    instruction = experience.Instruction(
      parsed.instruction,
      parsed.instruction_length,
      jnp.zeros_like(last.stop),
    )
    refined = rollout.refine(actor, source, instruction, refine_keys)
    images = refined.images
    is_finite = refined.is_finite
    stop = parsed.stop | last.stop
    needed = counts if self.never_stop else counts & ~stop
    score = self.reward(images, prompts.target, needed & is_finite)
    edited = ScoredImages(images, score.only_where(is_finite))

    def keep_finished(old: jax.Array, new: jax.Array) -> jax.Array:
      """Returns the old rows of finished samples, the new rows of others."""
      finished = stop.reshape(-1, *[1] * (new.ndim - 1))
      return jnp.where(finished, old, new)

    kept = jax.tree.map(keep_finished, last.kept, edited)
    chain = edited if self.never_stop else None
    return Round(
      state=ChainState(kept=kept, chain=chain, stop=stop),
      format=parsed.format,
      says_stop=parsed.stop,
      text=text,
      instruction_tokens=parsed.instruction_length,
    )

  def _answer(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    ids,
    images: types.Images,
  ) -> experience.Text:
    """Answers, about every image, the question that replaces that of reflection."""
    capacities = dataclasses.replace(
      self.settings.capacities, question=self.question_tokens
    )
    settings = dataclasses.replace(self.settings, capacities=capacities)
    actor = actors.sampler(self.modules, policy, towers, settings)
    source = rollout.look(actor, images)
    return rollout.reflect(actor, prompts, source, self._keys(ids))

  def run(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    image_index: Sequence[int],
    count: int,
  ) -> list[TimedRound]:
    """Draws all rounds of one batch.

    Args:
      policy: Parameters on the mesh.
      towers: Frozen parameters on the mesh.
      prompts: Prompts in numpy, one row per chain.
      image_index: Index of each chain among those of its prompt, [B].
      count: Rows that count, the first ones; the others fill the batch and get no score of a
        service.

    Returns:
      Every round. Once all samples have finished, nothing more is drawn unless `never_stop`: the
      rounds that are left repeat the last one, in no time.
    """
    counts = np.arange(self.batch_size) < count
    rounds = []
    for number in range(self.rounds):
      if rounds and self._is_over(rounds[-1].round, count):
        rounds.append(dataclasses.replace(rounds[-1], seconds=0.0))
        continue
      ids = _ids(prompts, image_index, number)
      arguments = [policy, towers, prompts, ids, counts]
      if rounds:
        arguments.append(rounds[-1].round.state)
      program = "revise" if rounds else "draft"
      result, seconds = self._timed(program, *arguments)
      rounds.append(TimedRound(result, seconds))
    # Fetched at the end: every round takes the state of the one before from the devices.
    return [
      dataclasses.replace(timed, round=multihost.fetch(timed.round))
      for timed in rounds
    ]

  def _is_over(self, last: Round, count: int) -> bool:
    """Returns whether no row that counts needs another round."""
    return not self.never_stop and bool(
      multihost.fetch(last.stop)[:count].all()
    )

  def ask(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    image_index: Sequence[int],
    question_index: int,
    images: np.ndarray,
  ) -> experience.Text:
    """Asks a question about every image of a batch.

    Args:
      policy: Parameters on the mesh.
      towers: Frozen parameters on the mesh.
      prompts: Prompts in numpy; the question stands in place of that of reflection.
      image_index: Index of each chain among those of its prompt, [B].
      question_index: Index of the question among those about the same image.
      images: uint8 [B, H, W, 3].

    Returns:
      The answers, in numpy.
    """
    ids = _ids(prompts, image_index, _FIRST_QUESTION + question_index)
    text, _ = self._timed("answer", policy, towers, prompts, ids, images)
    return multihost.fetch(text)

  def _timed(self, name: str, *arguments):
    """Runs a compiled function; returns its result on the devices and the seconds that it took."""
    # Compiled apart, so that the time of a round does not include compilation.
    if name not in self._programs:
      self._programs[name] = self._compiled(name, arguments)
    program = self._programs[name]
    start = time.monotonic()
    result = jax.block_until_ready(program(*arguments))
    return result, time.monotonic() - start

  def _compiled(self, name: str, arguments: tuple) -> jax.stages.Compiled:
    """Compiles a function for the shapes of its arguments."""
    function = getattr(self, name)
    if self.keep:
      function = self._jitted(self.keep(name, function, arguments))
    return function.lower(*arguments).compile()


def _ids(
  prompts: experience.Prompts, image_index: Sequence[int], number: int
) -> np.ndarray:
  """Returns int32 [B, 3] of (prompt, image, round), from which the noise of a round follows."""
  images = np.asarray(image_index, np.int32)
  rounds = np.full_like(images, number)
  return np.stack([prompts.index, images, rounds], axis=1)


def batches(
  rows: Sequence[tuple[int, int]], size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields batches of rows, int32 [size, 2], and how many rows of each count.

  The last batch is filled with copies of its last row.
  """
  for start in range(0, len(rows), size):
    batch = np.array(rows[start : start + size], np.int32)
    padding = np.repeat(batch[-1:], size - len(batch), axis=0)
    yield np.concatenate([batch, padding]), len(batch)
