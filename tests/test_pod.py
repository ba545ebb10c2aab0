"""Tests of launch/pod: that its files say what the main job needs; nothing is started."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import threading

import pytest
import yaml

from configs import r3_geneval
from r3jax.parallel import preemption

ROOT = pathlib.Path(__file__).parents[1]
POD = ROOT / "launch" / "pod"
SCRIPTS = ("env.sh", "start.sh", "queued_resources.sh", "slurm.sbatch")


def _bash(command: str, **environment) -> subprocess.CompletedProcess:
  return subprocess.run(
    ["bash", "-c", command],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=False,
  )


class TestScripts:
  @pytest.mark.parametrize("name", SCRIPTS)
  def test_bash_parses_it(self, name):
    found = _bash(f"bash -n launch/pod/{name}")
    assert (found.returncode, found.stderr) == (0, "")
    if name != "env.sh":  # which is sourced
      assert "\nset -euo pipefail\n" in (POD / name).read_text()

  @pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
  @pytest.mark.parametrize("name", SCRIPTS)
  def test_shellcheck_finds_nothing(self, name):
    found = _bash(
      f"shellcheck --shell=bash --external-sources launch/pod/{name}"
    )
    assert found.returncode == 0, found.stdout


class TestEnvironment:
  def _variables(self, **given) -> dict[str, str]:
    found = _bash(
      "unset LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR; "
      + "".join(
        f"export {name}={shlex.quote(value)}; " for name, value in given.items()
      )
      + "source launch/pod/env.sh; env",
      HOME="/home/somebody",
    )
    return dict(
      line.split("=", 1) for line in found.stdout.splitlines() if "=" in line
    )

  def test_flags_are_those_of_the_docs(self):
    flags = self._variables()["LIBTPU_INIT_ARGS"].split()
    assert flags and all(re.fullmatch(r"--xla_\w+=\w+", flag) for flag in flags)
    documented = (ROOT / "docs" / "tpu.md").read_text()
    assert all(
      f"`{flag.removeprefix('--').partition('=')[0]}`" in documented
      for flag in flags
    )

  def test_what_is_set_stays(self):
    given = {
      "LIBTPU_INIT_ARGS": "",
      "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
    }
    assert self._variables(**given).items() >= given.items()

  def test_compiled_programs_are_kept_in_the_home(self):
    assert (
      self._variables()["JAX_COMPILATION_CACHE_DIR"]
      == "/home/somebody/.cache/r3jax/compiled"
    )


class TestQueuedResources:
  @pytest.fixture
  def run(self, tmp_path):
    """Runs the script; returns the calls of gcloud that it made."""
    log = tmp_path / "calls"
    fake = tmp_path / "gcloud"
    fake.write_text(
      f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> {log}; echo >> {log}\n'
    )
    fake.chmod(0o755)

    def call(arguments: str, **variables) -> list[str]:
      path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
      found = _bash(
        f"bash launch/pod/queued_resources.sh {arguments}", **path, **variables
      )
      assert found.returncode == 0, found.stderr
      return log.read_text().removesuffix("\0\n").split("\0")

    return call

  def test_asks_for_a_slice(self, run):
    assert run("create", PROJECT="p", ZONE="z", TIER="--spot") == [
      "compute",
      "tpus",
      "queued-resources",
      "create",
      "r3jax",
      "--node-id=r3jax",
      "--accelerator-type=v5p-128",
      "--runtime-version=v2-alpha-tpuv5",
      "--spot",
      "--project=p",
      "--zone=z",
    ]

  def test_starts_the_job_on_every_host(self, run):
    found = run(
      "run '--config.reward.endpoints=(\"http://a:1\",)'",
      PROJECT="p",
      WORKDIR="gs://b/run",
    )
    assert "--worker=all" in found
    (command,) = [part for part in found if part.startswith("--command=")]
    parts = shlex.split(command.removeprefix("--command="))
    assert "launch/tpu.py" in parts and "--workdir=gs://b/run" in parts
    assert '--config.reward.endpoints=("http://a:1",)' in parts
    # process 0 alone writes it
    assert "JAX_COMPILATION_CACHE_DIR=gs://b/run-compiled" in parts
    assert (
      _bash(
        f"bash -n -c {shlex.quote(command.removeprefix('--command='))}"
      ).returncode
      == 0
    )

  def test_without_a_command_it_says_what_there_is(self):
    found = _bash("bash launch/pod/queued_resources.sh")
    assert (
      found.returncode == 2 and "queued_resources.sh create" in found.stderr
    )

  def test_missing_variable_is_named(self):
    found = _bash(
      "bash launch/pod/queued_resources.sh run", PROJECT="p", WORKDIR=""
    )
    assert found.returncode == 2 and "set the variable WORKDIR" in found.stderr

  def test_stop_waits_until_the_process_is_gone(self, tmp_path):
    (tmp_path / "gcloud").write_text(
      "#!/usr/bin/env bash\n"
      'for word in "$@"; do [[ $word != --command=* ]] || bash -c "${word#--command=}"; done\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    job = subprocess.Popen(
      ["bash", "-c", "trap 'sleep 0.5; exit 75' TERM; echo; sleep 60 & wait"],
      stdout=subprocess.PIPE,
      start_new_session=True,
    )
    job.stdout.readline()  # it traps the signal
    (tmp_path / "run.pid").write_text(str(job.pid))
    # A process that nobody waits for would stay in the table of processes.
    waiter = threading.Thread(target=job.wait)
    waiter.start()
    found = _bash(
      "bash launch/pod/queued_resources.sh stop",
      PATH=f"{tmp_path}:{os.environ['PATH']}",
      PROJECT="p",
      REMOTE=str(tmp_path),
    )
    waiter.join(10)
    os.killpg(job.pid, signal.SIGKILL)  # its sleep
    assert (found.returncode, job.returncode) == (0, 75), found.stderr


class TestJobSet:
  def test_being_asked_to_end_is_no_failure(self):
    jobset = yaml.safe_load((POD / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    rule = spec["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [preemption.EXIT_CODE]
    (restart,) = jobset["spec"]["failurePolicy"]["rules"]
    assert restart["onJobFailureReasons"] == ["PodFailurePolicy"]

  def test_grace_of_the_pods_is_longer_than_that_of_the_run(self):
    jobset = yaml.safe_load((POD / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    grace = r3_geneval.get_config().preemption.grace_s
    assert pod["terminationGracePeriodSeconds"] >= grace + 5

  def test_pods_are_the_hosts_of_the_slice(self):
    jobset = yaml.safe_load((POD / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == (
      "jobset.x-k8s.io/v1alpha2",
      "JobSet",
    )
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sides[0]) * int(sides[1]) * int(sides[2])
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == hosts
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"

  def test_config_takes_its_flags(self):
    jobset = yaml.safe_load((POD / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    keys = [
      arg.partition("=")[0].removeprefix("--config.")
      for arg in container["args"]
      if arg.startswith("--config.")
    ]
    assert len(keys) >= 4
    known = r3_geneval.get_config()
    for key in keys:
      section, _, name = key.partition(".")
      assert name in known[section]


class TestDockerfile:
  def test_copies_what_is_there_and_starts_the_job(self):
    lines = [
      line.split()
      for line in (POD / "Dockerfile").read_text().splitlines()
      if line and line[0] not in "# "
    ]
    assert {line[0] for line in lines} <= {
      "FROM",
      "WORKDIR",
      "COPY",
      "RUN",
      "ENTRYPOINT",
    }
    sources = [
      part for line in lines if line[0] == "COPY" for part in line[1:-1]
    ]
    assert all((ROOT / source).exists() for source in sources)
    assert lines[-1] == ["ENTRYPOINT", '["bash",', '"launch/pod/start.sh"]']


class TestSlurm:
  def test_every_gpu_has_a_task(self):
    script = (POD / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert re.search(r'^srun .*launch/pod/start.sh "\$@"$', script, re.M)
