"""Serves a reward over HTTP until SIGTERM or Ctrl-C, then finishes its work and ends.

  r3jax serve-reward --reward=shapes --port=8000
  r3jax serve-reward --reward=geneval --detector=MODEL --clip=MODEL     needs r3jax[detector]
  r3jax serve-reward --reward=ocr                                       needs r3jax[ocr]
  r3jax serve-reward --reward=pickscore                                 needs r3jax[preferences]

Runs use it with --config.reward.name=service and
--config.reward.endpoints="('http://HOST:8000',)". r3jax/rewards/remote/protocol.py describes the
protocol.
"""

import os
import signal
import sys
import threading

from absl import flags
from absl import logging
import jax

from r3jax.cli import command_line
from r3jax.files import rules
from r3jax.parallel import preemption
from r3jax.rewards.serving import geneval
from r3jax.rewards.serving import local
from r3jax.rewards.serving import preferences
from r3jax.rewards.serving import server as server_lib


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_enum(
    "reward", "shapes", sorted(local.NAMES), "Reward that is served."
  )
  flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all."
  )
  flags.DEFINE_integer("port", 8000, "0 takes a free one; the log says which.")
  flags.DEFINE_string(
    "token_env",
    "",
    "Environment variable with the token that clients must send.",
  )
  flags.DEFINE_float(
    "grace", 30.0, "Seconds that unfinished requests get at the end."
  )
  command_line.require(host="an address to listen at")
  command_line.limit(
    port=rules.Whole(0, 65_535),
    token_env=rules.ENVIRONMENT_VARIABLE,
    grace=rules.Real(0, 1e6),
  )
  _define_geneval()
  _define_preferences()
  _define_limits()


def _define_geneval() -> None:
  thresholds = geneval.Thresholds()
  flags.DEFINE_string(
    "detector", "", "Folder or name of the detector (geneval)."
  )
  flags.DEFINE_string(
    "clip", "", "Folder or name of the CLIP model that names colours (geneval)."
  )
  flags.DEFINE_float(
    "confidence",
    thresholds.confidence,
    "Confidence above which an object counts (geneval).",
  )
  flags.DEFINE_float(
    "counting_confidence",
    thresholds.counting_confidence,
    "The same for counting prompts; the default is that of GenEval's own detector (geneval).",
  )
  command_line.limit(
    confidence=rules.Real(0, 1), counting_confidence=rules.Real(0, 1)
  )


def _define_preferences() -> None:
  flags.DEFINE_string(
    "model",
    "",
    "Folder or name of the CLIP model (pickscore, clipscore, hpsv2, aesthetic). Default: the "
    "reward's own, from Hugging Face.",
  )
  flags.DEFINE_string(
    "tokenizer",
    "",
    "Folder or name of the model with the tokenizer (pickscore, clipscore, hpsv2). Default: "
    "--model, else the reward's own.",
  )
  flags.DEFINE_string(
    "weights",
    "",
    "File of the weights beside CLIP (hpsv2: HPS_v2.1_compressed.pt, aesthetic: "
    "sac+logos+ava1-l14-linearMSE.pth).",
  )
  flags.DEFINE_list(
    "span",
    [],
    "The model's numbers that become the scores 0 and 1, such as 10,30 (pickscore, clipscore, "
    "hpsv2, aesthetic). Default: docs/howto/rewards_zoo.md#preferences.",
  )


def _options() -> preferences.Options:
  """Returns what the flags say of a model of preferences.

  Raises:
    ValueError: --span is not two numbers.
  """
  values = flags.FLAGS
  span = None
  if values.span:
    message = (
      f"--span must be two numbers, such as 10,30; got {','.join(values.span)}"
    )
    try:
      least, most = (float(number) for number in values.span)
    except ValueError as error:
      raise ValueError(message) from error
    span = (least, most)
  return preferences.Options(
    values.model, values.tokenizer, values.weights, span
  )


def _define_limits() -> None:
  limits = server_lib.Limits()
  flags.DEFINE_integer(
    "max_body_bytes", limits.max_body_bytes, "Bytes of a request at most."
  )
  flags.DEFINE_integer(
    "max_items", limits.max_items, "Images of a request at most."
  )
  flags.DEFINE_integer(
    "max_pixels", limits.max_pixels, "Pixels of an image at most."
  )
  flags.DEFINE_integer(
    "max_request_pixels",
    limits.max_request_pixels,
    "Pixels of all images of a request at most.",
  )
  flags.DEFINE_integer(
    "queue", limits.queue, "Requests that wait; further ones get 429."
  )
  at_least_1 = rules.Whole(1, 2**62)
  command_line.limit(
    max_body_bytes=at_least_1,
    max_items=at_least_1,
    max_pixels=at_least_1,
    max_request_pixels=at_least_1,
    queue=rules.Whole(0, 1_000_000),
  )


def _token() -> str:
  """Returns the token that clients must send, "" for none.

  Raises:
    ValueError: the variable that should hold it is not set.
  """
  name = flags.FLAGS.token_env
  if not name:
    return ""
  if not os.environ.get(name):
    raise ValueError(
      "--token_env must name a variable of the environment that is set"
    )
  return os.environ[name]


def _server() -> server_lib.Server:
  """Returns the server that the flags describe.

  Raises:
    ValueError: the flags cannot be used.
    OSError: the address cannot be listened at.
  """
  values = flags.FLAGS
  limits = server_lib.Limits(
    max_body_bytes=values.max_body_bytes,
    max_items=values.max_items,
    max_pixels=values.max_pixels,
    max_request_pixels=values.max_request_pixels,
    queue=values.queue,
  )
  thresholds = geneval.Thresholds(values.confidence, values.counting_confidence)
  reward = local.load(
    values.reward, values.detector, values.clip, thresholds, _options()
  )
  address = (values.host, values.port)
  return server_lib.Server(address, reward, _token(), limits)


def run() -> None:
  """Serves until a signal arrives."""
  values = flags.FLAGS
  logging.set_verbosity(logging.INFO)
  # An accelerator of this host belongs to the run that asks for scores.
  jax.config.update("jax_platforms", "cpu")
  try:
    server = _server()
  except (ValueError, OSError) as error:
    sys.exit(f"r3jax: {error}")

  def stop(*unused_signal):
    # A thread of its own: the main thread is in serve_forever, which `drain` ends.
    threading.Thread(target=server.drain, args=(values.grace,)).start()

  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  # Up to here a signal has ended the process.
  preemption.ENDING.leave_signals()
  host, port = server.server_address[:2]
  logging.info("serving %s at http://%s:%d", values.reward, host, port)
  server.serve_forever(poll_interval=0.1)
  server.server_close()
  logging.info("ended: %s", server.statistics())
