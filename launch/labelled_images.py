r"""Makes the labelled images of the embedded world, about which every model is asked the same.

  python launch/evaluate.py --config=configs/r3_geneval.py:shapes --workdir=evaluations/drafts \
    --config.eval.prompts=1200 --config.eval.rounds=1 --config.eval.seed=17 \
    --config.eval.labelled_images=
  python launch/labelled_images.py evaluations/drafts [--seed=0] [--out=FOLDER]

The first command draws drafts of the shipped model, the second chooses among them and renders
further scenes (`r3jax/worlds/shapes/labelled_set.py`). By default it writes the set that is
shipped. Some 5 minutes on two cores. The right images of another model or of a larger world are
others, so that both commands must be given again for these.
"""

import pathlib
import sys

from absl import app
from absl import flags
from etils import epath

from r3jax.evaluation import finished
from r3jax.files import image_files
from r3jax.worlds.shapes import labelled_set
from r3jax.worlds.shapes import prompts

_SEED = flags.DEFINE_integer("seed", 0, "Seed of all draws.", 0)
_OUT = flags.DEFINE_string(
  "out", "", "Folder to write; that of the shipped set unless given."
)


def _drafts(folder: str) -> list[labelled_set.Candidate]:
  """Returns the drafts of an evaluation without clutter.

  Whether an image with clutter is right depends on what counts as an object.
  """
  by_text = {record.text: record for record in prompts.heldout_records()}
  (evaluation,) = finished.read(folder)
  drafts = []
  for sample in evaluation.samples:
    draft = sample.turns[0]
    if draft.parts is None or draft.parts["clutter"] != 0:
      continue
    pixels = image_files.read(epath.Path(folder) / draft.image)
    is_right = draft.parts["strict"] == 1
    record = by_text[sample.prompt]
    drafts.append(labelled_set.Candidate(record, pixels, is_right))
  return drafts


def main(argv: list[str]) -> None:
  """Makes the set and says what it holds."""
  if len(argv) != 2:
    sys.exit("r3jax: labelled_images takes the folder of an evaluation")
  try:
    images = labelled_set.make(_drafts(argv[1]), _SEED.value)
  except ValueError as error:
    sys.exit(f"r3jax: {error}")
  folder = pathlib.Path(_OUT.value) if _OUT.value else labelled_set.folder()
  labelled_set.write(images, folder)
  num_right = sum(image.matches for image in images)
  print(f"{folder}: {len(images)} images, {num_right} of them right")


if __name__ == "__main__":
  app.run(main)
