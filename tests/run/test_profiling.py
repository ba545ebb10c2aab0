"""Tests of profiling.py, and of the names that the stages give their operations."""

import re

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.rl import mapped
from r3jax.rl import pools
from r3jax.run import profiling
from tests import tiny


def _run(folder, first: int, last: int, start: int, steps: int) -> list[int]:
  """Runs iterations first .. last; returns the numbers of those in the trace."""
  profiler = profiling.Profiler(epath.Path(folder), start, steps)
  double = jax.jit(lambda x: 2 * x)
  for number in range(first, last + 1):
    with profiler.iteration(number):
      double(jnp.ones(3)).block_until_ready()
  profiler.close()
  files = list(folder.glob("plugins/profile/*/*.xplane.pb"))
  if not files:
    return []
  (file,) = files
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
    if event.name == "iteration"
  ]
  return sorted(dict(event.stats)["step_num"] for event in events)


class TestProfiler:
  @pytest.mark.parametrize(
    "first, last, start, steps, traced",
    [
      (1, 4, 2, 2, [2, 3]),
      (3, 5, 2, 3, [3, 4]),  # resumed in the midst
      (1, 3, 3, 5, [3]),  # ended before it was over
      (1, 3, 0, 0, []),
      (5, 6, 2, 2, []),  # resumed behind them
    ],
  )
  def test_iterations_of_the_window_are_traced(
    self, tmp_path, first, last, start, steps, traced
  ):
    assert _run(tmp_path, first, last, start, steps) == traced

  def test_other_processes_trace_nothing(self, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling.jax, "process_index", lambda: 1)
    assert _run(tmp_path, 1, 2, 1, 1) == []


def _scopes(lowered) -> set[str]:
  """Returns the names above the operations of a lowered program, innermost last."""
  names = re.findall(r'loc\("([^"]*)"', lowered.as_text(debug_info=True))
  return {"/".join(name.split("/")[:-1]) for name in names}


class TestNames:
  def test_stages_name_their_operations(self, tiny_model):
    """Looks at the reason half of the step, and at the rollouts of the other half."""
    bench = tiny.make_bench(tiny_model, changes={"reflect_rounds": 0})
    num_groups = bench.stages.settings.num_groups
    zeros = np.zeros(num_groups, np.float32)
    sources = pools.ScoredImages(
      np.zeros((num_groups, 48, 48, 3), np.uint8),
      zeros,
      zeros > 0,
      {"strict": zeros},
      zeros.astype(np.int32),
    )
    with jax.set_mesh(bench.mesh):
      state, frozen, batch = bench.state(), bench.frozen, bench.batch(0)
      reason = jax.jit(mapped.fused(bench.stages, bench.mesh)).lower(
        state, frozen, batch, np.uint32(0)
      )
      edit = mapped.split(bench.stages, bench.mesh).edit.lower(
        state, frozen, batch, sources, jax.random.key(0), np.int32(0)
      )
    scopes = _scopes(reason) | _scopes(edit)
    for path in (
      "reason/decode",
      "reason/flow",
      "reason/towers",
      "score",
      "update",
      "reflect/decode",
      "refine/flow",
      "refine/towers",
    ):
      assert any(f"/{path}/" in f"{scope}/" for scope in scopes), (
        path,
        sorted(scopes)[:50],
      )
