"""Meshes and micro-batches to try on a slice, in the order in which to try them."""

from collections.abc import Iterator, Sequence
import math

from r3jax.rl import placement


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def meshes(num_chips: int, num_kv_heads: int) -> Iterator[dict[str, int]]:
  """Yields the meshes of a number of chips whose `tensor` axis splits the heads."""
  for tensor in _divisors(math.gcd(num_chips, num_kv_heads)):
    for fsdp in _divisors(num_chips // tensor):
      data = num_chips // (tensor * fsdp)
      yield {"data": data, "fsdp": fsdp, "tensor": tensor}


def micro_batches(groups: int, group_size: int, replicas: int) -> list[int]:
  """Returns the numbers of micro-batches that split a replica's samples, rising.

  The list is empty where the replicas do not split the samples.
  """
  numbers = []
  for number in range(1, groups * group_size // replicas + 1):
    try:
      placement.check(groups, group_size, replicas, number)
    except ValueError:
      continue
    numbers.append(number)
  return numbers


def more(
  numbers: Sequence[int], current: int, passing: int, room: int
) -> int | None:
  """Returns the next number of micro-batches to try, None where there is none.

  Args:
    numbers: those that split the samples, rising.
    current: the number that did not fit.
    passing: bytes of a chip that it needed beside what stays.
    room: bytes of a chip that are free for it.
  """
  larger = [number for number in numbers if number > current]
  if not larger:
    return None
  # If all of it shrank with the number of micro-batches.
  needed = current * passing / max(room, 1)
  sufficient = [number for number in larger if number >= needed]
  return sufficient[0] if sufficient else larger[-1]
