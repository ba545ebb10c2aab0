"""Tests of the wheel: what it holds, and that its command works without the repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("setuptools")  # of the extra test
pytest.importorskip("wheel")

ROOT = pathlib.Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
FILES = ("setup.py", "requirements.txt", "MANIFEST.in", "LICENSE", "README.md")


@pytest.fixture(name="wheel", scope="module")
def fixture_wheel(tmp_path_factory) -> zipfile.ZipFile:
  """A wheel built from a copy of the repository, without a network."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
  for package in ("r3jax", "configs"):
    shutil.copytree(ROOT / package, source / package, ignore=ignored)
  for name in FILES:
    shutil.copy(ROOT / name, source / name)
  built = subprocess.run(
    [sys.executable, "-c", BUILD, folder],
    cwd=source,
    capture_output=True,
    text=True,
  )
  assert built.returncode == 0, built.stderr[-2000:]
  (path,) = folder.glob("*.whl")
  return zipfile.ZipFile(path)


@pytest.mark.parametrize("folder", ["pod", "reward_server"])
def test_first_layer_of_the_container_builds(folder, tmp_path):
  """The image installs the requirements before the package is copied into it."""
  lines = (ROOT / "launch" / folder / "Dockerfile").read_text().splitlines()
  install = next(i for i, line in enumerate(lines) if "pip install" in line)
  for line in lines[:install]:
    if not line.startswith("COPY"):
      continue
    *sources, target = line.split()[1:]
    for source in sources:
      path = tmp_path / (source if target == "./" else target)
      path.parent.mkdir(exist_ok=True)
      shutil.copy(ROOT / source, path)
  if "mkdir configs" in lines[install]:
    (tmp_path / "configs").mkdir()
  built = subprocess.run(
    [sys.executable, "-c", BUILD, tmp_path],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert built.returncode == 0, built.stderr[-2000:]


@pytest.fixture(name="site", scope="module")
def fixture_site(wheel, tmp_path_factory) -> pathlib.Path:
  """A folder of installed packages with the wheel alone, outside of the repository."""
  folder = tmp_path_factory.mktemp("site")
  wheel.extractall(folder)
  return folder


def run(site: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=site.parent,
    env=os.environ | {"PYTHONPATH": str(site)},
    capture_output=True,
    text=True,
    timeout=300,
  )


class TestContents:
  def test_every_file_of_the_package_is_in_it(self, wheel):
    paths = [
      path.relative_to(ROOT).as_posix()
      for path in (ROOT / "r3jax").rglob("*")
      if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(paths) > 150
    assert set(paths) <= set(wheel.namelist())

  def test_configs_are_inside_of_the_package(self, wheel):
    names = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {f"r3jax/configs/{name}" for name in names} <= set(wheel.namelist())
    roots = {name.split("/")[0] for name in wheel.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {
      "r3jax"
    }

  def test_it_gives_the_command(self, wheel):
    (entry_points,) = [
      name for name in wheel.namelist() if name.endswith("entry_points.txt")
    ]
    text = wheel.read(entry_points).decode()
    assert "[console_scripts]\nr3jax = r3jax.cli.main:main" in text


class TestWithoutTheRepository:
  def test_configs_are_found_by_name_and_import_each_other(self, site):
    code = (
      "import r3jax; print(r3jax.__file__); "
      "print(r3jax.get_config('r3_geneval_plus:v5p-128').mesh.fsdp)"
    )
    done = run(site, "-c", code)
    assert done.returncode == 0, done.stderr
    package, fsdp = done.stdout.split()
    assert pathlib.Path(package) == site / "r3jax" / "__init__.py"
    assert fsdp == "8"

  def test_help_lists_the_keys_of_a_config(self, site):
    done = run(site, "-m", "r3jax", "train", "--help")
    assert done.returncode == 0, done.stderr
    assert "--config.total_steps=500\n      Iterations." in done.stdout

  def test_a_command_runs(self, site):
    out = site.parent / "converted"
    done = run(
      site,
      "-m",
      "r3jax",
      "convert",
      "--source=shapes",
      f"--out={out}",
      "--format=bagel",
    )
    assert done.returncode == 0, done.stderr
    assert (out / "ema.safetensors").is_file()
