"""Puts the tests on 8 virtual CPU devices, with full float32 products and quick compiles."""

import os

# Before JAX starts. A session on an accelerator sets JAX_PLATFORMS itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
  _flags += " --xla_force_host_platform_device_count=8"
if (
  os.environ["JAX_PLATFORMS"] == "cpu"
  and "xla_backend_optimization_level" not in _flags
):
  # The tests compile much and compute little: this halves their time.
  _flags += (
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  )
if (
  os.environ["JAX_PLATFORMS"] == "cpu"
  and "collective_call_terminate" not in _flags
):
  # XLA aborts the process where one device waits 40 s for another: eight of them on two busy
  # cores may.
  _flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = _flags.strip()

import pytest  # noqa: E402


@pytest.fixture
def store(monkeypatch):
  """An empty object store in memory, which epath finds at gs://."""
  from tests import stores

  made = stores.MemoryStore()
  stores.serve(made, monkeypatch)
  return made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
  """The folder of the tiny model, see `tiny.write_model`."""
  from tests import tiny  # imports JAX

  folder = tmp_path_factory.mktemp("tiny") / "model"
  tiny.write_model(folder)
  return folder


@pytest.fixture(scope="session")
def not_square_model(tmp_path_factory):
  """The folder of a tiny model for images of 48 x 80 pixels, see `tiny.NOT_SQUARE`."""
  from tests import tiny  # imports JAX

  folder = tmp_path_factory.mktemp("not_square") / "model"
  tiny.write_model(folder, tiny.sizes_for(48, 80))
  return folder
