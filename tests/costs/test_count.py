"""Tests of the analytic costs against numbers worked out by hand, and against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r3_geneval
from r3jax.aot import abstract
from r3jax.benchmark import subject
from r3jax.costs import chips
from r3jax.costs import count
from r3jax.costs import towers as towers_lib
from r3jax.model import architecture
from r3jax.model import image_encoders
from r3jax.model import network
from r3jax.model import parameters
from r3jax.model import siglip
from r3jax.parallel import sharding
from r3jax.sequence import layouts
from r3jax.sequence import segments

SMALL = architecture.BagelConfig(
  architecture.LLMConfig(
    hidden_size=8,
    intermediate_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=10,
  ),
  vision=architecture.VisionConfig(hidden_size=6),
)
EXPERT = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16  # q, k, v, o; gate, up, down
LAYOUT = segments.Layout(
  (
    segments.text("prompt", 3),
    segments.image("draft", "noise", (1, 2), ("prompt",)),
    segments.image("siglip", "vit", (1, 2)),
  )
)


def forward(names, past, rows, copies, dtype=jnp.bfloat16) -> count.Work:
  read_by = count.Copies(copies, copies)
  return count.forward(SMALL, dtype, LAYOUT, names, past, rows, read_by)


class TestForward:
  def test_counts_products_and_visible_pairs(self):
    work = forward(("draft",), ("prompt",), rows=5, copies=2)
    pairs = 4 * (3 + 4)  # four slots see the prompt and each other
    assert work.attention == 3 * 5 * 4 * 8 * pairs
    # Two markers belong to und, two latents to gen.
    assert work.und == 3 * 5 * 2 * EXPERT * 2
    time_and_tokens = (256 * 8 + 8 * 8) + 64 * 8 * 2
    assert work.gen == 3 * 5 * 2 * EXPERT * 2 + 2 * 5 * time_and_tokens
    # Both experts, bfloat16, two copies.
    assert work.read == 3 * 2 * 2 * EXPERT * 2

  def test_text_is_causal_and_reads_one_expert(self):
    work = forward(("prompt",), (), rows=1, copies=1)
    assert work.cost.flops == 3 * (2 * EXPERT * 3 + 4 * 8 * 6)
    assert work.read == 3 * 2 * EXPERT

  def test_reads_numbers_of_the_dtype_of_the_model(self):
    narrow = forward(("prompt",), (), 1, 1)
    wide = forward(("prompt",), (), 1, 1, jnp.float32)
    assert wide.read == 2 * narrow.read

  def test_patches_run_through_the_connector(self):
    work = forward(("siglip",), (), rows=1, copies=1)
    connector = 2 * 2 * (6 * 8 + 8 * 8)
    assert work.und == 3 * 2 * EXPERT * 4 + connector


class TestPasses:
  WORK = count.Work(und=100.0, gen=10.0, attention=1.0, read=7.0)

  def cost(self, **changes) -> count.Cost:
    flags = dict.fromkeys(
      ("needs_reference", "remat", "has_adapters", "freeze_und"), False
    )
    return count.Passes.of(**flags | changes).cost(self.WORK)

  def test_all_weights_take_two_products_backward(self):
    assert self.cost().flops == 3 * 111
    assert self.cost().read == 2 * 7

  def test_recomputation_and_reference_are_forward_passes(self):
    assert self.cost(needs_reference=True, remat=True).flops == 5 * 111

  def test_weights_that_are_not_trained_have_no_gradient(self):
    assert self.cost(freeze_und=True).flops == 3 * 111 - 100
    assert self.cost(has_adapters=True).flops == 3 * 111 - 110


class TestCost:
  def test_seconds_are_those_of_the_slower_part(self):
    chip = chips.Chip(1, 100.0, 10.0, 1.0, ())
    assert count.Cost(400.0, 10.0).seconds(chip, 2) == 2.0
    assert count.Cost(400.0, 100.0).seconds(chip, 2) == 5.0


class TestCopies:
  @pytest.mark.parametrize(
    "mlp, number", [((), 64), (("tensor",), 16), (("fsdp", "tensor"), 8)]
  )
  def test_are_the_chips_that_rules_do_not_split_over(self, mlp, number):
    rules = sharding.Rules.of({"mlp": mlp, "gen_mlp": ("tensor",)})
    read_by = count.copies(rules, {"data": 8, "fsdp": 2, "tensor": 4})
    assert read_by == count.Copies(und=number, gen=16)

  def test_every_expert_is_read_by_its_own_number_of_chips(self):
    work = count.forward(
      SMALL,
      jnp.bfloat16,
      LAYOUT,
      ("draft",),
      (),
      rows=1,
      copies=count.Copies(und=2, gen=5),
    )
    assert work.read == 3 * 2 * EXPERT * (2 + 5)


# One layer and one head each: XLA counts the body of a loop once.
ONE_LAYER = architecture.BagelConfig(
  architecture.LLMConfig(
    hidden_size=96,
    intermediate_size=256,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    vocab_size=64,
  ),
  vision=architecture.VisionConfig(96, 256, 1, 1),
  autoencoder=architecture.AutoencoderConfig(32, (1, 1, 2, 2), 1),
  autoencoder_transform=architecture.ImageTransform(128, 128, 16),
  vision_transform=architecture.ImageTransform(126, 126, 14),
)
GRID = (8, 8)
NOISE = segments.Layout((segments.image("draft", "noise", GRID),))


def near(flops: float, tolerance: float):
  """Returns what equals a number of operations up to a share of it."""
  return pytest.approx(flops, rel=tolerance)


def xla_flops(function, *arguments) -> float:
  """Returns what XLA counts in a compiled function, given the shapes of its arguments."""
  # What LLVM makes of it does not matter.
  quick = {"xla_backend_optimization_level": 0}
  compiled = jax.jit(function).lower(*arguments).compile(quick)
  return compiled.cost_analysis()["flops"]


class TestAgainstXla:
  """XLA counts norms and activations too, and no zeros around images."""

  def test_a_pass_forward_and_backward(self):
    bagel = network.Bagel(ONE_LAYER)
    latent = jax.ShapeDtypeStruct((1, 64, ONE_LAYER.latent_dim), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)

    def loss(policy, latent, t):
      inputs = {"draft": network.Noised(latent, t)}
      output = bagel.apply({"params": policy}, NOISE, inputs, {})
      velocity = bagel.apply(
        {"params": policy}, output.latent("draft"), method="velocity"
      )
      return jnp.sum(velocity**2)

    arguments = (parameters.unboxed(bagel), latent, time)
    work = count.forward(
      ONE_LAYER,
      jnp.float32,
      NOISE,
      ("draft",),
      (),
      rows=1,
      copies=count.Copies(1, 1),
    )
    work += count.velocities(ONE_LAYER, 64)
    passes = count.Passes(forward=1, und=True, gen=True)
    counted = passes.cost(work).flops
    assert xla_flops(jax.grad(loss), *arguments) == near(counted, 0.05)

  def test_image_towers(self):
    towers = image_encoders.Towers(ONE_LAYER, (128, 128))
    frozen = jax.eval_shape(lambda: subject.random_towers(ONE_LAYER))
    images = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.uint8)
    latent = jax.ShapeDtypeStruct((1, 64, ONE_LAYER.latent_dim), jnp.float32)
    encoded = towers_lib.encode(towers, 1, 1).flops
    decoded = towers_lib.decode(towers, 1, 1).flops
    assert xla_flops(towers.encode, frozen, images) == near(encoded, 0.08)
    assert xla_flops(towers.decode, frozen, latent) == near(decoded, 0.08)

  def test_vit(self):
    # Without the resize, which are products for XLA.
    tower = siglip.VisionTransformer(ONE_LAYER.vision)
    params = jax.eval_shape(lambda: subject.random_towers(ONE_LAYER))["vision"]
    patches = jax.ShapeDtypeStruct((1, 81, 3 * 14**2), jnp.float32)

    def features(params, patches):
      return tower.apply({"params": params}, patches, np.arange(81))

    towers = image_encoders.Towers(ONE_LAYER, (128, 128))
    counted = towers_lib.features(towers, 1, 1).flops
    assert xla_flops(features, params, patches) == near(counted, 0.05)


SAMPLES = 16


@pytest.fixture(scope="module")
def group() -> count.Batch:
  """Returns a group of 16 samples of BAGEL-7B-MoT, texts at their longest."""
  config = r3_geneval.get_config().copy_and_resolve_references()
  config.model.attention = "xla"
  base = abstract.base(config, None)
  return count.Batch(
    base.modules, base.rollout, 1, SAMPLES, count.Copies(1, 1), 1
  )


def unshared_updates(batch: count.Batch) -> dict[str, float]:
  """Returns the operations of the updates where every sample and branch is a whole sequence."""
  capacities = batch.settings.capacities
  reason = layouts.reason(capacities)
  reflect = layouts.reflect(capacities)
  refine = layouts.refine(capacities)

  def sequence(layout: segments.Layout, *names: str) -> count.Work:
    return batch.own(layout, names, ())

  text = sequence(reflect, *count.REFLECT_CONTEXT, "answer")
  text += batch.head(capacities.answer - 1)
  edits = (
    sequence(refine, *count.SOURCE, "instruction", "edit")
    + sequence(refine, *count.SOURCE, "edit_without_text")
    + sequence(refine, "instruction_alone", "edit_without_image")
  )
  drafts = sequence(reason, *count.REASON_CONTEXT, "thought", "draft")
  drafts += sequence(reason, "system", "draft_without_text")
  drafts += batch.head(capacities.thought - 1)
  return {
    "reason_update": PASSES.cost(drafts).flops,
    "edit_update": PASSES.cost(text + edits).flops,
  }


PASSES = count.Passes(forward=1, und=True, gen=True)


class TestSharedPrefixes:
  def test_updates_compute_what_samples_and_branches_share_once(self, group):
    shared = {
      name: cost.flops
      for name, cost in count.updates(group, group, PASSES).items()
    }
    unshared = unshared_updates(group)
    assert unshared["edit_update"] >= 2.2 * shared["edit_update"]
    assert unshared["reason_update"] >= 1.08 * shared["reason_update"]
    assert sum(unshared.values()) >= 1.85 * sum(shared.values())

  def test_contexts_are_computed_once(self, group):
    capacities = group.settings.capacities
    refine = layouts.refine(capacities)
    contexts = (
      (layouts.reason(capacities), count.REASON_CONTEXT),
      (layouts.reflect(capacities), count.REFLECT_CONTEXT),
      (refine, count.SOURCE),
    )
    # Instructions are each sample's own.
    instructions = group.own(refine, count.INSTRUCTION, count.SOURCE).cost.flops
    shared = instructions
    unshared = instructions
    for layout, names in contexts:
      shared += group.shared(layout, names).cost.flops
      unshared += group.own(layout, names, ()).cost.flops
    assert unshared >= 4 * shared
