"""Tests of launch/compile.py on real TPU topologies; they need libtpu and many minutes."""

import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from r3jax.aot import hlo
from r3jax.costs import count
from r3jax.model import architecture

ROOT = pathlib.Path(__file__).parents[2]
LLM = architecture.bagel_7b().llm
WIDE = [
  "--config.sharding.rollout.mlp=('fsdp','tensor')",
  "--config.sharding.rollout.vocab=('fsdp','tensor')",
]

pytestmark = [
  pytest.mark.slow,
  pytest.mark.timeout(3600),
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the extra aot",
  ),
]


def run(
  *arguments: str, config: str = "configs/r3_geneval.py"
) -> subprocess.CompletedProcess:
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "XLA_FLAGS": "",
  }
  # that of the other tests; the splash kernel has none such
  del environment["JAX_DEFAULT_MATMUL_PRECISION"]
  command = [
    sys.executable,
    "launch/compile.py",
    f"--config={config}",
    *arguments,
  ]
  return subprocess.run(
    command,
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


def weight_sizes(fsdp: int, tensor: int) -> set[int]:
  """Returns the numbers of elements of every matrix, whole or in the part that one axis leaves."""
  heads, kv_heads = (
    LLM.num_heads * LLM.head_dim,
    LLM.num_kv_heads * LLM.head_dim,
  )
  sides = (heads, kv_heads, LLM.intermediate_size, LLM.vocab_size)
  parts = (1, fsdp, tensor)  # a gather leaves no more than one axis
  whole = {LLM.hidden_size * side for side in sides}
  assert (
    2 * sum([heads, kv_heads]) * LLM.hidden_size
    + 3 * LLM.intermediate_size * LLM.hidden_size
    == count.expert_parameters(LLM)
  )
  return {size // part for size, part in itertools.product(whole, parts)}


def check_gathers(text: str, data: int, fsdp: int, tensor: int):
  """Asserts that a compiled step of 128 samples gathers weights in training, and in no rollout."""
  collectives, sizes = hlo.collectives(text), weight_sizes(fsdp, tensor)
  # activations have such a dimension; a few have a matrix's size
  rows = {128 // data, 128 // data // fsdp}

  def is_weight(collective: hlo.Collective) -> bool:
    return any(
      math.prod(shape.dims) in sizes and not rows & set(shape.dims)
      for shape in collective.shapes
    )

  gathers = [
    one for one in collectives if one.kind == "all-gather" and is_weight(one)
  ]
  assert gathers  # of training: the sizes are the right ones
  for loop in ("decode", "flow"):
    # the names are there
    assert any(loop in name for one in collectives for name in one.path), loop
    assert not [
      one for one in gathers if any(loop in name for name in one.path)
    ], loop


class TestRollouts:
  @pytest.mark.parametrize(
    "mesh, rules",
    [((8, 2, 4), []), ((4, 4, 4), WIDE), ((8, 8, 1), WIDE)],
    ids=["narrow", "wide", "without tensor"],
  )
  def test_no_weights_are_gathered_in_the_decode_and_denoising_loops(
    self, tmp_path, mesh, rules
  ):
    data, fsdp, tensor = mesh
    found = run(
      "--topology=v5p:4x4x4",
      "--layers=2",
      f"--hlo={tmp_path / 'hlo'}",
      f"--out={tmp_path / 'json'}",
      *rules,
      f"--config.mesh.data={data}",
      f"--config.mesh.fsdp={fsdp}",
      f"--config.mesh.tensor={tensor}",
    )
    assert found.returncode == 0, found.stderr[-2000:]
    check_gathers((tmp_path / "hlo" / "step.txt").read_text(), *mesh)
    assert (
      json.loads((tmp_path / "json").read_text())["programs"]["step"]["memory"][
        "peak"
      ]
      < 95 * 2**30
    )


class TestSmallModel:
  """The embedded world's on four small chips; minutes."""

  CONFIG, TOPOLOGY = "configs/r3_geneval.py:shapes", "--topology=v5e:2x2"

  def test_search_compiles_until_one_fits(self, tmp_path):
    found = run(
      self.TOPOLOGY,
      "--find=1",
      f"--out={tmp_path / 'json'}",
      config=self.CONFIG,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    (one,) = json.loads((tmp_path / "json").read_text())
    assert math.prod(one["mesh"].values()) == 4 and one["micro_batches"] == 1
    assert "1 micro-batches: fits" in found.stdout and list(
      one["programs"]
    ) == ["step"]

  @pytest.mark.parametrize(
    "program, parts",
    [
      ("evaluate", ["draft", "revise"]),
      ("generate", ["think", "draft", "look", "reflect", "refine"]),
    ],
  )
  def test_other_programs_are_compiled_part_by_part(
    self, tmp_path, program, parts
  ):
    found = run(
      self.TOPOLOGY,
      f"--program={program}",
      f"--out={tmp_path / 'json'}",
      config=self.CONFIG,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert (
      list(json.loads((tmp_path / "json").read_text())["programs"]) == parts
    )


class TestRefusals:
  def test_step_that_does_not_fit_says_what_to_change(self):
    found = run(
      "--topology=v5e:2x2",
      "--layers=2",
      "--config.mesh.data=4",
      "--config.groups_per_step=4",
    )
    assert found.returncode == 1
    assert (
      "r3jax: step needs" in found.stderr
      and "raise mesh.fsdp * mesh.tensor (1 * 1)" in found.stderr
    )

  @pytest.mark.parametrize(
    "arguments, message",
    [
      (["--topology=v5e:3x5"], "libtpu refuses the topology 'v5e:3x5'"),
      (
        ["--topology=v5e:4x4", "--config.mesh.data=4"],
        "must be the number of devices (16); got 4 * 1 * 1",
      ),
      (
        ["--topology=v5e:1x1", "--config.mesh.data=4"],
        "must be the number of devices (1); got 4 * 1 * 1",
      ),
      (
        ["--topology=v5e:4x4", "--config.mesh.tensor=8"],
        "must be divisible by their mesh axis",
      ),
    ],
  )
  def test_what_cannot_be_is_one_message(self, arguments, message):
    found = run(*arguments)
    assert (
      found.returncode == 1
      and message in found.stderr
      and "Traceback" not in found.stderr
    )
