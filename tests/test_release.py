"""Tests of what a release consists of beside the package: versions, lock file, workflow, forms."""

import pathlib
import re
import shutil
import subprocess

from packaging import requirements
import pytest
import yaml

import r3jax

ROOT = pathlib.Path(__file__).parents[1]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
SCRIPTS = ("launch/release_check.sh", "launch/venv.sh", ".ci/run")


def _requirements(name: str) -> list[requirements.Requirement]:
  lines = (ROOT / name).read_text().splitlines()
  stripped = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
  return [requirements.Requirement(line) for line in stripped if line]


class TestVersion:
  def test_changelog_and_citation_have_it(self):
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == citation["version"] == r3jax.__version__

  def test_changelog_keeps_its_form(self):
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for section in re.split(r"^## ", changelog, flags=re.M)[1:]:
      assert re.match(
        r"\[(Unreleased\]|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)\n", section
      )
      kinds = re.findall(r"^### (.+)$", section, re.M)
      assert kinds == [kind for kind in KINDS if kind in kinds]


class TestLockFile:
  def test_pins_what_the_requirements_allow(self):
    pinned = {
      pin.name.lower().replace("_", "-"): str(pin.specifier)
      for pin in _requirements("constraints.txt")
    }
    for requirement in _requirements("requirements.txt"):
      name = requirement.name.lower().replace("_", "-")
      assert pinned[name].startswith("=="), name
      assert requirement.specifier.contains(pinned[name][2:]), name

  def test_has_no_tensorflow(self):
    """The base install and the tests work without it."""
    for name in ("requirements.txt", "constraints.txt"):
      names = {requirement.name for requirement in _requirements(name)}
      assert names.isdisjoint(
        {"tensorflow", "tensorflow-cpu", "tensorflow_cpu"}
      )


class TestWorkflow:
  def test_runs_what_ci_runs_on_the_versions_of_the_package(self):
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    test = jobs["test"]
    assert {"run": "bash .ci/run"} in test["steps"]
    assert {"run": "bash launch/release_check.sh"} in jobs["release"]["steps"]
    classified = re.findall(
      r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text()
    )
    assert test["strategy"]["matrix"]["python"] == classified
    search = re.search(
      r"in python3 (.*); do", (ROOT / "launch" / "venv.sh").read_text()
    )
    assert search[1].split() == [f"python{v}" for v in reversed(classified)]

  def test_forms_of_issues_have_fields(self):
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug", "feature"):
      form = yaml.safe_load((folder / f"{name}.yml").read_text())
      assert {"name", "description", "body"} <= form.keys()
      ids = [field["id"] for field in form["body"] if "id" in field]
      assert len(ids) == len(set(ids)) > 1


class TestScripts:
  @pytest.mark.parametrize("name", SCRIPTS)
  def test_bash_parses_it(self, name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)

  @pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
  @pytest.mark.parametrize("name", SCRIPTS)
  def test_shellcheck_finds_nothing(self, name):
    checked = subprocess.run(
      ["shellcheck", "--shell=bash", "--external-sources", name],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert checked.returncode == 0, checked.stdout
