"""Tests of guidance: golden velocities of both flow cases, closed forms, the trainer's goldens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.models import bagel
from r3jax.models import layers
from r3jax.rl import settings as settings_lib
from r3jax.sampling import guidance as guidance_lib
from r3jax.sampling import schedule as schedule_lib
from r3jax.sequence import layout as layout_lib
from tests import goldens_lib

GEN, EDIT = "f_flow_gen", "f_flow_edit"
BRANCHES = ("v_cond", "v_cfg_text", "v_cfg_img")


def _golden_branches(name: str) -> tuple[jax.Array, ...]:
  arrays = goldens_lib.case(name)
  return tuple(goldens_lib.rows_of(arrays[branch]) for branch in BRANCHES if branch in arrays)


def _packed(x: jax.Array) -> np.ndarray:
  return np.asarray(x).reshape(-1, x.shape[-1])


def _combined(guidance: guidance_lib.Guidance, branches) -> np.ndarray:
  """Combines the branches that the guidance uses."""
  needed = 1 + guidance.uses_text + guidance.uses_image
  return _packed(guidance_lib.combine(guidance, *branches[:needed]))


class TestBranches:
  """Velocities of the noise segments, before they are combined."""

  @pytest.mark.parametrize("name", [GEN, EDIT])
  def test_equal_golden(self, name):
    scene, arrays = goldens_lib.scene(name), goldens_lib.case(name)
    latent = goldens_lib.rows_of(arrays["x_t"])
    found = scene.branches(latent, float(arrays["t"]))
    for array, velocity in zip(BRANCHES, found):
      goldens_lib.assert_close(name, array, _packed(velocity))

  def test_context_of_an_edit_equals_golden(self):
    scene, transforms = goldens_lib.edit_scene(EDIT), goldens_lib.config()
    pictures = goldens_lib.images(EDIT)
    vae = goldens_lib.pixels_nchw(pictures, transforms.autoencoder_transform)
    vit = goldens_lib.pixels_nchw(pictures, transforms.vision_transform)
    goldens_lib.assert_close(EDIT, "vae_tensor", vae)
    goldens_lib.assert_close(EDIT, "vit_tensor", vit)
    markers = scene.output.text("source")
    block = [markers[:, :1], scene.output.latent("source"), markers[:, 1:]]
    goldens_lib.assert_close(EDIT, "hidden_vae_block", _packed(jnp.concatenate(block, axis=1)))

  def test_corrupted_context_of_an_edit_equals_golden(self):
    """The golden ViT and text blocks come from the reference's static cache (R3.md 8, defect 1).

    There the ViT block sees only itself and the text sees zeros in the place of the VAE block. Keys
    and values of the right context are held by the velocities.
    """
    scene = goldens_lib.edit_scene(EDIT)
    features, _ = goldens_lib.look(goldens_lib.images(EDIT))
    ids, lengths = goldens_lib.texts(EDIT, "edit_ids")
    vit = goldens_lib.run(scene.layout, {"seen": features}, scene.lengths)
    goldens_lib.assert_close(EDIT, "hidden_vit_block", _packed(vit.text("seen")))
    depth, rows, _, *entry = vit.cache.key.shape
    zeros = jnp.zeros((depth, rows, scene.layout["source"].capacity, *entry))
    past = (bagel.Cache(zeros, zeros, ("source",)), vit.cache)
    hidden = goldens_lib.run(scene.layout, {"instruction": ids}, scene.lengths, past).text(
        "instruction"
    )
    text = np.concatenate([np.asarray(row)[:length] for row, length in zip(hidden, lengths)])
    goldens_lib.assert_close(EDIT, "hidden_text_block", text)

  @pytest.mark.parametrize("name", [GEN, EDIT])
  def test_positions_and_lengths_equal_golden(self, name):
    scene = goldens_lib.scene(name)
    layout, conditional = scene.layout, scene.noise[0]
    positions = layout_lib.positions(layout, (conditional,), scene.lengths, 2)
    goldens_lib.assert_close(name, "query_position_ids", np.asarray(positions).reshape(-1))
    ropes = []
    for noise in scene.noise:
      context = [segment for segment in layout[noise].sees if segment in scene.output.cache.names]
      held = layout_lib.filled(layout, context, scene.lengths, 2).sum(axis=1)
      ropes.append([held, np.broadcast_to(layout_lib.start(layout, noise, scene.lengths), 2)])
    goldens_lib.assert_close(name, "kv_lens_ropes", np.asarray(ropes))
    if name == GEN:
      side = goldens_lib.config().max_latent_side
      ids = layers.grid_positions(*layout[conditional].grid, side)
      goldens_lib.assert_close(name, "latent_position_ids", np.tile(ids, 2))

  @pytest.mark.parametrize("name", [GEN, EDIT])
  def test_in_one_pass_equal_separate_passes(self, name):
    scene, arrays = goldens_lib.scene(name), goldens_lib.case(name)
    latent = goldens_lib.rows_of(arrays["x_t"])
    together = scene.branches(latent, float(arrays["t"]))
    for i, noise in enumerate(scene.noise[1:], 1):
      (alone,) = dataclasses.replace(scene, noise=(noise,)).branches(latent, float(arrays["t"]))
      np.testing.assert_allclose(together[i], alone, atol=1e-5, rtol=0)


class TestCombine:

  @pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
  def test_equals_golden_without_an_image(self, renorm):
    text, image, low = (float(x) for x in goldens_lib.case(GEN)["scales"])
    branches = _golden_branches(GEN)
    for suffix, scale in (("", text), ("_low", low)):
      guidance = guidance_lib.Guidance(scale, image, renorm)
      goldens_lib.assert_close(GEN, f"v_{renorm}{suffix}", _combined(guidance, branches))

  def test_equals_golden_for_a_least_renorm(self):
    text = float(goldens_lib.case(GEN)["scales"][0])
    guidance = guidance_lib.Guidance(text, 1.0, "channel", renorm_min=0.9)
    goldens_lib.assert_close(GEN, "v_channel_min09", _combined(guidance, _golden_branches(GEN)))

  @pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
  def test_equals_golden_with_an_image(self, renorm):
    text, image, text_low, image_low = (float(x) for x in goldens_lib.case(EDIT)["scales"])
    variants = {"": (text, image), "_low": (text_low, image_low), "_noimg": (text, 1.0)}
    for suffix, scales in variants.items():
      if f"v_{renorm}{suffix}" in goldens_lib.case(EDIT):
        guidance = guidance_lib.Guidance(*scales, renorm)
        goldens_lib.assert_close(
            EDIT, f"v_{renorm}{suffix}", _combined(guidance, _golden_branches(EDIT))
        )

  @pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
  def test_equals_golden_of_the_trainer(self, renorm):
    name = "j_pack_multi"
    arrays = goldens_lib.case(name)
    guidance = guidance_lib.Guidance(*(float(x) for x in arrays["cfg_scales"]), renorm)
    predicted = jnp.asarray(arrays["cfg_v_pred"])
    found = []
    for ranges in arrays["cfg_index"]:
      copies = [predicted[None, start:stop] for start, stop in ranges if start >= 0]
      guided = guidance_lib.combine(guidance, *copies) if len(copies) == 3 else copies[0]
      found.append(guided[0])  # the reference's trainer guides only where all copies are there
    goldens_lib.assert_close(name, f"cfg_out_{renorm}", np.concatenate(found))

  def test_shrinks_to_the_norm_of_the_conditional_velocity(self):
    v, u = jnp.array([[[3.0, 0.0], [0.0, 4.0]]]), jnp.zeros((1, 2, 2))
    for renorm in ("global", "channel", "text_channel"):
      found = guidance_lib.combine(guidance_lib.Guidance(4.0, 1.0, renorm), v, u)
      np.testing.assert_allclose(found, v, rtol=1e-6)  # 4 v shrunk to |v|

  def test_never_stretches(self):
    v, u = jnp.array([[[4.0, 0.0]]]), jnp.array([[[6.0, 0.0]]])
    found = guidance_lib.combine(guidance_lib.Guidance(2.0, 1.0, "channel"), v, u)
    np.testing.assert_allclose(found, [[[2.0, 0.0]]], rtol=1e-6)

  def test_is_finite_where_everything_is_zero(self):
    zeros = jnp.zeros((1, 2, 2))
    found = guidance_lib.combine(guidance_lib.Guidance(4.0, 1.0, "global"), zeros, zeros)
    np.testing.assert_array_equal(found, zeros)

  def test_gradient_is_finite_where_everything_is_zero(self):
    guidance = guidance_lib.Guidance(4.0, 1.0, "global")
    energy = lambda v: jnp.sum(guidance_lib.combine(guidance, v, jnp.zeros((1, 2, 2))))
    assert bool(jnp.isfinite(jax.grad(energy)(jnp.zeros((1, 2, 2)))).all())


class TestCombineWhereActive:

  def test_leaves_rows_outside_the_interval(self):
    guidance = guidance_lib.Guidance(4.0, 1.0, "channel", interval=(0.4, 0.9))
    v, u = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    t = jnp.array([0.4, 0.41, 0.9, 1.0])
    found = guidance_lib.combine_where_active(guidance, t, (v, u))
    guided = guidance_lib.combine(guidance, v, u)
    np.testing.assert_array_equal(found, jnp.stack([v[0], guided[1], guided[2], v[3]]))


class TestGuidance:

  def test_does_nothing_at_text_scale_1(self):
    guidance = guidance_lib.Guidance(1.0, 1.5, "global")
    assert not guidance.uses_text and not guidance.uses_image
    assert not guidance.active(0.9)
    flow = settings_lib.FlowSettings(
        schedule_lib.Schedule(4), guidance, schedule_lib.Eta("constant", 1.0), 0
    )
    names = flow.branches(goldens_lib.edit_scene(EDIT).noise)
    assert names == ("edit",)  # what the golden says of an image scale alone:
    arrays = goldens_lib.case(EDIT)
    goldens_lib.assert_close(EDIT, "v_textscale1_imgscale", arrays["v_cond"])

  def test_refuses_an_unknown_renorm(self):
    with pytest.raises(ValueError, match="got 'none'"):
      guidance_lib.Guidance(4.0, 1.0, "none")
