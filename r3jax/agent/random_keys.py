"""Random keys of a rollout: one per group and one per sample."""

import flax.struct
import jax

from r3jax import types


@flax.struct.dataclass
class Keys:
  """Randomness of one stage: per group and per sample."""

  group: types.Key  # [G]
  sample: types.Key  # [B]

  @property
  def samples(self) -> int:
    """Samples per group on this device."""
    return self.sample.shape[0] // self.group.shape[0]


def numbered_keys(seed: int, ids: jax.Array) -> Keys:
  """Returns the keys of rows that are groups of one sample; ids are [B, n] int32 numbers of each row."""

  def fold(row):
    key = jax.random.key(seed)
    for number in row:
      key = jax.random.fold_in(key, number)
    return jax.random.split(key)

  pair = jax.vmap(fold)(ids)
  return Keys(pair[:, 0], pair[:, 1])


def split_keys(keys: Keys) -> tuple[Keys, Keys]:
  """Returns two independent sets of keys."""
  pair = jax.vmap(lambda key: jax.random.split(key))
  group, sample = pair(keys.group), pair(keys.sample)
  return Keys(group[:, 0], sample[:, 0]), Keys(group[:, 1], sample[:, 1])
