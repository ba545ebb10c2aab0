"""Tests of the reference's literal loss.

Its numbers are in tests/parity (apply_cfg, onpolicy, perturbed).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.agent import reference_loss
from r3jax.agent import rollout_settings
from r3jax.sampling import classifier_free
from r3jax.sampling import schedules
from r3jax.sequence import layouts
from tests import tiny

WIDE = (2, 3)


def _flow(guidance: classifier_free.Guidance) -> rollout_settings.FlowSettings:
  return rollout_settings.FlowSettings(
    schedules.Schedule(4), guidance, schedules.Eta("monotonic", 1.0), 1
  )


@pytest.fixture(scope="module")
def capacities():
  return layouts.Capacities(4, 4, 4, 4, 4, 4, WIDE, (1, 1))


class TestReason:
  def test_scores_without_guidance(self, capacities):
    flow, _ = reference_loss.reason(
      _flow(classifier_free.Guidance(4.0, 1.0, "global")),
      layouts.reason(capacities),
    )
    assert flow.branches(layouts.DRAFT) == ("draft",)

  def test_transposes_the_copy_alone(self, capacities):
    layout = layouts.reason(capacities)
    _, literal = reference_loss.reason(
      _flow(classifier_free.Guidance(4.0, 1.0, "global")), layout
    )
    assert literal["draft"] == layout["draft"]
    assert (
      layout["draft_without_text"].grid,
      literal["draft_without_text"].grid,
    ) == ((2, 3), (3, 2))


class TestRefine:
  @pytest.fixture
  def literal(self, capacities):
    flow = _flow(classifier_free.Guidance(4.0, 1.5, "text_channel"))
    return reference_loss.refine(flow, layouts.refine(capacities))

  def test_takes_the_global_renorm(self, literal):
    assert literal[0].guidance.renorm == "global"

  def test_guides_at_the_lower_bound_too(self, literal):
    t = jnp.array([0.3999, 0.4, 0.4001, 1.0], jnp.float32)
    sampled = classifier_free.Guidance(4.0, 1.5, "text_channel").active(t)
    np.testing.assert_array_equal(sampled, [False, False, True, True])
    np.testing.assert_array_equal(
      literal[0].guidance.active(t), [False, True, True, True]
    )

  def test_transposes_the_copies_and_not_what_they_copy(self, literal):
    grids = {
      segment.name: segment.grid
      for segment in literal[1].segments
      if segment.kind in ("clean", "noise")
    }
    assert grids == {
      "source": (2, 3),
      "edit": (2, 3),
      "edit_without_text": (3, 2),
      "edit_without_image": (3, 2),
    }


# two compilations of the step; the loss itself is compared with the goldens
@pytest.mark.slow
class TestIteration:
  def test_samples_the_same_and_leaves_ratio_one(self, tiny_model):
    guided = {"reason.interval": (0.0, 1.0), "refine.interval": (0.0, 1.0)}
    ((_, usual, samples),) = tiny.make_bench(tiny_model, changes=guided).run(1)
    changes = guided | {"compat.reference_loss": True}
    ((_, literal, literal_samples),) = tiny.make_bench(
      tiny_model, changes=changes
    ).run(1)
    jax.tree.map(
      np.testing.assert_array_equal,
      literal_samples.drafts.rollout,
      samples.drafts.rollout,
    )
    assert (
      usual["mismatch/reason_image"] < 1e-4 < literal["mismatch/reason_image"]
    )
    assert usual["mismatch/edit_image"] < 1e-4 < literal["mismatch/edit_image"]
    assert literal["mismatch/reason_text"] < 1e-4
