"""The protocol strings of BAGEL weights: part of their interface, exact to the character."""

import dataclasses

GEN_THINK = (
  "You should first think about the planning process in the mind and then generate the image. \n"
  "The planning process is enclosed within <think> </think> tags, i.e. "
  "<think> planning process here </think> image here."
)

VLM_THINK = (
  "You should first think about the reasoning process in the mind and then provide the user "
  "with the answer. \n"
  "The reasoning process is enclosed within <think> </think> tags, i.e. "
  "<think> reasoning process here </think> answer here"
)

REFLECTION = (
  "The description of the target image is: {prompt}\n"
  "How to further edit the provided image to make it consistent with the target description? "
  "Please provide concrete editing instructions in a single sentence. "
  "If no editing operation is needed, answer: no further edit needed."
)


def reflection_question(prompt: str) -> str:
  """Returns the question of the reflect stage about an image drawn for `prompt`."""
  return REFLECTION.replace("{prompt}", prompt)


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """Token ids of the four markers."""

  text_begin: int = 151644
  text_end: int = 151645
  image_begin: int = 151652
  image_end: int = 151653
