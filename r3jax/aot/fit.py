"""Searches the meshes of a slice for those that a run fits."""

from collections.abc import Callable
import dataclasses

from r3jax.aot import child
from r3jax.aot import report
from r3jax.aot import results
from r3jax.aot import search


def find(
  request: child.Request, num_meshes: int, on_try: Callable[[str], None]
) -> list[results.Compilation]:
  """Compiles one candidate after the other until enough fit; returns those, the fastest first.

  A candidate that does not fit is tried again with more micro-batches.

  Args:
    request: what is compiled; its mesh and micro-batches are not read.
    num_meshes: number of fitting meshes after which the search ends.
    on_try: called with a line about every compilation.

  Raises:
    ValueError: no mesh can hold the weights, or the config cannot run.
  """
  listing = child.run(dataclasses.replace(request, lists_candidates=True))
  if listing.problem:
    raise ValueError(listing.problem)
  fitting: list[results.Compilation] = []
  for candidate in listing.candidates:
    if len(fitting) == num_meshes:
      break
    compilation = _fit(request, candidate, on_try)
    if compilation is not None:
      fitting.append(compilation)
  return sorted(fitting, key=lambda compilation: compilation.seconds)


def _fit(
  request: child.Request,
  candidate: results.Compilation,
  on_try: Callable[[str], None],
) -> results.Compilation | None:
  """Compiles a candidate with the fewest micro-batches that fit; returns None where none do."""
  config = request.target.config
  mesh = dict(candidate.mesh)
  numbers = [1]
  if request.target.command == "step":
    numbers = search.micro_batches(
      config.groups_per_step, config.group_size, mesh["data"]
    )
  number: int | None = numbers[0]
  while number is not None:
    target = request.target.on(mesh, number)
    outcome = child.run(dataclasses.replace(request, target=target))
    verdict = outcome.problem or report.success(outcome.compilation)
    on_try(f"{mesh}, {number} micro-batches: {verdict}")
    if not outcome.problem:
      return outcome.compilation
    if outcome.used is None:
      return None
    passing = outcome.used - candidate.held
    room = candidate.hbm - candidate.held
    number = search.more(numbers, number, passing, room)
  return None
