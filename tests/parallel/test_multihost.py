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
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
import numpy as np
import orbax.checkpoint as ocp
import pytest

from r3jax.evaluation import sample_log
from r3jax.files import jsonl
from r3jax.parallel import multihost
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 3
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def start(
  model,
  workdir,
  process: int = 0,
  processes: int = 1,
  port: int = 0,
  devices: int = 8,
  **changes,
) -> subprocess.Popen:
  """Starts one process of the main job in float64; together the processes have `devices`."""
  settings = (
    tiny.settings(model)
    | MESH
    | {"total_steps": STEPS, "model.dtype": "float64"}
    | changes
  )
  command = [
    sys.executable,
    "launch/tpu.py",
    "--config=configs/r3_geneval.py:shapes",
    f"--workdir={workdir}",
  ]
  command += [f"--config.{key}={value}" for key, value in settings.items()]
  if processes > 1:
    command += [
      f"--coordinator=127.0.0.1:{port}",
      f"--num_processes={processes}",
      f"--process_id={process}",
    ]
  flags = re.sub(
    r"(force_host_platform_device_count)=\d+",
    rf"\1={devices // processes}",
    os.environ["XLA_FLAGS"],
  )
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": flags,
    "JAX_ENABLE_X64": "1",
  }
  with (workdir.parent / f"{workdir.name}.{process}.log").open("a") as log:
    return subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=log, stderr=log
    )


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def start_two(model, workdir, second=None, **changes) -> list[subprocess.Popen]:
  """Starts two processes; `second` changes the config of the second one only."""
  port = free_port()
  return [
    start(model, workdir, i, 2, port, **changes | (second or {} if i else {}))
    for i in range(2)
  ]


def logs(workdir) -> str:
  return "\n".join(
    path.read_text()[-3000:]
    for path in sorted(workdir.parent.glob(f"{workdir.name}.*.log"))
  )


def samples(folder) -> list[dict]:
  """Returns the samples of a page without the times."""
  return [
    sample | {"turns": [{**turn, "seconds": None} for turn in sample["turns"]]}
    for sample in [line.to_json() for line in sample_log.read(folder)]
  ]


def metrics(workdir) -> list[dict]:
  rows = jsonl.read(workdir / "metrics.jsonl")
  return [
    {
      name: value
      for name, value in row.items()
      if not name.startswith(("seconds/", "perf/"))
    }
    for row in rows
  ]


def state(workdir) -> list[np.ndarray]:
  """Returns the last checkpoint's parameters and moments, read by plain Orbax."""
  path = workdir / "checkpoints" / str(STEPS) / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    restored = checkpointer.restore(
      path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
    )
  return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


class TestFetch:
  def test_returns_whole_arrays(self):
    mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    x = jax.device_put(np.arange(16), jax.NamedSharding(mesh, jax.P("data")))
    found = multihost.fetch({"x": x})["x"]
    assert isinstance(found, np.ndarray) and found.tolist() == list(range(16))

  def test_leaves_numbers_of_the_host_to_every_process(self, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert multihost.fetch({"seconds": np.float32(3), "none": None}) == {
      "seconds": 3.0,
      "none": None,
    }


GKE = {"TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc", "TPU_WORKER_ID": "1"}
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[03-04]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
METADATA = {
  "agent-worker-number": "3",
  "worker-network-endpoints": ",".join(f"w:{i}:10.0.0.{i}" for i in range(4)),
  "tpu-env": "",
}


class TestInitialize:
  @pytest.fixture
  def joined(self, monkeypatch):
    """The (coordinator, processes, process) that JAX detects and would connect."""
    calls = []
    for name in [
      name
      for name in os.environ
      if name.startswith(
        ("TPU_", "MEGASCALE_", "SLURM_", "OMPI_", "KUBERNETES_")
      )
    ]:
      monkeypatch.delenv(name)

    def connect(*given, heartbeat_timeout_seconds):
      assert heartbeat_timeout_seconds == multihost.HEARTBEAT_SECONDS
      given = (*given, None, None, None)[:3]
      found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        *given, None, None, 1
      )[:3]
      if found[0] is None:
        # as JAX's own
        raise ValueError("coordinator_address should be defined.")
      calls.append(found)

    monkeypatch.setattr(multihost.jax.distributed, "initialize", connect)
    monkeypatch.setattr(
      cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1"
    )
    monkeypatch.setattr(
      cloud_tpu_cluster, "get_metadata", lambda key: ("", 404)
    )
    return calls

  @pytest.fixture
  def tpu(self, monkeypatch):
    """A host with TPUs, as far as JAX can tell."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)

  def test_host_without_accelerators_is_alone(self, joined):
    multihost.initialize("", 1, 0)
    assert joined == []

  def test_coordinator_that_is_given_is_taken(self, joined):
    multihost.initialize("host:1", 4, 2)
    assert joined == [("host:1", 4, 2)]

  def test_hosts_of_a_cloud_tpu_slice_find_each_other(
    self, joined, tpu, monkeypatch
  ):
    monkeypatch.setattr(
      cloud_tpu_cluster, "get_metadata", lambda key: (METADATA[key], 200)
    )
    multihost.initialize("", 1, 0)
    assert joined == [("10.0.0.0:8482", 4, 3)]

  def test_pods_of_a_slice_find_each_other(self, joined, tpu, monkeypatch):
    for name, value in GKE.items():
      monkeypatch.setenv(name, value)
    multihost.initialize("", 1, 0)
    assert joined == [("tpu-0.svc:8482", 2, 1)]

  def test_pods_of_several_slices_find_each_other(
    self, joined, tpu, monkeypatch
  ):
    slices = {
      "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.svc:8080",
      "MEGASCALE_NUM_SLICES": "2",
      "MEGASCALE_SLICE_ID": "1",
    }
    for name, value in (GKE | slices).items():
      monkeypatch.setenv(name, value)
    multihost.initialize("", 1, 0)
    assert joined == [("job-0-0.svc:8482", 4, 3)]

  def test_tasks_of_slurm_find_each_other(self, joined, monkeypatch):
    for name, value in SLURM.items():
      monkeypatch.setenv(name, value)
    multihost.initialize("", 1, 0)
    assert joined == [(f"node03:{7 + 65535 - 4096 + 1}", 2, 1)]

  def test_batch_script_of_slurm_outside_of_srun_is_alone(
    self, joined, monkeypatch
  ):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    multihost.initialize("", 1, 0)
    assert joined == []

  @pytest.mark.parametrize(
    "name, host",
    [("TPU_PROCESS_ADDRESSES", "local"), ("TPU_WORKER_HOSTNAMES", "localhost")],
  )
  def test_only_host_of_a_tpu_is_alone(
    self, joined, tpu, monkeypatch, name, host
  ):
    monkeypatch.setenv(name, host)
    multihost.initialize("", 1, 0)
    assert joined == []

  def test_other_error_is_not_hidden(self, monkeypatch):
    def connect(**_):
      raise ValueError("process_id and num_processes must be nonnegative")

    monkeypatch.setattr(multihost.jax.distributed, "initialize", connect)
    with pytest.raises(ValueError, match="must be nonnegative"):
      multihost.initialize("", 1, 0)


class Service:
  """The coordination service as process 0 of two sees it; the other one may write or be late."""

  def __init__(self, other: str | None = None, late: bool = False):
    self.texts, self._other, self._late = {}, other, late

  def key_value_dir_get(self, folder):
    return [item for item in self.texts.items() if item[0].startswith(folder)]

  def key_value_set(self, key, value, allow_overwrite=False):
    self.texts[key] = value

  def wait_at_barrier(self, name, milliseconds):
    assert milliseconds == multihost.WAIT_SECONDS * 1000
    if self._late:
      raise jax.errors.JaxRuntimeError(
        "DEADLINE_EXCEEDED: some timed out task names: 1"
      )
    if self._other:
      self.texts[f"{name}1"] = self._other


@pytest.fixture(name="connect")
def fixture_connect(monkeypatch):
  """Connects this process, the first of two, to a service."""

  def connected(service):
    monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.distributed.global_state, "client", service)

  return connected


class TestRaiseTogether:
  def test_alone_it_raises_its_own_error(self):
    multihost.raise_together(None)
    with pytest.raises(KeyError, match="mine"):
      multihost.raise_together(KeyError("mine"))

  def test_error_of_another_process_is_told(self, connect):
    connect(Service(other="ValueError: theirs"))
    # Plain: this process has nothing that a traceback could show.
    assert issubclass(multihost.OthersFailed, multihost.PlainError)
    with pytest.raises(
      multihost.OthersFailed,
      match=r"processes \[1\] failed, see their logs\n  process 1: ValueError: theirs",
    ):
      multihost.raise_together(None)

  def test_own_error_is_raised_and_told(self, connect):
    service = Service()
    connect(service)
    with pytest.raises(KeyError, match="mine"):
      multihost.raise_together(KeyError("mine"))
    assert list(service.texts.values()) == ["KeyError: 'mine'"]
    multihost.raise_together(None)  # the next time it is forgotten

  def test_one_that_does_not_come_is_named(self, connect):
    connect(Service(late=True))
    with pytest.raises(
      multihost.OthersFailed,
      match="must come here within 1800 s of the first(?s:.*)task names: 1",
    ):
      multihost.raise_together(None)
    with pytest.raises(KeyError, match="mine"):
      multihost.raise_together(KeyError("mine"))


class TestBeats:
  def test_process_that_gives_no_sign_of_life_is_named(self, connect):
    service = Service()
    connect(service)
    now = 0.0
    beats = multihost._Beats(lambda: now)
    for now in range(0, 300, 5):
      if now < 100:
        service.texts[f"{multihost._ALIVE}1"] = str(now)
      stopped = beats.exchange()
      assert stopped == [] if now <= 160 or now % 10 else stopped == [1], now

  def test_process_that_has_left_may_be_silent(self, connect):
    service = Service()
    connect(service)
    now = 0.0
    beats = multihost._Beats(lambda: now)
    service.texts[f"{multihost._ALIVE}1"] = multihost._HAS_LEFT
    for now in range(0, 300, 10):
      assert beats.exchange() == [], now

  def test_signs_come_before_jax_loses_patience(self):
    seconds = multihost._SILENT_SECONDS + multihost._BEAT_SECONDS
    seconds += 2 * multihost._ANSWER_SECONDS + 6 * multihost._POLL_SECONDS
    # Its last heartbeat may be half as old already.
    assert seconds < multihost.HEARTBEAT_SECONDS / 2


class TestWhoFailed:
  """A computation fails in this process, the first of two."""

  @pytest.fixture(name="log")
  def fixture_log(self, monkeypatch):
    lines = []
    monkeypatch.setattr(
      multihost.logging,
      "error",
      lambda text, *words: lines.append(text % words),
    )
    monkeypatch.setattr(multihost, "_ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    return lines

  error = jax.errors.JaxRuntimeError("connection closed by peer")

  def test_silent_process_is_named_to_all(self, connect, log):
    service = Service()
    connect(service)
    assert multihost._silent_behind(self.error) == [1]
    (line,) = log
    assert line.startswith("processes [1] do not answer: they were killed")
    assert "[1] do not answer" in service.texts[f"{multihost._FAILED}0"]

  @pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
  def test_broken_connection_is_not_an_error_of_ones_own(
    self, connect, log, monkeypatch, kind
  ):
    connect(Service())
    monkeypatch.setattr(multihost.endings, "end_now", pytest.exit)
    with pytest.raises(pytest.exit.Exception):
      multihost._end_after(kind("Gloo: connection closed by peer"))
    (line,) = log
    assert line.startswith("processes [1] do not answer: they were killed")

  def test_process_with_a_problem_is_named(self, connect, log):
    service = Service()
    connect(service)
    service.texts[f"{multihost._FAILED}1"] = "OSError: theirs\nand more"
    assert multihost._silent_behind(self.error) is not None
    assert log == ["process 1 failed, and ends this one: OSError: theirs"]

  def test_own_error_stays_own_where_the_other_answers(self, connect, log):
    service = Service()
    connect(service)
    service.texts[f"{multihost._ANSWERED}1"] = ""
    assert multihost._silent_behind(self.error) is None
    assert log == []


def fragile(how: str) -> tuple[list[int], list[str]]:
  """Returns exit codes and outputs of two processes that compute together until one fails."""
  command = [sys.executable, "tests/parallel/fragile.py"]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  coordinator = f"127.0.0.1:{free_port()}"
  processes = [
    subprocess.Popen(
      [*command, str(i), coordinator, how],
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], outputs


class TestEndingTogether:
  def test_alone_an_exception_goes_through(self):
    with pytest.raises(KeyError, match="mine"), multihost.ending_together():
      raise KeyError("mine")

  def test_one_that_raises_ends_the_other(self):
    codes, (first, second) = fragile("raises")
    assert codes == [1, 1]
    assert (
      "process 1 failed, and ends this one: OSError: no space left" in first
    ), first
    assert (
      "Traceback" in second
      and "this process failed, the others are ended" in second
    ), second
    assert "Traceback" not in first, first

  @pytest.mark.slow
  def test_first_that_raises_ends_the_other(self):
    codes, (_, second) = fragile("first_raises")
    assert codes == [1, 1]
    assert (
      "process 0 failed, and ends this one: OSError: no space left" in second
    ), second

  @pytest.mark.slow
  def test_one_that_is_killed_ends_the_other(self):
    codes, (first, _) = fragile("killed")
    assert codes == [1, -signal.SIGKILL]
    assert "processes [1] do not answer: they were killed or hang" in first, (
      first
    )
    assert "Traceback" not in first, first

  @pytest.mark.slow
  def test_one_that_is_killed_outside_of_a_computation_is_missed(self):
    codes, (first, _) = fragile("silent")
    assert codes == [1, -signal.SIGKILL]
    assert "processes [1] do not answer: they were killed or hang" in first, (
      first
    )
    assert "Traceback" not in first and "stack trace" not in first, first

  @pytest.mark.slow
  def test_jax_aborts_the_others_when_the_first_is_killed(self):
    codes, (_, second) = fragile("first_killed")
    assert codes[0] == -signal.SIGKILL
    # As docs/tpu.md says: whichever thread is faster, JAX's or ours.
    assert codes[1] in (1, -signal.SIGABRT)
    assert (
      "JAX distributed service detected fatal errors" in second
      or "processes [0] do not answer" in second
    ), second

  @pytest.mark.slow
  def test_one_that_hangs_is_named(self):
    codes, (first, _) = fragile("late")
    assert codes == [1, 1]
    assert (
      "must come here within 2 s of the first" in first
      and "task names:\n1" in first
    ), first


class TestEndingWhenAsked:
  def test_both_end_after_the_same_iteration(self):
    codes, outputs = fragile("asked")
    assert codes == [75, 75], outputs
    saved = [
      re.findall(r"saved after iteration (\d+)", output) for output in outputs
    ]
    assert saved[0] == saved[1] and int(saved[0][0]) >= 3, outputs
    assert "asked to end by process 1" in outputs[0]
    assert "Traceback" not in "".join(outputs)

  @pytest.mark.slow
  @pytest.mark.parametrize("how", ["asked_early", "asked_twice", "asked_last"])
  def test_both_end_at_once(self, how):
    start_time = time.monotonic()
    codes, outputs = fragile(how)
    assert codes == [75, 75], outputs
    assert "Traceback" not in "".join(outputs)
    assert time.monotonic() - start_time < 60


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
    assert [
      process.wait(timeout=1200) for process in start_two(tiny_model, workdir)
    ] == [0, 0], logs(workdir)
    return workdir

  def test_numbers_are_those_of_one_process(self, alone, together):
    assert len(metrics(alone)) == STEPS
    for one, two in zip(metrics(alone), metrics(together), strict=True):
      assert one.keys() == two.keys()
      for name, value in one.items():
        assert two[name] == (
          value if value is None else pytest.approx(value, abs=1e-8, rel=1e-8)
        ), name

  def test_parameters_are_those_of_one_process(self, alone, together):
    for one, two in zip(state(alone), state(together), strict=True):
      np.testing.assert_allclose(two, one, atol=1e-8, rtol=0)

  def test_files_are_written_once(self, alone, together):
    def names(workdir):
      paths = workdir.rglob("*.json*")
      return sorted(str(path.relative_to(workdir)) for path in paths)

    assert [name for name in names(together) if "checkpoints" not in name] == [
      name for name in names(alone) if "checkpoints" not in name
    ]
    for name in ("evaluation/step_000000", "evaluation/step_000003", "report"):
      assert samples(together / name) == samples(alone / name)

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
    assert (
      start(
        model, copy, **{"total_steps": STEPS + 1, "eval.batch_size": 8} | where
      ).wait(timeout=1200)
      == 0
    ), logs(copy)
    rows = metrics(copy)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    return rows[-1]

  @pytest.mark.parametrize("devices, data", [(8, 8), (1, 1)])
  def test_checkpoint_of_two_goes_on_in_one_on_another_mesh(
    self, tiny_model, together, longer, devices, data
  ):
    where = {
      "devices": devices,
      "mesh.data": data,
      "mesh.fsdp": 1,
      "mesh.tensor": 1,
    }
    for name, value in self._one_more(tiny_model, together, **where).items():
      assert longer[name] == (
        value if value is None else pytest.approx(value, abs=1e-8, rel=1e-8)
      ), name

  def test_one_that_cannot_start_ends_both(self, tiny_model, tmp_path):
    processes = start_two(
      tiny_model, tmp_path / "workdir", {"step.mode": "pmap"}
    )
    assert [process.wait(timeout=300) for process in processes] == [1, 1]
    assert (
      "step.mode must be one of 'fused', 'split'; got 'pmap'"
      in (tmp_path / "workdir.1.log").read_text()
    )
    assert (
      "processes [1] failed, see their logs"
      in (tmp_path / "workdir.0.log").read_text()
    )

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
    assert (
      "processes [1] do not answer" in (tmp_path / "workdir.0.log").read_text()
    ), logs(workdir)
