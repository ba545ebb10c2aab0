"""Draws the prompts of every iteration with Grain: endless, reshuffled every epoch, resumable."""

import grain
import numpy as np


def prompt_iterator(
  num_prompts: int, groups_per_step: int, seed: int
) -> grain.DatasetIterator:
  """Returns an endless iterator over int32 arrays [groups_per_step] of prompt indices.

  Step k yields places k*groups_per_step ... of a sequence of epochs; an epoch holds every prompt
  once, in an order drawn from (seed, epoch). A step may span two epochs. The order is global: it
  is the same on every host, each of which takes its share of the groups later. The position is
  `get_state()`, a small JSON object that does not depend on the number of hosts; checkpoints hold
  it and `set_state` continues from it.

  Args:
    num_prompts: the size of the training set.
    groups_per_step: the number of prompts of an iteration.
    seed: decides the order.

  Raises:
    ValueError: there are no prompts or no groups.
  """
  if num_prompts < 1 or groups_per_step < 1:
    raise ValueError(
      "num_prompts and groups_per_step must be at least 1, got "
      f"{num_prompts} and {groups_per_step}"
    )

  def to_int32(batch: np.ndarray) -> np.ndarray:
    return batch.astype(np.int32)

  indices = grain.MapDataset.range(num_prompts).seed(seed).shuffle().repeat()
  # An endless sequence has no remainder, but without dropping it Grain's length of the dataset
  # overflows for batches of 1.
  batches = indices.batch(groups_per_step, drop_remainder=True).map(to_int32)
  # No threads: an index costs nothing to compute.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(options))
