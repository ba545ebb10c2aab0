"""How BAGEL-7B is spread over TPU slices: variants of the configs.

  python launch/tpu.py --config=configs/r3_geneval.py:v5p-128 ...

Where a chip holds the gen expert whole (13 GiB in bfloat16), nothing is split over "tensor":
weights travel once per layer and update, activations do not. Elsewhere the heads of a layer are
split. The widest matrices that decode text are split over all chips of a replica. Those of the gen
expert are not: the hidden states of a denoising step are much larger, and would have to travel.

`launch/compile.py` compiles every one ahead of time; docs/tpu.md says what they need. Names of v5p
and tpu7x slices count cores (v5p-128 has 64 chips), those of v5e and v6e count chips. A core of
tpu7x is a device of its own.
"""

import dataclasses
import difflib

import ml_collections

_ALL = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of TPUs and how a run uses it.

  Attributes:
    topology: of its chips, as JAX names it.
    mesh: devices along the axes data, fsdp and tensor.
    micro_batches: parts of a replica's samples whose gradients are computed one after the other.
    wide_rollout: splits the widest matrices that decode text over all chips of a replica.
    lora_rank: of the adapters; 0 trains the whole policy.
    groups: prompts of an iteration.
  """

  topology: str
  mesh: tuple[int, int, int]
  micro_batches: int = 1
  wide_rollout: bool = True
  lora_rank: int = 0
  groups: int = 8


def _with_adapters(
  topology: str, mesh: tuple[int, int, int], micro_batches: int, groups: int = 8
) -> Slice:
  """Returns a slice on which adapters of rank 16 are trained."""
  return Slice(
    topology,
    mesh,
    micro_batches,
    lora_rank=16,
    groups=groups,
  )


SLICES = {
  "v5p-128": Slice("v5p:4x4x4", (8, 8, 1)),
  "v5e-256": Slice("v5e:16x16", (4, 16, 4), 2),
  "v6e-64": Slice("v6e:8x8", (2, 32, 1), 2),
  "v6e-256": Slice("v6e:16x16", (8, 16, 2)),
  # Wide rollouts crashed libtpu 0.0.42, and were not tried again since its crash in the ViT is
  # avoided (`layers.full_attention`).
  "tpu7x-128": Slice("tpu7x:4x4x4", (16, 2, 4), wide_rollout=False),
  "lora-v5e-4": _with_adapters("v5e:2x2", (1, 1, 4), 64, groups=4),
  "lora-v5e-16": _with_adapters("v5e:4x4", (2, 2, 4), 16),
  "lora-v5e-32": _with_adapters("v5e:4x8", (2, 4, 4), 8),
  "lora-v6e-8": _with_adapters("v6e:2x4", (1, 8, 1), 16),
  "lora-v5p-8": _with_adapters("v5p:2x2x1", (1, 4, 1), 16),
}


def spread(
  config: ml_collections.ConfigDict, variant: str, others: tuple[str, ...]
) -> None:
  """Changes a config of BAGEL-7B to be spread over a slice; leaves it as it is for "bagel".

  Args:
    config: for one device.
    variant: name of a slice, or "bagel".
    others: further variants of the config file, for the error.

  Raises:
    ValueError: there is no such variant.
  """
  if variant == "bagel":
    return
  if variant not in SLICES:
    known = ["bagel", *others, *SLICES]
    message = f"the config's variant must be one of {known}; got {variant!r}"
    for nearest in difflib.get_close_matches(variant, known, n=1):
      message += f"; did you mean {nearest}?"
    raise ValueError(message)
  layout = SLICES[variant]
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = layout.mesh
  config.step.micro_batches = layout.micro_batches
  config.groups_per_step = layout.groups
  if layout.wide_rollout:
    config.sharding.rollout.mlp = _ALL
    config.sharding.rollout.vocab = _ALL
  if layout.lora_rank:
    config.model.lora.rank = layout.lora_rank
    # Ten times the rates of the whole policy.
    config.optimizer.und_learning_rate = 5e-5
    config.optimizer.gen_learning_rate = 5e-5
