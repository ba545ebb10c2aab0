"""Serves a reward over HTTP until SIGTERM or Ctrl-C, then finishes what it has and ends.

  python launch/serve_reward.py --reward=shapes --port=8000
  python launch/serve_reward.py --reward=geneval --detector=MODEL --clip=MODEL     needs r3jax[detector]

Runs of `launch/tpu.py` use it with --config.reward.name=service and
--config.reward.endpoints="('http://HOST:8000',)". docs/rewards.md has the protocol.
"""

import os
import signal
import sys
import threading

from absl import app
from absl import flags
from absl import logging
import jax

from r3jax.rewards.serving import geneval
from r3jax.rewards.serving import local
from r3jax.rewards.serving import server as server_lib

_REWARD = flags.DEFINE_enum(
  "reward", "shapes", sorted(local.NAMES), "What scores."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all."
)
_PORT = flags.DEFINE_integer(
  "port", 8000, "0 takes a free one; the log says which.", 0, 65535
)
_TOKEN_ENV = flags.DEFINE_string(
  "token_env", "", "Environment variable with the token that clients must send."
)
_DETECTOR = flags.DEFINE_string(
  "detector", "", "Folder or name of the detector (geneval)."
)
_CLIP = flags.DEFINE_string(
  "clip", "", "Folder or name of the CLIP model that tells colours (geneval)."
)
_THRESHOLDS = geneval.Thresholds()
_CONFIDENCE = flags.DEFINE_float(
  "confidence", _THRESHOLDS.confidence, "An object must be surer (geneval)."
)
_COUNTING_CONFIDENCE = flags.DEFINE_float(
  "counting_confidence",
  _THRESHOLDS.counting_confidence,
  "The same for counting prompts; the default is that of GenEval's own detector (geneval).",
)
_LIMITS = server_lib.Limits()
_MAX_BODY_BYTES = flags.DEFINE_integer(
  "max_body_bytes", _LIMITS.max_body_bytes, "Of a request.", 1
)
_MAX_ITEMS = flags.DEFINE_integer(
  "max_items", _LIMITS.max_items, "Images of a request.", 1
)
_MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels", _LIMITS.max_pixels, "Of an image.", 1
)
_MAX_REQUEST_PIXELS = flags.DEFINE_integer(
  "max_request_pixels",
  _LIMITS.max_request_pixels,
  "Of all images of a request.",
  1,
)
_QUEUE = flags.DEFINE_integer(
  "queue", _LIMITS.queue, "Requests that wait; further ones get 429.", 0
)
_GRACE = flags.DEFINE_float(
  "grace", 30.0, "Seconds that work under way is given at the end.", 0
)


def _token() -> str:
  """Returns the token that clients must send; empty if none is asked for."""
  if _TOKEN_ENV.value and not os.environ.get(_TOKEN_ENV.value):
    raise ValueError(
      "--token_env must name a variable of the environment that is set"
    )
  return os.environ[_TOKEN_ENV.value] if _TOKEN_ENV.value else ""


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  # the accelerator, if there is one, belongs to the run that asks
  jax.config.update("jax_platforms", "cpu")
  limits = server_lib.Limits(
    max_body_bytes=_MAX_BODY_BYTES.value,
    max_items=_MAX_ITEMS.value,
    max_pixels=_MAX_PIXELS.value,
    max_request_pixels=_MAX_REQUEST_PIXELS.value,
    queue=_QUEUE.value,
  )
  try:
    thresholds = geneval.Thresholds(
      _CONFIDENCE.value, _COUNTING_CONFIDENCE.value
    )
    reward = local.load(_REWARD.value, _DETECTOR.value, _CLIP.value, thresholds)
    server = server_lib.Server(
      (_HOST.value, _PORT.value), reward, _token(), limits
    )
  except (ValueError, OSError) as error:
    sys.exit(f"r3jax: {error}")
  end = lambda *_: threading.Thread(
    target=server.drain, args=(_GRACE.value,)
  ).start()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
  logging.info(
    "serving %s at http://%s:%d", _REWARD.value, *server.server_address[:2]
  )
  server.serve_forever(poll_interval=0.1)
  server.server_close()
  logging.info("ended: %s", server.statistics())


if __name__ == "__main__":
  app.run(main)
