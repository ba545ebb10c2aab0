"""Kept programs: traced once, the same numbers, another program for whatever changes one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax.parallel import meshes
from r3jax.run import program_cache

pytestmark = pytest.mark.usefixtures("_mesh")


@pytest.fixture
def _mesh():
  with jax.set_mesh(meshes.make_mesh_on(jax.devices()[:2], 2, 1, 1)):
    yield


class Counted:
  """A step with an optimizer's state, mapped over `data`, that counts its traces."""

  def __init__(self, scale: float):
    self.traces = 0
    self._scale = scale
    self._optimizer = optax.adam(1e-2)

  def init(self, x: jax.Array):
    return {"x": x, "moments": self._optimizer.init(x)}

  def __call__(self, state, rows: jax.Array):
    self.traces += 1
    one = jax.sharding.PartitionSpec()
    many = jax.sharding.PartitionSpec("data")
    total = jax.shard_map(
      lambda x, rows: jax.lax.psum(jnp.sum(x * rows), "data"),
      in_specs=(one, many),
      out_specs=one,
      axis_names={"data"},
    )
    gradient = jax.grad(lambda x: self._scale * total(x, rows) ** 2)(state["x"])
    updates, moments = self._optimizer.update(gradient, state["moments"])
    return {"x": state["x"] + updates, "moments": moments}


def _kept(folder, step: Counted, constants: list[str], rows: int = 4):
  state = step.init(jnp.linspace(0.0, 1.0, 3))
  arguments = (state, jnp.arange(3.0 * rows).reshape(rows, 3))
  program = jax.jit(
    program_cache.load_or_export(folder, constants, step, arguments)
  )
  return jax.tree.map(np.asarray, program(*arguments)), jax.tree.map(
    np.asarray, jax.jit(step)(*arguments)
  )


class TestLoadOrExport:
  def test_second_start_does_not_trace_and_has_the_same_numbers(self, tmp_path):
    first, direct = _kept(tmp_path, Counted(2.0), [])
    step = Counted(2.0)
    second, _ = _kept(tmp_path, step, [])
    assert step.traces == 1  # by the direct call alone
    assert (
      jax.tree.structure(first)
      == jax.tree.structure(second)
      == jax.tree.structure(direct)
    )
    jax.tree.map(np.testing.assert_array_equal, first, direct)
    jax.tree.map(np.testing.assert_array_equal, second, direct)

  def test_other_constants_shapes_or_source_make_another_program(
    self, tmp_path, monkeypatch
  ):
    _kept(tmp_path, Counted(2.0), ["scale 2"])
    for change in (
      {"constants": ["scale 3"]},
      {"constants": ["scale 2"], "rows": 6},
    ):
      found, direct = _kept(tmp_path, Counted(3.0), **change)
      jax.tree.map(np.testing.assert_array_equal, found, direct)
    monkeypatch.setattr(program_cache, "code_version", lambda: "another")
    _kept(tmp_path, Counted(2.0), ["scale 2"])
    with jax.default_matmul_precision("bfloat16"):
      _kept(tmp_path, Counted(2.0), ["scale 2"])
    assert len(list(tmp_path.iterdir())) == 5

  def test_other_devices_make_another_program(self):
    keys = set()
    for count in (1, 2):
      mesh = meshes.make_mesh_on(jax.devices()[:count], count, 1, 1)
      x = jax.device_put(
        np.zeros(4), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
      )
      keys.add(program_cache._key([], (x,)))
    assert len(keys) == 2

  @pytest.mark.parametrize("content", [b"", b"no program"])
  def test_damaged_file_is_made_anew(self, tmp_path, content):
    _kept(tmp_path, Counted(2.0), [])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(content)
    found, direct = _kept(tmp_path, Counted(2.0), [])
    jax.tree.map(np.testing.assert_array_equal, found, direct)
    assert len(path.read_bytes()) == len(whole)

  def test_unwritable_folder_keeps_nothing(self, tmp_path):
    (tmp_path / "file").write_text("")
    found, direct = _kept(tmp_path / "file" / "folder", Counted(2.0), [])
    jax.tree.map(np.testing.assert_array_equal, found, direct)
