"""Random keys of a rollout: one per group and one per sample (docs/algorithm.md#randomness).

Training and evaluation are different domains. Equal seeds therefore share no number, as in a run
whose `eval.seed` equals its `seed`.
"""

import flax.struct
import jax

from r3jax import types

# What a domain folds into the key of its seed. Training folds in the iteration, 0 ... 2**31 - 1;
# every other domain has a number above those.
_EVALUATION = 2**31


@flax.struct.dataclass
class Keys:
  """The keys of one stage on one device.

  Attributes:
    group: for what the samples of a group share, such as the initial noise.
    sample: for what is each sample's own.
  """

  group: types.Key  # [G]
  sample: types.Key  # [B]

  @property
  def samples_per_group(self) -> int:
    """Samples of each group on this device."""
    return self.sample.shape[0] // self.group.shape[0]


def _split_each(keys: types.Key) -> types.Key:
  """Splits every key in two, [n] -> [n, 2]."""
  return jax.vmap(jax.random.split)(keys)


def iteration_key(
  seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike
) -> types.Key:
  """Returns the key of all randomness in an iteration of training.

  Args:
    seed: uint32 seed of training.
    step: int32 number of iterations done before, from 0.
  """
  return jax.random.fold_in(jax.random.key(seed), step)


def evaluation_keys(seed: int, ids: jax.Array) -> Keys:
  """Returns the keys of rows of evaluation, which are groups of one sample each.

  Args:
    seed: seed of all rows.
    ids: [B, n] int32; rows with the same numbers get the same keys.
  """
  domain_key = jax.random.fold_in(jax.random.key(seed), _EVALUATION)

  def row_key(numbers: jax.Array) -> types.Key:
    key = domain_key
    for number in numbers:
      key = jax.random.fold_in(key, number)
    return key

  # Rows do not depend on the batch that they are in.
  pairs = _split_each(jax.vmap(row_key)(ids))
  return Keys(group=pairs[:, 0], sample=pairs[:, 1])


def split_keys(keys: Keys) -> tuple[Keys, Keys]:
  """Returns two independent sets of keys."""
  group = _split_each(keys.group)
  sample = _split_each(keys.sample)
  first = Keys(group[:, 0], sample[:, 0])
  second = Keys(group[:, 1], sample[:, 1])
  return first, second
