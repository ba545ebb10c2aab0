"""Kept programs: traced once, the same numbers, another program for whatever changes one."""

from collections.abc import Mapping
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import r3_geneval
from r3jax import inference
from r3jax.agent import rollout
from r3jax.files import config_guard
from r3jax.parallel import meshes
from r3jax.run import evaluation_setup
from r3jax.run import model_setup
from r3jax.run import program_cache
from r3jax.run import setup
from r3jax.run import stage_settings
from tests import tiny

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
    program_cache.load_or_export(folder, "a step", constants, step, arguments)
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

  def test_changed_bytes_are_not_run(self, tmp_path, caplog):
    _kept(tmp_path, Counted(2.0), [])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for position in np.random.default_rng(0).integers(len(whole), size=50):
      content = bytearray(whole)
      content[position] ^= 1
      path.write_bytes(content)
      assert program_cache._read(epath.Path(path)) is None
    assert "damaged" in caplog.text
    path.write_bytes(whole)
    assert program_cache._read(epath.Path(path)) is not None

  def test_file_of_another_user_is_passed_over(self, tmp_path):
    _kept(tmp_path, Counted(2.0), [])
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()  # root may read every file, but no folder
    found, direct = _kept(tmp_path, Counted(2.0), [])
    jax.tree.map(np.testing.assert_array_equal, found, direct)

  def test_unwritable_folder_keeps_nothing(self, tmp_path):
    (tmp_path / "file").write_text("")
    found, direct = _kept(tmp_path / "file" / "folder", Counted(2.0), [])
    jax.tree.map(np.testing.assert_array_equal, found, direct)


def _another(value):
  """Returns a value of the same type that differs."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value + 1
  if isinstance(value, str):
    return f"{value}x"
  if isinstance(value, tuple):
    return (*value, "x")
  raise TypeError(f"no other value is known for {value!r}")


def _leaves(variant: str) -> dict:
  """Returns the values of a config by dotted key."""
  config = r3_geneval.get_config(variant)
  leaves = {}
  for key in config_guard._flatten(config.to_dict()):
    value = config
    for part in key.split("."):
      value = value[part]
    leaves[key] = value
  return leaves


def _is_left_out(
  key: str, listed: Mapping[str, str] = program_cache.NOT_TRACED
) -> bool:
  return config_guard._is_under(key, tuple(listed))


LISTS = {
  "the step": program_cache.NOT_TRACED,
  "evaluation": program_cache.NOT_EVALUATED,
  "generation": program_cache.NOT_GENERATED,
}


class TestConstants:
  @pytest.fixture
  def model(self, tmp_path):
    (tmp_path / "llm_config.json").write_text("{}")
    return epath.Path(tmp_path)

  @pytest.mark.parametrize("variant", ["bagel", "shapes", "smoke"])
  @pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
  def test_every_key_makes_another_program_unless_it_is_on_the_list(
    self, model, variant, listed
  ):
    expected = program_cache.constants(
      r3_geneval.get_config(variant).to_dict(), model, listed
    )
    for key, value in _leaves(variant).items():
      config = r3_geneval.get_config(variant).unlock()
      if key == "reward.members":
        config.reward.members = {"a": {"name": "world", "weight": 1.0}}
      else:
        config.update_from_flattened_dict({key: _another(value)})
      changed = program_cache.constants(config.to_dict(), model, listed)
      assert (changed == expected) == _is_left_out(key, listed), key

  @pytest.mark.parametrize(
    "first, second",
    [
      ({"step.micro_batches": 1}, {"step.micro_batches": 4}),
      ({"sharding.train.mlp": ("tensor",)}, {"sharding.train.mlp": ("fsdp",)}),
      (
        {"reward.shuffle": True, "seed": 1},
        {"reward.shuffle": True, "seed": 2},
      ),
      ({"step.mode": "fused"}, {"step.mode": "split"}),
    ],
  )
  def test_configs_that_shared_a_program_no_longer_do(
    self, model, first, second
  ):
    programs = []
    for changes in (first, second):
      config = r3_geneval.get_config("shapes")
      config.update_from_flattened_dict(changes)
      programs.append(program_cache.constants(config.to_dict(), model))
    assert programs[0] != programs[1]

  def test_seeds_share_a_program(self, model):
    programs = []
    for seed in (1, 2):
      config = r3_geneval.get_config("shapes")
      config.seed = seed
      programs.append(program_cache.constants(config.to_dict(), model))
    assert programs[0] == programs[1]

  def test_other_sizes_or_another_tokenizer_make_another_program(self, model):
    config = r3_geneval.get_config("shapes").to_dict()
    first = program_cache.constants(config, model)
    (model / "llm_config.json").write_text(json.dumps({"num_layers": 3}))
    second = program_cache.constants(config, model)
    (model / "merges.txt").write_text("a b")
    assert first != second != program_cache.constants(config, model)

  def test_listed_keys_reach_neither_model_nor_settings(self, tiny_model):
    """The list is right: what a step is built of stays the same."""

    def built(config):
      model = model_setup.build(config)
      settings = stage_settings.for_iteration(config)
      return model.modules, model.rollout, settings

    expected = built(tiny.make_config(tiny_model))
    for key, value in _leaves("shapes").items():
      if _is_left_out(key):
        config = tiny.make_config(tiny_model, {key: _another(value)})
        assert built(config) == expected, key

  def test_keys_listed_for_evaluation_and_generation_do_not_reach_them(
    self, stages, tiny_model
  ):
    for key, value in _leaves("shapes").items():
      # What generation leaves out holds what evaluation does.
      if _is_left_out(key, program_cache.NOT_GENERATED):
        changed = _sampling_stages(tiny_model, {key: _another(value)})
        assert changed == stages, key

  def test_every_listed_key_exists(self):
    config = r3_geneval.get_config("bagel").to_dict()
    for key in program_cache.NOT_TRACED:
      value = config
      for part in key.split("."):
        value = value[part]


class TestWorldOfOnesOwn:
  """Its verifier is traced, and nothing says whether its source has changed."""

  @pytest.mark.parametrize(
    "world, is_kept",
    [("shapes", True), ("r3jax.worlds.shapes.world:WORLD", False)],
  )
  def test_its_step_is_not_kept(self, tiny_model, world, is_kept):
    session = tiny.make_bench(tiny_model, changes={"world": world}).session
    assert session._can_be_kept() is is_kept


# What evaluation and generation compute with, each with another value than the tiny config's.
SAMPLING_CHANGES = {
  "model.dtype": "bfloat16",
  "sharding.rollout.mlp": ("fsdp",),
  "sequence.thought_tokens": 5,
  "text.top_p": 0.5,
  "reason.shift": 2.0,
  "reason.text_scale": 2.0,
  "reason.renorm": "channel",
  "refine.interval": (0.5, 1.0),
  "refine.renorm_min": 0.5,
  "eval.points": 7,
  "eval.temperature": 0.5,
  "eval.reason.text_scale": 3.0,
}


@pytest.fixture(scope="module", name="stages")
def fixture_stages(tiny_model):
  return _sampling_stages(tiny_model)


class TestEvaluation:
  def test_second_start_does_not_trace_and_draws_the_same(
    self, tiny_model, tmp_path, monkeypatch
  ):
    """Another start is another sampler: each compiles anew what it has not kept."""
    bench = tiny.make_bench(tiny_model, changes={"eval.rounds": 1})
    traces = []
    monkeypatch.setattr(rollout, "reason", _counted(rollout, "reason", traces))
    drawn = []
    traced = []
    for folder in (None, tmp_path, tmp_path):
      evaluation = evaluation_setup.build(
        bench.session.config, bench.session.experiment, bench.mesh, folder
      )
      traces.clear()
      with jax.set_mesh(bench.mesh):
        rounds = tiny.draw(
          evaluation.sampler,
          bench.policy,
          bench.frozen.towers,
          evaluation.prompts,
          images=1,
        )
      drawn.append(rounds)
      traced.append(list(traces))
    assert traced == [["reason"], ["reason"], []]
    assert len(list(tmp_path.iterdir())) == 1
    for kept in drawn[1:]:
      jax.tree.map(np.testing.assert_array_equal, kept, drawn[0])

  @pytest.mark.parametrize(
    "changes",
    [{"sequence.parser": "strings"}, {"reward.name": "tests.tiny:redness"}],
    ids=["parser", "reward"],
  )
  def test_what_calls_the_host_is_not_kept(self, tiny_model, tmp_path, changes):
    config = tiny.make_config(tiny_model, changes)
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    evaluation = evaluation_setup.build(
      config, setup.build(config), mesh, epath.Path(tmp_path)
    )
    assert evaluation.sampler.keep is None


def _counted(module, name: str, traces: list[str]):
  """Returns a function of a module that notes its name when it is called."""
  function = getattr(module, name)

  def counted(*arguments):
    traces.append(name)
    return function(*arguments)

  return counted


class TestGeneration:
  """In a process `inference.Stages` is the key of its programs."""

  @pytest.mark.parametrize("key", SAMPLING_CHANGES)
  def test_what_they_compute_with_makes_another_program(
    self, tiny_model, stages, key
  ):
    changed = _sampling_stages(tiny_model, {key: SAMPLING_CHANGES[key]})
    assert changed != stages

  def test_the_same_config_shares_its_programs(self, tiny_model, stages):
    again = _sampling_stages(tiny_model)
    assert again == stages
    assert hash(again) == hash(stages)


def _sampling_stages(folder, changes: dict | None = None) -> inference.Stages:
  config = tiny.make_config(folder, changes)
  model = model_setup.build(config)
  return inference.make_stages(config, model.modules, model.rollout)
