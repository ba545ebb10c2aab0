"""What the rest of the program asks of a world.

A world is a closed domain of prompts whose images a program can verify exactly. It is a plugin:
`registry.find` finds a `World` by its registered name or as `package.module:ATTRIBUTE`, and
`docs/howto/add_a_world.md` writes one.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import tokenizers

from r3jax import types
from r3jax.data import labelled_images
from r3jax.data import records

# A pytree of numpy arrays [n, ...] that holds what n prompts ask for.
Target = Any
# What a world sees in one image; only the world's own questions look inside.
Scene = Any
# (question, right answer in one word)
QuestionAnswer = tuple[str, str]
Ask = Callable[[Scene, np.random.Generator], QuestionAnswer | None]


@dataclasses.dataclass(frozen=True)
class Quiz:
  """Questions about images whose right answers the world knows.

  Attributes:
    see: reads every image of uint8 [B, H, W, 3].
    kinds: kind -> draws a question about one image and its answer; None where that image gives
      no question of the kind. A kind's place in the mapping is part of the seed of its draws.
    match: writes the question whether an image matches a prompt.
  """

  see: Callable[[np.ndarray], Sequence[Scene]]
  kinds: Mapping[str, Ask]
  match: Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class World:
  """A domain of prompts, and the program that verifies their images.

  Attributes:
    name: a short word, for logs and file names.
    canvas: height and width of the images in pixels.
    records: returns the prompts of a split, "train" or "heldout", in a fixed order.
    encode: turns n prompts into the target arrays that `verify` reads, [n, ...] each. Raises
      a ValueError for a prompt that is not of this world.
    verify: scores images, uint8 [B, H, W, 3], by targets [B, ...] inside the compiled step. Its
      score lies in [0, 1], and 1 means perfect.
    parts: names of the parts of its scores; "strict" must be among them, which is 1 where an image
      shows exactly what was asked for, and 0 elsewhere.
    boxes: returns {"label": str, "box": [y0, x0, y1, x1] in shares of the image} of every object
      that it sees, per image; the report draws them.
    quiz: further questions for the evaluation of understanding.
    labelled: returns labelled images about which every model is asked the same questions, in a
      fixed order; None if the world has none.
    tokenizer: builds the tokenizer of a model that speaks this world's language.
    model_folder: folder of a model that comes with the world, in BAGEL's format; "" if none does.
    verifier_facts: what a reward server reports of the verifier, JSON values by name.
  """

  name: str
  canvas: tuple[int, int]
  records: Callable[[str], list[records.Prompt]]
  encode: Callable[[Sequence[records.Prompt]], Target]
  verify: Callable[[types.Images, Target], types.Score]
  parts: tuple[str, ...]
  boxes: Callable[[np.ndarray], list[list[dict]]] | None = None
  quiz: Quiz | None = None
  labelled: Callable[[], Sequence[labelled_images.LabelledImage]] | None = None
  tokenizer: Callable[[], tokenizers.Tokenizer] | None = None
  model_folder: str = ""
  verifier_facts: Mapping[str, object] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if "strict" not in self.parts:
      raise ValueError(
        f"the parts of a world's scores must hold 'strict'; {self.name} has {self.parts}"
      )
