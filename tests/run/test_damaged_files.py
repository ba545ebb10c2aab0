"""Damages every small file of a finished run in every way, and calls all that read it.

Each reader does its work, or says in one line which file it is and what to do. The model is left
out, as in test_store_workdir.py.
"""

import os
import pathlib
import shutil

from etils import epath
import numpy as np
import pytest

from r3jax.cli import report as report_command
from r3jax.evaluation import comparison
from r3jax.evaluation import finished
from r3jax.evaluation import sample_log
from r3jax.run import loop
from r3jax.run import workdir as workdir_lib
from tests.run import test_store_workdir as fake_run

FILES = (
  "config.json",
  "metrics.jsonl",
  "evaluation.jsonl",
  "summary.json",
  "training_prompts.jsonl",
  "rewards/judge.0.jsonl",
  "report/samples.jsonl",
  "report/index.html",
  "evaluation/step_000000/samples.jsonl",
  "evaluation/step_000000/settings.json",
  "evaluation/step_000000/summary.json",
  "evaluation/step_000000/tables.md",
  "evaluation/step_000000/rewards/judge.0.jsonl",
  "evaluation/step_000007/summary.json",
)
# Beside files: what lies in the place of a folder.
FOLDERS = ("report", "rewards", "evaluation", "evaluation/step_000007")


def _cut(path: pathlib.Path) -> None:
  content = path.read_bytes()
  path.write_bytes(content[: len(content) * 2 // 3])


def _break_lines(path: pathlib.Path) -> None:
  """Puts lines that are no objects of the log between its lines."""
  lines = path.read_bytes().splitlines(keepends=True)
  strange = [b"\n", b'{"step": 1', b"\n", b"7\n", b'{"step": "x"}\n', b"\xff\n"]
  strange += [b'{"step": 1, "turns": 3}\n', b"[" * 50_000 + b"\n"]
  strange.append(
    b'{"step": 1, "optimizer/skipped": null, "seconds/iteration": NaN}\n'
  )
  strange.append(b'{"step": 1, "reason/score": 1' + b"0" * 400 + b"}\n")
  path.write_bytes(b"".join([*lines[:1], *strange, *lines[1:]]))


def _replace(content: bytes):
  def replace(path: pathlib.Path) -> None:
    path.write_bytes(content)

  return replace


def _make_folder(path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


def _make_pipe(path: pathlib.Path) -> None:
  path.unlink()
  os.mkfifo(path)


def _make_loop(path: pathlib.Path) -> None:
  """Puts a link to itself there, which cannot be read."""
  path.unlink()
  path.symlink_to(path)


DAMAGES = {
  "empty": _replace(b""),
  "cut": _cut,
  "broken lines": _break_lines,
  "no JSON": _replace(b"not json\n"),
  "a list": _replace(b"[1, 2]\n"),
  "an empty object": _replace(b"{}\n"),
  "other keys": _replace(b'{"scores": 3, "rounds": "x", "prompt": []}\n'),
  "null": _replace(b"null\n"),
  "binary": _replace(bytes(range(256)) * 8),
  "deep": _replace(b"[" * 100_000 + b"\n"),
  "a folder": _make_folder,
  "a pipe": _make_pipe,
  "unreadable": _make_loop,
}


# Every damage of these files, and these damages of every file, belong to the normal suite.
_FIRST_FILES = ("config.json", "metrics.jsonl")
_FIRST_DAMAGES = ("cut", "other keys", "a pipe")


def _cases() -> list:
  """Returns the files and their damages; most are slow tests."""
  cases = []
  for name in FILES:
    for damage in DAMAGES:
      is_first = name in _FIRST_FILES or damage in _FIRST_DAMAGES
      marks = () if is_first else pytest.mark.slow
      cases.append(pytest.param(name, damage, marks=marks))
  return cases


@pytest.fixture(scope="module", autouse=True)
def around():
  """Leaves out what the model takes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.host_metrics, "compute", lambda *_: {})
    image = np.zeros((2, 2, 3), np.uint8)
    turn = sample_log.Turn(
      image="", score=0.5, text="t", instruction="", stop=False
    )

    def shown(experiment, step, *_):
      sample = sample_log.Sample(
        step=step, key=f"{step}", prompt="p", tag="colors", turns=(turn,)
      )
      prompt = fake_run.PROMPTS[0]
      return [loop.report_samples.ReportSample(sample, [image], prompt)]

    patch.setattr(loop.report_samples, "first_samples", shown)
    yield


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
  """The workdir of a finished run."""
  folder = tmp_path_factory.mktemp("damaged") / "run"
  fake_run._start(str(folder))
  workdir_lib.write_training_prompts(epath.Path(folder), fake_run.PROMPTS)
  shutil.rmtree(folder / "profile")
  return folder


@pytest.fixture
def run(finished_run, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def compiled(monkeypatch):
  """Gets an entry when the step is compiled."""
  calls = []
  compile_step = fake_run.Session.compile

  def counted(*arguments):
    calls.append(arguments)
    return compile_step(*arguments)

  monkeypatch.setattr(fake_run.Session, "compile", counted)
  return calls


def _compare(run: pathlib.Path) -> None:
  comparison.compare(finished.read(str(run)), seed=0)


def _report(run: pathlib.Path) -> None:
  try:
    report_command.run(str(run))
  except SystemExit as end:
    raise ValueError(str(end.code).removeprefix("r3jax: ")) from end


def _trained_on(run: pathlib.Path) -> None:
  workdir_lib.trained_on(str(run))


def _go_on(run: pathlib.Path) -> None:
  """Resumes the run for one iteration more."""
  fake_run._start(str(run), fake_run.STEPS + 1)


def _accepts(reader, run: pathlib.Path, path: pathlib.Path) -> bool:
  """Calls a reader; returns False where it refuses the file, in one line that names it."""
  try:
    reader(run)
  except ValueError as error:
    message = str(error)
    assert "\n" not in message and len(message) < 1000, message
    assert str(path) in message, message
    return False
  return True


def _check_readers(run: pathlib.Path, path: pathlib.Path, compiled) -> None:
  """Calls every reader, the runs that are started again last, because they repair."""
  for reader in (_compare, _report, _trained_on):
    _accepts(reader, run, path)
  restarts = _accepts(lambda folder: fake_run._start(str(folder)), run, path)
  assert not compiled  # no iteration is left
  if restarts:
    _compare(run)
    _report(run)
  resumes = _accepts(_go_on, run, path)
  assert bool(compiled) == resumes == restarts


class TestSmallFiles:
  @pytest.mark.parametrize("name, damage", _cases())
  def test_reader_works_or_names_the_file(self, run, compiled, name, damage):
    path = run / name
    DAMAGES[damage](path)
    _check_readers(run, path, compiled)

  @pytest.mark.parametrize("name", FOLDERS)
  def test_file_in_the_place_of_a_folder_is_named(self, run, compiled, name):
    shutil.rmtree(run / name)
    (run / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{run / name} must be a folder"):
      _go_on(run)
    assert not compiled

  def test_what_others_leave_is_not_touched(self, run, compiled):
    names = (
      "evaluation/notes.txt",
      "evaluation/step_000007 (copy)/samples.jsonl",
      "rewards/.DS_Store",
      "rewards/judge.0 (copy).jsonl",
      "report/mine/samples.jsonl",
      "tensorboard/mine",
    )
    for name in names:
      (run / name).parent.mkdir(parents=True, exist_ok=True)
      (run / name).write_text("mine")
    _go_on(run)
    _compare(run)
    assert compiled
    for name in names:
      assert (run / name).read_text() == "mine"

  def test_training_prompts_are_written_again(self, run, caplog):
    path = run / workdir_lib.TRAINED_ON
    before = path.read_bytes()
    path.write_bytes(before[:20])
    workdir_lib.write_training_prompts(epath.Path(run), fake_run.PROMPTS)
    assert path.read_bytes() == before
    assert str(path) in caplog.text
