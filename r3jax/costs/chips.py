"""Peak figures of TPU devices, by the name that topologies use, and of GPUs by that of JAX.

A device is what JAX calls a device: one chip, or half a chip of tpu7x.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak figures of one device.

  Attributes:
    hbm: bytes of memory.
    flops: bfloat16 operations per second.
    bandwidth: bytes per second from memory.
    links: bytes per second that all its links to other devices send together.
    topologies: some shapes of slices, for messages.
  """

  hbm: int
  flops: float
  bandwidth: float
  links: float
  topologies: tuple[str, ...]


# Sources: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. Links are half of the
# bidirectional figures; figures of tpu7x are half of a chip's.
CHIPS = {
  "v4": Chip(32 * GIB, 275e12, 1200e9, 300e9, ("2x2x1", "2x2x4", "4x4x4")),
  "v5e": Chip(
    16 * GIB,
    197e12,
    819e9,
    200e9,
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  ),
  "v5p": Chip(
    95 * GIB,
    459e12,
    2765e9,
    600e9,
    ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
  ),
  "v6e": Chip(
    32 * GIB,
    918e12,
    1638e9,
    400e9,
    ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  ),
  "tpu7x": Chip(
    96 * GIB,
    1153.5e12,
    3690e9,
    300e9,
    ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
  ),
}


# How JAX calls the devices of a chip.
_TPU_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
}
# Dense bfloat16 operations per second of GPUs, by a part of their name; data sheets of NVIDIA.
_GPU_FLOPS = {
  "A100": 312e12,
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the bfloat16 operations per second of a device, None where no figure is known.

  Args:
    device_kind: as JAX names it.
  """
  if device_kind in _TPU_KINDS:
    return CHIPS[_TPU_KINDS[device_kind]].flops
  for name, flops in _GPU_FLOPS.items():
    if name in device_kind:
      return flops
  return None


def of_topology(topology: str) -> Chip:
  """Returns the chip of a topology such as "v5p:4x4x4".

  Raises:
    ValueError: there is no such chip; the message lists known topologies.
  """
  name, colon, _ = topology.partition(":")
  if name not in CHIPS or not colon:
    raise ValueError(
      f"--topology must be CHIP:SHAPE; got {topology!r}. {known()}"
    )
  return CHIPS[name]


def known() -> str:
  """Returns a sentence that lists topologies."""
  slices = []
  for name, chip in CHIPS.items():
    topologies = [f"{name}:{shape}" for shape in chip.topologies]
    slices.append(f"{name}: {', '.join(topologies)}")
  return f"Known are {'; '.join(slices)}"
