"""Tests of reading compiled programs: a text by hand, and programs compiled for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.aot import hlo
from r3jax.parallel import meshes

# ruff: noqa: E501  as XLA writes it
TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %gathered = bf16[8,4]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], bf16[2,4]) tuple(%i, %y)
}

%inner_condition (p: (s32[], bf16[2,4])) -> pred[] {
  %c = s32[] constant(28)
  %other = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %w = (s32[], bf16[2,4]) while(%t), condition=%inner_condition, body=%inner_body, metadata={op_name="decode/while"}
  %reduced = (f32[4]{0}, s32[]) all-reduce(%a, %b), to_apply=%add
  ROOT %t = (s32[]) tuple(%i)
}

%condition (p: (s32[])) -> pred[] {
  %c = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%branch (p: f32[3]) -> f32[3] {
  ROOT %permuted = f32[3]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%all-reduce-scatter.1 (p: f32[6]) -> f32[2] {
  %summed = f32[6]{0} all-reduce(%p), replica_groups={{0,1,2}}, to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%summed, %i), dynamic_slice_sizes={2}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %mine = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="step/down"}
  %scattered = f32[5]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %w = (s32[]) while(%t), condition=%condition, body=%body, metadata={op_name="step/while"}, backend_config={"known_trip_count":{"n":"7"}}
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %c = f32[3] conditional(%i, %x, %x), branch_computations={%branch, %branch}
  ROOT %out = f32[2] copy(%p)
}
"""


class TestCollectives:
  def test_are_found_in_loops_and_branches_with_their_trip_counts(self):
    found = {
      (one.kind, one.bytes, one.times, one.path)
      for one in hlo.collectives(TEXT)
    }
    assert found == {
      ("all-gather", 8 * 4 * 2, 7 * 28, ("step/while", "decode/while")),
      ("all-reduce", 4 * 4 + 4, 7, ("step/while",)),
      ("all-gather", 16 * 4, 1, ()),
      ("collective-permute", 3 * 4, 1, ()),
      # What is summed: all parts, in whichever way XLA writes it.
      ("reduce-scatter", 6 * 4, 1, ()),
      ("reduce-scatter", 5 * 4 * 4, 1, ()),
    }
    names = [
      one.name for one in hlo.collectives(TEXT) if one.kind == "reduce-scatter"
    ]
    assert "step/down" in names

  def test_stage_and_cause_are_read_from_names(self):
    matrix = hlo.Shape("bf16", (8, 128))
    small = hlo.Shape("f32", (4,))
    loop = "jit(step)/refine/flow/while"
    named = hlo.Collective(
      "all-reduce",
      (matrix,),
      f"{loop}/body/layers/gen.finish/down/dot_general",
      (loop,),
      34,
    )
    unnamed = hlo.Collective("all-gather", (small, matrix), "", (loop,), 34)
    outside = hlo.Collective("all-gather", (small,), "jit(step)/add", (), 1)
    assert named.stage == unnamed.stage == "refine/flow"
    assert named.cause == "gen.finish/down/dot_general"
    assert unnamed.cause == "bf16[8,128]"
    assert outside.stage == "other"

  def test_other_text_is_refused(self):
    with pytest.raises(ValueError, match="must have an ENTRY computation"):
      hlo.collectives("module @jit_step {}")

  def test_of_a_program_on_eight_devices(self):
    """A gather of 8 rows in each of 5 steps, and one sum over all."""
    mesh = meshes.make_mesh_on(jax.devices(), 8, 1, 1)

    def step(x):
      def body(total, _):
        return total + jax.lax.all_gather(x, "data").sum(), None

      total, _ = jax.lax.scan(body, jnp.zeros((), x.dtype), None, length=5)
      return jax.lax.psum(total * x, "data")

    rows = jax.sharding.PartitionSpec("data")
    mapped = jax.jit(
      jax.shard_map(
        step,
        mesh=mesh,
        in_specs=rows,
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
      )
    )
    text = mapped.lower(np.ones((8, 1000), np.float32)).compile().as_text()
    found = [
      one
      for one in hlo.collectives(text)
      if one.kind in ("all-gather", "all-reduce")
    ]
    assert ("all-reduce", 4000) in {(one.kind, one.bytes) for one in found}
    (gather,) = [one for one in found if one.kind == "all-gather"]
    # XLA may hoist it out of the loop
    assert gather.bytes == 8 * 4000 and gather.times in (1, 5)
