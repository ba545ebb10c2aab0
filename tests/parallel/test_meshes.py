"""Tests of the mesh and of the devices that it is made of."""

import os

import jax
import pytest

from r3jax.parallel import meshes


class TestUseAllCores:
  @pytest.fixture
  def chosen(self, monkeypatch):
    """Returns the numbers that JAX is told, with nothing set by the user."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    told = []
    monkeypatch.setattr(
      jax.config, "update", lambda name, value: told.append((name, value))
    )
    return told

  @pytest.mark.parametrize(
    "cores, rows, devices",
    [(1, 8, 1), (2, 8, 2), (6, 8, 4), (16, 8, 8), (3, 9, 3), (4, 7, 1)],
  )
  def test_takes_the_most_cores_that_split_the_rows(
    self, chosen, monkeypatch, cores, rows, devices
  ):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    meshes.use_all_cores(rows)
    assert chosen == [("jax_num_cpu_devices", devices)]

  @pytest.mark.parametrize(
    "name, value",
    [
      ("JAX_NUM_CPU_DEVICES", "3"),
      ("XLA_FLAGS", "--xla_force_host_platform_device_count=4"),
    ],
  )
  def test_leaves_the_users_number_alone(
    self, chosen, monkeypatch, name, value
  ):
    monkeypatch.setenv(name, value)
    meshes.use_all_cores(8)
    assert not chosen


class TestMakeMesh:
  def test_minus_one_takes_what_is_left(self):
    assert dict(meshes.make_mesh(-1, 2, 2).shape) == {
      "data": 2,
      "fsdp": 2,
      "tensor": 2,
    }

  def test_wrong_product_is_refused(self):
    with pytest.raises(
      ValueError, match=r"number of devices \(8\); got 3 \* 1 \* 1"
    ):
      meshes.make_mesh(3, 1, 1)
