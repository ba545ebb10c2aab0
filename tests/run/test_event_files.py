"""Tests of run/logging/event_files.py with damaged files."""

from etils import epath
import numpy as np
import pytest

from r3jax.run.logging import event_files

STEPS = 6


@pytest.fixture(scope="module", name="content")
def fixture_content(tmp_path_factory):
  """An event file with a number in every step."""
  tf = pytest.importorskip("tensorflow")
  folder = tmp_path_factory.mktemp("events")
  writer = tf.summary.create_file_writer(str(folder))
  with writer.as_default():
    for step in range(STEPS):
      tf.summary.scalar("evaluation/score", step / 8, step=step)
  writer.close()
  (path,) = folder.iterdir()
  return path.read_bytes()


class TestDamage:
  def test_events_before_the_damage_stay(self, content, tmp_path):
    """Any cut, and 60 changed bytes."""
    folder = epath.Path(tmp_path)
    path = folder / "events.out.tfevents.1.host"
    rng = np.random.default_rng(0)
    damaged = [content[:length] for length in range(0, len(content), 17)]
    for position in rng.integers(len(content), size=60):
      changed = bytearray(content)
      changed[position] ^= 1 << rng.integers(8)
      damaged.append(bytes(changed))
    for remaining in damaged:
      path.write_bytes(remaining)
      event_files.scalars(folder, "evaluation/")
      event_files.drop_after(folder, 3)
      steps = event_files.scalars(folder, "evaluation/")
      assert all(step <= 3 for step in steps)

  def test_what_is_no_event_file_stays(self, content, tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "events.out.tfevents.1.host").write_bytes(content)
    (folder / "events.out.tfevents.2.mine").mkdir()
    (folder / "notes.txt").write_text("mine")
    event_files.drop_after(folder, None)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["events.out.tfevents.2.mine", "notes.txt"]
