"""The JSON protocol of reward services, version 1: what client and server say to each other.

  POST /v1/score  {"protocol": 1, "request_id": str, "items": [
                    {"image": base64 text, "format": "png" | "jpeg", "record": {...}}, ...]}
              ->  {"protocol": 1, "request_id": the same, "reward_id": `identity` of what scored, "outcomes": [
                    {"status": "ok", "score": 0..1, "parts": {name: 0..1}, "detail": {...}}
                    | {"status": "failed" | "invalid", "reason": str}, ...]}   in the order of items
  GET /health ->  {"protocol": 1, "status": "ready" | "draining", "parts": [name, ...], "reward": {...}}

"reward" says what scores (model, thresholds, ...). A record is a prompt in GenEval's format, see
`data/prompts.py`. Where a token is asked for, it comes as "Authorization: Bearer TOKEN".
"""

import base64
import binascii
from collections.abc import Sequence
import hashlib
import io
import json
import math

import numpy as np
from PIL import Image

from r3jax.rewards import outcome as outcome_lib
from r3jax.rewards.remote import client

VERSION = 1
FORMATS = ("png", "jpeg")
_MAX_REASON, _MAX_DETAIL = 2_000, 65_536  # characters
SCORE_PATH, HEALTH_PATH = "/v1/score", "/health"


class ProtocolError(ValueError):
  """What was sent is not of the protocol."""


def encode_image(image: np.ndarray, kind: str = "png") -> bytes:
  """Returns a file of an image, uint8 [H, W, 3]; "png" is exact, "jpeg" (quality 95) is small."""
  file = io.BytesIO()
  Image.fromarray(np.asarray(image)).save(
    file, kind, **({"quality": 95} if kind == "jpeg" else {})
  )
  return file.getvalue()


def decode_image(file: bytes, kind: str, max_pixels: int) -> np.ndarray:
  """Returns the image of a file, uint8 [H, W, 3].

  Raises:
    ProtocolError: it is no file of the kind, damaged, or has more than `max_pixels` pixels.
  """
  if kind not in FORMATS:
    raise ProtocolError(f"format must be one of {list(FORMATS)}; got {kind!r}")
  try:
    with Image.open(io.BytesIO(file), formats=[kind]) as image:
      if image.width * image.height > max_pixels:
        raise ProtocolError(
          f"an image must have at most {max_pixels} pixels; got {image.width} x {image.height}"
        )
      return np.array(image.convert("RGB"))
  except (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
  ) as error:
    if isinstance(error, ProtocolError):
      raise
    raise ProtocolError(
      f"the image must be a readable {kind} file: {error}"
    ) from error


def parse_object(body: bytes) -> dict:
  """Returns the JSON object of a message's body.

  Raises:
    ProtocolError: it is something else.
  """
  try:
    found = json.loads(body, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:  # of bad UTF-8, too
    raise ProtocolError(
      f"it must be a JSON object, not {body[:40]!r}"
    ) from error
  if not isinstance(found, dict):
    raise ProtocolError(
      f"it must be a JSON object, not a {type(found).__name__}"
    )
  return found


def _refuse_constant(name: str):
  raise ValueError(f"{name} is no JSON")


def _versioned(body: bytes) -> dict:
  found = parse_object(body)
  if found.get("protocol") != VERSION:
    raise ProtocolError(f"protocol must be {VERSION}")
  return found


def make_request(
  request_id: str,
  images: Sequence[np.ndarray],
  records: Sequence[dict],
  kind: str,
) -> bytes:
  """Returns the body of a request."""
  encode = lambda image: base64.b64encode(encode_image(image, kind)).decode()
  items = [
    {"image": encode(image), "format": kind, "record": record}
    for image, record in zip(images, records)
  ]
  return json.dumps(
    {"protocol": VERSION, "request_id": request_id, "items": items}
  ).encode()


def read_request(body: bytes) -> tuple[str, list[dict]]:
  """Returns id and items of a request; each item holds `image` (bytes), `format` and `record`.

  Raises:
    ProtocolError: it is not of the protocol.
  """
  message = _versioned(body)
  request_id, items = message.get("request_id"), message.get("items")
  if (
    not isinstance(request_id, str) or not isinstance(items, list) or not items
  ):
    raise ProtocolError(
      "a request must have request_id (a text) and items (a list that is not empty)"
    )
  return request_id, [_read_item(item) for item in items]


def _read_item(item: object) -> dict:
  if not isinstance(item, dict) or not isinstance(item.get("record"), dict):
    raise ProtocolError(
      "an item must be an object with image, format and record"
    )
  try:
    image = base64.b64decode(item.get("image", ""), validate=True)
  except (TypeError, ValueError, binascii.Error) as error:
    raise ProtocolError(
      f"an item's image must be base64 text: {error}"
    ) from error
  return {
    "image": image,
    "format": item.get("format"),
    "record": item["record"],
  }


def identity(reward: dict) -> str:
  """Returns 16 hex digits of what a reward says it is, so that another one behind the same address is seen."""
  return hashlib.sha256(
    json.dumps(reward, sort_keys=True).encode()
  ).hexdigest()[:16]


def make_reply(
  request_id: str, outcomes: Sequence[outcome_lib.Outcome], reward_id: str
) -> bytes:
  """Returns the body of a reply."""
  return json.dumps(
    {
      "protocol": VERSION,
      "request_id": request_id,
      "reward_id": reward_id,
      "outcomes": [outcome_lib.to_json(outcome) for outcome in outcomes],
    }
  ).encode()


def read_reply(
  body: bytes,
  request_id: str,
  number: int,
  parts: Sequence[str],
  reward_id: str,
) -> list[outcome_lib.Outcome]:
  """Returns the outcomes of a reply.

  Args:
    body: of the reply.
    request_id: that was sent.
    number: of items that were sent.
    parts: that the service said it gives.
    reward_id: of what it said it is.

  Raises:
    client.BadReply: it is not the answer to the request; no outcome of it is used.
  """
  try:
    message = _versioned(body)
  except ProtocolError as error:
    raise client.BadReply(str(error)) from error
  outcomes = message.get("outcomes")
  if message.get("request_id") != request_id:
    raise client.BadReply("it answers another request")
  if message.get("reward_id") != reward_id:
    raise client.BadReply(
      "another reward answers than the one that the run began with"
    )
  if not isinstance(outcomes, list) or len(outcomes) != number:
    seen = (
      len(outcomes) if isinstance(outcomes, list) else type(outcomes).__name__
    )
    raise client.BadReply(f"it must have {number} outcomes; got {seen}")
  return [_read_outcome(outcome, parts) for outcome in outcomes]


def _read_outcome(outcome: object, parts: Sequence[str]) -> outcome_lib.Outcome:
  # What is wrong is named by type: the text of what a stranger sent can be endless.
  if not isinstance(outcome, dict):
    raise client.BadReply(
      f"an outcome must be an object; got a {type(outcome).__name__}"
    )
  status = outcome.get("status")
  if status in ("failed", "invalid"):
    reason = outcome.get("reason")
    reason = (
      reason[:_MAX_REASON] if isinstance(reason, str) else "no reason was given"
    )
    return (
      outcome_lib.Failed(reason)
      if status == "failed"
      else outcome_lib.Invalid(reason)
    )
  if status != "ok":
    raise client.BadReply("an outcome's status must be ok, failed or invalid")
  given = outcome.get("parts")
  if not isinstance(given, dict) or set(given) != set(parts):
    raise client.BadReply(f"an outcome must have the parts {sorted(parts)}")
  score, *numbers = [
    as_share(value)
    for value in (outcome.get("score"), *(given[name] for name in parts))
  ]
  return outcome_lib.Ok(
    score, dict(zip(parts, numbers)), _read_detail(outcome.get("detail", {}))
  )


def _read_detail(detail: object) -> dict:
  """Returns what goes into the log; raises client.BadReply where it cannot."""
  try:
    fits = isinstance(detail, dict) and _is_shallow(detail, 20)
    fits = fits and len(json.dumps(detail, allow_nan=False)) <= _MAX_DETAIL
  except ValueError:  # infinite numbers
    fits = False
  if not fits:
    raise client.BadReply(
      f"an outcome's detail must be a shallow object of finite values, of at most {_MAX_DETAIL} characters"
    )
  return detail


def _is_shallow(value: object, levels: int) -> bool:
  """Tells whether objects and lists lie at most so many levels deep in each other."""
  inner = (
    value.values()
    if isinstance(value, dict)
    else value
    if isinstance(value, list)
    else ()
  )
  return (
    not inner
    or levels > 0
    and all(_is_shallow(one, levels - 1) for one in inner)
  )


def as_number(value: object) -> float:
  """Returns a finite number of a reply as float; booleans are none.

  Raises:
    client.BadReply: it is something else.
  """
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise client.BadReply(
      f"a score or part must be a number; got a {type(value).__name__}"
    )
  try:
    number = float(value)
  except OverflowError as error:
    raise client.BadReply(
      "a score or part must be a finite number; got a huge integer"
    ) from error
  if not math.isfinite(number):
    raise client.BadReply(
      f"a score or part must be a finite number; got {number}"
    )
  return number


def as_share(value: object) -> float:
  """Returns a number of a reply that is in [0, 1]; raises client.BadReply for anything else."""
  number = as_number(value)
  if not 0 <= number <= 1:
    raise client.BadReply(f"a score or part must be in [0, 1]; got {number}")
  return number


def make_health(reward: outcome_lib.HostReward, draining: bool) -> bytes:
  """Returns the body of an answer to GET /health."""
  return json.dumps(
    {
      "protocol": VERSION,
      "status": "draining" if draining else "ready",
      "parts": list(reward.parts),
      "reward": reward.describe(),
    }
  ).encode()


def read_health(body: bytes) -> dict:
  """Returns {"parts", "reward"} of a service.

  Raises:
    client.BadReply: it is not of the protocol, or the service is about to end.
  """
  try:
    message = _versioned(body)
  except ProtocolError as error:
    raise client.BadReply(str(error)) from error
  parts = message.get("parts")
  if not isinstance(parts, list) or not all(
    isinstance(name, str) for name in parts
  ):
    raise client.BadReply("parts must be a list of names")
  if "strict" not in parts or not isinstance(message.get("reward"), dict):
    raise client.BadReply(
      'a service must give the part "strict" and say what its reward is'
    )
  if message.get("status") != "ready":
    raise client.BadReply("the service must say that it is ready")
  return {name: message[name] for name in ("parts", "reward")}
