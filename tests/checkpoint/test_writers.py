"""Writers tell of their errors before anybody waits for other processes."""

from etils import epath
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from r3jax.checkpoint import writers


class Broken:
  """A write in the background that fails."""

  def result(self, timeout=None):
    raise OSError("no space")

  def cancel(self):
    return True


class TestCommit:
  def test_its_error_is_noted_and_goes_on(self):
    failures = writers.Failures()
    commit = writers._Commit(Broken(), failures)
    assert failures.first is None
    with pytest.raises(OSError, match="no space") as caught:
      commit.result()
    assert failures.first is caught.value


class TestRegistry:
  def test_orbax_reads_what_it_writes_without_it(self, tmp_path):
    handlers = writers.registry("state", ("data",), writers.Failures())
    folder = epath.Path(tmp_path)
    state = {"x": jnp.arange(3.0)}
    with ocp.CheckpointManager(folder, handler_registry=handlers) as manager:
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"a": 1})
      )
      manager.save(1, args=items)
    with ocp.CheckpointManager(folder) as manager:
      read = manager.restore(1)
    assert read.data == {"a": 1}
    assert read.state["x"].tolist() == [0.0, 1.0, 2.0]
    metadata = (folder / "1" / "_CHECKPOINT_METADATA").read_text()
    assert "r3jax" not in metadata
