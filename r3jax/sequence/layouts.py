"""The layouts of R3's three stages (R3.md section 4)."""

import dataclasses

from r3jax.sequence import segments


@dataclasses.dataclass(frozen=True)
class Capacities:
  """Slots of every segment; text capacities count the begin and end token.

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
  """Returns T(system) T(prompt) T(thought) N | T(system) N."""
  context = ("system", "prompt", "thought")
  return segments.Layout(
    (
      segments.text("system", capacities.system),
      segments.text("prompt", capacities.prompt, context[:1]),
      segments.text("thought", capacities.thought, context[:2]),
      segments.image("draft", "noise", capacities.latent_grid, context),
      segments.image(
        "draft_without_text", "noise", capacities.latent_grid, context[:1]
      ),
    )
  )


def reflect(capacities: Capacities) -> segments.Layout:
  """Returns T(system) V T(question) T(answer)."""
  context = ("system", "vision", "question")
  return segments.Layout(
    (
      segments.text("system", capacities.system),
      segments.image("vision", "vit", capacities.vit_grid, context[:1]),
      segments.text("question", capacities.question, context[:2]),
      segments.text("answer", capacities.answer, context),
    )
  )


def refine(capacities: Capacities) -> segments.Layout:
  """Returns A V T(instruction) N | A V N | T(instruction) N."""
  context = ("source", "vision", "instruction")
  return segments.Layout(
    (
      segments.image("source", "clean", capacities.latent_grid),
      segments.image("vision", "vit", capacities.vit_grid, context[:1]),
      segments.text("instruction", capacities.instruction, context[:2]),
      segments.image("edit", "noise", capacities.latent_grid, context),
      segments.image(
        "edit_without_text", "noise", capacities.latent_grid, context[:2]
      ),
      segments.text("instruction_alone", capacities.instruction),
      segments.image(
        "edit_without_image",
        "noise",
        capacities.latent_grid,
        ("instruction_alone",),
      ),
    )
  )
