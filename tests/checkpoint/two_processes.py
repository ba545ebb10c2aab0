"""One of two processes that save, damage and restore a state that is split over them.

python tests/checkpoint/two_processes.py PROCESS COORDINATOR FOLDER
"""

import pathlib
import shutil
import sys

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from r3jax.checkpoint import digests
from r3jax.checkpoint import training
from r3jax.data import pipeline
from r3jax.parallel import multihost

PROCESS = int(sys.argv[1])
COORDINATOR = sys.argv[2]
FOLDER = pathlib.Path(sys.argv[3])


def _state(step: int, mesh) -> dict:
  """Returns rows that are split over the processes, and a replicated number."""
  rows = jax.NamedSharding(mesh, jax.P("d"))
  replicated = jax.NamedSharding(mesh, jax.P())
  whole = np.arange(4096, dtype=np.float32).reshape(8, 512) + step
  return {
    "rows": jax.make_array_from_callback(
      whole.shape, rows, lambda index: whole[index]
    ),
    "step": jax.make_array_from_callback(
      (), replicated, lambda index: np.int32(step)[index]
    ),
  }


def _damage(folder: pathlib.Path) -> None:
  """Removes what process 1 has written."""
  shutil.rmtree(folder / "state" / "ocdbt.process_1" / "d")


def main() -> None:
  """Prints the digests and the step that is restored."""
  multihost.initialize(COORDINATOR, 2, PROCESS)
  with multihost.ending_together():
    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    saved = training.Checkpoints(FOLDER, every=1, keep=2)
    batches = pipeline.prompt_iterator(12, 2, 0)
    for step in (1, 2, 3):
      saved.save(step, _state(step, mesh), batches)
    saved.close()
    # Process 0 removes the oldest one.
    multihost.exchange("")
    assert training.complete_steps(FOLDER) == [2, 3]
    whole = jnp.arange(4096, dtype=jnp.float32).reshape(8, 512) + 3
    alone = digests.of_chunks(
      whole.dtype, whole.shape, [(np.asarray(whole), (0, 0))]
    )
    assert digests.of_tree(_state(3, mesh))["rows"] == alone
    multihost.exchange("")
    if PROCESS == 0:
      _damage(FOLDER / "3")
    multihost.exchange("")

    saved = training.Checkpoints(FOLDER, every=1, keep=2)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _state(0, mesh),
    )
    restored = saved.restore(abstract, batches)
    assert restored is not None
    step, state = restored
    saved.close()
    names = sorted(path.name for path in FOLDER.iterdir())
    print(
      "restored", step, float(multihost.fetch(state)["rows"][7, 511]), names
    )


logging.use_absl_handler()
main()
