"""Damages checkpoints and model folders at random, and counts how that ends.

  python tests/checkpoint/damage_campaign.py --seed=0 --checkpoints=200 --models=100

Exits with 1 where damaged numbers are loaded silently, where anything but one line is raised, where
a read hangs, or where a damaged newest checkpoint is not replaced by the one before it.
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import flax.traverse_util  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tensorstore  # noqa: E402

from r3jax.checkpoint import pretrained  # noqa: E402
from r3jax.checkpoint import training  # noqa: E402
from r3jax.data import pipeline  # noqa: E402
from r3jax.model import network  # noqa: E402
from r3jax.parallel import meshes  # noqa: E402
from tests.checkpoint import damages  # noqa: E402
from tests.checkpoint import sharded_model  # noqa: E402

# A read that takes longer counts as one that hangs.
_LIMIT_S = 60
_MAX_MESSAGE = 2000  # characters
OLD_STEP = 2
NEW_STEP = 4


class Hangs(BaseException):
  """A read has not ended in time."""


def _state(step: int) -> dict:
  """Returns a state of some hundred kilobytes, another one for every step."""
  key = jax.random.key(step)
  return {
    "policy": {
      "w": jax.random.normal(key, (64, 512)),
      "b": jax.random.normal(key, (300,), jnp.bfloat16),
    },
    "step": jnp.int32(step),
  }


def _iterator(step: int):
  iterator = pipeline.prompt_iterator(12, 2, 0)
  for _ in range(step):
    next(iterator)
  return iterator


def write_checkpoints(folder: pathlib.Path) -> None:
  """Writes the checkpoints of two steps."""
  saved = training.Checkpoints(folder, every=1, keep=2)
  for step in (OLD_STEP, NEW_STEP):
    saved.save(step, _state(step), _iterator(step))
    saved.wait()
  saved.close()


def write_nan(folder: pathlib.Path, rng: random.Random) -> None:
  """Writes a NaN into a saved array, by the library that wrote the array."""
  base = {"driver": "file", "path": f"{folder / 'state'}/"}
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "ocdbt", "base": base, "path": "policy.w/"},
  }
  array = tensorstore.open(spec, open=True).result()
  array[rng.randrange(64), rng.randrange(512)].write(np.nan).result()


def swap_item(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts an item of the older checkpoint, or some of them, into the newer one."""
  for name in rng.choice(
    (("state",), ("digests",), ("data",), ("state", "digests"))
  ):
    shutil.rmtree(folder / name)
    shutil.copytree(folder.parent / str(OLD_STEP) / name, folder / name)


def swap_file(folder: pathlib.Path, rng: random.Random) -> None:
  """Puts the content of a file of the older checkpoint into one of the newer."""
  older = folder.parent / str(OLD_STEP)
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  path = rng.choice(files)
  others = [other for other in older.rglob("*") if other.is_file()]
  same = [other for other in others if other.name == path.name]
  path.write_bytes(rng.choice(sorted(same or others)).read_bytes())


CHECKPOINT_DAMAGES = (*damages.DAMAGES, write_nan, swap_item, swap_file)


@contextlib.contextmanager
def _time_limit():
  def stop(signum, frame):
    del signum, frame
    raise Hangs

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(_LIMIT_S)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _is_same(tree, expected) -> bool:
  same = jax.tree.map(
    lambda a, b: bool(np.array_equal(np.asarray(a), np.asarray(b))),
    tree,
    expected,
  )
  return all(jax.tree.leaves(same))


def read_checkpoint(folder: pathlib.Path) -> str:
  """Restores the last good checkpoint; returns how that ended."""
  abstract = jax.eval_shape(lambda: _state(0))
  saved = training.Checkpoints(folder, every=1, keep=2)
  try:
    iterator = _iterator(0)
    restored = saved.restore(abstract, iterator)
  finally:
    saved.close()
  if restored is None:
    return "TRACEBACK: no checkpoint"
  step, state = restored
  expected = _state(step)
  is_right = _is_same(state, expected) and (
    iterator.get_state() == _iterator(step).get_state()
  )
  if not is_right:
    return "SILENT"
  if step == NEW_STEP:
    return "same numbers"
  aside = folder / f"{NEW_STEP}.damaged"
  return "the one before" if aside.exists() else "TRACEBACK: not moved aside"


def outcome(read: Callable[[], str]) -> str:
  """Returns how a read of what is damaged ended."""
  try:
    with _time_limit():
      return read()
  except ValueError as error:
    if len(str(error)) > _MAX_MESSAGE:
      return f"TRACEBACK: {len(str(error))} characters"
    return f"refused: {error}"
  except Hangs:
    return "HANGS"
  except Exception as error:  # noqa: BLE001
    # Whatever it is, a user would see a traceback.
    return f"TRACEBACK: {type(error).__name__}: {error}"[:300]


def damaged_checkpoint(
  whole: pathlib.Path, scratch: pathlib.Path, number: int, seed: int
) -> tuple[str, str]:
  """Returns the name of a damage of the newest checkpoint, and how its read ended."""
  rng = random.Random(f"checkpoint {seed} {number}")
  damage = CHECKPOINT_DAMAGES[number % len(CHECKPOINT_DAMAGES)]
  folder = scratch / f"checkpoints_{number}"
  shutil.copytree(whole, folder)
  damage(folder / str(NEW_STEP), rng)
  result = outcome(lambda: read_checkpoint(folder))
  shutil.rmtree(folder)
  if result.startswith("refused"):
    # The one before is good.
    result = f"TRACEBACK: {result}"
  return damage.__name__, result


def damaged_model(
  whole: pathlib.Path,
  scratch: pathlib.Path,
  number: int,
  seed: int,
  expected: dict,
) -> tuple[str, str]:
  """Returns the name of a damage of a model's folder, and how its load ended."""
  rng = random.Random(f"model {seed} {number}")
  damage = damages.DAMAGES[number % len(damages.DAMAGES)]
  folder = scratch / f"model_{number}"
  shutil.copytree(whole, folder)
  damage(folder, rng)
  is_verified = (folder / "digests.json").exists()

  def read() -> str:
    if _is_same(read_model(folder), expected):
      return "same numbers"
    return "SILENT" if is_verified else "not verified"

  result = outcome(read)
  shutil.rmtree(folder)
  return damage.__name__, result


def read_model(folder: pathlib.Path) -> dict:
  """Returns all that a program takes from a model's folder, by name."""
  model = pretrained.find(str(folder))
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  placed = pretrained.shardings(network.Bagel(model.sizes), mesh)
  weights = model.weights(placed, None)
  leaves = flax.traverse_util.flatten_dict(weights, sep="/")
  texts = {
    "sizes": repr(model.sizes),
    "vocabulary": repr(sorted(model.tokenizer.vocabulary)),
  }
  return leaves | texts


def _capture_tracebacks(run: Callable[[], None]) -> int:
  """Runs a function; returns how many tracebacks have been printed meanwhile."""
  with tempfile.TemporaryFile() as log:
    before = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
      run()
    finally:
      sys.stderr.flush()
      os.dup2(before, 2)
      os.close(before)
    log.seek(0)
    content = log.read().decode(errors="replace")
  first = content.find("Traceback (most recent call last)")
  if first >= 0:
    print("the first traceback:", content[max(0, first - 500) : first + 3000])
  return content.count("Traceback (most recent call last)")


def main() -> None:
  """Runs the campaign and prints the counts."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--checkpoints", type=int, default=200)
  parser.add_argument("--models", type=int, default=100)
  arguments = parser.parse_args()
  results: list[tuple[str, str, str]] = []

  def run() -> None:
    with tempfile.TemporaryDirectory() as scratch:
      _run(pathlib.Path(scratch), arguments, results)

  tracebacks = _capture_tracebacks(run)
  counts: dict[str, collections.Counter] = {}
  bad = 0
  for kind, damage, result in results:
    word = result.split(":")[0]
    counts.setdefault(kind, collections.Counter())[word] += 1
    if word in ("SILENT", "TRACEBACK", "HANGS"):
      bad += 1
      print(f"{kind} {damage}: {result}")
  for kind, counter in counts.items():
    print(kind, dict(counter))
  print(f"tracebacks in the log: {tracebacks}")
  sys.exit(1 if bad or tracebacks else 0)


def _run(
  scratch: pathlib.Path,
  arguments: argparse.Namespace,
  results: list[tuple[str, str, str]],
) -> None:
  """Damages and reads; adds (kind, damage, result)."""
  from tests import tiny

  write_checkpoints(scratch / "whole")
  for number in range(arguments.checkpoints):
    damage, result = damaged_checkpoint(
      scratch / "whole", scratch, number, arguments.seed
    )
    results.append(("checkpoints", damage, result))

  if not arguments.models:
    return
  tiny.write_model(scratch / "bare")
  bare = pretrained.find(str(scratch / "bare"))
  mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
  placed = pretrained.shardings(network.Bagel(bare.sizes), mesh)
  weights = bare.weights(placed, None)
  for form in ("bagel", "orbax"):
    pretrained.save(weights, bare, scratch / form, form)
  # As a release: several files and an index.
  (scratch / "indexed").mkdir()
  sharded_model.write(scratch / "indexed", sharded_model.tiny_bagel())
  pretrained.write_digests(scratch / "indexed")
  forms = ("bagel", "orbax", "indexed", "bare")
  expected = {form: read_model(scratch / form) for form in forms}
  for number in range(arguments.models):
    # Damages come in groups, so that every folder gets every damage.
    form = forms[number // len(damages.DAMAGES) % len(forms)]
    damage, result = damaged_model(
      scratch / form, scratch, number, arguments.seed, expected[form]
    )
    results.append((f"models ({form})", damage, result))


if __name__ == "__main__":
  main()
