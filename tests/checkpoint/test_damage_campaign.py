"""A short campaign of damages, see damage_campaign.py."""

import pytest

from tests.checkpoint import damage_campaign

NUM_DAMAGES = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "checkpoints"
  damage_campaign.write_checkpoints(folder)
  return folder


def test_damaged_newest_checkpoint_is_replaced_by_the_one_before(
  whole, tmp_path
):
  results = {}
  for number in range(NUM_DAMAGES):
    name, result = damage_campaign.damaged_checkpoint(
      whole, tmp_path, number, seed=1
    )
    results[name, number] = result
  good = ("the one before", "same numbers")
  assert {k: v for k, v in results.items() if v not in good} == {}
  assert "the one before" in results.values()
