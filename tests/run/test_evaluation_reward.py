"""Tests that evaluations are scored by a reward of their own where the config has one."""

import dataclasses

import numpy as np

from r3jax.rewards import combine
from r3jax.run import evaluation_setup
from tests import tiny


def test_evaluation_is_scored_by_its_own_reward(tiny_model):
  bench = tiny.make_bench(tiny_model)
  session = bench.session
  meshes = []

  def on(mesh):
    meshes.append(mesh)
    return tiny.brightness

  def encode(prompts):
    return np.arange(len(prompts)) + 7

  own = combine.GraphReward(encode, on, ("strict",))
  experiment = dataclasses.replace(
    session.experiment, own_evaluation_reward=own
  )
  evaluation = evaluation_setup.build(session.config, experiment, bench.mesh)
  assert meshes == [bench.mesh]
  assert evaluation.prompts.target[0] == 7
  trained = experiment.encode(experiment.heldout).target
  assert not isinstance(trained, np.ndarray)  # the verifier's, a pytree
  assert session.experiment.evaluation_reward is session.experiment.reward
