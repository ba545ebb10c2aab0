"""Tests of checkpoint/training.py."""

import functools
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

from etils import epath
import flax
import jax
from jax import numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore

from r3jax.checkpoint import digests
from r3jax.checkpoint import training
from r3jax.checkpoint import verification
from r3jax.data import pipeline

ROOT = pathlib.Path(__file__).parents[2]
OPTIMIZER = optax.adamw(1e-2)


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  optimizer: optax.OptState


def new_state(size=8):
  params = {
    "w": jnp.arange(size, dtype=jnp.float32),
    "b": jnp.ones((size, 2), jnp.bfloat16),
  }
  return State(jnp.int32(0), params, OPTIMIZER.init(params))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, indices):
  grads = jax.tree.map(
    lambda p: p * jnp.sum(indices).astype(p.dtype) / 10, state.params
  )
  updates, optimizer = OPTIMIZER.update(grads, state.optimizer, state.params)
  return State(
    state.step + 1, optax.apply_updates(state.params, updates), optimizer
  )


def new_iterator():
  return pipeline.prompt_iterator(num_prompts=10, groups_per_step=3, seed=0)


def train(folder, steps, every=2, keep=2):
  """Trains up to `steps`, going on from the last checkpoint."""
  saver, iterator = training.Checkpoints(folder, every, keep), new_iterator()
  restored = saver.restore(jax.eval_shape(new_state), iterator)
  first, state = restored or (0, new_state())
  for step in range(first + 1, steps + 1):
    state = train_step(state, next(iterator))
    saver.save(step, state, iterator)
  saver.close()
  return state


def assert_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class TestRestore:
  def test_empty_folder_gives_none(self, tmp_path):
    saver = training.Checkpoints(tmp_path / "checkpoints", every=1, keep=1)
    assert saver.restore(jax.eval_shape(new_state), new_iterator()) is None
    saver.close()

  def test_resumed_equals_uninterrupted(self, tmp_path):
    uninterrupted = train(tmp_path / "one", 8)
    train(tmp_path / "two", 5)  # Its last checkpoint is that of step 4.
    assert_equal(train(tmp_path / "two", 8), uninterrupted)

  def test_step_and_iterator_come_back(self, tmp_path):
    train(tmp_path, 5)
    saver = training.Checkpoints(tmp_path, 2, 2)
    iterator, expected = new_iterator(), new_iterator()
    step, state = saver.restore(jax.eval_shape(new_state), iterator)
    saver.close()
    prompts = [next(expected) for _ in range(5)]
    assert (step, int(state.step)) == (4, 4)
    np.testing.assert_array_equal(next(iterator), prompts[4])

  def test_state_takes_the_sharding_that_is_asked_for(self, tmp_path):
    train(tmp_path, 2)
    mesh = jax.make_mesh((4,), ("fsdp",))
    sharding = jax.NamedSharding(mesh, jax.P())
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=rows if x.ndim else sharding
      ),
      jax.eval_shape(new_state),
    )
    saver = training.Checkpoints(tmp_path, 2, 2)
    _, state = saver.restore(abstract, new_iterator())
    saver.close()
    assert state.params["w"].sharding.spec == jax.P("fsdp")
    assert_equal(state, train(tmp_path / "again", 2))

  def test_older_checkpoint_with_a_third_item_is_restored(self, tmp_path):
    """Checkpoints used to hold JSON facts in an item `extra`, which was always empty."""
    state, iterator = new_state(), new_iterator()
    with ocp.CheckpointManager(tmp_path) as manager:
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(iterator.get_state()),
        extra=ocp.args.JsonSave({}),
      )
      manager.save(3, args=items)
    saver = training.Checkpoints(tmp_path, 2, 2)
    step, restored = saver.restore(jax.eval_shape(new_state), iterator)
    saver.save(4, restored, iterator)
    saver.close()
    assert step == 3
    assert_equal(restored, state)
    # A user's copy is none of the run's checkpoints.
    shutil.copytree(tmp_path / "4", tmp_path / "best_9")
    assert training.latest_step(tmp_path) == 4

  def test_incomplete_checkpoint_is_passed_over(self, tmp_path):
    train(tmp_path, 4)
    (tmp_path / "6.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)
    saver = training.Checkpoints(tmp_path, 2, 2)
    assert saver.restore(jax.eval_shape(new_state), new_iterator())[0] == 4
    saver.close()

  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  def test_other_shape_is_refused(self, tmp_path):
    train(tmp_path, 2)
    saver = training.Checkpoints(tmp_path, 2, 2)
    with pytest.raises(ValueError, match="shape"):
      saver.restore(
        jax.eval_shape(functools.partial(new_state, 9)), new_iterator()
      )
    saver.close()
    # Orbax's other reads fail unheard; here, where that is ignored.
    gc.collect()


class TestDamage:
  @pytest.fixture
  def folder(self, tmp_path):
    """Checkpoints of the steps 2 and 4."""
    train(tmp_path, 4)
    return tmp_path

  def _restore(self, folder):
    saver = training.Checkpoints(folder, 2, 2)
    iterator = new_iterator()
    try:
      restored = saver.restore(jax.eval_shape(new_state), iterator)
    finally:
      saver.close()
    return restored, iterator

  def _largest_file(self, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)

  def _damage(self, folder, step):
    (folder / str(step) / "data" / "metadata").write_text('{"next_index": 3}')

  def test_the_one_before_is_restored_and_the_damaged_one_moved(
    self, folder, caplog
  ):
    os.truncate(self._largest_file(folder / "4" / "state" / "d"), 100)
    with caplog.at_level("WARNING"):
      (step, state), iterator = self._restore(folder)
    assert step == 2
    assert_equal(state, train(folder / "again", 2))
    assert iterator.get_state() == {"next_index": 2}
    assert (folder / "4.damaged").is_dir()
    assert f"{folder}/4 is damaged" in caplog.text
    assert_equal(train(folder, 6), train(folder / "other", 6))
    assert training.complete_steps(folder) == [4, 6]

  def test_a_second_damaged_one_gets_another_name(self, folder):
    (folder / "4.damaged").mkdir()
    shutil.rmtree(folder / "4")
    (folder / "4").mkdir()
    (step, _), _ = self._restore(folder)
    assert step == 2
    assert (folder / "4.damaged-2").is_dir()

  def test_nothing_is_moved_where_none_is_good(self, folder):
    for step in (2, 4):
      self._damage(folder, step)
    for _ in range(2):
      with pytest.raises(training.Unusable, match="4 is damaged.*2 is damaged"):
        self._restore(folder)
    assert training.complete_steps(folder) == [2, 4]

  def test_readers_pass_it_over_and_move_nothing(self, folder):
    assert training.newest_sound(folder) == 4
    self._damage(folder, 4)
    assert training.newest_sound(folder) == 2
    assert training.latest_step(folder) == 4
    self._damage(folder, 2)
    with pytest.raises(training.Unusable, match="no checkpoint can be used"):
      training.newest_sound(folder)

  def test_readers_take_one_before_a_step(self, folder):
    assert training.newest_sound(folder, before=4) == 2
    self._damage(folder, 2)
    with pytest.raises(training.Unusable, match="no checkpoint can be used"):
      training.newest_sound(folder, before=4)
    assert training.newest_sound(folder, before=2) is None

  def test_copy_by_another_number_is_left_alone(self, folder):
    shutil.copytree(folder / "4", folder / "007")
    assert training.complete_steps(folder) == [2, 4]
    assert self._restore(folder)[0][0] == 4
    assert (folder / "007").is_dir()

  def test_huge_file_is_not_read_whole(self, folder):
    os.truncate(folder / "4" / "digests" / "metadata", 1 << 40)
    assert self._restore(folder)[0][0] == 2

  def test_what_a_reader_lacks_is_no_damage(self, folder, monkeypatch):
    def check(*_args, **_keywords):
      raise verification.Unreadable("UNAVAILABLE: try again")

    monkeypatch.setattr(verification, "check", check)
    with pytest.raises(training.Unusable, match="4: UNAVAILABLE: try again"):
      self._restore(folder)
    assert training.complete_steps(folder) == [2, 4]

  def test_other_numbers_than_those_on_disk_are_noticed(
    self, folder, monkeypatch
  ):
    monkeypatch.setattr(verification, "check", lambda *_, **__: True)
    of_tree = digests.of_tree

    def other_at_4(tree):
      if int(tree.step) == 4:
        tree = tree.replace(step=tree.step + 1)
      return of_tree(tree)

    monkeypatch.setattr(digests, "of_tree", other_at_4)
    assert self._restore(folder)[0][0] == 2


class TestMovingAsideInAStore:
  """A store renames a folder object by object; a kill may come in between."""

  folder = epath.Path("gs://bucket/run/checkpoints")
  files = ("_CHECKPOINT_METADATA", "data/metadata", "state/d/0")

  @pytest.fixture(name="move")
  def fixture_move(self, store):
    for file in self.files:
      store.objects[f"{self.folder}/6/{file}"] = b"damaged"
    store.objects[f"{self.folder}/4/{self.files[0]}"] = b"good"
    saver = mock.Mock(_folder=self.folder)
    return functools.partial(
      training.Checkpoints._move_aside, saver, {6: "data: cut"}
    )

  def _names(self, store):
    return sorted(
      name.removeprefix(f"{self.folder}/") for name in store.objects
    )

  def test_all_objects_get_the_new_name(self, store, move):
    move()
    damaged = [f"6.damaged/{file}" for file in sorted(self.files)]
    assert self._names(store) == [f"4/{self.files[0]}", *damaged]

  def test_start_after_a_kill_moves_the_rest(self, store, move, monkeypatch):
    replace = store.replace

    def killed(path, dst):
      replace(path, dst)
      raise KeyboardInterrupt

    monkeypatch.setattr(store, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      move()
    monkeypatch.setattr(store, "replace", replace)
    move()
    assert self._names(store) == [
      f"4/{self.files[0]}",
      *(f"6.damaged-2/{file}" for file in sorted(self.files[1:])),
      f"6.damaged/{self.files[0]}",
    ]

  def test_refusal_of_the_store_is_one_line(self, store, move, monkeypatch):
    def refuse(path, dst):
      raise PermissionError(13, "no right to write", path)

    monkeypatch.setattr(store, "rename", refuse)
    with pytest.raises(training.Unusable, match="must be moved away by hand"):
      move()


class TestOtherRun:
  """A checkpoint that was copied from another workdir, with arrays of the same shapes."""

  def _open(self, folder, config):
    return training.Checkpoints(folder, 1, 2, config)

  @pytest.fixture
  def folder(self, tmp_path):
    saver = self._open(tmp_path, {"seed": "0", "optimizer.clip": "1.0"})
    saver.save(1, new_state(), new_iterator())
    saver.close()
    return tmp_path

  @pytest.mark.parametrize("config", [{"seed": "1"}, {"seed": "1", "new": "2"}])
  def test_is_refused_and_stays(self, folder, config):
    saver = self._open(folder, config)
    with pytest.raises(
      training.Unusable, match=r"1 must be of this run.*seed is 0 there and 1"
    ):
      saver.restore(jax.eval_shape(new_state), new_iterator())
    saver.close()
    assert training.complete_steps(folder) == [1]

  @pytest.mark.parametrize("config", [None, {"seed": "0", "new": "2"}])
  def test_keys_of_another_version_do_not_matter(self, folder, config):
    saver = self._open(folder, config)
    step, _ = saver.restore(jax.eval_shape(new_state), new_iterator())
    saver.close()
    assert step == 1


class TestVerifiedSaves:
  def test_state_that_is_not_finite_is_refused(self, tmp_path):
    train(tmp_path, 4)
    saver = training.Checkpoints(tmp_path, 2, 2)
    state = new_state()
    state.params["w"] = state.params["w"].at[3].set(jnp.nan)
    with pytest.raises(training.Unusable, match="not finite .*params.w"):
      saver.save(6, state, new_iterator(), force=True)
    saver.close()
    assert training.complete_steps(tmp_path) == [2, 4]

  def test_nothing_is_removed_before_the_newer_one_is_verified(
    self, tmp_path, monkeypatch
  ):
    train(tmp_path, 4)
    monkeypatch.setattr(training, "_RETRY_SECONDS", (0.0,))

    def check(*_args, **_keywords):
      raise verification.Damaged("params.w is missing")

    monkeypatch.setattr(verification, "check", check)
    saver = training.Checkpoints(tmp_path, 2, 2)
    saver.save(6, new_state(), new_iterator())
    with pytest.raises(training.SaveFailed, match="6 is not what was saved"):
      saver.close()
    assert training.complete_steps(tmp_path) == [2, 4, 6]

  def test_failed_save_is_noticed_without_another_save(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(training, "_RETRY_SECONDS", ())
    train(tmp_path, 2)
    saver = training.Checkpoints(tmp_path, 2, 2)

    def fail(*_args):
      raise OSError(28, "No space left on device")

    # In the thread that ends a save.
    monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", fail)
    saver.save(4, new_state(), new_iterator())
    with pytest.raises(training.SaveFailed, match="No space left") as error:
      while True:
        saver.check()
        time.sleep(0.01)
    assert "\n" not in str(error.value)


class TestSave:
  def test_saves_when_due_and_keeps_the_latest(self, tmp_path):
    train(tmp_path, 9, every=2, keep=2)
    assert sorted(
      path.name for path in tmp_path.iterdir() if path.name.isdigit()
    ) == ["6", "8"]

  def test_large_arrays_are_saved_in_chunks(self, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHUNK_BYTES", 1000)
    state = new_state(size=1024)
    saver = training.Checkpoints(tmp_path, every=1, keep=1)
    saver.save(1, state, new_iterator())
    abstract = jax.eval_shape(functools.partial(new_state, 1024))
    _, restored = saver.restore(abstract, new_iterator())
    saver.close()
    assert_equal(restored, state)
    base = {"driver": "file", "path": f"{tmp_path / '1' / 'state'}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": "params.w/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    assert stored.chunk_layout.read_chunk.shape == (128,)

  def test_force_saves_the_last_step_once(self, tmp_path):
    saver, state = training.Checkpoints(tmp_path, every=10, keep=2), new_state()
    assert not saver.save(3, state, new_iterator())
    assert saver.save(3, state, new_iterator(), force=True)
    assert not saver.save(3, state, new_iterator(), force=True)
    saver.close()

  def test_donated_buffers_do_not_reach_the_checkpoint(self, tmp_path):
    state = new_state(size=1 << 20)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    saver = training.Checkpoints(tmp_path, every=1, keep=1)
    saver.save(1, state, new_iterator())
    for _ in range(3):
      state = train_step(state, jnp.arange(3))
    _, restored = saver.restore(
      jax.eval_shape(lambda: new_state(1 << 20)), new_iterator()
    )
    saver.close()
    assert_equal(restored, expected)

  def test_killed_run_resumes_from_a_complete_checkpoint(self, tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests" / "checkpoint")!r}]
import test_training
test_training.train({str(tmp_path)!r}, 10**6, every=1)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
      deadline = time.monotonic() + 60
      while not any(
        path.name.isdigit() and int(path.name) >= 5
        for path in tmp_path.iterdir()
      ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    finally:
      process.send_signal(signal.SIGKILL)
      process.wait()
    saver = training.Checkpoints(tmp_path, 1, 2)
    step, state = saver.restore(jax.eval_shape(new_state), new_iterator())
    saver.close()
    assert step >= 5
    expected, iterator = new_state(), new_iterator()
    for _ in range(step):
      expected = train_step(expected, next(iterator))
    assert_equal(state, expected)

  @pytest.mark.parametrize("every, keep", [(0, 1), (1, 0)])
  def test_senseless_cadence_is_refused(self, tmp_path, every, keep):
    with pytest.raises(ValueError, match="must be at least 1"):
      training.Checkpoints(tmp_path, every, keep)
