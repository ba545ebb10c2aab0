"""What an iteration costs, counted from sizes: XLA counts the body of a loop once.

Only the language model's products and attention are counted; the image towers, norms and the
optimizer are left out. A stage's time is the roofline's: the longer of computing and reading.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from r3jax.agent import settings as settings_lib
from r3jax.costs import chips
from r3jax.model import architecture
from r3jax.parallel import sharding
from r3jax.sequence import layouts
from r3jax.sequence import segments

BACKWARD = 2  # products of a backward pass, in forward passes

# Segments of the stages: what a group shares, and what an edit is told.
_ASKED, _SEEN, _SOURCE = (
  ("system", "prompt"),
  ("system", "vision", "question"),
  ("source", "vision"),
)
_TOLD = ("instruction", "instruction_alone")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of all chips together.

  Attributes:
    flops: operations.
    read: bytes read from memory.
  """

  flops: float
  read: float

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.flops + other.flops, self.read + other.read)

  def times(self, factor: float) -> "Cost":
    """Returns the cost of doing it several times."""
    return Cost(self.flops * factor, self.read * factor)

  def seconds(self, chip: chips.Chip, number: int) -> float:
    """Returns the roofline's time on so many chips."""
    return max(self.flops / chip.flops, self.read / chip.bandwidth) / number


def expert_parameters(llm: architecture.LLMConfig) -> int:
  """Returns the numbers in the matrices of one expert of one layer."""
  heads, kv_heads = (
    llm.num_heads * llm.head_dim,
    llm.num_kv_heads * llm.head_dim,
  )
  return llm.hidden_size * (
    2 * heads + 2 * kv_heads + 3 * llm.intermediate_size
  )


def forward(
  llm: architecture.LLMConfig,
  layout: segments.Layout,
  names: Sequence[str],
  past: Sequence[str],
  rows: int,
  copies: int,
) -> Cost:
  """Returns the cost of running segments once, in bfloat16.

  Args:
    llm: sizes.
    layout: of the sequence.
    names: segments that are run.
    past: segments that they may see in a cache.
    rows: sequences, over all replicas.
    copies: chips that read the same weights.
  """
  slots = layout.slots(names)
  und, gen = slots.num_und, len(slots.segment) - slots.num_und
  seen = int(segments.visibility(layout, names, [*past, *names]).sum())
  products = 2 * expert_parameters(llm) * (und + gen) * rows
  attention = 4 * llm.num_heads * llm.head_dim * seen * rows
  weights = 2 * expert_parameters(llm) * (bool(und) + bool(gen)) * copies
  return Cost(llm.num_layers * (products + attention), llm.num_layers * weights)


def _head(llm: architecture.LLMConfig, slots: int, copies: int) -> Cost:
  size = llm.hidden_size * llm.vocab_size
  return Cost(2 * size * slots, 2 * size * copies)


def _decode(
  llm,
  layout: segments.Layout,
  name: str,
  past: Sequence[str],
  rows: int,
  groups: int,
  copies: int,
) -> Cost:
  """Returns the cost of the longest text: per token all weights of the und expert and all keys and values are read."""
  tokens, context = layout[name].capacity, sum(layout[p].capacity for p in past)
  # bytes of a slot's key and value
  entry = 4 * llm.num_kv_heads * llm.head_dim * llm.num_layers
  cache = entry * (context * groups + tokens / 2 * rows)
  once = Cost(
    llm.num_layers
    * rows
    * (
      2 * expert_parameters(llm)
      + 4 * llm.num_heads * llm.head_dim * (context + tokens / 2)
    ),
    llm.num_layers * 2 * expert_parameters(llm) * copies + cache,
  )
  return (once + _head(llm, rows, copies)).times(tokens)


def _flow(
  llm,
  layout,
  flow: settings_lib.FlowSettings,
  names,
  past,
  rows: int,
  copies: int,
) -> Cost:
  guided = int(flow.guided.sum())
  every = forward(llm, layout, names[:1], past, rows, copies)
  branches = forward(llm, layout, flow.branches(names), past, rows, copies)
  return branches.times(guided) + every.times(flow.schedule.num_steps - guided)


def copies(rules: sharding.Rules, mesh: Mapping[str, int]) -> int:
  """Returns how many chips read the same weight: those that neither rules nor replicas give another part of it.

  Training gathers a layer over `fsdp` and then reads it whole, as every chip of a rollout does.
  """
  return math.prod(mesh.values()) // math.prod(
    mesh[axis] for axis in rules.axes("mlp")
  )


def rollouts(
  modules: settings_lib.Modules,
  settings: settings_lib.Settings,
  mesh: Mapping[str, int],
  groups: int,
  samples: int,
) -> dict[str, Cost]:
  """Returns the cost of a draft and a revision of images, texts at their longest.

  Args:
    modules, settings: of the run.
    mesh: sizes of its axes.
    groups: prompts.
    samples: images of a prompt; what they share is computed once.
  """
  llm, c, rows = modules.bagel.config.llm, settings.capacities, groups * samples
  each = copies(modules.rollout_rules, mesh)
  reason, reflect, refine = (
    layouts.reason(c),
    layouts.reflect(c),
    layouts.refine(c),
  )
  run = lambda layout, names, past=(), n=rows: forward(
    llm, layout, names, past, n, each
  )
  return {
    "reason: think": run(reason, _ASKED, n=groups)
    + _decode(llm, reason, "thought", _ASKED, rows, groups, each),
    "reason: draft": _flow(
      llm,
      reason,
      settings.reason_flow,
      layouts.DRAFT,
      (*_ASKED, "thought"),
      rows,
      each,
    ),
    "reflect": run(reflect, _SEEN, n=groups)
    + _decode(llm, reflect, "answer", _SEEN, rows, groups, each),
    "refine": run(refine, _SOURCE, n=groups)
    + run(refine, _TOLD, _SOURCE)
    + _flow(
      llm,
      refine,
      settings.refine_flow,
      layouts.EDIT,
      (*_SOURCE, *_TOLD),
      rows,
      each,
    ),
  }


def iteration(
  modules: settings_lib.Modules,
  settings: settings_lib.Settings,
  mesh: Mapping[str, int],
  remat: bool,
  trains_all: bool,
) -> dict[str, Cost]:
  """Returns the cost of every stage of an iteration with one round of reflection, texts at their longest.

  Args:
    modules, settings: of the run.
    mesh: sizes of its axes.
    remat: layers are computed again in the backward pass.
    trains_all: the backward pass forms the weights' gradients, too; adapters need only those of activations.
  """
  llm, c, groups = (
    modules.bagel.config.llm,
    settings.capacities,
    settings.groups,
  )
  rows, each = (
    groups * settings.group_size,
    settings.micro_batches * copies(modules.bagel.rules, mesh),
  )
  run = lambda layout, names, past=(), n=rows: forward(
    llm, layout, names, past, n, each
  )
  reason, reflect, refine = (
    layouts.reason(c),
    layouts.reflect(c),
    layouts.refine(c),
  )
  draft_names = settings.reason_flow.branches(layouts.DRAFT)
  edit_names = settings.refine_flow.branches(layouts.EDIT)
  score_reason = (
    run(reason, _ASKED, n=groups)
    + run(reason, ("thought", *draft_names), _ASKED)
    + _head(llm, rows * c.thought, each)
  )
  score_edit = (
    run(reflect, _SEEN, n=groups)
    + run(reflect, ("answer",), _SEEN)
    + run(refine, _SOURCE, n=groups)
    + run(refine, (*_TOLD, *edit_names), _SOURCE)
    + _head(llm, rows * c.answer, each)
  )
  passes = (
    (1 + settings.loss.needs_reference)
    + (BACKWARD if trains_all else BACKWARD / 2)
    + remat
  )
  sampled = rollouts(modules, settings, mesh, groups, settings.group_size)
  return sampled | {
    "reason: update": score_reason.times(passes),
    "edit: update": score_edit.times(passes),
  }
