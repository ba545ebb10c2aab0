"""Draws the prompts of every step with Grain: endless, reshuffled every epoch, resumable."""

import grain
import numpy as np


def prompt_iterator(
  num_records: int, groups_per_step: int, seed: int
) -> grain.DatasetIterator:
  """Returns an endless iterator over int32 arrays [groups_per_step] of record indices.

  Step k yields places k*groups_per_step ... of a sequence of epochs; an epoch holds every record
  once, in an order drawn from (seed, epoch). A step may span two epochs. The order is global: it
  is the same on every host, each of which takes its share of the groups later. The position is
  `get_state()`, a small JSON object that does not depend on the number of hosts; `set_state`
  continues from it, and io/checkpoints.py saves it.

  Raises:
    ValueError: if there are no records or no groups.
  """
  if num_records < 1 or groups_per_step < 1:
    raise ValueError(
      "num_records and groups_per_step must be at least 1, got "
      f"{num_records} and {groups_per_step}"
    )
  indices = grain.MapDataset.range(num_records).seed(seed).shuffle().repeat()
  # The remainder is that of an endless sequence: without dropping it, its length overflows for batches of 1.
  steps = indices.batch(groups_per_step, drop_remainder=True).map(
    lambda batch: batch.astype(np.int32)
  )
  # No threads: an index costs nothing to make.
  return iter(
    steps.to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
  )
