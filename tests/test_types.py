"""Tests that the array types in signatures hold while the whole step is traced."""

import importlib
import inspect
import pkgutil
import typing

import beartype
import jax
import jaxtyping
import numpy as np
import pytest

import r3jax
from r3jax.rl import mapped
from tests import tiny

CHECKED = tuple(
  f"r3jax.{name}."
  for name in ("sequence", "model", "sampling", "agent", "rl", "rewards")
)


def _is_protocol(member) -> bool:
  return inspect.isclass(member) and getattr(member, "_is_protocol", False)


@pytest.fixture
def checked(monkeypatch) -> list[str]:
  """Checks module-level functions as they are called; returns the names of those that were."""
  called = []

  def watch(function, name):
    checking = jaxtyping.jaxtyped(function, typechecker=beartype.beartype)

    def recording(*args, **kwargs):
      called.append(name)
      return checking(*args, **kwargs)

    return recording

  names = [
    info.name
    for info in pkgutil.walk_packages(r3jax.__path__, "r3jax.")
    if info.name.startswith(CHECKED)
  ]
  modules = [importlib.import_module(name) for name in names]
  for module in modules:
    for _, kind in inspect.getmembers(module, _is_protocol):
      typing.runtime_checkable(kind)  # the checker asks isinstance
  for module in modules:
    for name, function in inspect.getmembers(module, inspect.isfunction):
      is_imported = function.__module__ != module.__name__
      if is_imported or inspect.isgeneratorfunction(function):
        continue
      checking = watch(function, f"{module.__name__}.{name}")
      monkeypatch.setattr(module, name, checking)
  return called


class TestSignatures:
  def test_hold_in_the_step(self, tiny_model, checked):
    bench = tiny.make_bench(tiny_model)
    with jax.set_mesh(bench.mesh):
      step = mapped.fused(bench.stages, bench.mesh)
      jax.eval_shape(
        step, bench.state(), bench.frozen, bench.batch(0), np.uint32(0)
      )
    assert {
      "r3jax.model.attention.attend",
      "r3jax.sampling.decoding.decode",
      "r3jax.sampling.flow_matching.sample",
      "r3jax.sampling.classifier_free.combine",
      "r3jax.rl.losses.k3",
      "r3jax.agent.rollout.refine",
      "r3jax.sequence.thoughts.parse_tokens",
    } <= set(checked)
    assert len(set(checked)) > 60

  def test_wrong_shape_is_reported(self, checked):
    from r3jax.sampling import classifier_free

    latent, other = (jax.numpy.zeros((2, n, 4)) for n in (3, 5))
    with pytest.raises(jaxtyping.TypeCheckError):
      classifier_free.combine(
        classifier_free.Guidance(1.0, 1.0, "global"), latent, other, None
      )
