"""Tests of run/stage_settings.py: how evaluation samples."""

import dataclasses

from configs import r3_geneval
from r3jax.agent import rollout_settings
from r3jax.run import stage_settings
from r3jax.sampling import classifier_free
from r3jax.sampling import decoding
from r3jax.sampling import schedules

DRAFTS = classifier_free.Guidance(4.0, 1.0, "global", 0.0, (0.4, 1.0))
EDITS = classifier_free.Guidance(4.0, 1.5, "text_channel", 0.0, (0.4, 1.0))


def _flow(guidance: classifier_free.Guidance) -> rollout_settings.FlowSettings:
  eta = schedules.Eta("constant", 0.7)
  return rollout_settings.FlowSettings(
    schedules.Schedule(16), guidance, eta, sde_index_max=2
  )


TEXT = decoding.TextSampling(0.9, 0.8, 0, "data")
TRAINING = rollout_settings.RolloutSettings(
  capacities=None,
  reason_text=TEXT,
  reflect_text=TEXT,
  reason_flow=_flow(DRAFTS),
  refine_flow=_flow(EDITS),
  system_reason=(),
  system_reflect=(),
)


class TestForEvaluation:
  def settings(self, **changes) -> rollout_settings.RolloutSettings:
    config = r3_geneval.get_config()
    config.update_from_flattened_dict(changes)
    return stage_settings.for_evaluation(config, TRAINING)

  def test_guides_as_training_by_default(self):
    settings = self.settings()
    assert settings.reason_flow.guidance == DRAFTS
    assert settings.refine_flow.guidance == EDITS
    text = dataclasses.replace(TEXT, temperature=0.3)
    assert settings.reason_text == settings.reflect_text == text
    for flow in (settings.reason_flow, settings.refine_flow):
      assert flow.schedule == schedules.Schedule(50)
      assert flow.sde_index_max == 0

  def test_has_its_own_guidance_by_stage(self):
    changes = {
      "eval.reason.text_scale": 1.0,
      "eval.refine.image_scale": 2.0,
      "eval.refine.interval": (0.0, 0.9),
    }
    settings = self.settings(**changes)
    drafts = dataclasses.replace(DRAFTS, text_scale=1.0)
    edits = dataclasses.replace(EDITS, image_scale=2.0, interval=(0.0, 0.9))
    assert settings.reason_flow.guidance == drafts
    assert settings.refine_flow.guidance == edits
    # Scales of 1 do not guide, and cost no further branch.
    assert not settings.reason_flow.guided.any()
    assert settings.refine_flow.guided.any()

  def test_has_its_own_points_and_temperature(self):
    settings = self.settings(**{"eval.points": 7, "eval.temperature": 0.0})
    assert settings.reason_flow.schedule.points == 7
    assert settings.refine_flow.schedule.points == 7
    assert settings.reason_text.temperature == 0.0
