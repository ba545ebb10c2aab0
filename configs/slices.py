"""How BAGEL-7B is spread over TPU slices: variants of the configs, each compiled by `launch/compile.py`.

  python launch/tpu.py --config=configs/r3_geneval.py:v5p-128 ...

docs/tpu.md says what was compiled and what it needs. v5p and tpu7x count cores (v5p-128 has 64 chips),
v5e and v6e count chips; of tpu7x a core is a device of its own.
"""

import ml_collections

# Rollouts of the layers' widest matrices split over all chips of a replica: where memory is scarce.
_WIDE = dict(mlp=("fsdp", "tensor"), vocab=("fsdp", "tensor"))


def _full(
  data: int, fsdp: int, tensor: int, micro_batches: int = 1, rollout=None
):
  def change(config: ml_collections.ConfigDict):
    config.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    config.step.micro_batches = micro_batches
    config.sharding.rollout.update(rollout or {})

  return change


def _lora(*mesh: int, rank: int, micro_batches: int, groups: int = 8):
  def change(config: ml_collections.ConfigDict):
    _full(*mesh, micro_batches=micro_batches, rollout=_WIDE)(config)
    config.groups_per_step = groups
    config.model.lora.rank = rank
    # ten times those of full fine-tuning
    config.optimizer.update(und_learning_rate=5e-5, gen_learning_rate=5e-5)

  return change


SLICES = {
  "v5p-128": ("v5p:4x4x4", _full(8, 2, 4)),
  "v5e-256": ("v5e:16x16", _full(4, 16, 4, micro_batches=2, rollout=_WIDE)),
  "v6e-64": ("v6e:8x8", _full(2, 8, 4, micro_batches=8, rollout=_WIDE)),
  "v6e-256": ("v6e:16x16", _full(8, 8, 4, micro_batches=2, rollout=_WIDE)),
  "tpu7x-128": ("tpu7x:4x4x4", _full(16, 2, 4)),
  "lora-v5e-4": (
    "v5e:2x2",
    _lora(1, 1, 4, rank=16, micro_batches=64, groups=4),
  ),
  "lora-v5e-16": ("v5e:4x4", _lora(2, 2, 4, rank=16, micro_batches=16)),
  "lora-v5e-32": ("v5e:4x8", _lora(2, 4, 4, rank=16, micro_batches=16)),
  "lora-v6e-8": ("v6e:2x4", _lora(2, 1, 4, rank=16, micro_batches=16)),
  "lora-v5p-8": ("v5p:2x2x1", _lora(2, 1, 2, rank=16, micro_batches=16)),
}


def on(
  config: ml_collections.ConfigDict, variant: str, others: tuple[str, ...]
) -> ml_collections.ConfigDict:
  """Returns a config of BAGEL-7B spread over a slice, as it is for "bagel".

  Args:
    config: of one device; is changed.
    variant: name of a slice, or "bagel".
    others: further variants that the config file knows, for the message.

  Raises:
    ValueError: there is no such variant.
  """
  if variant == "bagel":
    return config
  if variant not in SLICES:
    raise ValueError(
      f"the config's variant must be one of {['bagel', *others, *SLICES]}; got {variant!r}"
    )
  SLICES[variant][1](config)
  return config
