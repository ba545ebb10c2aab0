"""Compiles programs for a topology and reads what the compiler reports; needs libtpu."""

from collections.abc import Callable, Sequence
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
from r3jax.aot import results
from r3jax.aot import search
from r3jax.costs import chips
from r3jax.costs import count
from r3jax.parallel import meshes
from r3jax.run import model_setup


@dataclasses.dataclass(frozen=True)
class Target:
  """What is compiled, and for which slice.

  Attributes:
    command: a key of `programs.COMMANDS`.
    config: of a run; its mesh is one of the topology.
    topology: of the slice, for example "v5p:4x4x4".
    layers: number of layers of the language model; None for all.
  """

  command: str
  config: ml_collections.ConfigDict
  topology: str
  layers: int | None

  @property
  def chip(self) -> chips.Chip:
    """The chips of the slice."""
    return chips.of_topology(self.topology)

  def on(self, mesh: dict[str, int], micro_batches: int = 1) -> "Target":
    """Returns the target with another mesh and number of micro-batches."""
    config = self.config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.step.micro_batches = micro_batches
    return dataclasses.replace(self, config=config)

  def devices(self) -> Sequence[jax.Device]:
    """Returns the chips as JAX describes them.

    Raises:
      ValueError: libtpu does not know the slice; lists those that it knows.
    """
    options = {}
    if self.topology.endswith(":1x1"):
      # Otherwise a host has 2 x 2 chips.
      options = {"chips_per_host_bounds": (1, 1, 1)}
    try:
      description = topologies.get_topology_desc(
        platform="tpu", topology_name=self.topology, **options
      )
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(
        f"libtpu refuses the topology {self.topology!r}: {error}\n{chips.known()}"
      ) from error
    return description.devices

  def build(
    self, devices: Sequence[jax.Device]
  ) -> tuple[programs.Programs, jax.sharding.Mesh]:
    """Returns the programs, and their mesh of the devices.

    Raises:
      ValueError: the config cannot run on the mesh; the message says what must hold.
    """
    config = self.config.copy_and_resolve_references()
    if config.model.attention == "auto":  # chosen as on the TPU itself
      head_dim = abstract.model_sizes(config, None).llm.head_dim
      config.model.attention = model_setup.attention_on("tpu", head_dim)
    mesh = meshes.make_mesh_on(devices, **config.mesh)
    build_programs = programs.COMMANDS[self.command]
    return build_programs(config, mesh, self.layers), mesh


def _describe(
  target: Target, built: programs.Programs, mesh: jax.sharding.Mesh
) -> results.Compilation:
  """Returns what is known before anything is compiled."""
  is_step = target.command == "step"
  held = [
    sum(program.bytes_by_kind().values()) for program in built.programs.values()
  ]

  def stage_cost(cost: count.Cost) -> results.StageCost:
    seconds = cost.seconds(target.chip, mesh.size)
    return results.StageCost(cost.flops, cost.read, seconds)

  return results.Compilation(
    topology=target.topology,
    mesh=dict(mesh.shape),
    layers=built.layers,
    samples=built.samples,
    micro_batches=target.config.step.micro_batches if is_step else 1,
    hbm=target.chip.hbm,
    held=max(held),
    stages={name: stage_cost(cost) for name, cost in built.stages.items()},
  )


def measure(
  target: Target,
  note: Callable[[results.Compilation, str], None],
  keep_text: Callable[[str, str], None],
) -> results.Compilation:
  """Compiles all programs of a target.

  Args:
    target: what is compiled, and for which slice.
    note: called with what is known, and the name of the program that is compiled next; the
      compiler may abort the process.
    keep_text: called with the name and the HLO text of every compiled program.

  Raises:
    ValueError: the config cannot run on the slice, or its weights alone do not fit.
  """
  built, mesh = target.build(target.devices())
  compilation = _describe(target, built, mesh)
  held = compilation.held
  if held > compilation.hbm:
    message = report.shortage(
      target.command, held, compilation.hbm, held, compilation.mesh
    )
    raise ValueError(f"{message}. Not compiled.")
  compiled_programs = {}
  for name, program in built.programs.items():
    note(compilation, name)
    compiled_programs[name] = _compile(name, program, target.chip, keep_text)
    compilation = dataclasses.replace(
      compilation, programs=dict(compiled_programs)
    )
  peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return dataclasses.replace(compilation, compiler_gib=peak_kib / 2**20)


def _compile(
  name: str,
  program: programs.Program,
  chip: chips.Chip,
  keep_text: Callable[[str, str], None],
) -> results.CompiledProgram:
  lowered = program.lower()
  start = time.monotonic()
  compiled = lowered.compile()
  seconds = time.monotonic() - start
  text = compiled.as_text()
  keep_text(name, text)
  collectives = hlo.collectives(text)
  traffic = results.traffic(collectives)
  memory = results.memory_by_kind(
    compiled.memory_analysis(), program.bytes_by_kind(), program.beside()
  )
  return results.CompiledProgram(
    compile_seconds=seconds,
    collectives=traffic,
    causes=results.causes(collectives, chip),
    link_seconds=results.link_seconds(traffic, chip),
    memory=memory,
  )


def candidates(target: Target) -> list[results.Compilation]:
  """Returns the meshes of a slice that can hold the weights, the fastest by the roofline first.

  Raises:
    ValueError: no mesh can; lists why.
  """
  devices = target.devices()
  num_kv_heads = abstract.model_sizes(
    target.config, target.layers
  ).llm.num_kv_heads
  fitting = []
  refusals = []
  for mesh in search.meshes(len(devices), num_kv_heads):
    candidate = target.on(mesh)
    try:
      compilation = _describe(candidate, *candidate.build(devices))
    except ValueError as error:
      refusals.append(f"{mesh}: {error}")
      continue
    if compilation.held < compilation.hbm:
      fitting.append(compilation)
    else:
      held_gib = compilation.held / report.GIB
      refusals.append(
        f"{mesh}: weights and optimizer take {held_gib:.1f} GiB of a chip"
      )
  if not fitting:
    raise ValueError(
      "no mesh of this slice can hold the run:\n  " + "\n  ".join(refusals)
    )
  return sorted(fitting, key=lambda candidate: candidate.roofline_seconds)
