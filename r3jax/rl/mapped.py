"""The iteration mapped over replicas: as one fused program, or as one program per stage."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from r3jax import types
from r3jax.agent import experience
from r3jax.rl import diagnostics
from r3jax.rl import iteration
from r3jax.rl import iteration_settings
from r3jax.rl import placement
from r3jax.rl import pools
from r3jax.rl import replica_stages
from r3jax.rl import stage_outputs
from r3jax.rl import train_state

# The same on every replica.
_WHOLE = jax.sharding.PartitionSpec()
# Rows of samples or of groups, each replica has its own.
_ROWS = jax.sharding.PartitionSpec(placement.AXIS)


def map_over_replicas(
  function: Callable, mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any
) -> Callable:
  """Maps a function by hand over `data`; the other mesh axes stay with the compiler."""
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={placement.AXIS},
    check_vma=False,
  )


def fused(
  stages: replica_stages.ReplicaStages, mesh: jax.sharding.Mesh
) -> Callable:
  """Returns the whole iteration as one mapped function.

  It takes (state, frozen, prompts, seed) and returns what `iteration.run` does. Over mesh axes
  other than `data` it is partitioned as the shardings of its arguments say. Samples are sharded
  over `data`.
  """
  return map_over_replicas(
    functools.partial(iteration.run, stages),
    mesh,
    in_specs=_WHOLE,
    out_specs=(_WHOLE, _WHOLE, _ROWS),
  )


_Learned = tuple[train_state.TrainState, diagnostics.Metrics]
_LearnedFromChain = tuple[
  train_state.TrainState, Sequence[diagnostics.Metrics], diagnostics.Metrics
]


@dataclasses.dataclass(frozen=True)
class StagePrograms:
  """The stages of an iteration as separate programs; `iteration.Stages` has their arguments."""

  settings: iteration_settings.IterationSettings
  draft: Callable[..., stage_outputs.Drafts]
  score_drafts: Callable[..., types.Score]
  learn_to_reason: Callable[..., _Learned]
  pool: Callable[..., pools.ScoredImages]
  draw: Callable[..., pools.ScoredImages]
  edit: Callable[..., stage_outputs.Edits]
  score_edits: Callable[..., types.Score]
  learn_to_edit: Callable[..., _Learned]
  learn_from_chain: Callable[..., _LearnedFromChain]

  def names(self) -> tuple[str, ...]:
    """Returns the names of all stages; an iteration runs those of its chain."""
    fields = dataclasses.fields(self)
    return tuple(field.name for field in fields if field.name != "settings")


def split(
  stages: replica_stages.ReplicaStages,
  mesh: jax.sharding.Mesh,
  shardings: train_state.TrainState | None = None,
) -> StagePrograms:
  """Returns the same stages as separate compiled programs.

  Args:
    stages: the stages on one replica.
    mesh: mesh with a `data` axis that the stages are mapped over.
    shardings: shardings of the state that an update returns; the compiler's
      choice if None.
  """

  def compiled(
    stage: Callable, in_specs: Any, out_specs: Any, out_shardings: Any = None
  ) -> Callable:
    function = map_over_replicas(stage, mesh, in_specs, out_specs)
    return jax.jit(function, out_shardings=out_shardings)

  # (state, frozen, prompts, sources, key, turn) -> edits
  edit_in = (_WHOLE, _WHOLE, _WHOLE, _ROWS, _WHOLE, _WHOLE)
  # (state, frozen, samples, scores) -> (state, metrics)
  learn_in = (_WHOLE, _WHOLE, _ROWS, _ROWS)
  learn_out = (_WHOLE, _WHOLE)
  # A state that comes back with other shardings than it had would make every stage compile again.
  learn_shardings = (shardings, None)
  return StagePrograms(
    settings=stages.settings,
    draft=compiled(stages.draft, (_WHOLE,) * 4, _ROWS),
    score_drafts=compiled(stages.score_drafts, (_ROWS,), _ROWS),
    learn_to_reason=compiled(
      stages.learn_to_reason, learn_in, learn_out, learn_shardings
    ),
    pool=compiled(stages.pool, (_ROWS,), _WHOLE),
    draw=compiled(stages.draw, (_WHOLE,) * 3, _ROWS),
    edit=compiled(stages.edit, edit_in, _ROWS),
    score_edits=compiled(stages.score_edits, (_ROWS,), _ROWS),
    learn_to_edit=compiled(
      stages.learn_to_edit, learn_in, learn_out, learn_shardings
    ),
    learn_from_chain=compiled(
      stages.learn_from_chain,
      (_WHOLE, _WHOLE, _ROWS, _ROWS, _ROWS),
      (_WHOLE, _WHOLE, _WHOLE),
      (shardings, None, None),
    ),
  )


def timed(programs: StagePrograms, seconds: dict[str, float]) -> StagePrograms:
  """Returns programs that wait for their results and add their time to `seconds`, by stage."""

  def watch(name: str) -> Callable:
    program = getattr(programs, name)

    def stage(*arguments):
      start = time.monotonic()
      # JAX returns before a program has run.
      result = jax.block_until_ready(program(*arguments))
      elapsed = time.monotonic() - start
      seconds[name] = seconds.get(name, 0.0) + elapsed
      return result

    return stage

  return dataclasses.replace(
    programs, **{name: watch(name) for name in programs.names()}
  )


def run_timed(
  programs: StagePrograms,
  state: train_state.TrainState,
  frozen: train_state.Frozen,
  prompts: experience.Prompts,
  seed: jax.typing.ArrayLike,
) -> tuple[train_state.TrainState, dict, stage_outputs.Samples]:
  """Runs an iteration with separate programs and times them; arguments as `iteration.run`.

  Returns:
    What `iteration.run` returns; metrics also hold "seconds/stage/NAME" of every stage that ran,
    summed over rounds.
  """
  seconds: dict[str, float] = {}
  state, metrics, samples = iteration.run(
    timed(programs, seconds), state, frozen, prompts, seed
  )
  timings = {
    f"seconds/stage/{name}": np.float32(value)
    for name, value in seconds.items()
  }
  return state, metrics | timings, samples
