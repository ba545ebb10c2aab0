"""R3 on GenEval++ with BAGEL-7B, rewarded by a vision-language judge.

  python launch/tpu.py --config=configs/r3_geneval_plus.py --workdir=DIR --config.model.folder=DIR \
    --config.data.heldout=FILE --config.reward.endpoints="('http://HOST:8000',)"

`data.heldout` is GenEval++'s file of 280 prompts. The benchmark's training prompts were never
published: they are generated, without those of the test set. The judge is any OpenAI-compatible
server with a vision-language model. The paper's is Qwen2.5-VL-72B, for example behind vLLM on GPUs
of its own: `vllm serve Qwen/Qwen2.5-VL-72B-Instruct`. An iteration asks it about 256 images.

Hyperparameters are those of the reference's script. The paper reports GenEval++ 0.371 -> 0.689
(figures from secondary sources); nothing of this size has been run with r3jax.
"""

import ml_collections

from configs import r3_geneval
from configs import slices


def get_config(variant: str = "bagel") -> ml_collections.ConfigDict:
  """Returns the config of a variant: "bagel" or a slice of `slices.py`."""
  config = r3_geneval.get_config().unlock()
  slices.spread(config, variant, ())
  config.data.benchmark = "geneval_plus"
  config.reward.name = "judge"
  config.reward.judge.task = "geneval_plus"
  return config.lock()
