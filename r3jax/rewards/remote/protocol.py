"""The JSON protocol of reward services, version 1: the messages between client and server.

  POST /v1/score  {"protocol": 1, "request_id": str, "items": [
                    {"image": base64 text, "format": "png" | "jpeg", "record": {...}}, ...]}
              ->  {"protocol": 1, "request_id": str, "reward_id": str, "outcomes": [
                    {"status": "ok", "score": 0..1, "parts": {name: 0..1}, "detail": {...}}
                    | {"status": "failed" | "invalid", "reason": str}, ...]}
  GET /health ->  {"protocol": 1, "status": "ready" | "draining", "parts": [name, ...],
                   "reward": {...}}

Outcomes come in the order of the items, and the reply repeats the request's id. "reward" identifies
what scores (model, thresholds, ...), "reward_id" is its `identity`. A record is the JSON form of a
prompt, see `data/records.py`. A server with a token expects the header "Authorization: Bearer
TOKEN".
"""

import base64
import binascii
from collections.abc import Sequence
import dataclasses
import hashlib
import io
import json
import math

import numpy as np
from PIL import Image

from r3jax.data import records
from r3jax.files import bounded
from r3jax.files import image_files
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client

VERSION = 1
FORMATS = ("png", "jpeg")
SCORE_PATH = "/v1/score"
HEALTH_PATH = "/health"
# In characters.
_MAX_REASON = 2_000
_MAX_DETAIL = 65_536
# Objects and lists in an outcome's detail may be nested so deep.
_MAX_DETAIL_LEVELS = 20


class ProtocolError(ValueError):
  """A message is not of the protocol."""


@dataclasses.dataclass(frozen=True)
class Item:
  """An image of a request, as it was sent.

  Attributes:
    image: the bytes of the file.
    format: the format that the client names, any JSON value.
    record: the JSON object of the prompt, not validated yet.
  """

  image: bytes
  format: object
  record: dict


def check_format(key: str, kind: str) -> None:
  """Checks the value of a config key that names the format of images.

  Raises:
    ValueError: there is no such format.
  """
  if kind not in FORMATS:
    raise ValueError(f"{key} must be one of {list(FORMATS)}; got {kind!r}")


def encode_image(image: np.ndarray, kind: str = "png") -> bytes:
  """Returns a file of an image, uint8 [H, W, 3]; "png" is exact, "jpeg" (quality 95) is small."""
  file = io.BytesIO()
  options = {"quality": 95} if kind == "jpeg" else {}
  Image.fromarray(np.asarray(image)).save(file, kind, **options)
  return file.getvalue()


def decode_image(file: bytes, kind: object, max_pixels: int) -> np.ndarray:
  """Returns the image of a file, uint8 [H, W, 3].

  Raises:
    ProtocolError: it is no file of the kind, damaged, or has more than `max_pixels` pixels.
  """
  if kind not in FORMATS:
    raise ProtocolError(f"format must be one of {list(FORMATS)}; got {kind!r}")
  try:
    # The header says the size; nothing is decoded before it has been checked.
    with Image.open(io.BytesIO(file), formats=[kind]) as image:
      if image.width * image.height > max_pixels:
        raise ProtocolError(
          f"an image must have at most {max_pixels} pixels; got {image.width} x {image.height}"
        )
      return image_files.as_shown(image)
  except ProtocolError:
    raise
  except image_files.UNREADABLE as error:
    raise ProtocolError(
      f"the image must be a readable {kind} file: {error}"
    ) from error


def parse_object(body: bytes, allow_nan: bool = False) -> dict:
  """Returns the JSON object of a message's body.

  Args:
    body: UTF-8 text.
    allow_nan: whether NaN and Infinity, which are no JSON, are read as numbers.

  Raises:
    ProtocolError: it is something else, or exceeds `bounded.MESSAGE_LIMITS`.
  """
  try:
    message = bounded.parse_json(body, bounded.MESSAGE_LIMITS, allow_nan)
  except ValueError as error:
    raise ProtocolError(
      f"it must be a JSON object, not {body[:40]!r}: {error}"
    ) from error
  if not isinstance(message, dict):
    raise ProtocolError(
      f"it must be a JSON object, not a {type(message).__name__}"
    )
  return message


def read_object(body: bytes, allow_nan: bool = False) -> dict:
  """Returns the JSON object of a reply, see `parse_object`.

  Raises:
    http_client.BadReply: it is something else.
  """
  try:
    return parse_object(body, allow_nan)
  except ProtocolError as error:
    raise http_client.BadReply(str(error)) from error


def _versioned(body: bytes) -> dict:
  """Returns the JSON object of a message of this version of the protocol."""
  message = parse_object(body)
  if message.get("protocol") != VERSION:
    raise ProtocolError(f"protocol must be {VERSION}")
  return message


def make_request(
  request_id: str,
  images: Sequence[np.ndarray],
  prompts: Sequence[records.Prompt],
  kind: str,
) -> bytes:
  """Returns the body of a request.

  Args:
    request_id: the reply repeats it.
    images: uint8 [H, W, 3] each.
    prompts: the prompt of each image.
    kind: the format of the images, one of FORMATS.
  """
  items = [
    {
      "image": encode_base64(image, kind),
      "format": kind,
      "record": prompt.to_json(),
    }
    for image, prompt in zip(images, prompts, strict=True)
  ]
  return _to_body({"request_id": request_id, "items": items})


def encode_base64(image: np.ndarray, kind: str = "png") -> str:
  """Returns the file of an image (see `encode_image`) as base64 text."""
  return base64.b64encode(encode_image(image, kind)).decode()


def _to_body(message: dict) -> bytes:
  return json.dumps({"protocol": VERSION} | message).encode()


def read_request(body: bytes) -> tuple[str, list[Item]]:
  """Returns the id and the items of a request.

  Raises:
    ProtocolError: it is not of the protocol.
  """
  message = _versioned(body)
  request_id = message.get("request_id")
  items = message.get("items")
  has_items = isinstance(items, list) and bool(items)
  if not isinstance(request_id, str) or not has_items:
    raise ProtocolError(
      "a request must have request_id (a text) and items (a list that is not empty)"
    )
  return request_id, [_read_item(item) for item in items]


def _read_item(item: object) -> Item:
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
  return Item(image, item.get("format"), item["record"])


def identity(reward: dict) -> str:
  """Returns 16 hex digits of a reward's description, by which a client notices another reward."""
  description = json.dumps(reward, sort_keys=True).encode()
  return hashlib.sha256(description).hexdigest()[:16]


def make_reply(
  request_id: str, results: Sequence[outcome.Outcome], reward_id: str
) -> bytes:
  """Returns the body of a reply."""
  return _to_body(
    {
      "request_id": request_id,
      "reward_id": reward_id,
      "outcomes": [outcome.to_json(result) for result in results],
    }
  )


def read_reply(
  body: bytes,
  request_id: str,
  number: int,
  parts: Sequence[str],
  reward_id: str,
) -> list[outcome.Outcome]:
  """Returns the outcomes of a reply.

  Args:
    body: the reply.
    request_id: the id of the request.
    number: the number of items in the request.
    parts: names of the parts that the service gave at the start.
    reward_id: the identity of the reward that answered at the start.

  Raises:
    http_client.BadReply: it is not the answer to the request; none of its outcomes may be used.
  """
  try:
    message = _versioned(body)
  except ProtocolError as error:
    raise http_client.BadReply(str(error)) from error
  results = message.get("outcomes")
  if message.get("request_id") != request_id:
    raise http_client.BadReply("it answers another request")
  if message.get("reward_id") != reward_id:
    raise http_client.BadReply(
      "another reward answers than the one that the run began with"
    )
  if not isinstance(results, list) or len(results) != number:
    actual = count_or_type(results)
    raise http_client.BadReply(f"it must have {number} outcomes; got {actual}")
  return [_read_outcome(result, parts) for result in results]


def count_or_type(value: object) -> int | str:
  """Returns the length of a list, or the name of another value's type, for an error's text.

  A reply is described by its type: the text of a stranger's message can be endless.
  """
  return len(value) if isinstance(value, list) else type(value).__name__


def _read_outcome(result: object, parts: Sequence[str]) -> outcome.Outcome:
  """Returns one outcome of a reply; raises http_client.BadReply where it is none."""
  if not isinstance(result, dict):
    raise http_client.BadReply(
      f"an outcome must be an object; got a {type(result).__name__}"
    )
  status = result.get("status")
  if status == "failed":
    return outcome.Failed(_read_reason(result))
  if status == "invalid":
    return outcome.Invalid(_read_reason(result))
  if status != "ok":
    raise http_client.BadReply(
      "an outcome's status must be ok, failed or invalid"
    )
  values = result.get("parts")
  if not isinstance(values, dict) or set(values) != set(parts):
    raise http_client.BadReply(
      f"an outcome must have the parts {sorted(parts)}"
    )
  return outcome.Ok(
    score=as_share(result.get("score")),
    parts={name: as_share(values[name]) for name in parts},
    detail=_read_detail(result.get("detail", {})),
  )


def _read_reason(result: dict) -> str:
  reason = result.get("reason")
  if not isinstance(reason, str):
    return "no reason was given"
  return reason[:_MAX_REASON]


def _read_detail(detail: object) -> dict:
  """Returns an outcome's detail; raises http_client.BadReply where it does not fit into the log."""
  if isinstance(detail, dict) and _is_shallow(detail, _MAX_DETAIL_LEVELS):
    try:
      if len(json.dumps(detail, allow_nan=False)) <= _MAX_DETAIL:
        return detail
    except ValueError:  # infinite numbers
      pass
  raise http_client.BadReply(
    "an outcome's detail must be a shallow object of finite values, of at most "
    f"{_MAX_DETAIL} characters"
  )


def _is_shallow(value: object, levels: int) -> bool:
  """Returns whether objects and lists are nested at most so many levels deep."""
  if isinstance(value, dict):
    inner = list(value.values())
  elif isinstance(value, list):
    inner = value
  else:
    return True
  if not inner:
    return True
  return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def as_number(value: object) -> float:
  """Returns a finite number of a reply as float.

  Raises:
    http_client.BadReply: it is something else, for example a boolean.
  """
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise http_client.BadReply(
      f"a score or part must be a number; got a {type(value).__name__}"
    )
  try:
    number = float(value)
  except OverflowError as error:
    raise http_client.BadReply(
      "a score or part must be a finite number; got a huge integer"
    ) from error
  if not math.isfinite(number):
    raise http_client.BadReply(
      f"a score or part must be a finite number; got {number}"
    )
  return number


def as_share(value: object) -> float:
  """Returns a number of a reply that is in [0, 1].

  Raises:
    http_client.BadReply: it is something else.
  """
  number = as_number(value)
  if not 0 <= number <= 1:
    raise http_client.BadReply(
      f"a score or part must be in [0, 1]; got {number}"
    )
  return number


def make_health(reward: outcome.HostReward, draining: bool) -> bytes:
  """Returns the body of an answer to GET /health."""
  return _to_body(
    {
      "status": "draining" if draining else "ready",
      "parts": list(reward.parts),
      "reward": reward.describe(),
    }
  )


@dataclasses.dataclass(frozen=True)
class Health:
  """What a service says of itself.

  Attributes:
    parts: names of the parts of its scores.
    reward: JSON values that identify what scores.
  """

  parts: tuple[str, ...]
  reward: dict


def read_health(body: bytes) -> Health:
  """Returns what a service answers to GET /health.

  Raises:
    http_client.BadReply: it is not of the protocol, or the service is about to end.
  """
  try:
    message = _versioned(body)
  except ProtocolError as error:
    raise http_client.BadReply(str(error)) from error
  parts = message.get("parts")
  reward = message.get("reward")
  if not isinstance(parts, list):
    raise http_client.BadReply("parts must be a list of names")
  if not all(isinstance(name, str) for name in parts):
    raise http_client.BadReply("parts must be a list of names")
  if "strict" not in parts or not isinstance(reward, dict):
    raise http_client.BadReply(
      'a service must give the part "strict" and say what its reward is'
    )
  if message.get("status") != "ready":
    raise http_client.BadReply("the service must say that it is ready")
  return Health(tuple(parts), reward)
