"""Tests of parallel/multihost.py, and of the main job in two processes."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from r3jax.io import jsonl
from r3jax.parallel import multihost
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 3
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def start(
    model, workdir, process: int = 0, processes: int = 1, port: int = 0, devices: int = 8, **changes
) -> subprocess.Popen:
  """Starts one process of the main job in float64; together the processes have `devices`."""
  settings = tiny.settings(model) | MESH | {"total_steps": STEPS, "model.dtype": "float64"} | changes
  command = [sys.executable, "launch/tpu.py", "--config=configs/r3_geneval.py:shapes", f"--workdir={workdir}"]
  command += [f"--config.{key}={value}" for key, value in settings.items()]
  if processes > 1:
    command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={process}"]
  flags = re.sub(r"(force_host_platform_device_count)=\d+", rf"\1={devices // processes}", os.environ["XLA_FLAGS"])
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
  with (workdir.parent / f"{workdir.name}.{process}.log").open("a") as log:
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def start_two(model, workdir, second=None, **changes) -> list[subprocess.Popen]:
  """Starts two processes; `second` changes the config of the second one only."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  return [start(model, workdir, i, 2, port, **changes | (second or {} if i else {})) for i in range(2)]


def logs(workdir) -> str:
  return "\n".join(path.read_text()[-3000:] for path in sorted(workdir.parent.glob(f"{workdir.name}.*.log")))


def metrics(workdir) -> list[dict]:
  rows = jsonl.read(workdir / "metrics.jsonl")
  return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def state(workdir) -> list[np.ndarray]:
  """Returns the last checkpoint's parameters and moments, read by plain Orbax."""
  path = workdir / "checkpoints" / str(STEPS) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


class TestFetch:

  def test_returns_whole_arrays(self):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.arange(16), jax.NamedSharding(mesh, jax.P("data")))
    found = multihost.fetch({"x": x})["x"]
    assert isinstance(found, np.ndarray) and found.tolist() == list(range(16))


class TestRaiseTogether:

  def test_alone_it_raises_its_own_error(self):
    multihost.raise_together(None)
    with pytest.raises(KeyError, match="mine"):
      multihost.raise_together(KeyError("mine"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestTwoProcesses:

  @pytest.fixture(scope="class")
  @classmethod
  def alone(cls, tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "workdir"
    assert start(tiny_model, workdir).wait(timeout=1200) == 0, logs(workdir)
    return workdir

  @pytest.fixture(scope="class")
  @classmethod
  def together(cls, tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together") / "workdir"
    assert [process.wait(timeout=1200) for process in start_two(tiny_model, workdir)] == [0, 0], logs(workdir)
    return workdir

  def test_numbers_are_those_of_one_process(self, alone, together):
    assert len(metrics(alone)) == STEPS
    for one, two in zip(metrics(alone), metrics(together), strict=True):
      assert one.keys() == two.keys()
      for name, value in one.items():
        assert two[name] == (value if value is None else pytest.approx(value, abs=1e-8, rel=1e-8)), name

  def test_parameters_are_those_of_one_process(self, alone, together):
    for one, two in zip(state(alone), state(together), strict=True):
      np.testing.assert_allclose(two, one, atol=1e-8, rtol=0)

  def test_files_are_written_once(self, alone, together):
    names = lambda workdir: sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*.json*"))
    assert [name for name in names(together) if "checkpoints" not in name] == [
        name for name in names(alone) if "checkpoints" not in name]
    for name in ("evaluation/step_000000.json", "evaluation/step_000003.json", "report/samples.jsonl"):
      assert (together / name).read_text() == (alone / name).read_text()

  @pytest.fixture(scope="class")
  @classmethod
  def longer(cls, tiny_model, alone):
    """The numbers of the iteration after the last, by the process that made those before."""
    return cls._one_more(tiny_model, alone)

  @staticmethod
  def _one_more(model, workdir, **where) -> dict:
    """Goes on in a copy of a workdir for one iteration; returns its metrics."""
    copy = workdir.parent / "_".join(["longer", *map(str, where.values())])
    shutil.copytree(workdir, copy)
    assert start(model, copy, **{"total_steps": STEPS + 1, "eval.batch_size": 8} | where).wait(timeout=1200) == 0, logs(copy)
    rows = metrics(copy)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    return rows[-1]

  @pytest.mark.parametrize("devices, data", [(8, 8), (1, 1)])
  def test_checkpoint_of_two_goes_on_in_one_on_another_mesh(self, tiny_model, together, longer, devices, data):
    where = {"devices": devices, "mesh.data": data, "mesh.fsdp": 1, "mesh.tensor": 1}
    for name, value in self._one_more(tiny_model, together, **where).items():
      assert longer[name] == (value if value is None else pytest.approx(value, abs=1e-8, rel=1e-8)), name

  def test_one_that_cannot_start_ends_both(self, tiny_model, tmp_path):
    processes = start_two(tiny_model, tmp_path / "workdir", {"step.mode": "pmap"})
    assert [process.wait(timeout=300) for process in processes] == [1, 1]
    assert "step.mode must be 'fused' or 'split'" in (tmp_path / "workdir.1.log").read_text()
    assert "processes [1] failed, see their logs" in (tmp_path / "workdir.0.log").read_text()

  def test_killed_one_ends_the_other(self, tiny_model, tmp_path):
    workdir = tmp_path / "workdir"
    one, two = start_two(tiny_model, workdir, total_steps=100_000)
    while not (workdir / "metrics.jsonl").exists():
      assert one.poll() is None and two.poll() is None, logs(workdir)
      time.sleep(0.1)
    two.send_signal(signal.SIGKILL)
    start_time = time.monotonic()
    assert one.wait(timeout=300) != 0
    print("ended after", round(time.monotonic() - start_time, 1), "s")
