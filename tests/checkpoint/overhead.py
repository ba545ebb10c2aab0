"""Measures what digests and checks of finite numbers cost, in CPU seconds.

  python tests/checkpoint/overhead.py --iteration=SECONDS

The state is that of the embedded world's model: parameters and two moments of the optimizer.
SECONDS are the CPU seconds of an iteration of the main job, for example by `user` and `sys` of two
runs that differ by some iterations. Exits with 1 where the share of an iteration is 1 % or more.
"""

import argparse
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from etils import epath  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from configs import r3_geneval  # noqa: E402
from r3jax.checkpoint import digests  # noqa: E402
from r3jax.checkpoint import pretrained  # noqa: E402
from r3jax.checkpoint import training  # noqa: E402
from r3jax.checkpoint import verification  # noqa: E402
from r3jax.data import pipeline  # noqa: E402
from r3jax.model import network  # noqa: E402
from r3jax.parallel import meshes  # noqa: E402
from r3jax.rl import diagnostics  # noqa: E402
from r3jax.worlds import registry  # noqa: E402

_REPEATS = 5


def _state() -> dict:
  """Returns arrays of the shapes that a run saves."""
  model = pretrained.find(registry.OF_WORLD, "shapes")
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  shardings = pretrained.shardings(network.Bagel(model.sizes), mesh)
  weights = model.weights(shardings, jnp.float32, lambda share: None)
  policy = weights["policy"]
  moments = jax.tree.map(lambda x: x * 1e-3, policy)
  squares = jax.tree.map(lambda x: x * x, moments)
  return {"policy": policy, "first": moments, "second": squares}


def _cpu_seconds(function, *arguments) -> float:
  """Returns the median CPU seconds of a call, without those of the first."""
  function(*arguments)
  seconds = []
  for _ in range(_REPEATS):
    start = time.process_time()
    function(*arguments)
    seconds.append(time.process_time() - start)
  return float(np.median(seconds))


def _check_metrics(metrics: dict) -> None:
  """Does what an update does to find numbers that are not finite, beside its sums and norms."""
  jax.block_until_ready(_count_nonfinite(metrics))


_count_nonfinite = jax.jit(diagnostics.num_nonfinite)


def main() -> None:
  """Prints the seconds, and their share of an iteration."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--iteration", type=float, required=True)
  iteration = parser.parse_args().iteration
  config = r3_geneval.get_config("shapes")
  every = config.checkpoint.every
  state = _state()
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  with tempfile.TemporaryDirectory() as name:
    folder = epath.Path(name)
    saver = training.Checkpoints(folder, 1, 2)
    batches = pipeline.prompt_iterator(12, 2, 0)
    saver.save(1, state, batches, force=True)
    saver.close()
    read_back = _cpu_seconds(verification.check, folder / "1")
  of_state = _cpu_seconds(digests.of_tree, state)
  metrics = {name: jnp.float32(1) for name in diagnostics.UPDATE_METRICS}
  # Two stages, each with an update.
  finite = 2 * _cpu_seconds(_check_metrics, metrics)
  an_iteration = finite + (of_state + read_back) / every
  share = an_iteration / iteration
  print(f"state: {num_bytes / 1e6:.1f} MB, saved every {every} iterations")
  print(f"digests before a save: {of_state:.3f} s")
  print(f"reading it back: {read_back:.3f} s")
  print(f"finite checks of an iteration: {finite:.5f} s")
  print(f"together {share:.4%} of an iteration of {iteration:g} s")
  print(
    f"with a save after every iteration {(finite + of_state + read_back) / iteration:.3%}"
  )
  sys.exit(share >= 0.01)


if __name__ == "__main__":
  main()
