"""R3 on texts that the image must show, with BAGEL-7B, rewarded by a text reader.

  r3jax serve-reward --reward=ocr                                       on a CPU, needs r3jax[ocr]
  python launch/tpu.py --config=configs/r3_ocr.py --workdir=DIR --config.model.folder=DIR \
    --config.reward.endpoints="('http://HOST:8000',)"

Prompts are generated, of the kind 'a photo of a shop sign above a door that says "Quiet Harbor"':
20,000 to train on, without those whose inscription is in the test set, and the 200 of the test set.
Files of your own may quote the text, or name it in the field `inscription`. The score is 1 minus
the edit distance of the text that is read, divided by the longer of the two texts; see
docs/howto/rewards_zoo.md for its rules and for what a server needs. An iteration asks for 256
images, and the score of a text costs some 0.5 s of a core.

Hyperparameters are those of the reference's script for GenEval; nothing of this size has been run
with r3jax.
"""

import ml_collections

from configs import r3_geneval
from configs import slices


def get_config(variant: str = "bagel") -> ml_collections.ConfigDict:
  """Returns the config of a variant: "bagel" or a slice of `slices.py`."""
  config = r3_geneval.get_config().unlock()
  slices.spread(config, variant, ())
  config.data.benchmark = "ocr"
  config.data.heldout = "generated"
  config.reward.name = "service"
  return config.lock()
