"""The layouts of R3's three stages (docs/algorithm.md#stages)."""

import dataclasses

from r3jax.sequence import segments


@dataclasses.dataclass(frozen=True)
class Capacities:
  """Slots of every segment; text capacities count the begin and the end token.

  Attributes:
    system: either system prompt.
    prompt: the image prompt.
    thought: the reason stage's answer, max_tokens + 1.
    question: the reflection question with the prompt in it.
    answer: the reflect stage's answer, max_tokens + 1.
    instruction: the edit instruction.
    latent_grid: rows and columns of latent tokens.
    vit_grid: rows and columns of ViT patches.
  """

  system: int
  prompt: int
  thought: int
  question: int
  answer: int
  instruction: int
  latent_grid: tuple[int, int]
  vit_grid: tuple[int, int]


# Noise segments of a stage: full context, without text, without image.
DRAFT = ("draft", "draft_without_text")
EDIT = ("edit", "edit_without_text", "edit_without_image")


def reason(capacities: Capacities) -> segments.Layout:
  """Returns T(system) T(prompt) T(thought) N | T(system) N.

  T is a text, N a noisy latent; behind the bar stands the unconditional branch, which shares the
  system prompt.
  """
  c = capacities
  context = ("system", "prompt", "thought")
  draft, without_text = DRAFT
  return segments.Layout(
    (
      segments.text("system", c.system),
      segments.text("prompt", c.prompt, ("system",)),
      segments.text("thought", c.thought, ("system", "prompt")),
      segments.image(draft, "noise", c.latent_grid, context),
      segments.image(without_text, "noise", c.latent_grid, ("system",)),
    )
  )


def reflect(capacities: Capacities) -> segments.Layout:
  """Returns T(system) V T(question) T(answer); V are the ViT patches of the draft."""
  c = capacities
  context = ("system", "siglip", "question")
  return segments.Layout(
    (
      segments.text("system", c.system),
      segments.image("siglip", "vit", c.vit_grid, ("system",)),
      segments.text("question", c.question, ("system", "siglip")),
      segments.text("answer", c.answer, context),
    )
  )


def refine(capacities: Capacities) -> segments.Layout:
  """Returns A V T(instruction) N | A V N | T(instruction) N.

  A are the clean latents and V the ViT patches of the source image; behind the bars stand the
  branches without text and without image.
  """
  c = capacities
  source = ("source", "siglip")
  context = ("source", "siglip", "instruction")
  edit, without_text, without_image = EDIT
  alone = "instruction_alone"  # the instruction again, at other positions
  return segments.Layout(
    (
      segments.image("source", "clean", c.latent_grid),
      segments.image("siglip", "vit", c.vit_grid, ("source",)),
      segments.text("instruction", c.instruction, source),
      segments.image(edit, "noise", c.latent_grid, context),
      segments.image(without_text, "noise", c.latent_grid, source),
      segments.text(alone, c.instruction),
      segments.image(without_image, "noise", c.latent_grid, (alone,)),
    )
  )
