"""Tests of runs that train only adapters: step, workdir as a model, refusals, whole runs."""

import json
import pathlib
import shutil

from etils import epath
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from r3jax import inference
from r3jax import types
from r3jax.checkpoint import pretrained
from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.rl import mapped
from r3jax.run import loop
from r3jax.run import sessions
from r3jax.run import setup
from r3jax.run import summary
from r3jax.run import workdir as workdir_lib
from tests import tiny

TARGETS = {"und": ("q", "v", "down"), "gen": ("o", "gate")}
LORA = {"model.lora.rank": 2, "model.lora.alpha": 6.0} | {
  f"model.lora.{key}": names for key, names in TARGETS.items()
}
ADAPTERS = {
  f"layers/{expert}/{name}/{leaf}"
  for expert, names in TARGETS.items()
  for name in names
  for leaf in ("lora_a", "lora_b")
}


def _flat(tree) -> dict[str, np.ndarray]:
  return flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def _size(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _same(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    found,
    expected,
  )


@pytest.fixture(scope="module")
def bench(tiny_model):
  # Without guidance there is less to compile.
  return tiny.make_bench(
    tiny_model,
    changes=LORA | {"optimizer.warmup_updates": 0, "reason.text_scale": 1.0},
  )


@pytest.fixture(scope="module")
def updates(bench):
  """State and metrics after each of two updates on the same drafts."""
  stages, found, drafts = (
    mapped.split(bench.stages, bench.mesh),
    [],
    tiny.drafts(bench),
  )
  value = np.linspace(0, 1, len(drafts.format_reward), dtype=np.float32)
  score = types.Score(value, np.ones_like(value, bool), {"strict": value})
  with jax.set_mesh(bench.mesh):
    state = bench.state()
    for _ in range(2):
      state, metrics = stages.learn_to_reason(
        state, bench.frozen, drafts, score
      )
      found.append(jax.device_get((state, metrics)))
  return found


class TestStep:
  def test_state_holds_adapters_and_their_moments_alone(self, bench):
    state, frozen = bench.state(), bench.frozen
    assert set(_flat(state.policy)) == ADAPTERS
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert _size(moments) == 2 * _size(state.policy)  # AdamW
    assert _size(frozen.base) > 10 * _size(state.policy)
    assert frozen.reference == {}
    _same(frozen.whole(frozen.reference), frozen.base)

  def test_policy_starts_as_its_reference_and_leaves_it(self, updates):
    (_, first), (_, second) = updates
    for kl in ("text_kl", "image_kl"):
      assert abs(first[kl]) < 1e-9 < second[kl]

  def test_both_experts_adapters_learn(self, bench, updates):
    start, (first, _), (second, _) = _flat(bench.policy), *updates
    once, twice = _flat(first.policy), _flat(second.policy)
    for path in ADAPTERS:
      # Where B is zero A has no gradient: it moves from the second update on.
      assert (once[path] != start[path]).any() == path.endswith("lora_b"), path
      assert (twice[path] != once[path]).any(), path

  @pytest.mark.slow
  def test_two_iterations_on_a_mesh_equal_those_of_one_device(self, tiny_model):
    with jax.enable_x64(True):
      changes = LORA | {"model.dtype": "float64"}
      found, expected = (
        tiny.make_bench(tiny_model, shape, changes).run(2)
        for shape in ((2, 2, 2), (1, 1, 1))
      )
    for name in ("reason_text", "reason_image", "edit_text", "edit_image"):
      # sampled and scored with adapters that have learned
      assert found[-1][1][f"mismatch/{name}"] < 1e-8
    for (state, metrics, _), (one_state, one_metrics, _) in zip(
      found, expected
    ):

      def check(a, b):
        return np.testing.assert_allclose(a, b, rtol=2e-7, atol=1e-8)

      jax.tree.map(check, (state, metrics), (one_state, one_metrics))


class TestParameters:
  def test_counts_what_is_trained_and_all(self, bench):
    adapters, whole = (
      _size(bench.policy),
      _size((bench.policy, bench.frozen.base, bench.frozen.towers)),
    )
    assert summary.count_parameters(bench.session, bench.policy) == {
      "trainable": adapters,
      "all": whole,
    }


class TestPrecision:
  def test_base_is_in_the_dtype_computed_in_and_adapters_in_float32(
    self, tiny_model
  ):
    experiment = setup.build(
      tiny.make_config(tiny_model, LORA | {"model.dtype": "bfloat16"})
    )
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    base, towers = experiment.load(mesh)
    adapters = jax.eval_shape(
      lambda: parameters.init_adapters(experiment.modules.bagel, mesh, 0)
    )

    def dtypes(tree):
      return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}

    # norms
    assert (dtypes(base), dtypes(towers), dtypes(adapters)) == (
      {"bfloat16"},
      {"bfloat16", "float32"},
      {"float32"},
    )


@pytest.fixture(scope="module")
def adapters(bench):
  """Adapters with A and B drawn."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), bench.policy
  )


def _merged(policy, adapters, scale: float):
  """Returns W + scale A B in float64, layer by layer."""
  found, updates = _flat(policy), _flat(adapters)
  for path in {path.rpartition("/")[0] for path in updates}:
    a, b = (
      np.float64(updates[f"{path}/{leaf}"]) for leaf in ("lora_a", "lora_b")
    )
    product = np.stack([np.tensordot(*pair, 1) for pair in zip(a, b)])
    found[f"{path}/kernel"] = found[f"{path}/kernel"] + scale * product
  return found


@pytest.fixture(scope="module")
def workdir(tiny_model, adapters, tmp_path_factory):
  return tiny.write_workdir(
    tmp_path_factory.mktemp("lora") / "run",
    tiny.make_config(tiny_model, LORA),
    adapters,
  )


class TestWorkdir:
  @staticmethod
  def _load(folder, dtype=jnp.float32, shape=(1, 1, 1)):
    found, mesh = (
      pretrained.find(str(folder)),
      meshes.make_mesh_on(jax.devices()[: np.prod(shape)], *shape),
    )
    return found.load(network.Bagel(found.sizes), mesh, dtype)

  @staticmethod
  def _close(found, expected, tolerance=1e-6):
    found = _flat(found)
    assert set(found) == set(expected)
    for path in found:
      np.testing.assert_allclose(
        found[path],
        expected[path],
        atol=tolerance,
        rtol=tolerance,
        err_msg=path,
      )

  def test_is_an_ordinary_model_with_the_updates_merged(
    self, workdir, tiny_model, adapters
  ):
    start, towers = self._load(tiny_model)
    policy, found_towers = self._load(workdir, shape=(2, 2, 2))
    self._close(policy, _merged(start, adapters, 3.0))
    _same(found_towers, towers)
    assert (
      np.abs(
        _flat(policy)["layers/gen/gate/kernel"]
        - _flat(start)["layers/gen/gate/kernel"]
      ).max()
      > 0.1
    )

  def test_is_merged_before_it_is_rounded(self, workdir, tiny_model, adapters):
    expected = _merged(self._load(tiny_model)[0], adapters, 3.0)
    policy = _flat(self._load(workdir, jnp.bfloat16)[0])
    for path in ("layers/und/q/kernel", "layers/gen/o/kernel"):
      rounded = np.asarray(jnp.float32(expected[path]).astype(jnp.bfloat16))
      # one is summed in float32, the other in float64
      assert np.mean(policy[path] == rounded) > 0.999

  def test_is_exported_merged(self, workdir, tiny_model, adapters, tmp_path):
    found, mesh = (
      pretrained.find(str(workdir)),
      meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1),
    )
    # as launch/convert.py does
    weights = found.weights(
      pretrained.shardings(network.Bagel(found.sizes), mesh), None
    )
    pretrained.save(weights, found, tmp_path / "out", "bagel")
    self._close(
      self._load(tmp_path / "out")[0],
      _merged(self._load(tiny_model)[0], adapters, 3.0),
    )

  def test_a_later_run_of_adapters_adds_its_own(
    self, workdir, tiny_model, adapters, tmp_path
  ):
    once = flax.traverse_util.unflatten_dict(
      _merged(self._load(tiny_model)[0], adapters, 3.0), sep="/"
    )
    config = tiny.make_config(workdir, LORA | {"model.lora.alpha": 2.0})
    again = tiny.write_workdir(tmp_path / "again", config, adapters)
    self._close(self._load(again)[0], _merged(once, adapters, 1.0))

  def test_a_later_run_of_the_whole_policy_replaces_it(
    self, workdir, adapters, tmp_path
  ):
    found = pretrained.find(
      str(
        tiny.write_workdir(
          tmp_path / "full", tiny.make_config(workdir), adapters
        )
      )
    )
    assert (
      found.adapted == ()
      and found.trained == tmp_path / "full" / "checkpoints" / "7" / "state"
    )

  def test_has_a_fingerprint_of_its_own(self, workdir, tiny_model, tmp_path):
    prints = [
      pretrained.find(str(folder)).fingerprint()
      for folder in (workdir, tiny_model)
    ]
    assert prints[0] != prints[1]
    shutil.copytree(workdir, tmp_path / "copy")
    assert pretrained.find(str(tmp_path / "copy")).fingerprint() == prints[0]


class TestBase:
  """A workdir of adapters is read with the base that they were trained on, or not at all."""

  @pytest.fixture
  def run(self, tiny_model, adapters, tmp_path, monkeypatch):
    """A workdir, and `here/model`, its base by a relative path and by an absolute one."""
    shutil.copytree(tiny_model, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    folder = tiny.write_workdir(
      tmp_path / "run", tiny.make_config(pathlib.Path("model"), LORA), adapters
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["weights"] = pretrained.find("model").fingerprint()
    config["model_path"] = str(tmp_path / "here" / "model")
    path.write_text(json.dumps(config))
    return folder

  @staticmethod
  def _change(folder):
    path = folder / "ema.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["llm2vae.bias"] += 1
    safetensors.numpy.save_file(tensors, path)

  def test_is_found_by_its_absolute_path_from_elsewhere(
    self, run, tiny_model, tmp_path, monkeypatch
  ):
    shutil.copytree(tiny_model, tmp_path / "there" / "model")
    self._change(tmp_path / "there" / "model")
    monkeypatch.chdir(tmp_path / "there")
    found = pretrained.find(str(run))
    assert found.folder == tmp_path / "here" / "model"

  def test_moved_base_is_found_where_the_relative_path_leads(
    self, run, tmp_path, monkeypatch
  ):
    (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert pretrained.find(str(run)).folder == epath.Path("model")

  def test_other_weights_in_its_place_are_refused(self, run, tmp_path):
    self._change(tmp_path / "here" / "model")
    with pytest.raises(
      ValueError,
      match="needs the model that it was trained from.*model has the fingerprint",
    ):
      pretrained.find(str(run))
    with pytest.raises(ValueError, match="needs the model"):
      (run / "training_prompts.jsonl").write_text("")
      workdir_lib.trained_on(str(run))

  def test_base_that_is_gone_is_refused(self, run, tmp_path):
    (tmp_path / "here" / "model").rename(tmp_path / "gone")
    with pytest.raises(
      ValueError, match="seen: model: a model must be in a folder that exists"
    ):
      pretrained.find(str(run))


class TestRefusals:
  @pytest.mark.parametrize(
    "changes, message",
    [
      (
        {"model.lora.rank": -1},
        "model.lora.rank must be a whole number in 0..65536; got -1",
      ),
      (
        {"model.lora.rank": 33},
        r"lora.rank \(33\) must be at most the smaller side .* q 32x32, .*v 32x16",
      ),
      (
        {"model.lora.und": ("lm_head",)},
        r"model.lora.und must be a tuple in which every item is one of 'q', .*got \('lm_head',\)",
      ),
      (
        {"model.lora.und": (), "model.lora.gen": ()},
        "must name a projection where model.lora.rank is above 0",
      ),
      (
        {"optimizer.freeze_und": True},
        r"model.lora.und must be \(\) where optimizer.freeze_und is set",
      ),
    ],
  )
  def test_a_config_that_makes_no_sense_is_refused(
    self, tiny_model, tmp_path, changes, message
  ):
    config = tiny.make_config(
      tiny_model, {"mesh.data": 8, "eval.batch_size": 8} | LORA | changes
    )
    with pytest.raises(ValueError, match=message):
      sessions.prepare(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

  def test_a_run_with_another_rank_is_refused(
    self, tiny_model, tmp_path, monkeypatch
  ):
    # what it would start from
    monkeypatch.setattr(setup.Experiment, "start", lambda *_: ({}, None))

    def config(rank):
      return tiny.make_config(
        tiny_model,
        {"mesh.data": 8, "eval.batch_size": 8}
        | LORA
        | {"model.lora.rank": rank},
      )

    sessions.prepare(config(2), str(tmp_path))
    with pytest.raises(
      ValueError, match=r"\n  model.lora.rank: 2 there, 3 now$"
    ):
      sessions.prepare(config(3), str(tmp_path))


@pytest.mark.slow
class TestRun:
  def test_resumes_and_is_drawn_with_as_it_was_evaluated(
    self, tiny_model, tmp_path
  ):
    changes = LORA | {
      "mesh.data": 2,
      "mesh.fsdp": 2,
      "mesh.tensor": 2,
      "checkpoint.every": 1,
    }

    def config(steps, mode):
      return tiny.make_config(
        tiny_model, changes | {"total_steps": steps, "step.mode": mode}
      )

    session, policy = sessions.prepare(
      config(2, "fused"), str(tmp_path / "run")
    )
    whole, start = loop.run(session, policy), _size(policy)
    assert whole["parameters"]["trainable"] == start
    loop.run(*sessions.prepare(config(1, "split"), str(tmp_path / "parts")))
    parts = loop.run(
      *sessions.prepare(config(2, "split"), str(tmp_path / "parts"))
    )
    np.testing.assert_allclose(
      parts["scores"]["draft"]["after"],
      whole["scores"]["draft"]["after"],
      atol=1e-3,
    )
    # The merged model draws what the evaluator drew with the adapters beside the base.
    _, state = training.Checkpoints(
      tmp_path / "run" / "checkpoints", 1, 2
    ).restore(
      jax.eval_shape(session.init, policy),
      pipeline.prompt_iterator(len(session.experiment.train), 2, 0),
    )
    with jax.set_mesh(session.mesh):
      (first, *_) = session.evaluation.run(
        session.frozen.whole(state.policy),
        session.frozen.towers,
        epath.Path(tmp_path / "again"),
        2,
      )
    model = inference.load(
      tiny.make_config(tmp_path / "run", changes), session.mesh
    )
    prompt, seed = session.experiment.heldout[0], session.config.eval.seed
    (sample,) = model.generate(prompt.text, rounds=1, seed=seed, number=0)
    drawn, expected = (
      np.int32(sample.turns[0].image),
      np.int32(Image.open(tmp_path / "again" / first.turns[0].image)),
    )
    assert np.mean(np.abs(drawn - expected)) < 0.1
