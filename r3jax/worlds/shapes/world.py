"""The world of coloured shapes as a `World`."""

import importlib.resources

from r3jax.data import records
from r3jax.worlds import base
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import labelled_set
from r3jax.worlds.shapes import quiz
from r3jax.worlds.shapes import readings
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import stored_prompts
from r3jax.worlds.shapes import verifier
from r3jax.worlds.shapes import vocabulary


def _records(split: str) -> list[records.Prompt]:
  """Returns the records of a split, prepared as TFDS data on first use."""
  return stored_prompts.load(split=split)


WORLD = base.World(
  name="shapes",
  canvas=(scenes.CANVAS, scenes.CANVAS),
  records=_records,
  encode=verifier.encode_records,
  verify=verifier.verify,
  parts=verifier.PARTS,
  boxes=readings.boxes,
  quiz=base.Quiz(readings.objects, quiz.KINDS, grammar.match_question),
  labelled=labelled_set.load,
  tokenizer=vocabulary.build_tokenizer,
  model_folder=str(importlib.resources.files("r3jax") / "assets" / "shapes"),
  verifier_facts={
    "thresholds": [round(float(x), 6) for x in verifier.THRESHOLDS],
    "strict without more difference in blank cells than": verifier.MARKED,
  },
)
