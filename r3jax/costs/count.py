"""Counts what an iteration costs, from sizes alone: XLA counts the body of a loop only once.

Products, convolutions and attention are counted: of the language model with its head and its image
adapters, of the ViT and of the autoencoder. Norms, activations, low-rank updates and the optimizer
are not. Attention counts the pairs of slots that see each other, texts at their longest. Bytes are
those of weights and of cached keys and values. The time of a stage is the roofline's: the longer of
computing and reading.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import rollout_settings
from r3jax.costs import cost
from r3jax.costs import towers as towers_lib
from r3jax.model import architecture
from r3jax.parallel import sharding
from r3jax.rl import iteration_settings
from r3jax.sequence import layouts
from r3jax.sequence import segments

Cost = cost.Cost

# Numbers of the sinusoids of a time.
_TIME_FEATURES = 256

# Segments that a stage reads before it writes, and those of an edit's instruction.
REASON_CONTEXT = ("system", "prompt")
REFLECT_CONTEXT = ("system", "siglip", "question")
SOURCE = ("source", "siglip")
INSTRUCTION = ("instruction", "instruction_alone")


# Stages of a draft and of its revision, and all that every round of reflection runs.
DRAFT_STAGES = ("think", "draft_flow", "draft_decode")
REVISION_STAGES = (
  "look",
  "reflect",
  "refine_context",
  "refine_flow",
  "edit_decode",
)
EDIT_STAGES = (*REVISION_STAGES, "edit_update")


def expert_parameters(llm: architecture.LLMConfig) -> int:
  """Returns the number of elements in the matrices of one expert of one layer."""
  heads = llm.num_heads * llm.head_dim
  kv_heads = llm.num_kv_heads * llm.head_dim
  attention = 2 * heads + 2 * kv_heads  # q and o; k and v
  mlp = 3 * llm.intermediate_size  # gate, up and down
  return llm.hidden_size * (attention + mlp)


@dataclasses.dataclass(frozen=True)
class Copies:
  """How many chips read the same part of a weight, by expert.

  Attributes:
    und: of the und expert and the head.
    gen: of the gen expert.
  """

  und: int
  gen: int

  def times(self, factor: int) -> "Copies":
    """Returns the numbers where every chip reads its weights so many times."""
    return Copies(self.und * factor, self.gen * factor)


@dataclasses.dataclass(frozen=True)
class Work:
  """A forward pass by the products in it, on all chips together.

  Attributes:
    und: operations of the products of the und expert, the connector and the head.
    gen: operations of the products of the gen expert and what reads and writes latents.
    attention: operations of attention.
    read: bytes of weights and of cached keys and values.
  """

  und: float = 0.0
  gen: float = 0.0
  attention: float = 0.0
  read: float = 0.0

  def __add__(self, other: "Work") -> "Work":
    return Work(
      self.und + other.und,
      self.gen + other.gen,
      self.attention + other.attention,
      self.read + other.read,
    )

  @property
  def cost(self) -> Cost:
    """Cost of the pass."""
    return Cost(self.und + self.gen + self.attention, self.read)


def forward(
  bagel: architecture.BagelConfig,
  dtype: types.DType,
  layout: segments.Layout,
  names: Sequence[str],
  past: Sequence[str],
  rows: int,
  copies: Copies,
) -> Work:
  """Returns the work of running segments once.

  Args:
    bagel: sizes of the model.
    dtype: of the weights as they are computed with.
    layout: of the sequence.
    names: segments that are run.
    past: segments in the cache that they may attend to.
    rows: number of sequences, over all replicas.
    copies: chips that read the same weights.
  """
  llm = bagel.llm
  slots = layout.slots(names)
  num_slots = len(slots.segment)
  num_gen = num_slots - slots.num_und
  visible = segments.visibility(layout, names, [*past, *names])
  num_pairs = int(visible.sum())
  # A multiplication and an addition per weight.
  products = 2 * llm.num_layers * expert_parameters(llm) * rows
  attention = llm.num_layers * _attention(llm, num_pairs) * rows
  # An expert without slots is not read.
  num_read = copies.und * bool(slots.num_und) + copies.gen * bool(num_gen)
  weights = llm.num_layers * expert_parameters(llm) * num_read
  read = cost.bytes_of(dtype) * weights
  adapters = Work()
  for name in names:
    adapters += _adapters(bagel, layout[name], rows)
  layers = Work(products * slots.num_und, products * num_gen, attention, read)
  return layers + adapters


def _adapters(
  bagel: architecture.BagelConfig, segment: segments.Segment, rows: int
) -> Work:
  """Returns the work of what turns an image into embeddings, of a segment of `rows` sequences."""
  width = bagel.llm.hidden_size
  if segment.num_gen:
    time = _TIME_FEATURES * width + width**2
    tokens = bagel.latent_dim * width * segment.num_gen
    return Work(gen=2 * (time + tokens) * rows)
  if segment.grid is not None:
    connector = bagel.vision.hidden_size * width + width**2
    num_patches = math.prod(segment.grid)
    return Work(und=2 * connector * num_patches * rows)
  return Work()  # rows of a table


def velocities(bagel: architecture.BagelConfig, num_slots: float) -> Work:
  """Returns the work of reading velocities out of hidden states."""
  return Work(gen=2 * bagel.llm.hidden_size * bagel.latent_dim * num_slots)


def _attention(llm: architecture.LLMConfig, num_pairs: float) -> float:
  """Returns the operations of pairs of slots in a layer: scores, then sums of values."""
  return 4 * llm.num_heads * llm.head_dim * num_pairs


def head(
  llm: architecture.LLMConfig, dtype: types.DType, num_slots: int, copies: int
) -> Work:
  """Returns the work of the logits of slots."""
  size = llm.hidden_size * llm.vocab_size
  return Work(
    und=2 * size * num_slots, read=cost.bytes_of(dtype) * size * copies
  )


def copies(rules: sharding.Rules, mesh: Mapping[str, int]) -> Copies:
  """Returns how many chips read the same part of a weight.

  Training gathers a layer over `fsdp` and then reads it whole, as every chip of a rollout does.

  Args:
    rules: of the shardings.
    mesh: sizes of its axes.
  """
  chips = math.prod(mesh.values())
  und_parts = math.prod(mesh[axis] for axis in rules.axes("mlp"))
  gen_parts = math.prod(mesh[axis] for axis in rules.axes("gen_mlp"))
  return Copies(und=chips // und_parts, gen=chips // gen_parts)


@dataclasses.dataclass(frozen=True)
class Batch:
  """How many sequences run, and on what.

  Attributes:
    modules: of the run.
    settings: how it samples.
    groups: rows of what a group has in common.
    rows: samples, over all groups.
    copies: chips that read the same weights.
    chips: number of chips.
  """

  modules: actors.Modules
  settings: rollout_settings.RolloutSettings
  groups: int
  rows: int
  copies: Copies
  chips: int

  @property
  def bagel(self) -> architecture.BagelConfig:
    """Sizes of the model."""
    return self.modules.bagel.config

  @property
  def dtype(self) -> types.DType:
    """Dtype that the model computes in."""
    return self.modules.bagel.dtype

  def shared(self, layout: segments.Layout, names: Sequence[str]) -> Work:
    """Returns the work of segments that the samples of a group have in common."""
    return self._forward(layout, names, (), self.groups)

  def own(
    self, layout: segments.Layout, names: Sequence[str], past: Sequence[str]
  ) -> Work:
    """Returns the work of segments that every sample has for itself."""
    return self._forward(layout, names, past, self.rows)

  def _forward(
    self,
    layout: segments.Layout,
    names: Sequence[str],
    past: Sequence[str],
    rows: int,
  ) -> Work:
    return forward(
      self.bagel, self.dtype, layout, names, past, rows, self.copies
    )

  def head(self, num_slots: int) -> Work:
    """Returns the work of the logits of some slots of every sample."""
    slots = num_slots * self.rows
    return head(self.bagel.llm, self.dtype, slots, self.copies.und)

  def decode(
    self, layout: segments.Layout, name: str, past: Sequence[str]
  ) -> Work:
    """Returns the work of the longest text: every token reads weights, keys and values."""
    llm = self.bagel.llm
    num_tokens = layout[name].capacity
    context = sum(layout[segment].capacity for segment in past)
    mean_length = (num_tokens + 1) / 2  # of the text so far
    products = 2 * llm.num_layers * expert_parameters(llm) * self.rows
    pairs = (context + mean_length) * self.rows
    attention = llm.num_layers * _attention(llm, pairs)
    size = cost.bytes_of(self.dtype)
    weights = size * llm.num_layers * expert_parameters(llm) * self.copies.und
    # A group shares the keys and values of its context.
    num_cached = context * self.groups + mean_length * self.rows
    slot = 2 * size * llm.num_kv_heads * llm.head_dim * llm.num_layers
    token = Work(
      und=products, attention=attention, read=weights + slot * num_cached
    )
    return _times(token + self.head(1), num_tokens)

  def flow(
    self,
    layout: segments.Layout,
    flow: rollout_settings.FlowSettings,
    names: Sequence[str],
    past: Sequence[str],
  ) -> Work:
    """Returns the work of an image: all branches in guided steps, the first alone in others."""
    num_guided = int(flow.guided.sum())
    num_plain = flow.schedule.num_steps - num_guided
    guided = self._velocity(layout, flow.branches(tuple(names)), past)
    plain = self._velocity(layout, names[:1], past)
    return _times(guided, num_guided) + _times(plain, num_plain)

  def _velocity(
    self, layout: segments.Layout, names: Sequence[str], past: Sequence[str]
  ) -> Work:
    return self.own(layout, names, past) + self.read_velocities(layout, names)

  def read_velocities(
    self, layout: segments.Layout, names: Sequence[str]
  ) -> Work:
    """Returns the work of reading the velocities of noise segments."""
    num_slots = sum(layout[name].num_gen for name in names)
    return velocities(self.bagel, num_slots * self.rows)

  def decode_images(self) -> Cost:
    """Returns the cost of an image of every sample's latents."""
    return towers_lib.decode(self.modules.towers, self.rows, self.chips)

  def look(self) -> Cost:
    """Returns the cost of what the model sees of every group's image."""
    towers = self.modules.towers
    features = towers_lib.features(towers, self.groups, self.chips)
    return features + towers_lib.encode(towers, self.groups, self.chips)


def _times(work: Work, factor: float) -> Work:
  return Work(
    work.und * factor,
    work.gen * factor,
    work.attention * factor,
    work.read * factor,
  )


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
  rows = groups * samples
  num_copies = copies(modules.rollout_rules, mesh)
  chips = math.prod(mesh.values())
  reason = layouts.reason(settings.capacities)
  reflect = layouts.reflect(settings.capacities)
  refine = layouts.refine(settings.capacities)

  drafts = Batch(modules, settings, groups, rows, num_copies, chips)
  think = drafts.shared(reason, REASON_CONTEXT)
  think += drafts.decode(reason, "thought", REASON_CONTEXT)
  draft_flow = drafts.flow(
    reason,
    settings.reason_flow,
    layouts.DRAFT,
    (*REASON_CONTEXT, "thought"),
  )

  num_sources = rows if own_sources else groups
  edits = dataclasses.replace(drafts, groups=num_sources)
  answer = edits.shared(reflect, REFLECT_CONTEXT)
  answer += edits.decode(reflect, "answer", REFLECT_CONTEXT)
  refine_context = edits.shared(refine, SOURCE)
  refine_context += edits.own(refine, INSTRUCTION, SOURCE)
  refine_flow = edits.flow(
    refine, settings.refine_flow, layouts.EDIT, (*SOURCE, *INSTRUCTION)
  )
  return {
    "think": think.cost,
    "draft_flow": draft_flow.cost,
    "draft_decode": drafts.decode_images(),
    "look": edits.look(),
    "reflect": answer.cost,
    "refine_context": refine_context.cost,
    "refine_flow": refine_flow.cost,
    "edit_decode": edits.decode_images(),
  }


@dataclasses.dataclass(frozen=True)
class Passes:
  """How often an update computes what its samples need.

  Attributes:
    forward: forward passes: the policy's, the reference's, and those that the backward pass
      computes again.
    und: whether the weights of und are trained, so that their gradients are formed.
    gen: whether those of gen are.
  """

  forward: int
  und: bool
  gen: bool

  @classmethod
  def of(
    cls,
    needs_reference: bool,
    remat: bool,
    has_adapters: bool,
    freeze_und: bool,
  ) -> "Passes":
    """Returns the passes of a run.

    Args:
      needs_reference: whether the objective has a KL.
      remat: whether the backward pass computes layers again.
      has_adapters: whether adapters are trained, and no matrix of the model.
      freeze_und: whether everything that goes with und stays as it is.
    """
    trains_matrices = not has_adapters
    return cls(
      forward=1 + needs_reference + remat,
      und=trains_matrices and not freeze_und,
      gen=trains_matrices,
    )

  def cost(self, work: Work) -> Cost:
    """Returns the cost of an update, given the work of one forward pass.

    The backward pass forms the gradients of all activations: a product each, two in attention. It
    reads the weights once more.
    """
    products = work.und + work.gen
    backward = products + 2 * work.attention
    backward += work.und * self.und + work.gen * self.gen
    forward = work.cost.flops * self.forward
    return Cost(forward + backward, work.read * (self.forward + 1))


def updates(batch: Batch, edit_batch: Batch, passes: Passes) -> dict[str, Cost]:
  """Returns the cost of the updates by stage.

  Args:
    batch: of the reason stage.
    edit_batch: of the edit stages, whose groups are the source images.
    passes: of an update.
  """
  rollout = batch.settings
  capacities = rollout.capacities
  reason = layouts.reason(capacities)
  reflect = layouts.reflect(capacities)
  refine = layouts.refine(capacities)
  draft_names = rollout.reason_flow.branches(layouts.DRAFT)
  edit_names = rollout.refine_flow.branches(layouts.EDIT)

  score_reason = batch.shared(reason, REASON_CONTEXT)
  score_reason += batch.own(reason, ("thought", *draft_names), REASON_CONTEXT)
  score_reason += batch.head(capacities.thought - 1)
  score_reason += batch.read_velocities(reason, draft_names)

  score_text = edit_batch.shared(reflect, REFLECT_CONTEXT)
  score_text += edit_batch.own(reflect, ("answer",), REFLECT_CONTEXT)
  score_text += edit_batch.head(capacities.answer - 1)
  score_image = edit_batch.shared(refine, SOURCE)
  score_image += edit_batch.own(refine, (*INSTRUCTION, *edit_names), SOURCE)
  score_image += edit_batch.read_velocities(refine, edit_names)
  return {
    "reason_update": passes.cost(score_reason),
    "edit_update": passes.cost(score_text + score_image),
  }


def iteration(
  modules: actors.Modules,
  rollout: rollout_settings.RolloutSettings,
  settings: iteration_settings.IterationSettings,
  mesh: Mapping[str, int],
  remat: bool,
  freeze_und: bool = False,
) -> dict[str, Cost]:
  """Returns the cost of an iteration by stage, texts at their longest.

  Args:
    modules: of the run; with adapters it forms no gradients of the model's weights.
    rollout: how it samples.
    settings: how it learns.
    mesh: sizes of its axes.
    remat: whether the backward pass computes layers again.
    freeze_und: whether everything that goes with und stays as it is.
  """
  groups = settings.num_groups
  rows = groups * settings.group_size
  own_sources = settings.chain == "full"
  # Every micro-batch reads the weights again.
  num_copies = copies(modules.bagel.rules, mesh).times(
    settings.num_micro_batches
  )
  chips = math.prod(mesh.values())
  batch = Batch(modules, rollout, groups, rows, num_copies, chips)
  num_sources = rows if own_sources else groups
  edit_batch = dataclasses.replace(batch, groups=num_sources)
  passes = Passes.of(
    settings.loss.needs_reference,
    remat,
    bool(modules.bagel.lora.rank),
    freeze_und,
  )
  stages = rollouts(
    modules, rollout, mesh, groups, settings.group_size, own_sources
  )
  stages |= updates(batch, edit_batch, passes)
  for name in EDIT_STAGES:
    stages[name] = stages[name].times(settings.num_reflect_rounds)
  return stages
