"""R3 on TIIF-Bench with BAGEL-7B, rewarded by a judge's answers to yes/no questions.

  python launch/tpu.py --config=configs/r3_tiif.py --workdir=DIR --config.model.folder=DIR \
    --config.data.train=FILE --config.data.heldout=FILE \
    --config.reward.endpoints="('http://HOST:8000',)"

The files hold the benchmark's training and test prompts in JSON lines, 2,261 and 277 of them; the
short descriptions are used. The judge is any OpenAI-compatible server with a vision-language model,
see `configs/r3_geneval_plus.py`. 97 % of the expected answers are "yes": look at the metric
`service/judge/right_on_no` before you trust a score.

Hyperparameters are those of the reference's script. The paper reports TIIF testmini 70.97 -> 82.02
(figures from secondary sources); nothing of this size has been run with r3jax.
"""

import ml_collections

from configs import r3_geneval
from configs import slices


def get_config(variant: str = "bagel") -> ml_collections.ConfigDict:
  """Returns the config of a variant: "bagel" or a slice of `slices.py`."""
  config = r3_geneval.get_config().unlock()
  slices.spread(config, variant, ())
  config.data.benchmark = "tiif"
  config.data.train = ""  # a file, there is no generator
  # The longest prompt of the benchmark has 398 words.
  config.sequence.prompt_tokens = 640
  config.sequence.question_tokens = 736
  config.reward.name = "judge"
  config.reward.judge.task = "tiif"
  return config.lock()
