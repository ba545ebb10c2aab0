"""Compiles programs for a topology and reads what the compiler found; needs libtpu."""

from collections.abc import Callable
import dataclasses
import resource
import time

import jax
from jax.experimental import topologies
import ml_collections

from r3jax.aot import abstract
from r3jax.aot import hlo
from r3jax.aot import programs
from r3jax.aot import report
from r3jax.aot import search
from r3jax.costs import chips
from r3jax.parallel import meshes
from r3jax.run import setup


@dataclasses.dataclass(frozen=True)
class Target:
  """What is compiled, and for what.

  Attributes:
    command: a key of `programs.COMMANDS`.
    config: of a run; its mesh is one of the topology.
    topology: of the slice, for example "v5p:4x4x4".
    layers: of the language model; None for all.
  """

  command: str
  config: ml_collections.ConfigDict
  topology: str
  layers: int | None

  @property
  def chip(self) -> chips.Chip:
    """The chips of the slice."""
    return chips.of_topology(self.topology)

  def on(self, mesh: dict[str, int]) -> "Target":
    """Returns the same with another mesh, in one micro-batch."""
    config = self.config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.step.micro_batches = 1
    return dataclasses.replace(self, config=config)

  def devices(self):
    """Returns the chips as JAX knows them.

    Raises:
      ValueError: libtpu knows no such slice; lists the known.
    """
    # else hosts have 2 x 2
    alone = (
      {"chips_per_host_bounds": (1, 1, 1)}
      if self.topology.endswith(":1x1")
      else {}
    )
    try:
      return topologies.get_topology_desc(
        platform="tpu", topology_name=self.topology, **alone
      ).devices
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(
        f"libtpu refuses the topology {self.topology!r}: {error}\n{chips.known()}"
      ) from error

  def build(self, devices) -> tuple[programs.Programs, jax.sharding.Mesh]:
    """Returns the programs and their mesh of the devices.

    Raises:
      ValueError: the config cannot be run on the mesh; the message says what must hold.
    """
    config = self.config.copy_and_resolve_references()
    if config.model.attention == "auto":  # as on the TPU itself
      config.model.attention = setup.attention_on(
        "tpu", abstract.model_sizes(config, None).llm.head_dim
      )
    mesh = meshes.make_mesh_on(devices, **config.mesh)
    return programs.COMMANDS[self.command](config, mesh, self.layers), mesh


def _described(
  target: Target, built: programs.Programs, mesh: jax.sharding.Mesh
) -> dict:
  """Returns what is known before anything is compiled."""
  chip = target.chip
  return {
    "topology": target.topology,
    "mesh": dict(mesh.shape),
    "layers": built.layers,
    "samples": built.samples,
    "micro_batches": target.config.step.micro_batches
    if target.command == "step"
    else 1,
    "hbm": chip.hbm,
    "held": max(
      sum(program.bytes_by_kind().values())
      for program in built.programs.values()
    ),
    "stages": {
      name: vars(cost) | {"seconds": cost.seconds(chip, mesh.size)}
      for name, cost in built.stages.items()
    },
    "programs": {},
  }


def measure(
  target: Target, note: Callable[[dict], None], keep: Callable[[str, str], None]
) -> dict:
  """Compiles all programs of a target.

  Args:
    target: what and for what.
    note: called with what is known before each program is compiled, and at the end.
    keep: called with the name and the text of every compiled program.

  Returns:
    The numbers that `report.table` shows.

  Raises:
    ValueError: the config cannot be run on the slice, or its weights alone do not fit.
  """
  built, mesh = target.build(target.devices())
  found, chip = _described(target, built, mesh), target.chip
  if found["held"] > chip.hbm:
    raise ValueError(
      report.needs(
        target.command, found["held"], chip.hbm, found["held"], mesh.shape
      )
      + ". Not compiled."
    )
  for name, program in built.programs.items():
    note(found | {"compiling": name})
    lowered, start = program.lower(), time.monotonic()
    compiled = lowered.compile()
    seconds, text = time.monotonic() - start, compiled.as_text()
    keep(name, text)
    collectives = report.traffic(hlo.collectives(text))
    found["programs"][name] = {
      "compile_seconds": seconds,
      "collectives": collectives,
      "link_seconds": report.on_links(collectives, chip),
      "memory": report.memory(
        compiled.memory_analysis(), program.bytes_by_kind(), program.beside()
      ),
    }
  found["compiler_gib"] = (
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  )
  note(found)
  return found


def candidates(target: Target) -> list[dict]:
  """Returns what is known of every mesh of a slice that could hold the weights, the fastest by the roofline first.

  Raises:
    ValueError: none could; lists why.
  """
  devices, refused, found = target.devices(), [], []
  for mesh in search.meshes(
    len(devices),
    abstract.model_sizes(target.config, target.layers).llm.num_kv_heads,
  ):
    tried = target.on(mesh)
    try:
      one = _described(tried, *tried.build(devices))
    except ValueError as error:
      refused.append(f"{mesh}: {error}")
      continue
    if one["held"] < one["hbm"]:
      found.append(one)
    else:
      refused.append(
        f"{mesh}: weights and optimizer take {one['held'] / report.GIB:.1f} GiB of a chip"
      )
  if not found:
    raise ValueError(
      "no mesh of this slice can hold the run:\n  " + "\n  ".join(refused)
    )
  return sorted(
    found,
    key=lambda one: sum(stage["seconds"] for stage in one["stages"].values()),
  )
