"""Runs launch/colab_tpu.ipynb from top to bottom on a CPU, with as little work as it takes."""

import base64
import importlib.util
import io
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

nbclient = pytest.importorskip("nbclient")  # of the extra test
nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab_tpu.ipynb"
SMALL = {
  "R3JAX_ITERATIONS": "1",
  "R3JAX_GROUPS": "2",
  "R3JAX_GROUP_SIZE": "4",
  "R3JAX_HELD_OUT": "6",
}
PICTURES = 3  # prompts, before and after


def _pictures(cell) -> list[np.ndarray]:
  """Returns the pictures that a cell shows."""
  shown = [
    output["data"]["image/png"]
    for output in cell.outputs
    if "image/png" in output.get("data", {})
  ]
  return [
    np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(picture))))
    for picture in shown
  ]


def _text(cell) -> str:
  return "".join(output.get("text", "") for output in cell.outputs)


def test_notebook_is_kept_without_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  assert not [
    cell
    for cell in notebook.cells
    if cell.get("outputs") or cell.get("execution_count")
  ]


def test_first_cell_has_the_only_setting_and_asks_for_it(monkeypatch):
  """No other cell names an address that the reader would have to change."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
  assert code[0].startswith('REPOSITORY = ""')
  assert not [source for source in code[1:] if "REPOSITORY" in source]
  assert "OWNER" not in NOTEBOOK.read_text()
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="REPOSITORY must be .* is empty; set"):
    exec(code[0], {})


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
  for name, value in (
    SMALL | {"R3JAX_WORKDIR": str(tmp_path / "run"), "PYTHONPATH": str(ROOT)}
  ).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv(
    "XLA_FLAGS",
    os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
  )
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  if kept := os.environ.get("R3JAX_KEEP_NOTEBOOK"):
    nbformat.write(notebook, kept)
  before, after = [
    cell
    for cell in notebook.cells
    if cell.source.rstrip().endswith(("load(config))", "load(config.lock()))"))
  ]
  for cell in (before, after):
    pictures = _pictures(cell)
    # not one colour
    assert len(pictures) == PICTURES and all(
      picture.std() > 5 for picture in pictures
    )
    assert _text(cell).count("plan:") == _text(cell).count("edits:") == PICTURES
  (trained,) = [
    cell for cell in notebook.cells if "r3jax.train(" in cell.source
  ]
  assert "draft: " in _text(trained) and "seconds:" in _text(trained)
  assert "<iframe srcdoc=" in notebook.cells[-1].outputs[0]["data"]["text/html"]
  assert (tmp_path / "run" / "summary.json").exists()
