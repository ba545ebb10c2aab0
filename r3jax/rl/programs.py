"""The iteration as programs: one fused, mapped program, or the stages as separate ones."""

import functools
import time
import types as types_lib

import jax
import numpy as np

from r3jax.rl import iteration as iteration_lib
from r3jax.rl import placement
from r3jax.rl import train_state


def fused(iteration: iteration_lib.Iteration, mesh: jax.sharding.Mesh):
  """Returns the iteration as one mapped function: (state, frozen, prompts, seed) -> see `run`.

  It is mapped by hand over `data`; the other mesh axes stay with the compiler, which follows the
  shardings of the arguments. Samples come back sharded over `data`.
  """
  body = functools.partial(iteration_lib.run, iteration)
  spec = jax.sharding.PartitionSpec
  return jax.shard_map(
    body,
    mesh=mesh,
    in_specs=spec(),
    out_specs=(spec(), spec(), spec(placement.AXIS)),
    axis_names={placement.AXIS},
    check_vma=False,
  )


_ONE, _MANY = (
  jax.sharding.PartitionSpec(),
  jax.sharding.PartitionSpec(placement.AXIS),
)
_SPLIT_SPECS = {
  "draft": ((_ONE, _ONE, _ONE, _ONE), _MANY),
  "score_drafts": ((_MANY,), _MANY),
  "learn_to_reason": ((_ONE, _ONE, _MANY, _MANY), (_ONE, _ONE)),
  "pool": ((_MANY, _MANY), _ONE),
  "edit": ((_ONE, _ONE, _ONE, _ONE, _ONE, _ONE), _MANY),
  "score_edits": ((_MANY,), _MANY),
  "learn_to_edit": ((_ONE, _ONE, _MANY, _MANY), (_ONE, _ONE)),
  "pool_again": ((_MANY, _MANY), _ONE),
}


def split(
  iteration: iteration_lib.Iteration,
  mesh: jax.sharding.Mesh,
  shardings: train_state.TrainState | None = None,
) -> types_lib.SimpleNamespace:
  """Returns the same stages as separate compiled programs; takes the place of `iteration` in `run`.

  Args:
    iteration: the stages.
    mesh: they are mapped over its `data` axis.
    shardings: of the state that an update returns; the compiler's choice if None.
  """

  def compiled(name: str, in_specs, out_specs):
    mapped = jax.shard_map(
      getattr(iteration, name),
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names={placement.AXIS},
      check_vma=False,
    )
    updates = name in ("learn_to_reason", "learn_to_edit")
    return jax.jit(mapped, out_shardings=(shardings, None) if updates else None)

  stages = {
    name: compiled(name, *specs) for name, specs in _SPLIT_SPECS.items()
  }
  return types_lib.SimpleNamespace(settings=iteration.settings, **stages)


def run_timed(stages: types_lib.SimpleNamespace, *arguments):
  """Does what `run` does with the stages of `split`, and waits for each of them to time it.

  Returns:
    What `run` returns; metrics also have "seconds/stage/NAME" of every stage that ran, over all rounds.
  """
  seconds: dict[str, float] = {}

  def timed(name: str):
    def stage(*inputs):
      start = time.monotonic()
      found = jax.block_until_ready(getattr(stages, name)(*inputs))
      seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
      return found

    return stage

  watched = types_lib.SimpleNamespace(
    settings=stages.settings, **{name: timed(name) for name in _SPLIT_SPECS}
  )
  state, metrics, samples = iteration_lib.run(watched, *arguments)
  return (
    state,
    metrics
    | {
      f"seconds/stage/{name}": np.float32(spent)
      for name, spent in seconds.items()
    },
    samples,
  )
