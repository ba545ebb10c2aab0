"""Tests of the analytic costs against numbers worked out by hand, and of reports."""

import types

import jax
import pytest

from configs import r3_geneval
from r3jax.aot import hlo
from r3jax.aot import measure
from r3jax.aot import programs
from r3jax.aot import report
from r3jax.aot import search
from r3jax.costs import chips
from r3jax.costs import count as count_lib
from r3jax.model import architecture
from r3jax.parallel import meshes
from r3jax.parallel import sharding
from r3jax.sequence import segments

SMALL = architecture.LLMConfig(
  hidden_size=8,
  intermediate_size=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  vocab_size=10,
)
EXPERT = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16  # q, k, v, o; gate, up, down
LAYOUT = segments.Layout(
  (
    segments.text("prompt", 3),
    segments.image("draft", "noise", (1, 2), ("prompt",)),
  )
)


class TestForward:
  def test_counts_products_and_visible_pairs(self):
    found = count_lib.forward(
      SMALL, LAYOUT, ("draft",), ("prompt",), rows=5, copies=2
    )
    pairs = 4 * (3 + 4)  # four slots see the prompt and each other
    assert found.flops == 3 * 5 * (2 * EXPERT * 4 + 4 * 8 * pairs)
    # both experts, bfloat16, two copies
    assert found.read == 3 * 2 * 2 * EXPERT * 2

  def test_text_is_causal_and_reads_one_expert(self):
    found = count_lib.forward(SMALL, LAYOUT, ("prompt",), (), rows=1, copies=1)
    assert found.flops == 3 * (2 * EXPERT * 3 + 4 * 8 * 6)
    assert found.read == 3 * 2 * EXPERT


class TestCost:
  def test_seconds_are_those_of_the_slower_part(self):
    chip = chips.Chip(1, 100.0, 10.0, 1.0, ())
    assert count_lib.Cost(400.0, 10.0).seconds(chip, 2) == 2.0
    assert count_lib.Cost(400.0, 100.0).seconds(chip, 2) == 5.0


class TestChips:
  @pytest.mark.parametrize("name", ["v7:2x2", "v5p", ""])
  def test_unknown_topology_lists_the_known(self, name):
    with pytest.raises(
      ValueError, match="must be CHIP:SHAPE.*v5p:4x4x4.*tpu7x:2x2x1"
    ):
      chips.of_topology(name)


class TestReport:
  def test_memory_adds_up(self):
    analysis = types.SimpleNamespace(
      output_size_in_bytes=50,
      alias_size_in_bytes=40,
      temp_size_in_bytes=300,
      generated_code_size_in_bytes=7,
      argument_size_in_bytes=110,
    )
    found = report.memory(
      analysis, {"a": 60, "b": 45, "optimizer, not an argument": 20}, beside=20
    )
    assert found == {
      "a": 60,
      "b": 45,
      "optimizer, not an argument": 20,
      "padding of arguments": 5,
      "temporaries": 300,
      "results": 10,
      "program": 7,
      "peak": 447,
    }

  def test_links_send_a_sum_twice(self):
    totals = {
      "all-reduce": {"runs": 3, "bytes": 100},
      "all-gather": {"runs": 1, "bytes": 40},
    }
    assert report.on_links(totals, chips.Chip(1, 1.0, 1.0, 24.0, ())) == 10.0

  @pytest.mark.parametrize(
    "peak, problem", [(10, ""), (11, "draft needs 0.0 GiB")]
  )
  def test_largest_program_decides(self, peak, problem):
    held = {"weights": 4, "temporaries": peak - 4, "peak": peak}
    found = {
      "hbm": 10,
      "mesh": {"fsdp": 1, "tensor": 1},
      "programs": {"look": {"memory": {"peak": 3}}, "draft": {"memory": held}},
    }
    assert report.largest(found) == ("draft", peak)
    assert report.problem(found, "draft").startswith(problem) and bool(
      report.problem(found, "draft")
    ) == bool(problem)

  def test_compilers_message_is_read(self):
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.50G of 15.75G hbm. Exceeded by 18.75G."
    assert report.out_of_memory(text) == (int(34.5 * 2**30), int(15.75 * 2**30))
    other = "Ran out of memory on HBM, the total memory required for HLO temporaries (34.48G) exceeds available HBM (31.25G)."
    assert report.out_of_memory(other) == (
      int(34.48 * 2**30),
      int(31.25 * 2**30),
    )
    assert report.out_of_memory("Check failed") is None

  def test_advice_names_the_knob_and_by_how_much(self):
    mesh = {"fsdp": 2, "tensor": 4}
    assert "raise step.micro_batches about 4 times" in report.advice(
      50 * 2**30, 16 * 2**30, 4 * 2**30, mesh
    )
    assert "raise mesh.fsdp * mesh.tensor (2 * 4) 3 times" in report.advice(
      50 * 2**30, 16 * 2**30, 20 * 2**30, mesh
    )

  def test_traffic_sums_by_kind(self):
    one = hlo.Collective("all-gather", (("bf16", (2, 3)),), (), 5)
    other = hlo.Collective("all-gather", (("f32", (1,)), ("s32", ())), (), 1)
    assert report.traffic([one, other]) == {
      "all-gather": {"runs": 6, "bytes": 5 * 12 + 8}
    }


class TestCopies:
  @pytest.mark.parametrize(
    "mlp, number", [((), 64), (("tensor",), 16), (("fsdp", "tensor"), 8)]
  )
  def test_are_the_chips_that_rules_do_not_split_over(self, mlp, number):
    assert (
      count_lib.copies(
        sharding.Rules.of({"mlp": mlp}), {"data": 8, "fsdp": 2, "tensor": 4}
      )
      == number
    )


class TestSearch:
  def test_meshes_are_all_splits_that_the_heads_allow(self):
    found = [tuple(mesh.values()) for mesh in search.meshes(8, kv_heads=4)]
    assert found == [
      (8, 1, 1),
      (4, 2, 1),
      (2, 4, 1),
      (1, 8, 1),
      (4, 1, 2),
      (2, 2, 2),
      (1, 4, 2),
      (2, 1, 4),
      (1, 2, 4),
    ]

  @pytest.mark.parametrize(
    "replicas, numbers",
    [(4, [1, 2, 4, 8, 16]), (2, [1, 2, 4, 8, 16, 32]), (3, [])],
  )
  def test_micro_batches_are_those_that_split_the_samples(
    self, replicas, numbers
  ):
    assert search.micro_batches(4, 16, replicas) == numbers

  @pytest.mark.parametrize(
    "passing, room, wanted",
    [(10, 9, 2), (31, 10, 4), (1000, 10, 16), (10, -5, 16)],
  )
  def test_next_number_is_the_one_that_would_fit(self, passing, room, wanted):
    assert search.more([1, 2, 4, 8, 16], 1, passing, room) == wanted

  def test_nothing_follows_the_last(self):
    assert search.more([1, 2], 2, 10, 5) is None


class TestTarget:
  def test_candidates_start_with_one_micro_batch_whatever_the_config_says(self):
    config = r3_geneval.get_config("v6e-64")
    target = measure.Target("step", config, "v6e:8x8", None)
    tried = target.on({"data": 64, "fsdp": 1, "tensor": 1})
    assert (tried.config.step.micro_batches, tried.config.mesh.data) == (1, 64)
    assert (config.step.micro_batches, config.mesh.data) == (8, 2)


class TestProgram:
  @staticmethod
  def step(config, layers=None):
    built = programs.step(
      config, meshes.make_mesh_of(jax.devices(), 2, 2, 2), layers
    )
    return built, built.programs["step"]

  @pytest.fixture(scope="class")
  @classmethod
  def config(cls):
    config = r3_geneval.get_config().unlock()
    config.model.attention = "xla"
    return config

  def test_full_size_is_the_released_one(self, config):
    built, program = self.step(config)
    state, frozen, prompts, _ = program.arguments
    llm = architecture.bagel_7b().llm
    assert (built.layers, built.samples, llm.vocab_size) == (28, 128, 152064)
    gate = state.policy["layers"]["gen"]["gate"]["kernel"]
    assert (gate.shape, gate.dtype, gate.sharding.shard_shape(gate.shape)) == (
      (28, 3584, 18944),
      "float32",
      (28, 1792, 9472),
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(state.policy))
    layers = (
      28
      * 2
      * (
        count_lib.expert_parameters(llm)
        + (28 + 4 + 4) * 128
        + 2 * 3584
        + 2 * 128
      )
    )
    rest = sum(
      leaf.size
      for name, part in state.policy.items()
      if name != "layers"
      for leaf in jax.tree.leaves(part)
    )
    assert count == layers + rest and 14.1e9 < count < 14.3e9
    assert state.policy["embed_tokens"]["embedding"].shape == (152064, 3584)
    assert frozen.reference["lm_head"]["kernel"].dtype == "bfloat16"
    assert prompts.ids.shape == (8, 96)
    held = program.bytes_by_kind()
    assert held["optimizer"] == pytest.approx(
      2 * held["trained parameters"], rel=1e-6
    )
    assert held["reference"] == pytest.approx(
      held["trained parameters"] / 2, rel=1e-3
    )
    # four shards; norms are whole
    assert held["trained parameters"] == pytest.approx(4 * count / 4, rel=5e-3)

  def test_lora_trains_adapters_beside_a_narrow_base(self, config):
    config = config.copy_and_resolve_references()
    config.model.lora.rank = 16
    _, program = self.step(config, layers=2)
    state, frozen, _, _ = program.arguments
    names = {
      path[-1].key
      for path, _ in jax.tree_util.tree_leaves_with_path(state.policy)
    }
    assert names == {"lora_a", "lora_b"} and frozen.reference == {}
    assert frozen.base["layers"]["gen"]["gate"]["kernel"].dtype == "bfloat16"
    held = program.bytes_by_kind()
    assert (
      held["optimizer"] < held["base of adapters"] / 10
      and held["reference"] == 0
    )

  def test_evaluation_runs_beside_the_state_of_training(self, config):
    step_held = self.step(config, layers=2)[1].bytes_by_kind()
    built = programs.evaluation(
      config, meshes.make_mesh_of(jax.devices(), 2, 2, 2), layers=2
    )
    draft, revise = built.programs["draft"], built.programs["revise"]
    assert (
      draft.bytes_by_kind().items()
      >= {
        name: size for name, size in step_held.items() if name != "prompts"
      }.items()
    )
    assert draft.beside() == step_held["optimizer"] + step_held["reference"]
    images = revise.arguments[-1].chain.images
    assert (
      images.shape == (64, 512, 512, 3)
      and images.sharding.shard_shape(images.shape)[0] == 32
    )
    assert built.samples == 64

  def test_generation_holds_weights_split_as_rollouts_want_them(self, config):
    built = programs.generation(
      config, meshes.make_mesh_of(jax.devices(), 1, 2, 4), layers=2
    )
    assert list(built.programs) == [
      "think",
      "draft",
      "look",
      "reflect",
      "refine",
    ]
    policy = built.programs["draft"].arguments[0]
    gate = policy["layers"]["gen"]["gate"]["kernel"]
    # whole over fsdp
    assert (gate.dtype, gate.sharding.shard_shape(gate.shape)) == (
      "bfloat16",
      (2, 3584, 18944 // 4),
    )
