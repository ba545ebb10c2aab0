"""Counts what an iteration costs, from sizes alone: XLA counts the body of a loop only once.

The products and the attention of the language model are counted; the image towers, norms and the
optimizer are not. The time of a stage is the roofline's: the longer of computing and reading.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from r3jax.agent import actors
from r3jax.agent import rollout_settings
from r3jax.costs import chips
from r3jax.model import architecture
from r3jax.parallel import sharding
from r3jax.rl import iteration_settings
from r3jax.sequence import layouts
from r3jax.sequence import segments

# Products of a backward pass, in forward passes: gradients of activations, and of weights.
BACKWARD = 2
BYTES = 2  # of a bfloat16 number

# Segments that a stage reads before it writes, and those of an edit's instruction.
_REASON_CONTEXT = ("system", "prompt")
_REFLECT_CONTEXT = ("system", "siglip", "question")
_SOURCE = ("source", "siglip")
_INSTRUCTION = ("instruction", "instruction_alone")


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of a computation on all chips together.

  Attributes:
    flops: operations.
    read: bytes read from memory.
  """

  flops: float
  read: float

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.flops + other.flops, self.read + other.read)

  def times(self, factor: float) -> "Cost":
    """Returns the cost of repeating it."""
    return Cost(self.flops * factor, self.read * factor)

  def seconds(self, chip: chips.Chip, num_chips: int) -> float:
    """Returns the roofline's time on a number of chips."""
    computing = self.flops / chip.flops
    reading = self.read / chip.bandwidth
    return max(computing, reading) / num_chips


def expert_parameters(llm: architecture.LLMConfig) -> int:
  """Returns the number of elements in the matrices of one expert of one layer."""
  heads = llm.num_heads * llm.head_dim
  kv_heads = llm.num_kv_heads * llm.head_dim
  attention = 2 * heads + 2 * kv_heads  # q and o; k and v
  mlp = 3 * llm.intermediate_size  # gate, up and down
  return llm.hidden_size * (attention + mlp)


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
    llm: sizes of the language model.
    layout: of the sequence.
    names: segments that are run.
    past: segments in the cache that they may attend to.
    rows: number of sequences, over all replicas.
    copies: number of chips that read the same weights.
  """
  slots = layout.slots(names)
  num_slots = len(slots.segment)
  num_gen = num_slots - slots.num_und
  visible = segments.visibility(layout, names, [*past, *names])
  num_pairs = int(visible.sum())
  # A multiplication and an addition per weight.
  products = 2 * expert_parameters(llm) * num_slots * rows
  attention = _attention(llm, num_pairs) * rows
  num_experts = bool(slots.num_und) + bool(num_gen)
  weights = BYTES * expert_parameters(llm) * num_experts * copies
  layer_flops = products + attention
  return Cost(llm.num_layers * layer_flops, llm.num_layers * weights)


def _attention(llm: architecture.LLMConfig, num_pairs: float) -> float:
  """Returns the operations of pairs of slots in a layer: scores, then sums of values."""
  return 4 * llm.num_heads * llm.head_dim * num_pairs


def _head(llm: architecture.LLMConfig, num_slots: int, copies: int) -> Cost:
  """Returns the cost of the logits of slots."""
  size = llm.hidden_size * llm.vocab_size
  return Cost(2 * size * num_slots, BYTES * size * copies)


def _decode(
  llm: architecture.LLMConfig,
  layout: segments.Layout,
  name: str,
  past: Sequence[str],
  rows: int,
  groups: int,
  copies: int,
) -> Cost:
  """Returns the cost of the longest text: every token reads the und expert, all keys and values."""
  num_tokens = layout[name].capacity
  context = sum(layout[segment].capacity for segment in past)
  mean_length = num_tokens / 2  # of the text so far
  products = 2 * expert_parameters(llm)
  attention = _attention(llm, context + mean_length)
  flops = llm.num_layers * rows * (products + attention)
  weights = llm.num_layers * BYTES * expert_parameters(llm) * copies
  # A group shares the keys and values of its context.
  num_cached = context * groups + mean_length * rows
  slot_bytes = 2 * BYTES * llm.num_kv_heads * llm.head_dim * llm.num_layers
  token = Cost(flops, weights + slot_bytes * num_cached)
  return (token + _head(llm, rows, copies)).times(num_tokens)


def _flow(
  llm: architecture.LLMConfig,
  layout: segments.Layout,
  flow: rollout_settings.FlowSettings,
  names: Sequence[str],
  past: Sequence[str],
  rows: int,
  copies: int,
) -> Cost:
  """Returns the cost of an image: all branches in guided steps, the first alone in the others."""
  num_guided = int(flow.guided.sum())
  num_plain = flow.schedule.num_steps - num_guided
  plain = forward(llm, layout, names[:1], past, rows, copies)
  guided = forward(llm, layout, flow.branches(names), past, rows, copies)
  return guided.times(num_guided) + plain.times(num_plain)


@dataclasses.dataclass(frozen=True)
class _Forwards:
  """Costs of running segments once for all samples.

  Attributes:
    llm: sizes of the language model.
    groups: number of groups.
    rows: number of samples, over all groups.
    copies: number of chips that read the same weights.
  """

  llm: architecture.LLMConfig
  groups: int
  rows: int
  copies: int

  def shared(self, layout: segments.Layout, names: Sequence[str]) -> Cost:
    """Returns the cost of segments that the samples of a group have in common."""
    return forward(self.llm, layout, names, (), self.groups, self.copies)

  def own(
    self, layout: segments.Layout, names: Sequence[str], past: Sequence[str]
  ) -> Cost:
    """Returns the cost of segments that every sample has for itself."""
    return forward(self.llm, layout, names, past, self.rows, self.copies)


def copies(rules: sharding.Rules, mesh: Mapping[str, int]) -> int:
  """Returns how many chips read the same part of a weight.

  Training gathers a layer over `fsdp` and then reads it whole, as every chip of a rollout does.

  Args:
    rules: of the shardings.
    mesh: sizes of its axes.
  """
  parts = math.prod(mesh[axis] for axis in rules.axes("mlp"))
  return math.prod(mesh.values()) // parts


def rollouts(
  modules: actors.Modules,
  settings: rollout_settings.RolloutSettings,
  mesh: Mapping[str, int],
  groups: int,
  samples: int,
  own_sources: bool = False,
) -> dict[str, Cost]:
  """Returns the cost of a draft and a revision of images by stage, texts at their longest.

  Args:
    modules: of the run.
    settings: how it samples.
    mesh: sizes of its axes.
    groups: number of prompts.
    samples: number of images of a prompt; what they share is computed once.
    own_sources: whether each of them starts its edit from an image of its own.
  """
  llm = modules.bagel.config.llm
  rows = groups * samples
  num_copies = copies(modules.rollout_rules, mesh)
  reason = layouts.reason(settings.capacities)
  reflect = layouts.reflect(settings.capacities)
  refine = layouts.refine(settings.capacities)

  forwards = _Forwards(llm, groups, rows, num_copies)

  think = forwards.shared(reason, _REASON_CONTEXT)
  think += _decode(
    llm, reason, "thought", _REASON_CONTEXT, rows, groups, num_copies
  )
  draft = _flow(
    llm,
    reason,
    settings.reason_flow,
    layouts.DRAFT,
    (*_REASON_CONTEXT, "thought"),
    rows,
    num_copies,
  )
  num_sources = rows if own_sources else groups
  edit_forwards = _Forwards(llm, num_sources, rows, num_copies)
  answer = edit_forwards.shared(reflect, _REFLECT_CONTEXT)
  answer += _decode(
    llm, reflect, "answer", _REFLECT_CONTEXT, rows, num_sources, num_copies
  )
  edit = edit_forwards.shared(refine, _SOURCE)
  edit += edit_forwards.own(refine, _INSTRUCTION, _SOURCE)
  edit += _flow(
    llm,
    refine,
    settings.refine_flow,
    layouts.EDIT,
    (*_SOURCE, *_INSTRUCTION),
    rows,
    num_copies,
  )
  return {
    "reason: think": think,
    "reason: draft": draft,
    "reflect": answer,
    "refine": edit,
  }


def iteration(
  modules: actors.Modules,
  rollout: rollout_settings.RolloutSettings,
  settings: iteration_settings.IterationSettings,
  mesh: Mapping[str, int],
  remat: bool,
  trains_all: bool,
) -> dict[str, Cost]:
  """Returns the cost of an iteration with one round of reflection by stage, texts at their longest.

  Args:
    modules: of the run.
    rollout: how it samples.
    settings: how it learns.
    mesh: sizes of its axes.
    remat: whether the backward pass computes layers again.
    trains_all: whether it forms the gradients of the weights; adapters need only those of
      activations.
  """
  llm = modules.bagel.config.llm
  capacities = rollout.capacities
  groups = settings.num_groups
  rows = groups * settings.group_size
  # Every micro-batch reads the weights again.
  num_copies = settings.num_micro_batches * copies(modules.bagel.rules, mesh)
  reason = layouts.reason(capacities)
  reflect = layouts.reflect(capacities)
  refine = layouts.refine(capacities)
  draft_names = rollout.reason_flow.branches(layouts.DRAFT)
  edit_names = rollout.refine_flow.branches(layouts.EDIT)

  forwards = _Forwards(llm, groups, rows, num_copies)

  score_reason = forwards.shared(reason, _REASON_CONTEXT)
  score_reason += forwards.own(
    reason, ("thought", *draft_names), _REASON_CONTEXT
  )
  score_reason += _head(llm, rows * capacities.thought, num_copies)

  own_sources = settings.chain == "full"
  num_sources = rows if own_sources else groups
  edit_forwards = _Forwards(llm, num_sources, rows, num_copies)
  score_edit = edit_forwards.shared(reflect, _REFLECT_CONTEXT)
  score_edit += edit_forwards.own(reflect, ("answer",), _REFLECT_CONTEXT)
  score_edit += edit_forwards.shared(refine, _SOURCE)
  score_edit += edit_forwards.own(refine, (*_INSTRUCTION, *edit_names), _SOURCE)
  score_edit += _head(llm, rows * capacities.answer, num_copies)

  forward_passes = 1 + settings.loss.needs_reference + remat
  backward_passes = BACKWARD if trains_all else BACKWARD / 2
  passes = forward_passes + backward_passes
  stages = rollouts(
    modules, rollout, mesh, groups, settings.group_size, own_sources
  )
  return stages | {
    "reason: update": score_reason.times(passes),
    "edit: update": score_edit.times(passes),
  }
