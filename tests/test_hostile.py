"""Tests that what others write is read or refused, see `tests/hostile.py`; always the same inputs.

`python -m tests.fuzz` tries new ones for as long as it is told.
"""

import hypothesis
import pytest

from tests import hostile


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_is_read_or_refused(name):
  target = hostile.TARGETS[name]

  @hypothesis.settings(
    max_examples=60,
    deadline=None,  # of busy machines; the time of the whole test is limited
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(target.inputs)
  def check(drawn):
    target.check(drawn)

  check()
