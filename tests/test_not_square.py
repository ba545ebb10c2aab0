"""Images of another size than the world's canvas; the step's numbers are in tests/parity."""

import pytest

from r3jax.generation import draw
from r3jax.run import setup
from r3jax.worlds import registry
from r3jax.worlds.shapes import prompts
from tests import tiny


@pytest.mark.parametrize("width, verifies", [(48, True), (80, False)])
def test_a_world_verifies_generated_images_of_its_own_size(
  not_square_model, width, verifies
):
  config = tiny.make_config(not_square_model, {"image.width": width})
  world = registry.find("shapes")
  record = prompts.heldout_records()[0]
  (target,) = draw._targets(config, world, [record])
  assert (target is not None) == verifies


@pytest.mark.parametrize("is_member", [False, True])
def test_a_world_that_scores_another_canvas_is_refused(
  not_square_model, is_member
):
  name = "sum" if is_member else "world"
  changes = tiny.NOT_SQUARE | {"reward.name": name}
  config = tiny.make_config(not_square_model, changes)
  if is_member:
    config.reward.members = {"shapes": {"name": "world", "weight": 1.0}}
  with pytest.raises(ValueError, match="must be the canvas of the world"):
    setup.build(config)
