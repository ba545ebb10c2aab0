"""What an iteration costs, counted from sizes: XLA counts the body of a loop once.

Only the language model's products and attention are counted; the image towers, norms and the
optimizer are left out. A stage's time is the roofline's: the longer of computing and reading.
"""

from collections.abc import Sequence
import dataclasses

from r3jax.aot import chips
from r3jax.models import config as config_lib
from r3jax.rl import settings as settings_lib
from r3jax.sequence import layout as layout_lib
from r3jax.sequence import stages

BACKWARD = 2  # products of a backward pass, in forward passes


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


def expert_parameters(llm: config_lib.LLMConfig) -> int:
  """Returns the numbers in the matrices of one expert of one layer."""
  heads, kv_heads = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
  return llm.hidden_size * (2 * heads + 2 * kv_heads + 3 * llm.intermediate_size)


def forward(
    llm: config_lib.LLMConfig, layout: layout_lib.Layout, names: Sequence[str], past: Sequence[str], rows: int,
    copies: int,
) -> Cost:
  """Returns the cost of running segments once, in bfloat16.

  Args:
    llm: sizes.
    layout: of the sequence.
    names: segments that are run.
    past: segments that they may see in a cache.
    rows: sequences, over all replicas.
    copies: of the weights, each read once: one per data replica.
  """
  slots = layout.slots(names)
  und, gen = slots.num_und, len(slots.segment) - slots.num_und
  seen = int(layout_lib.visibility(layout, names, [*past, *names]).sum())
  products = 2 * expert_parameters(llm) * (und + gen) * rows
  attention = 4 * llm.num_heads * llm.head_dim * seen * rows
  weights = 2 * expert_parameters(llm) * (bool(und) + bool(gen)) * copies
  return Cost(llm.num_layers * (products + attention), llm.num_layers * weights)


def _head(llm: config_lib.LLMConfig, slots: int, copies: int) -> Cost:
  size = llm.hidden_size * llm.vocab_size
  return Cost(2 * size * slots, 2 * size * copies)


def _decode(llm, layout: layout_lib.Layout, name: str, past: Sequence[str], rows: int, groups: int, copies: int) -> Cost:
  """Returns the cost of the longest text: per token all weights of the und expert and all keys and values are read."""
  tokens, context = layout[name].capacity, sum(layout[p].capacity for p in past)
  entry = 4 * llm.num_kv_heads * llm.head_dim * llm.num_layers  # bytes of a slot's key and value
  cache = entry * (context * groups + tokens / 2 * rows)
  once = Cost(
      llm.num_layers * rows * (2 * expert_parameters(llm) + 4 * llm.num_heads * llm.head_dim * (context + tokens / 2)),
      llm.num_layers * 2 * expert_parameters(llm) * copies + cache,
  )
  return (once + _head(llm, rows, copies)).times(tokens)


def _flow(llm, layout, flow: settings_lib.FlowSettings, names, past, rows: int, copies: int) -> Cost:
  guided = int(flow.guided.sum())
  every = forward(llm, layout, names[:1], past, rows, copies)
  branches = forward(llm, layout, flow.branches(names), past, rows, copies)
  return branches.times(guided) + every.times(flow.schedule.num_steps - guided)


def iteration(llm: config_lib.LLMConfig, settings: settings_lib.Settings, replicas: int, remat: bool, trains_all: bool) -> dict[str, Cost]:
  """Returns the cost of every stage of an iteration with one round of reflection, texts at their longest.

  Args:
    llm: sizes.
    settings: of the iteration.
    replicas: data replicas, each of which has the weights once.
    remat: layers are computed again in the backward pass.
    trains_all: the backward pass forms the weights' gradients, too; adapters need only those of activations.
  """
  c, groups = settings.capacities, settings.groups
  rows, copies = groups * settings.group_size, replicas
  run = lambda layout, names, past=(), n=rows: forward(llm, layout, names, past, n, copies)
  reason, reflect, refine = stages.reason(c), stages.reflect(c), stages.refine(c)
  draft_names = settings.reason_flow.branches(stages.DRAFT)
  edit_names = settings.refine_flow.branches(stages.EDIT)
  told = ("instruction", "instruction_alone")
  score_reason = (
      run(reason, ("system", "prompt"), n=groups) + run(reason, ("thought", *draft_names), ("system", "prompt"))
      + _head(llm, rows * c.thought, copies)
  )
  score_edit = (
      run(reflect, ("system", "seen", "question"), n=groups) + run(reflect, ("answer",), ("system", "seen", "question"))
      + run(refine, ("source", "seen"), n=groups) + run(refine, (*told, *edit_names), ("source", "seen"))
      + _head(llm, rows * c.answer, copies)
  )
  passes = (1 + settings.loss.needs_reference) + (BACKWARD if trains_all else BACKWARD / 2) + remat
  return {
      "reason: think": run(reason, ("system", "prompt"), n=groups)
                       + _decode(llm, reason, "thought", ("system", "prompt"), rows, groups, copies),
      "reason: draft": _flow(
          llm, reason, settings.reason_flow, stages.DRAFT, ("system", "prompt", "thought"), rows, copies),
      "reason: update": score_reason.times(passes),
      "reflect": run(reflect, ("system", "seen", "question"), n=groups)
                 + _decode(llm, reflect, "answer", ("system", "seen", "question"), rows, groups, copies),
      "refine": run(refine, ("source", "seen"), n=groups) + run(refine, told, ("source", "seen"))
                + _flow(llm, refine, settings.refine_flow, stages.EDIT, ("source", "seen", *told), rows, copies),
      "edit: update": score_edit.times(passes),
  }
