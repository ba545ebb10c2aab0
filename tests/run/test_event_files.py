"""Tests of run/logging/event_files.py, also with damaged files."""

import base64

from etils import epath
import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from r3jax.run.logging import event_files

STEPS = 6
# What TensorFlow 2.21 writes for `tf.summary.scalar("evaluation/score", 0.375, step=3)`.
OF_TENSORFLOW = """
PgAAAAAAAADZ0kDnCQAAQNQSw9pBGg1icmFpbi5FdmVudDoyUiQKInRlbnNvcmZsb3cuY29yZS51dGlsLmV2ZW50c193cml0
ZXKjnLtFOgAAAAAAAAASleriCRYYcdQSw9pBEAMqLQorChBldmFsdWF0aW9uL3Njb3JlQgoIARIAIgQAAMA+SgsKCQoHc2Nh
bGFyczOJ+Zc=
"""


def number(step: int) -> dict[str, float]:
  return {"evaluation/score": step / 8}


@pytest.fixture(scope="module", name="content")
def fixture_content(tmp_path_factory):
  """An event file with a number in every step."""
  folder = epath.Path(tmp_path_factory.mktemp("events"))
  writer = event_files.Writer(folder)
  for step in range(STEPS):
    writer.write_scalars(step, number(step))
  (path,) = folder.iterdir()
  return path.read_bytes()


class TestFormat:
  def test_checksums_are_tensorboards(self):
    for content in (b"", b"r3jax", bytes(range(256))):
      expected = pywrap_tensorflow.masked_crc32c(content)
      assert event_files._masked(content) == expected

  def test_files_of_tensorflow_are_read_and_continued(self, tmp_path):
    """Runs of earlier versions have them."""
    folder = epath.Path(tmp_path)
    path = folder / "events.out.tfevents.1.host"
    path.write_bytes(base64.b64decode(OF_TENSORFLOW))
    before = path.read_bytes()
    event_files.drop_after(folder, 3)
    assert path.read_bytes() == before
    event_files.Writer(folder).write_scalars(4, number(4))
    assert event_files.scalars(folder, "evaluation/") == {
      3: number(3),
      4: number(4),
    }

  def test_store_gets_a_file_per_event(self, store):
    folder = epath.Path("gs://bucket/run/tensorboard")
    writer = event_files.Writer(folder)
    for step in range(STEPS):
      writer.write_scalars(step, number(step))
    assert len(store.objects) == STEPS and set(store.writes.values()) == {1}
    event_files.drop_after(folder, 3)
    assert len(store.objects) == 4
    stored = event_files.scalars(folder, "evaluation/")
    assert stored == {step: number(step) for step in range(4)}


class TestDamage:
  def test_events_before_the_damage_stay(self, content, tmp_path):
    """Any cut, and 60 changed bytes."""
    folder = epath.Path(tmp_path)
    path = folder / "events.out.tfevents.1.host"
    path.write_bytes(content)
    ends = np.cumsum(
      [len(record.content) for record in event_files._read(path, content)]
    )
    rng = np.random.default_rng(0)
    damaged = [
      (content[:length], length) for length in range(0, len(content), 17)
    ]
    for position in rng.integers(len(content), size=60):
      changed = bytearray(content)
      changed[position] ^= 1 << rng.integers(8)
      damaged.append((bytes(changed), position))
    for remaining, position in damaged:
      path.write_bytes(remaining)
      # The first record has no number: it names the format.
      num_whole = max(int((ends <= position).sum()) - 1, 0)
      stored = event_files.scalars(folder, "evaluation/")
      assert stored == {step: number(step) for step in range(num_whole)}
      event_files.drop_after(folder, 3)
      stored = event_files.scalars(folder, "evaluation/")
      assert stored == {step: number(step) for step in range(min(num_whole, 4))}

  def test_what_is_no_event_is_left_out(self, tmp_path):
    """A record as it should be, of something else."""
    folder = epath.Path(tmp_path)
    length = (3).to_bytes(8, "little")
    content = b""
    for part in (length, b"\xff\xff\xff"):
      content += part + event_files._masked(part).to_bytes(4, "little")
    (folder / "events.out.tfevents.1.host").write_bytes(content)
    assert event_files.scalars(folder, "evaluation/") == {}

  def test_what_is_no_event_file_stays(self, content, tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "events.out.tfevents.1.host").write_bytes(content)
    (folder / "events.out.tfevents.2.mine").mkdir()
    (folder / "notes.txt").write_text("mine")
    event_files.drop_after(folder, None)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["events.out.tfevents.2.mine", "notes.txt"]
