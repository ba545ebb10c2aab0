"""Tests of the command `r3jax` as a user meets it: help, configs, refusals, imports."""

import contextlib
import errno
import importlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from r3jax.cli import command_line
from r3jax.cli import main
from r3jax.cli import startup
from r3jax.files import config_files
from r3jax.files import jsonl
from r3jax.parallel import multihost
from r3jax.parallel import preemption

ROOT = pathlib.Path(__file__).parents[2]


def run(
  *arguments: str, cwd: pathlib.Path = ROOT
) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )


def r3jax(*arguments: str, **options) -> subprocess.CompletedProcess:
  return run("-m", "r3jax", *arguments, **options)


def refusal(*arguments: str, **options) -> str:
  done = r3jax(*arguments, **options)
  assert done.returncode == 1, done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr.splitlines()[-1]


def test_message_is_not_longer_than_a_screen(monkeypatch):
  def refuse(name, arguments):
    sys.exit("r3jax: " + "x" * 10_000 + " the end")

  monkeypatch.setattr(main, "_run_command", refuse)
  with pytest.raises(SystemExit) as end:
    main.run_command("train", [])
  assert len(end.value.code) == 2000
  assert end.value.code.startswith("r3jax: xxx")
  assert end.value.code.endswith("xxx the end")


class TestHelp:
  def test_of_all_commands(self):
    done = r3jax("--help")
    assert done.returncode == 0
    for name in main.COMMANDS:
      assert re.search(rf"^  {name} +\w", done.stdout, re.M)
    assert r3jax().stdout == done.stdout

  @pytest.mark.parametrize("name", main.COMMANDS)
  def test_of_one_command(self, name):
    done = r3jax(name, "--help")
    assert done.returncode == 0, done.stderr
    command = main.COMMANDS[name]
    assert done.stdout.startswith(
      f"usage: r3jax {name} {command.words}".rstrip()
    )
    assert f"  r3jax {name} " in done.stdout.split("flags:")[0]
    assert ("--config.seed=0" in done.stdout) == bool(command.config)

  def test_shows_the_keys_of_the_config_that_is_named(self):
    done = r3jax("train", "--help", "--config=r3_geneval:shapes")
    assert "--config.groups_per_step=8\n" in done.stdout
    assert "--config.world='shapes'\n" in done.stdout
    assert "      Must be a whole number in 1..65536.\n" in done.stdout
    assert "keys of r3_geneval:shapes" in done.stdout

  def test_version(self):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", r3jax("--version").stdout)


class TestHomes:
  def test_tilde_behind_a_flag_is_the_home_folder(self, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    arguments = ["--out=~/model", "~/a", "--config.data.train=~/train.jsonl"]
    assert command_line.with_homes(arguments) == [
      "--out=/home/me/model",
      "/home/me/a",
      "--config.data.train=/home/me/train.jsonl",
    ]

  def test_texts_and_names_keep_it(self):
    arguments = [
      "--prompt=~ three cats",
      "--question",
      "~?",
      "--config.log.wandb.name=~nobody-here",
      "--out=a~",
    ]
    assert command_line.with_homes(arguments) == arguments

  def test_home_that_does_not_exist_is_refused(self, tmp_path):
    message = refusal(
      "convert",
      "--source=shapes",
      "--out=~nobody-here/model",
      "--format=orbax",
      cwd=tmp_path,
    )
    assert "none is known; got '~nobody-here/model'" in message
    assert not list(tmp_path.iterdir())


class TestImports:
  """Seconds are bounded generously: other tests run meanwhile."""

  @pytest.mark.parametrize(
    "arguments", [("-c", "import r3jax"), ("-m", "r3jax", "--help")]
  )
  def test_do_not_wait_for_jax(self, arguments):
    start = time.monotonic()
    done = run("-X", "importtime", *arguments)
    assert time.monotonic() - start < 10
    imported = {
      line.split("|")[-1].strip() for line in done.stderr.splitlines()
    }
    assert "r3jax" in imported
    assert not imported & {"jax", "flax", "numpy"}

  def test_public_names_are_imported_when_they_are_used(self):
    code = (
      "import sys, r3jax; assert 'jax' not in sys.modules; "
      "names = [getattr(r3jax, name) for name in dir(r3jax)]; "
      "assert r3jax.Model is sys.modules['r3jax.inference'].Model"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr

  def test_no_library_module_defines_a_flag(self):
    code = (
      "import pkgutil, importlib, r3jax; from absl import flags\n"
      "before = set(flags.FLAGS)\n"
      "for module in pkgutil.walk_packages(r3jax.__path__, 'r3jax.'):\n"
      "  if module.name != 'r3jax.__main__': importlib.import_module(module.name)\n"
      "ours = {m for m in flags.FLAGS.flags_by_module_dict() if m.startswith('r3jax')}\n"
      "assert not ours, ours"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


class TestConfig:
  KEY = "--config.no_such_key=1"

  @pytest.mark.parametrize(
    "config",
    [
      "--config=r3_geneval:shapes",
      f"--config={ROOT}/configs/r3_geneval.py:shapes",
      "--config=r3_tiif",
    ],
  )
  def test_is_found_by_name_and_by_path_from_anywhere(self, tmp_path, config):
    message = refusal("train", config, "--workdir=w", self.KEY, cwd=tmp_path)
    assert message.startswith("r3jax: the config has no key no_such_key")
    assert "no_such_key" in message

  def test_value_may_be_the_next_word(self, tmp_path):
    message = refusal(
      "train",
      "--config",
      "r3_geneval",
      "--workdir",
      "w",
      self.KEY,
      cwd=tmp_path,
    )
    assert "no_such_key" in message

  @pytest.mark.parametrize(
    "config, message",
    [
      ("r3_genevl", "got 'r3_genevl'; did you mean r3_geneval?"),
      ("configs/r3_tif.py", "got 'configs/r3_tif.py'; did you mean r3_tiif?"),
      ("r3_geneval:shaps", "got 'shaps'; did you mean shapes?"),
      ("r3_tiif:v5p-12", "got 'v5p-12'; did you mean v5p-128?"),
      ("sft_shapes:v5p-128", "has no variants; got 'v5p-128'"),
    ],
  )
  def test_unknown_one_is_one_line(self, config, message):
    assert message in refusal("train", f"--config={config}", "--workdir=w")

  @pytest.mark.parametrize(
    "line, message",
    [
      ("config.group_sise = 4", 'Did you mean "group_size"'),
      ("config.seed = 'x'", "line 4: TypeError: "),
      ("config.seed = ", "line 4: SyntaxError: invalid syntax"),
      ("from configs import slicess", "line 4: ImportError: "),
    ],
  )
  def test_mistake_in_a_users_config_is_a_line_with_its_place(
    self, tmp_path, monkeypatch, line, message
  ):
    path = tmp_path / "mine.py"
    path.write_text(
      "from configs import r3_geneval\n"
      "def get_config():\n"
      "  config = r3_geneval.get_config('shapes')\n"
      f"  {line}\n"
      "  return config\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
      config_files.load("mine.py")
    assert str(error.value).startswith("mine.py, line 4: ")
    assert len(str(error.value).splitlines()) == 1

  def test_users_config_may_import_a_shipped_one(self, tmp_path):
    (tmp_path / "mine.py").write_text(
      "from configs import r3_geneval\n"
      "from configs import beside\n"
      "def get_config():\n"
      "  config = r3_geneval.get_config('shapes').unlock()\n"
      "  config.mine = beside.VALUE\n"
      "  return config.lock()\n"
    )
    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    done = r3jax("train", "--config=mine.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config.mine=3\n" in done.stdout


class TestRefusals:
  def test_unknown_command_names_the_nearest(self):
    message = refusal("trian")
    assert "got 'trian'; did you mean train?" in message

  @pytest.mark.parametrize(
    "arguments, message",
    [
      (
        ["--config=r3_geneval", "--workdr=w"],
        "Unknown command line flag 'workdr'",
      ),
      (["--config=r3_geneval"], "--workdir must name the folder of the run"),
      (
        ["--config=r3_geneval", "--workdir=w", "x"],
        "takes flags only; got ['x']",
      ),
    ],
  )
  def test_flags_that_cannot_be_are_one_line(self, arguments, message):
    assert message in refusal("train", *arguments)

  def test_words_are_counted(self):
    assert "rescore takes DIR; got []" in refusal(
      "rescore", "--config=r3_geneval"
    )


class TestSignals:
  def test_every_command_ends_in_one_line(self, monkeypatch):
    """While it imports, parses and loads; a command of any kind listens from its first line."""
    texts = []
    monkeypatch.setattr(preemption.ENDING, "listen", texts.append)
    monkeypatch.setattr(importlib, "import_module", _no_module)
    for name in main.COMMANDS:
      with pytest.raises(ModuleNotFoundError):
        main.run_command(name, [])
    assert len(texts) == len(main.COMMANDS)
    assert all(texts)

  def test_ctrl_c_leaves_no_traceback(self):
    # SIGHUP is ignored where the tests run under nohup.
    code = """
import runpy, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.argv[1:] = ["report", "/dev"]
runpy.run_module("r3jax", run_name="__main__")
"""
    process = subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stderr=subprocess.PIPE,
      text=True,
    )
    wait = time.monotonic() + 60
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while time.monotonic() < wait and not _catches(status, signal.SIGHUP):
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == preemption.EXIT_CODE
    assert error == (
      "r3jax: asked to end by SIGINT: nothing has to be saved; the same command starts anew\n"
    )


def _no_module(name: str):
  raise ModuleNotFoundError(name)


def _catches(status: pathlib.Path, number: signal.Signals) -> bool:
  """Returns whether a process has a handler of a signal, by its file in /proc."""
  mask = re.search(r"SigCgt:\s*(\w+)", status.read_text()).group(1)
  return bool(int(mask, 16) >> (number - 1) & 1)


class TestPipes:
  @pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"]])
  def test_reader_that_has_left_ends_a_command_quietly(self, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
      [sys.executable, "-m", "r3jax", *arguments],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=writer,
      stderr=subprocess.PIPE,
      text=True,
      timeout=300,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")

  def test_another_broken_pipe_is_an_error(self):
    class Command:
      """A command whose connection to a service breaks."""

      @staticmethod
      def run():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
      main._call(Command, [])


class TestFullDisk:
  def test_ends_a_command_in_one_line_that_names_the_file(self):
    class Command:
      """A command that logs to a device which is always full."""

      @staticmethod
      def run():
        jsonl.append("/dev/full", [{"step": 1}])

    with pytest.raises(SystemExit) as end:
      main._call(Command, [])
    assert end.value.code == (
      "r3jax: there must be room for what is written: [Errno 28] No space left on "
      "device: '/dev/full'. Free some; the same command then continues"
    )

  def test_ends_several_processes_without_a_traceback(self, monkeypatch):
    monkeypatch.setattr(startup.jax, "process_count", lambda: 2)
    for name in ("multihost.ending_together", "agreement.ending_when_asked"):
      monkeypatch.setattr(f"r3jax.cli.startup.{name}", contextlib.nullcontext)
    with (
      pytest.raises(multihost.PlainError, match="must be room.*'/dev/full'"),
      startup.ending_together(),
    ):
      jsonl.append("/dev/full", [{"step": 1}])

  @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
  def test_missing_right_is_one_line_that_names_the_file(self, number):
    class Command:
      """A command that reads a model which belongs to another user."""

      @staticmethod
      def run():
        raise OSError(number, os.strerror(number), "model/llm_config.json")

    with pytest.raises(SystemExit) as end:
      main._call(Command, [])
    assert end.value.code.startswith("r3jax: this user must have the right to")
    assert end.value.code.endswith(": 'model/llm_config.json'")

  def test_missing_right_to_a_port_keeps_its_traceback(self):
    class Command:
      """A command that listens at a port of the system."""

      @staticmethod
      def run():
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
      main._call(Command, [])

  def test_disk_that_fails_is_one_line_too(self):
    class Command:
      """A command whose disk has failed meanwhile."""

      @staticmethod
      def run():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(SystemExit) as end:
      main._call(Command, [])
    assert end.value.code == (
      "r3jax: files must stay readable and writable: [Errno 5] Input/output error. "
      "See to the machine; the same command then continues"
    )

  def test_other_errors_keep_their_traceback(self):
    class Command:
      """A command with a fault."""

      @staticmethod
      def run():
        raise FileNotFoundError(2, "No such file", "x")

    with pytest.raises(FileNotFoundError):
      main._call(Command, [])
