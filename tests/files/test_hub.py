"""Tests of files/hub.py, with a stand-in for huggingface_hub, and of paths that lead to it."""

import inspect
import sys
import types

import huggingface_hub
import pytest

from r3jax.checkpoint import pretrained
from r3jax.data import sources
from r3jax.files import hub
from r3jax.files import paths
from r3jax.run import sessions
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(types.ModuleType):
  """A stand-in for the library: its cache is filled, and nothing is fetched."""

  def __init__(self, cache):
    super().__init__("huggingface_hub")
    self.cache = cache
    self.calls = []

  def _folder(self, repo_id, repo_type, revision):
    self.calls.append((repo_type, repo_id, revision))
    name = f"{repo_type}s--{repo_id.replace('/', '--')}"
    folder = self.cache / name / "snapshots" / COMMIT
    if not folder.exists():
      raise OSError(f"404\n{repo_id} is not there")
    return folder

  def hf_hub_download(self, repo_id, filename, *, repo_type, revision):
    path = self._folder(repo_id, repo_type, revision) / filename
    if not path.exists():
      raise RuntimeError(f"{filename} is not there")
    return str(path)

  def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns):
    assert "*.safetensors" in allow_patterns
    return str(self._folder(repo_id, repo_type, revision))


@pytest.fixture
def fake(tmp_path, monkeypatch):
  library = Hub(tmp_path)
  monkeypatch.setitem(sys.modules, "huggingface_hub", library)
  monkeypatch.setattr(hub, "_commits", {})
  hub.local_path.cache_clear()
  yield library
  hub.local_path.cache_clear()


@pytest.fixture
def prompts(fake, tmp_path):
  """The address of a file of prompts."""
  folder = tmp_path / "datasets--me--prompts" / "snapshots" / COMMIT
  folder.mkdir(parents=True)
  (folder / "train.txt").write_text("a red ring\na bow\n")
  return "hf://datasets/me/prompts@v1/train.txt"


@pytest.fixture
def model(fake, tmp_path, tiny_model):
  """The address of the tiny model."""
  folder = tmp_path / "models--me--tiny" / "snapshots"
  folder.mkdir(parents=True)
  (folder / COMMIT).symlink_to(tiny_model)
  return "hf://me/tiny"


@pytest.mark.parametrize(
  "text, address",
  [
    ("hf://me/it", hub.Address("me/it", False, None, None)),
    ("hf://me/it/", hub.Address("me/it", False, None, None)),
    (
      "hf://me/it@v1.0/a/b.json",
      hub.Address("me/it", False, "v1.0", "a/b.json"),
    ),
    (
      "hf://datasets/me/it@main/x.txt",
      hub.Address("me/it", True, "main", "x.txt"),
    ),
  ],
)
def test_address_is_read(text, address):
  assert hub.parse(text) == address


@pytest.mark.parametrize(
  "text", ["hf://me", "hf://", "hf://me/it/../x", "hf://a b/c", "hf://me/it@"]
)
def test_another_form_is_refused(text):
  with pytest.raises(ValueError, match="must have the form hf://OWNER/NAME"):
    hub.parse(text)


def test_prompts_are_read_and_their_commit_is_known(prompts, fake):
  assert sources.read(prompts, None) == b"a red ring\na bow\n"
  sources.read(prompts, None)
  assert fake.calls == [("dataset", "me/prompts", "v1")]  # asked once
  assert hub.commits() == {prompts: COMMIT}


def test_model_is_found(model, tiny_model, fake):
  found = pretrained.find(model)
  assert found.fingerprint() == pretrained.find(str(tiny_model)).fingerprint()
  assert fake.calls == [("model", "me/tiny", None)]


def test_config_of_a_run_has_commits_and_fingerprints(
  model, prompts, tiny_model
):
  changes = {"model.folder": model, "data.train": prompts}
  config = tiny.make_config(tiny_model, changes)
  pretrained.find(model)
  sources.read(prompts, None)
  experiment = types.SimpleNamespace(
    pretrained=pretrained.find(model),
    train=(),
    reward=types.SimpleNamespace(describe=dict),
    own_evaluation_reward=None,
  )
  inputs = sessions._inputs(config, experiment)
  assert inputs["hub"] == {prompts: COMMIT, model: COMMIT}
  assert inputs["model_path"].endswith(f"models--me--tiny/snapshots/{COMMIT}")
  assert "hub" in sessions.MAY_DIFFER


def test_the_librarys_errors_are_one_line(fake, prompts):
  with pytest.raises(ValueError, match="OSError: 404 me/none is not there$"):
    paths.of_user("hf://me/none")
  with pytest.raises(ValueError, match="gated .* RuntimeError: no.txt is not"):
    paths.of_user("hf://datasets/me/prompts@v1/no.txt")


def test_missing_extra_is_named(monkeypatch):
  hub.local_path.cache_clear()
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"needs `pip install r3jax\[hf\]`"):
    paths.of_user("hf://me/it")


def test_the_library_has_these_functions():
  for name in ("hf_hub_download", "snapshot_download"):
    ours = inspect.signature(getattr(Hub, name)).parameters
    theirs = inspect.signature(getattr(huggingface_hub, name)).parameters
    assert set(ours) - {"self"} <= set(theirs)
