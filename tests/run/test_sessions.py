"""Tests of run/sessions.py: whether a run may or must resume."""

from etils import epath
import pytest

from r3jax.run import sessions
from r3jax.run import workdir


class TestResume:
  def test_modes_ask_for_a_checkpoint_or_for_none(self, tmp_path):
    files = workdir.Workdir(epath.Path(tmp_path))
    for mode in ("auto", "never"):
      sessions.check_resume(mode, files)
    with pytest.raises(ValueError, match="--resume=must needs a complete"):
      sessions.check_resume("must", files)
    with pytest.raises(ValueError, match="resume must be one of"):
      sessions.check_resume("maybe", files)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    for mode in ("auto", "must"):
      sessions.check_resume(mode, files)
    with pytest.raises(ValueError, match="never needs .* that of step 3"):
      sessions.check_resume("never", files)
