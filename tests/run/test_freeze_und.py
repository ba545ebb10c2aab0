"""Tests of runs that keep the und expert: what is trained, clipped, held and read back."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3jax import types
from r3jax.checkpoint import pretrained
from r3jax.model import low_rank
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes
from r3jax.rl import mapped
from r3jax.rl import train_state
from r3jax.run import summary
from tests import tiny

RATE = 10.0
CLIP_NORM = 1e-4  # below every gradient
CHANGES = {
  # With so large an eps Adam's first step is the rate times the clipped gradient.
  "optimizer.eps": 1.0,
  "optimizer.clip_norm": CLIP_NORM,
  "optimizer.und_learning_rate": RATE,
  "optimizer.gen_learning_rate": RATE,
  "optimizer.warmup_updates": 0,
  # Without guidance there is less to compile.
  "reason.text_scale": 1.0,
}


def _flat(tree) -> dict[str, np.ndarray]:
  return flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def _size(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _same(first, second):
  def check(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

  jax.tree.map(check, first, second)


def _bench(folder, freeze_und: bool) -> tiny.Bench:
  changes = CHANGES | {"optimizer.freeze_und": freeze_und}
  return tiny.make_bench(folder, changes=changes)


@pytest.fixture(scope="module", name="bench")
def fixture_bench(tiny_model):
  return _bench(tiny_model, freeze_und=True)


@pytest.fixture(scope="module", name="free_bench")
def fixture_free_bench(tiny_model):
  return _bench(tiny_model, freeze_und=False)


def _learn(bench: tiny.Bench):
  """Compiles one update; returns its memory, the state after it, and its metrics."""
  drafts = tiny.drafts(bench)
  value = np.linspace(0, 1, len(drafts.format_reward), dtype=np.float32)
  score = types.Score(value, np.ones_like(value, bool), {"strict": value})
  programs = mapped.split(bench.stages, bench.mesh)
  with jax.set_mesh(bench.mesh):
    arguments = (bench.state(), bench.frozen, drafts, score)
    program = programs.learn_to_reason.lower(*arguments).compile()
    state, metrics = program(*arguments)
  memory = program.memory_analysis()
  return memory, jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module", name="update")
def fixture_update(bench):
  return _learn(bench)


@pytest.fixture(scope="module", name="free_update")
def fixture_free_update(free_bench):
  return _learn(free_bench)


class TestStart:
  def test_gen_is_trained_and_und_held_beside_it(self, bench, free_bench):
    und, gen = parameters.split_experts(free_bench.policy)
    frozen = bench.frozen
    _same(bench.policy, gen)
    _same(frozen.base, und)
    _same(frozen.reference, gen)
    _same(frozen.whole(bench.policy), free_bench.policy)
    moments = [
      leaf for leaf in jax.tree.leaves(bench.state().opt_state) if leaf.ndim
    ]
    assert _size(moments) == 2 * _size(gen)

  def test_counts_gen_alone_as_trainable(self, bench, free_bench):
    _, gen = parameters.split_experts(free_bench.policy)
    counts = summary.count_parameters(bench.session, bench.policy)
    assert counts["trainable"] == _size(gen)
    assert (
      counts["all"]
      == summary.count_parameters(free_bench.session, free_bench.policy)["all"]
    )

  def test_und_has_the_dtype_that_is_computed_in(self, tiny_model):
    bench = tiny.make_bench(
      tiny_model,
      changes={"model.dtype": "bfloat16", "optimizer.freeze_und": True},
    )
    dtypes = {
      path: leaf.dtype.name for path, leaf in _flat(bench.frozen.base).items()
    }
    assert dtypes["layers/und/q/kernel"] == "bfloat16"
    # Norms read theirs in float32 whatever the rest computes in.
    assert dtypes["norm/und/scale"] == "float32"
    trained = {leaf.dtype.name for leaf in jax.tree.leaves(bench.policy)}
    assert trained == {"float32"}


class TestUpdate:
  def test_is_clipped_by_the_norm_of_gen(self, bench, update, free_update):
    _, state, metrics = update
    _, free_state, free_metrics = free_update
    assert metrics["gradient_norm"] == pytest.approx(
      free_metrics["gradient_norm_gen"], rel=1e-4
    )
    assert metrics["gradient_norm_und"] == 0
    change = jax.tree.map(np.subtract, state.policy, bench.policy)
    assert optax.tree.norm(change) == pytest.approx(RATE * CLIP_NORM, rel=2e-2)
    # Clipped by the norm of both experts, gen moves less.
    assert free_metrics["gradient_norm_und"] > 0
    _, free_gen = parameters.split_experts(free_state.policy)
    free_change = jax.tree.map(np.subtract, free_gen, bench.policy)
    share = free_metrics["gradient_norm_gen"] / free_metrics["gradient_norm"]
    assert optax.tree.norm(free_change) == pytest.approx(
      RATE * CLIP_NORM * share, rel=2e-2
    )

  def test_holds_no_gradient_of_und(self, bench, update, free_update):
    memory, *_ = update
    free_memory, *_ = free_update
    und_bytes = 4 * _size(bench.frozen.base)
    # Two moments and the reference are no longer arguments, new parameters and moments no longer
    # results, and the gradient is no temporary.
    arguments = (
      free_memory.argument_size_in_bytes - memory.argument_size_in_bytes
    )
    outputs = free_memory.output_size_in_bytes - memory.output_size_in_bytes
    assert arguments == pytest.approx(3 * und_bytes, rel=0.01)
    assert outputs == pytest.approx(3 * und_bytes, rel=0.01)
    assert memory.temp_size_in_bytes < free_memory.temp_size_in_bytes


@pytest.fixture(scope="module", name="drawn")
def fixture_drawn(free_bench):
  """A whole policy that differs from the model's in every leaf."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

  return jax.tree.map(draw, jax.device_get(free_bench.policy))


def _load(folder) -> types.Params:
  model = pretrained.find(str(folder))
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  policy, _ = model.load(network.Bagel(model.sizes), mesh)
  return policy


FREEZE = {"optimizer.freeze_und": True}


@pytest.fixture(scope="module", name="workdir")
def fixture_workdir(tiny_model, drawn, tmp_path_factory):
  _, gen = parameters.split_experts(drawn)
  config = tiny.make_config(tiny_model, FREEZE)
  folder = tmp_path_factory.mktemp("freeze") / "run"
  return tiny.write_workdir(folder, config, gen)


class TestWorkdir:
  """A workdir is a model: gen from its last checkpoint, und from where the run started."""

  def test_joins_the_trained_gen_and_the_und_of_its_start(
    self, workdir, free_bench, drawn
  ):
    und, _ = parameters.split_experts(free_bench.policy)
    _, gen = parameters.split_experts(drawn)
    _same(_load(workdir), low_rank.join(und, gen))

  def test_has_a_fingerprint_of_its_own(self, workdir, tiny_model):
    fingerprints = [
      pretrained.find(str(folder)).fingerprint()
      for folder in (workdir, tiny_model)
    ]
    assert fingerprints[0] != fingerprints[1]

  def test_und_of_an_earlier_run_is_kept(self, tiny_model, drawn, tmp_path):
    whole = tiny.write_workdir(
      tmp_path / "whole", tiny.make_config(tiny_model), drawn
    )
    und, gen = parameters.split_experts(drawn)
    moved = jax.tree.map(lambda leaf: leaf + 1, gen)
    later = tiny.write_workdir(
      tmp_path / "later", tiny.make_config(whole, FREEZE), moved
    )
    _same(_load(later), low_rank.join(und, moved))

  def test_adapters_of_an_earlier_run_stay_in_und_alone(
    self, tiny_model, free_bench, drawn, tmp_path
  ):
    lora = {
      "model.lora.rank": 1,
      "model.lora.alpha": 1.0,
      "model.lora.und": ("o",),
      "model.lora.gen": ("o",),
    }
    policy = jax.device_get(free_bench.policy)
    layers = {}
    for expert in ("und", "gen"):
      kernel = policy["layers"][expert]["o"]["kernel"]
      a = np.ones((*kernel.shape[:-1], 1), np.float32)
      b = np.ones((kernel.shape[0], 1, kernel.shape[-1]), np.float32)
      layers[expert] = {"o": {"lora_a": a, "lora_b": b}}
    adapted = tiny.write_workdir(
      tmp_path / "lora", tiny.make_config(tiny_model, lora), {"layers": layers}
    )
    _, gen = parameters.split_experts(drawn)
    later = tiny.write_workdir(
      tmp_path / "later", tiny.make_config(adapted, FREEZE), gen
    )
    loaded = _flat(_load(later))
    und, _ = parameters.split_experts(policy)
    expected = _flat(low_rank.join(und, gen))
    # A B is 1 everywhere.
    expected["layers/und/o/kernel"] = expected["layers/und/o/kernel"] + 1
    for path, leaf in expected.items():
      np.testing.assert_allclose(loaded[path], leaf, rtol=1e-6, err_msg=path)

  def test_a_later_run_of_the_whole_policy_replaces_both(
    self, workdir, drawn, tmp_path
  ):
    moved = jax.tree.map(lambda leaf: leaf + 1, drawn)
    later = tiny.write_workdir(
      tmp_path / "later", tiny.make_config(workdir), moved
    )
    _same(_load(later), moved)


class TestSplitExperts:
  def test_names_the_parameters_as_their_labels_do(self, free_bench):
    und, gen = parameters.split_experts(free_bench.policy)
    labels = _flat(train_state.expert_labels(free_bench.policy))
    for part, expert in ((und, "und"), (gen, "gen")):
      assert {labels[path] for path in _flat(part)} == {expert}
    assert len(_flat(und)) + len(_flat(gen)) == len(labels)
    assert jnp.size(gen["llm2vae"]["kernel"])
