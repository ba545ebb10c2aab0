"""Which meshes and micro-batches to try on a slice, and in which order."""

from collections.abc import Iterator, Sequence
import math

from r3jax.rl import placement


def meshes(chips: int, kv_heads: int) -> Iterator[dict[str, int]]:
  """Yields the meshes of so many chips: every size of `tensor` that splits the heads, every split of the rest."""
  divisors = lambda number: (n for n in range(1, number + 1) if number % n == 0)
  for tensor in divisors(math.gcd(chips, kv_heads)):
    for fsdp in divisors(chips // tensor):
      yield {"data": chips // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}


def micro_batches(groups: int, group_size: int, replicas: int) -> list[int]:
  """Returns the numbers of micro-batches that split a replica's samples, from 1 on; none where replicas do not."""
  found = []
  for number in range(1, groups * group_size // replicas + 1):
    try:
      placement.check(groups, group_size, replicas, number)
    except ValueError:
      continue
    found.append(number)
  return found


def more(
  numbers: Sequence[int], now: int, passing: int, room: int
) -> int | None:
  """Returns the next number of micro-batches to try, None where there is none.

  Args:
    numbers: that split the samples, rising.
    now: the number that did not fit.
    passing: bytes of a chip that it took beside what stays.
    room: bytes of a chip that are free for it.
  """
  wanted = now * passing / max(room, 1)  # if all of it were split
  larger = [number for number in numbers if number > now]
  return next(
    (number for number in larger if number >= wanted),
    larger[-1] if larger else None,
  )
