"""The parts of an iteration as programs of their own, run on what the parts before them returned.

They are the functions that `rl.replica_stages` calls inside of the training step; nothing is
computed here.
"""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import jax

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout
from r3jax.benchmark import measure
from r3jax.model import network
from r3jax.rl import mapped
from r3jax.rl import placement
from r3jax.rl import pools
from r3jax.rl import replica_stages
from r3jax.rl import stage_outputs
from r3jax.rl import train_state
from r3jax.run import sessions
from r3jax.sampling import flow_matching

_WHOLE = jax.sharding.PartitionSpec()
_ROWS = jax.sharding.PartitionSpec(placement.AXIS)
# Caches have their layers first, and rows behind.
_CACHED_ROWS = jax.sharding.PartitionSpec(None, placement.AXIS)


def row_specs(tree):
  """Returns how a tree of rows is split over replicas."""

  def spec(leaf):
    if isinstance(leaf, network.Cache):
      return dataclasses.replace(leaf, key=_CACHED_ROWS, value=_CACHED_ROWS)
    return _ROWS

  return jax.tree.map(
    spec, tree, is_leaf=lambda leaf: isinstance(leaf, network.Cache)
  )


@dataclasses.dataclass(frozen=True)
class Parts:
  """The parts of an iteration on one replica.

  Attributes:
    stages: the stages of the training step.
  """

  stages: replica_stages.ReplicaStages

  def think(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    prompts: experience.Prompts,
    key: types.Key,
  ) -> tuple[experience.Prompts, rollout.Thought]:
    """Returns this replica's prompts and the thoughts about them."""
    local_prompts = self.stages.place.local_prompts(prompts)
    text_keys, _ = self._reason_keys(key)
    actor = self.stages.sampling_actor(state, frozen)
    return local_prompts, rollout.think(actor, local_prompts, text_keys)

  def draft_flow(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    key: types.Key,
    thought: rollout.Thought,
  ) -> flow_matching.Trajectory:
    """Returns the latents of drafts."""
    _, flow_keys = self._reason_keys(key)
    actor = self.stages.sampling_actor(state, frozen)
    return rollout.draft_flow(actor, thought, flow_keys)

  def decode_images(
    self, frozen: train_state.Frozen, latent: types.Latent
  ) -> tuple[types.Images, types.Flags]:
    """Returns the images of latents, and whether they are finite."""
    towers = self.stages.modules.towers
    return towers.decode(frozen.towers, latent)

  def score_drafts(
    self,
    prompts: experience.Prompts,
    thought: rollout.Thought,
    trajectory: flow_matching.Trajectory,
    images: tuple[types.Images, types.Flags],
  ) -> tuple[stage_outputs.Drafts, types.Score]:
    """Returns what the update of the reason stage reads."""
    reason = experience.Reason(thought.text, trajectory, *images)
    drafts = self.stages.drafts(prompts, reason)
    return drafts, self.stages.score_drafts(drafts)

  def draw_sources(
    self,
    prompts: experience.Prompts,
    key: types.Key,
    drafts: stage_outputs.Drafts,
    score: types.Score,
  ) -> tuple[pools.ScoredImages, experience.Prompts]:
    """Returns a source image for every group, and the prompts that these were drawn for."""
    pool = self.stages.pool(stage_outputs.scored_drafts(drafts, score))
    sources = self.stages.draw(pool, key, 0)
    source_prompts = jax.tree.map(lambda x: x[sources.prompt_index], prompts)
    return sources, source_prompts

  def look(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    sources: pools.ScoredImages,
  ) -> experience.Source:
    """Returns what the model sees of the source images."""
    actor = self.stages.sampling_actor(state, frozen)
    return rollout.look(actor, sources.images)

  def reflect(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    key: types.Key,
    prompts: experience.Prompts,
    source: experience.Source,
  ) -> experience.Text:
    """Returns reflections on the source images."""
    actor = self.stages.sampling_actor(state, frozen)
    keys = self._edit_keys("reflect", key, source)
    return rollout.reflect(actor, prompts, source, keys)

  def refine_context(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    source: experience.Source,
    text: experience.Text,
  ) -> rollout.Conditioning:
    """Returns the cached source images and instructions."""
    actor = self.stages.sampling_actor(state, frozen)
    parsed = self.stages.parse(text.ids, text.lengths, "reflect")
    instruction = replica_stages.instruction_of(parsed)
    samples_per_group = text.ids.shape[0] // source.images.shape[0]
    return rollout.condition(actor, source, instruction, samples_per_group)

  def refine_flow(
    self,
    state: train_state.TrainState,
    frozen: train_state.Frozen,
    key: types.Key,
    conditioning: rollout.Conditioning,
    source: experience.Source,
  ) -> flow_matching.Trajectory:
    """Returns the latents of edits."""
    actor = self.stages.sampling_actor(state, frozen)
    keys = self._edit_keys("refine", key, source)
    return rollout.edit_flow(actor, conditioning, keys)

  def score_edits(
    self,
    sources: pools.ScoredImages,
    prompts: experience.Prompts,
    source: experience.Source,
    text: experience.Text,
    trajectory: flow_matching.Trajectory,
    images: tuple[types.Images, types.Flags],
  ) -> tuple[stage_outputs.Edits, types.Score]:
    """Returns what the update of the edit stages reads."""
    parsed = self.stages.parse(text.ids, text.lengths, "reflect")
    refined = experience.Refine(trajectory, *images)
    edits = self.stages.edits(sources, prompts, source, text, parsed, refined)
    return edits, self.stages.score_edits(edits)

  def _reason_keys(
    self, key: types.Key
  ) -> tuple[random_keys.Keys, random_keys.Keys]:
    return random_keys.split_keys(self.stages.place.keys(key, "reason"))

  def _edit_keys(
    self, stage: str, key: types.Key, source: experience.Source
  ) -> random_keys.Keys:
    return self.stages.edit_keys(key, stage, 0, source.images.shape[0])


# The parts that are measured, in the order in which they run.
NAMES = (
  "think",
  "draft_flow",
  "image_decode",
  "reason_update",
  "look",
  "reflect",
  "refine_context",
  "refine_flow",
  "edit_update",
)
# How often an iteration runs a part, where it is more than once.
TIMES = {"image_decode": 2}


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Compiles parts, times those that are asked for, and returns what they compute.

  Attributes:
    mesh: what parts are mapped over.
    timer: how they are timed.
    names: parts to time; the others run once.
    report: called with every measurement.
  """

  mesh: jax.sharding.Mesh
  timer: measure.Timer
  names: Sequence[str]
  report: Callable[[measure.Measurement], None]

  def run(
    self,
    name: str,
    part: Callable,
    whole: tuple = (),
    rows: tuple = (),
    returns_rows: bool = True,
  ) -> Any:
    """Runs a part, times it if that is asked for, and returns its result.

    Args:
      name: of the part.
      part: function of `whole` and `rows` on one replica.
      whole: arguments that every replica has whole.
      rows: arguments that replicas have rows of.
      returns_rows: whether replicas have rows of the result, and not all of it.
    """
    if name not in self.names:
      return self.prepare(part, whole, rows, returns_rows)
    arguments = (*whole, *rows)
    start = time.monotonic()
    compiled = self._compile(part, whole, rows, returns_rows)
    compile_seconds = time.monotonic() - start
    measurement, result = self.timer.time(
      name,
      lambda: compiled(*arguments),
      compile_seconds,
      measure.compiled_bytes(compiled),
    )
    self.report(measurement)
    return result

  def prepare(
    self,
    part: Callable,
    whole: tuple = (),
    rows: tuple = (),
    returns_rows: bool = True,
  ) -> Any:
    """Runs a part once and returns its result; for the arguments see `run`."""
    compiled = self._compile(part, whole, rows, returns_rows)
    return jax.block_until_ready(compiled(*whole, *rows))

  def _compile(
    self, part: Callable, whole: tuple, rows: tuple, returns_rows: bool
  ) -> jax.stages.Compiled:
    """Returns a part as a compiled program, mapped over replicas as the training step is."""
    in_specs = [_WHOLE] * len(whole) + [row_specs(tree) for tree in rows]
    out_specs = _WHOLE
    if returns_rows:
      # Any specs do to learn the structure of the result.
      as_whole = mapped.map_over_replicas(
        part, self.mesh, tuple(in_specs), _WHOLE
      )
      out_specs = row_specs(jax.eval_shape(as_whole, *whole, *rows))
    program = mapped.map_over_replicas(
      part, self.mesh, tuple(in_specs), out_specs
    )
    lowered = jax.jit(program).lower(*whole, *rows)
    return lowered.compile(compiler_options=sessions.compiler_options())


def measure_parts(
  session: sessions.Session, state: train_state.TrainState, recorder: Recorder
) -> None:
  """Runs an iteration part by part and reports the parts that the recorder names.

  Args:
    session: constants of the run.
    state: state before the iteration; stays as it is.
    recorder: runs the parts.
  """
  parts = Parts(session.stages)
  stages = session.stages
  frozen = session.frozen
  prompts = session.prompts
  key = random_keys.iteration_key(session.config.seed, 0)
  # What the sampling actor of every part would do again: in an iteration it happens once a rollout.
  sampling_state = _for_rollouts(session, state)
  policy = (sampling_state, frozen)
  run = recorder.run
  prepare = recorder.prepare

  # The reason stage.
  local_prompts, thought = run("think", parts.think, (*policy, prompts, key))
  draft = run("draft_flow", parts.draft_flow, (*policy, key), (thought,))
  images = run("image_decode", parts.decode_images, (frozen,), (draft.latent,))
  drafts, score = prepare(
    parts.score_drafts, (), (local_prompts, thought, draft, images)
  )
  update = (state, frozen)
  run(
    "reason_update",
    stages.learn_to_reason,
    update,
    (drafts, score),
    returns_rows=False,
  )

  # The edit stages, by the policy that drew the drafts: its values do not matter.
  sources, source_prompts = prepare(
    parts.draw_sources, (prompts, key), (drafts, score)
  )
  source = run("look", parts.look, policy, (sources,))
  text = run("reflect", parts.reflect, (*policy, key), (source_prompts, source))
  conditioning = run(
    "refine_context", parts.refine_context, policy, (source, text)
  )
  edit = run(
    "refine_flow", parts.refine_flow, (*policy, key), (conditioning, source)
  )
  edited = prepare(parts.decode_images, (frozen,), (edit.latent,))
  edits, edit_score = prepare(
    parts.score_edits,
    (),
    (sources, source_prompts, source, text, edit, edited),
  )
  run(
    "edit_update",
    stages.learn_to_edit,
    update,
    (edits, edit_score),
    returns_rows=False,
  )


def _for_rollouts(
  session: sessions.Session, state: train_state.TrainState
) -> train_state.TrainState:
  """Returns a state whose policy is in the compute dtype and placed as rollouts have it."""
  bagel = session.stages.modules.bagel
  dtype = jax.tree.leaves(state.policy)[0].dtype
  if dtype == bagel.dtype and session.mesh.size == 1:
    return state  # another copy would only take memory

  def place(state, frozen):
    return actors.sampler(
      session.stages.modules,
      frozen.whole(state.policy),
      frozen.towers,
      session.stages.rollout,
    ).policy

  placed = jax.jit(place)(state, session.frozen)
  return dataclasses.replace(state, policy=placed)
