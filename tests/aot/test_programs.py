"""Tests of the programs of a run as shapes, of reports about them and of the search."""

import dataclasses
import re
import types

import jax
import pytest

from configs import r3_geneval
from r3jax.aot import child
from r3jax.aot import hlo
from r3jax.aot import measure
from r3jax.aot import programs
from r3jax.aot import report
from r3jax.aot import results
from r3jax.aot import search
from r3jax.costs import chips
from r3jax.costs import count as count_lib
from r3jax.model import architecture
from r3jax.parallel import meshes


class TestResults:
  def test_memory_adds_up(self):
    analysis = types.SimpleNamespace(
      output_size_in_bytes=50,
      alias_size_in_bytes=40,
      temp_size_in_bytes=300,
      generated_code_size_in_bytes=7,
      argument_size_in_bytes=110,
    )
    memory = results.memory_by_kind(
      analysis, {"a": 60, "b": 45, "optimizer, not an argument": 20}, beside=20
    )
    assert memory == {
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
      "all-reduce": results.Traffic(runs=3, bytes=100),
      "all-gather": results.Traffic(runs=1, bytes=40),
    }
    chip = chips.Chip(1, 1.0, 1.0, 24.0, ())
    assert results.link_seconds(totals, chip) == 10.0

  def test_traffic_sums_by_kind(self):
    matrix = hlo.Shape("bf16", (2, 3))
    vector, scalar = hlo.Shape("f32", (1,)), hlo.Shape("s32", ())
    in_loop = hlo.Collective("all-gather", (matrix,), "a", (), 5)
    outside = hlo.Collective("all-gather", (vector, scalar), "b", (), 1)
    assert results.traffic([in_loop, outside]) == {
      "all-gather": results.Traffic(runs=6, bytes=5 * 12 + 8)
    }

  def test_causes_are_sorted_by_the_time_of_the_links(self):
    gathered = hlo.Shape("bf16", (3,))
    reduced = hlo.Shape("bf16", (2,))
    chip = dataclasses.replace(chips.CHIPS["v6e"], links=2.0)
    causes = results.causes(
      [
        hlo.Collective("all-gather", (gathered,), "update/q", (), 4),
        hlo.Collective("all-reduce", (reduced,), "update/o", (), 2),
        hlo.Collective("all-reduce", (reduced,), "update/o", (), 3),
      ],
      chip,
    )
    # An all-reduce sends its result twice.
    assert causes == [
      results.Cause("update", "all-reduce", "update/o", 5, 20, 20.0),
      results.Cause("update", "all-gather", "update/q", 4, 24, 12.0),
    ]


def compilation(peak: int) -> results.Compilation:
  """Returns one of two programs, for a chip of 10 bytes."""
  look = results.CompiledProgram(1.0, {}, [], 0.5, {"peak": 3})
  memory = {"weights": 4, "temporaries": peak - 4, "peak": peak}
  traffic = {"all-gather": results.Traffic(2, 8)}
  causes = [results.Cause("reason", "all-gather", "q", 2, 8, 0.25)]
  draft = results.CompiledProgram(2.0, traffic, causes, 0.25, memory)
  return results.Compilation(
    topology="v5e:1x1",
    mesh={"data": 1, "fsdp": 1, "tensor": 1},
    layers=2,
    samples=3,
    micro_batches=4,
    hbm=10,
    held=4,
    stages={"reflect": results.StageCost(2e15, 3e12, 1.5)},
    programs={"look": look, "draft": draft},
  )


class TestReport:
  @pytest.mark.parametrize(
    "peak, problem", [(10, ""), (11, "draft needs 0.0 GiB")]
  )
  def test_largest_program_decides(self, peak, problem):
    found = compilation(peak)
    assert (found.largest, found.peak) == ("draft", peak)
    assert found.programs["draft"].held == 4
    assert report.problem(found).startswith(problem)
    assert bool(report.problem(found)) == bool(problem)

  def test_time_is_that_of_stages_and_links(self):
    assert compilation(10).roofline_seconds == 1.5
    assert compilation(10).seconds == 1.5 + 0.5 + 0.25

  def test_table_has_every_program_and_stage(self):
    lines = report.table(compilation(10)).splitlines()
    assert lines[0] == (
      "v5e:1x1, mesh {'data': 1, 'fsdp': 1, 'tensor': 1}, 2 layers, 3 images at once, "
      "4 micro-batches"
    )
    rows = [line.split() for line in lines]
    assert ["all-gather", "2", "0.00"] in rows
    assert ["reason:", "all-gather", "0.25", "2", "0.00", "q"] in rows
    assert ["reflect", "2.00", "3.00", "1.50"] in rows
    assert rows[-1] == ["together", "1.50"]
    assert sum(line.startswith("  of ") for line in lines) == 2

  def test_compilers_message_is_read(self):
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.50G of 15.75G hbm."
    assert report.out_of_memory(text) == (int(34.5 * 2**30), int(15.75 * 2**30))
    other = (
      "Ran out of memory on HBM, the total memory required for HLO temporaries (34.48G) "
      "exceeds available HBM (31.25G)."
    )
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


class TestChild:
  MESSAGE = "Used 34.50G of 15.75G hbm."

  def test_out_of_memory_says_what_to_change(self):
    before = child.Outcome(compilation(10), compiling="step")
    outcome = child.explain_abort(before, 1, self.MESSAGE)
    assert outcome.used == int(34.5 * 2**30)
    assert outcome.problem.startswith("step needs 34.5 GiB of a chip that has")

  def test_a_failed_check_is_shown(self):
    message = "first\nCheck failed: x == y\nlast"
    outcome = child.explain_abort(child.Outcome(), -6, message)
    assert (
      outcome.problem == "the compiler ended with code -6: Check failed: x == y"
    )
    silent = child.explain_abort(child.Outcome(), -9, "")
    assert silent.problem == "the compiler ended with code -9: no message"

  def test_refusal_of_the_child_comes_back(self):
    config = r3_geneval.get_config("shapes")
    target = measure.Target("step", config, "v9:2x2", None)
    outcome = child.run(child.Request(target))
    # the second without the extra aot
    assert re.search("v9:2x2|TPU support not installed", outcome.problem)
    assert outcome.compilation is None and outcome.used is None


class TestSearch:
  def test_meshes_are_all_splits_that_the_heads_allow(self):
    found = [tuple(mesh.values()) for mesh in search.meshes(8, num_kv_heads=4)]
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
    assert (config.step.micro_batches, config.mesh.data) == (2, 2)


class TestProgram:
  @staticmethod
  def step(config, layers=None):
    built = programs.step(
      config, meshes.make_mesh_on(jax.devices(), 2, 2, 2), layers
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

  def test_a_frozen_expert_is_held_once_and_narrow(self, config):
    config = config.copy_and_resolve_references()
    config.optimizer.freeze_und = True
    _, program = self.step(config, layers=2)
    state, frozen, _, _ = program.arguments
    assert "und" not in state.policy["layers"]
    assert "embed_tokens" not in state.policy
    assert frozen.base["layers"]["und"]["gate"]["kernel"].dtype == "bfloat16"
    assert "und" not in frozen.reference["layers"]
    held = program.bytes_by_kind()
    trained = held["trained parameters"]
    assert held["optimizer"] == pytest.approx(2 * trained, rel=1e-3)
    assert held["reference"] == pytest.approx(trained / 2, rel=1e-2)

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
      held["optimizer"] < held["frozen parameters"] / 10
      and held["reference"] == 0
    )

  def test_evaluation_runs_beside_the_state_of_training(self, config):
    step_held = self.step(config, layers=2)[1].bytes_by_kind()
    built = programs.evaluation(
      config, meshes.make_mesh_on(jax.devices(), 2, 2, 2), layers=2
    )
    draft, revise = built.programs["draft"], built.programs["revise"]
    assert (
      draft.bytes_by_kind().items()
      >= {
        name: size for name, size in step_held.items() if name != "prompts"
      }.items()
    )
    assert draft.beside() == step_held["optimizer"] + step_held["reference"]
    images = revise.arguments[-1].kept.images
    assert (
      images.shape == (64, 512, 512, 3)
      and images.sharding.shard_shape(images.shape)[0] == 32
    )
    assert built.samples == 64

  def test_generation_holds_weights_split_as_rollouts_want_them(self, config):
    built = programs.generation(
      config, meshes.make_mesh_on(jax.devices(), 1, 2, 4), layers=2
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
