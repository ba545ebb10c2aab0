"""Texts that must be written in an image: how prompts quote them, and how they are compared."""

import dataclasses
import re

from r3jax.data import records
from r3jax.files import texts

# Straight and typographic double quotes; apostrophes are none.
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')
# Marks that differ between keyboards and fonts, and in nothing that a reader would call wrong.
_SAME_MARKS = str.maketrans(
  {
    **dict.fromkeys("‘’‚‛`´′", "'"),
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‐‑‒–—―−", "-"),
  }
)


def comparable(text: str) -> str:
  """Returns a text as inscriptions are compared.

  Characters are those of `texts.canonical`: Unicode's compatibility form NFKC, without case and
  without what is not visible. Every quote and dash is the one of ASCII. There is no white space,
  for where words end in an image, and where lines break, is a matter of layout.

  Args:
    text: any text; "" where nothing of it is visible.
  """
  return "".join(texts.canonical(text.translate(_SAME_MARKS)).split())


def quoted(text: str) -> str | None:
  """Returns what a prompt has in double quotes, several of them joined by blanks; None for none.

  Args:
    text: a prompt, for example 'a mug with the words "good morning"'.
  """
  passages = []
  for match in _QUOTED.finditer(text):
    passages.append(match[match.lastindex or 0].strip())
  return " ".join(filter(None, passages)) or None


def completed(prompt: records.Prompt) -> records.Prompt:
  """Returns a prompt with the inscription that its text has in double quotes.

  A prompt that has an inscription, or asks for something else, stays as it is.
  """
  asks_for_more = prompt.include or prompt.questions
  if prompt.inscription is not None or asks_for_more:
    return prompt
  return dataclasses.replace(prompt, inscription=quoted(prompt.text))
