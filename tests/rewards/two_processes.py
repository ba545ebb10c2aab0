# ruff: noqa: E402
"""One of two processes that train together, each with a reward service of its own.

  python tests/rewards/two_processes.py PROCESS COORDINATOR MODEL WORKDIR ENDPOINT

Prints one JSON object: how each of three runs ended on this process.
"""

import hashlib
import json
import pathlib
import sys

import jax

PROCESS, COORDINATOR, MODEL, WORKDIR, ENDPOINT = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(COORDINATOR, num_processes=2, process_id=PROCESS)

import dataclasses

from etils import epath
import numpy as np

from r3jax.run import loop
from r3jax.run import sessions
from r3jax.run import workdir
from r3jax.run.logging import metric_writer
from r3jax.run.logging import sinks
from r3jax.run.logging import timing
from tests import tiny

SETTINGS = {
  "mesh.data": 2,
  "log.samples_every": 0,
  "total_steps": 6,
  "checkpoint.every": 1000,
  "reward.name": "service",
  "reward.endpoints": (ENDPOINT,),
  "reward.batch": 2,
  "reward.cache": 0,
  "reward.client.deadline": 5.0,
  "reward.client.attempts": 1,
  "reward.client.failures_to_open": 1000,
}


def fingerprint(tree) -> str:
  """Returns a hash of the parameters."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
  return digest.hexdigest()


def run(session, policy, step, name: str, **reward) -> dict:
  """Runs iterations in a folder of their own; returns how they ended."""
  config = tiny.make_config(pathlib.Path(MODEL), SETTINGS)
  config.reward.update(reward)
  files = workdir.Workdir(epath.Path(WORKDIR) / name)
  session = dataclasses.replace(session, config=config, files=files)
  session.experiment.reward.metrics()
  try:
    state = loop.iterate(
      session,
      step,
      loop.resume(session, session.init(policy)),
      timing.PhaseClock(),
      metric_writer.MetricWriter(sinks.open_all(session.files.path, None)),
    )
  except (RuntimeError, ZeroDivisionError) as error:
    return {"ended": type(error).__name__, "says": str(error)[:200]}
  counts = session.experiment.reward.scorers["service"].metrics()
  return {
    "ended": "finished",
    "policy": fingerprint(state.policy),
    "step": int(state.step),
    "counts": counts,
  }


def break_here(scorer):
  """Makes this process's reward raise at its second call."""
  calls, score = iter(range(10**6)), scorer._reward.score
  scorer._reward.score = lambda images, records: (
    1 // (next(calls) != 1) and score(images, records)
  )


def main():
  session, policy = sessions.prepare(
    tiny.make_config(pathlib.Path(MODEL), SETTINGS), WORKDIR
  )
  with jax.set_mesh(session.mesh):
    step = session.compile(session.init(policy))
    found = {
      "goes on": run(session, policy, step, "a", max_failed_fraction=1.0),
      "stops": run(
        session, policy, step, "b", max_failed_fraction=0.1, failure_window=10
      ),
    }
    if PROCESS == 1:
      break_here(session.experiment.reward.scorers["service"])
    found["breaks"] = run(session, policy, step, "c", max_failed_fraction=1.0)
  print(json.dumps(found), flush=True)


main()
