"""Times whole iterations: as one program, and as one program per stage."""

import dataclasses
import time

import jax
import numpy as np

from r3jax import types
from r3jax.benchmark import measure
from r3jax.rl import mapped
from r3jax.run import sessions


def measure_fused(
  session: sessions.Session, policy: types.Params, timer: measure.Timer
) -> measure.Measurement:
  """Times iterations of the fused step as a run makes them, each on the state of the one before."""
  state = session.init(policy)
  start = time.monotonic()
  compiled = session.fused_program(state)
  compile_seconds = time.monotonic() - start
  seed = np.uint32(session.config.seed)

  def run():
    nonlocal state
    # The state is donated, and takes the place of the one before.
    state, metrics, samples = compiled(
      state, session.frozen, session.prompts, seed
    )
    return metrics, samples

  measurement, _ = timer.time(
    "fused", run, compile_seconds, measure.compiled_bytes(compiled)
  )
  return measurement


def measure_split(
  session: sessions.Session,
  policy: types.Params,
  timer: measure.Timer,
) -> measure.Measurement:
  """Times iterations in split mode, in which a stage compiles when it first runs."""
  state = session.init(policy)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  programs = mapped.split(session.stages, session.mesh, shardings)
  seed = np.uint32(session.config.seed)

  def run():
    nonlocal state
    state, metrics, _ = mapped.run_timed(
      programs, state, session.frozen, session.prompts, seed
    )
    return metrics

  start = time.monotonic()
  run()
  first_seconds = time.monotonic() - start
  measurement, _ = timer.time("split", run, 0.0, {})
  compile_seconds = max(first_seconds - measurement.median_seconds, 0.0)
  return dataclasses.replace(measurement, compile_seconds=compile_seconds)
