"""Loads a BAGEL folder over a mesh and prints what it took; run by test_streaming.py.

python -m tests.checkpoint.load_sharded FOLDER PROCESS PROCESSES PORT
"""

import json
import os
import re
import sys
import threading
import time

import flax.traverse_util
import jax
import numpy as np

from r3jax.checkpoint import pretrained
from r3jax.model import network
from r3jax.model import parameters
from r3jax.parallel import meshes


def anonymous_bytes() -> int:
  """Returns this process's resident memory that no file backs."""
  with open("/proc/self/status") as file:
    return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024


class Peak:
  """Watches the anonymous memory inside a `with` block."""

  def __enter__(self):
    self.start = self.peak = anonymous_bytes()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._stop.is_set():
      self.peak = max(self.peak, anonymous_bytes())
      time.sleep(0.001)

  def __exit__(self, *unused):
    self.peak = max(self.peak, anonymous_bytes())
    self._stop.set()
    self._thread.join()


def main(folder: str, process: int, processes: int, port: int):
  if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
  mesh = meshes.make_mesh(data=1, fsdp=4, tensor=2)
  found = pretrained.find(folder)
  bagel = network.Bagel(found.sizes)
  parameters.shardings(bagel, mesh)  # its compilations are part of the start
  jax.block_until_ready(
    [jax.device_put(np.zeros(8), device) for device in jax.local_devices()]
  )
  with Peak() as seen:
    policy, frozen = found.load(bagel, mesh)
  weights = {"policy": policy, **frozen}
  leaves = jax.tree.leaves(weights)
  shards = sum(
    shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards
  )
  sums = {
    path: [
      float(np.sum(np.asarray(shard.data, np.float64)))
      for shard in leaf.addressable_shards
    ]
    for path, leaf in flax.traverse_util.flatten_dict(weights, sep="/").items()
  }
  print(
    json.dumps(
      {"above_start": seen.peak - seen.start, "shards": shards, "sums": sums}
    )
  )


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  main(sys.argv[1], *map(int, sys.argv[2:]))
