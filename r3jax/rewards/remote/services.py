"""Rewards that a service computes: the own JSON protocol, and adapters for two that others use."""

import base64
from collections.abc import Callable, Sequence
import json
import pickle
import pickletools
from typing import TypeVar
import uuid

import numpy as np

from r3jax.rewards import outcome as outcome_lib
from r3jax.rewards.remote import client as client_lib
from r3jax.rewards.remote import protocol

T = TypeVar("T")


class _Service:
  """What the adapters share: batches over a client."""

  def __init__(self, client: client_lib.Client, batch: int):
    if batch < 1:
      raise ValueError(f"reward.batch must be at least 1; got {batch}")
    self._client, self._batch = client, batch

  def check(self, record: dict):
    """See `base.HostReward`; what a service can score it says itself."""

  def score(
    self, images: np.ndarray, records: Sequence[dict]
  ) -> list[outcome_lib.Outcome]:
    """See `base.HostReward`; a batch that fails is missing as a whole."""

    def outcomes(rows: slice) -> list[outcome_lib.Outcome]:
      try:
        return self._send(images[rows], records[rows])
      except client_lib.RequestFailed as error:
        return [outcome_lib.Failed(str(error))] * len(images[rows])

    batches = [
      slice(start, start + self._batch)
      for start in range(0, len(images), self._batch)
    ]
    return [
      outcome
      for found in self._client.map(outcomes, batches)
      for outcome in found
    ]

  def _send(
    self, images: np.ndarray, records: Sequence[dict]
  ) -> list[outcome_lib.Outcome]:
    """Returns the outcomes of one request; raises client.RequestFailed."""
    raise NotImplementedError

  def metrics(self) -> dict[str, float]:
    """See `base.HostReward`."""
    return self._client.metrics()


def survey(
  client: client_lib.Client, path: str, read: Callable[[bytes], T]
) -> T:
  """Returns what the endpoints say they are; those that do not answer now may do so later.

  Raises:
    ValueError: none answers, or two say different things.
  """
  answers = client.ask_each(path, read)
  good = [
    answer
    for answer in answers.values()
    if not isinstance(answer, client_lib.RequestFailed)
  ]
  if not good:
    lines = [f"\n  {url}: {error}" for url, error in answers.items()]
    raise ValueError(
      f"a reward service must answer GET {path} before a run starts; seen:"
      + "".join(lines)
    )
  if any(answer != good[0] for answer in good):
    raise ValueError(
      f"all endpoints must serve the same reward; they say: {json.dumps(good)}"
    )
  return good[0]


class JsonService(_Service):
  """A service of the protocol in `protocol.py`, for example `launch/serve_reward.py`."""

  def __init__(self, client: client_lib.Client, batch: int, kind: str = "png"):
    """Asks the service what it gives.

    Args:
      client: of its endpoints.
      batch: images per request.
      kind: how images travel, see `protocol.encode_image`.

    Raises:
      ValueError: no endpoint answers as it should.
    """
    super().__init__(client, batch)
    if kind not in protocol.FORMATS:
      raise ValueError(
        f"reward.image_format must be one of {list(protocol.FORMATS)}; got {kind!r}"
      )
    self._kind = kind
    health = survey(client, protocol.HEALTH_PATH, protocol.read_health)
    self.parts, self._reward = tuple(health["parts"]), health["reward"]
    self._identity = protocol.identity(self._reward)

  def _send(self, images, records) -> list[outcome_lib.Outcome]:
    request_id = uuid.uuid4().hex
    body = protocol.make_request(request_id, images, records, self._kind)
    read = lambda reply: protocol.read_reply(
      reply, request_id, len(images), self.parts, self._identity
    )
    return self._client.post(
      protocol.SCORE_PATH, body, "application/json", read
    )

  def describe(self) -> dict:
    """See `base.HostReward`."""
    return {"service": "json"} | self._reward


class UniRlService(_Service):
  """A service that takes and gives plain JSON.

    POST /score {"images": [base64 PNG], "prompts": [str], "metadata": [record]} -> {"scores": [number]}
    GET /health -> any JSON object

  The field names are those of UniRL-style servers as far as known; not tried against one of them.
  """

  parts = ("strict",)

  def __init__(self, client: client_lib.Client, batch: int):
    """Asks the service whether it is there; see `JsonService`."""
    super().__init__(client, batch)
    survey(client, "/health", lambda body: bool(_read_object(body)))

  def _send(self, images, records) -> list[outcome_lib.Outcome]:
    body = json.dumps(
      {
        "images": [
          base64.b64encode(protocol.encode_image(image)).decode()
          for image in images
        ],
        "prompts": [record["prompt"] for record in records],
        "metadata": list(records),
      }
    )
    read = lambda reply: [
      _clipped(score, {})
      for score in _column(_read_object(reply), "scores", len(images))
    ]
    return self._client.post("/score", body.encode(), "application/json", read)

  def describe(self) -> dict:
    """See `base.HostReward`."""
    return {"service": "unirl"}


class FlowGrpoService(_Service):
  """Flow-GRPO's reward server for GenEval : pickles over `POST /`.

  The score is the shaped one, clipped to [0, 1].

  A pickle can run code when it is read. Replies are read only if they are made of numbers, strings,
  lists, tuples and dicts, see `read_plain_pickle`. The server reads pickles too and asks for no
  key: use it on a network that you trust. It has no health route, so a run starts without a check.
  """

  parts = ("correct", "strict")

  def _send(self, images, records) -> list[outcome_lib.Outcome]:
    files = [protocol.encode_image(image, "jpeg") for image in images]
    body = pickle.dumps(
      {"images": files, "meta_datas": list(records), "only_strict": False}
    )

    def read(reply: bytes) -> list[outcome_lib.Outcome]:
      found = read_plain_pickle(reply)
      if not isinstance(found, dict):
        raise client_lib.BadReply(
          f"it must be a dict, not a {type(found).__name__}"
        )
      columns = [
        _column(found, name, len(images))
        for name in ("scores", "rewards", "strict_rewards")
      ]
      columns[1:] = [
        [protocol.as_share(value) for value in column] for column in columns[1:]
      ]
      return [
        _clipped(score, {"correct": right, "strict": strict})
        for score, right, strict in zip(*columns)
      ]

    return self._client.post("/", body, "application/octet-stream", read)

  def describe(self) -> dict:
    """See `base.HostReward`."""
    return {"service": "flow_grpo"}


def _read_object(body: bytes) -> dict:
  """Returns the JSON object of a reply; raises client.BadReply for anything else."""
  try:
    return protocol.parse_object(body)
  except protocol.ProtocolError as error:
    raise client_lib.BadReply(str(error)) from error


def _column(reply: dict, name: str, number: int) -> list[float]:
  """Returns one number per image from a reply; raises client.BadReply if they are not there."""
  values = reply.get(name)
  if not isinstance(values, list) or len(values) != number:
    seen = len(values) if isinstance(values, list) else type(values).__name__
    raise client_lib.BadReply(f"{name} must be {number} numbers; got {seen}")
  return [protocol.as_number(value) for value in values]


def _clipped(score: float, parts: dict[str, float]) -> outcome_lib.Ok:
  """Returns an outcome with the score clipped to [0, 1] and kept as it came in the detail."""
  clipped = min(max(score, 0.0), 1.0)
  return outcome_lib.Ok(
    clipped,
    {"strict": float(score >= 1)} | parts,
    {} if clipped == score else {"unclipped": score},
  )


# What a pickle of numbers, texts, lists, tuples and dicts is made of: nothing that imports or calls.
_PLAIN_OPCODES = frozenset(
  """
    PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    STRING BINSTRING SHORT_BINSTRING EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_DICT DICT SETITEM SETITEMS
""".split()
)
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def read_plain_pickle(body: bytes) -> object:
  """Returns the plain values of a pickle; nothing that it names is imported or run.

  Every opcode is looked at before the first is obeyed. Memo indices beyond the length of the body are
  refused too, for the unpickler would make room for them.

  Raises:
    client.BadReply: it is damaged or holds anything but numbers, strings, lists, tuples and dicts.
  """
  try:
    for opcode, argument, _ in pickletools.genops(body):
      if opcode.name not in _PLAIN_OPCODES:
        raise client_lib.BadReply(
          f"it must be a pickle of plain values; it has the opcode {opcode.name}"
        )
      if opcode.name in _PUTS and int(argument) > len(body):
        raise client_lib.BadReply(
          "it must be a pickle of plain values; it asks for room that it does not need"
        )
    return pickle.loads(body)
  except (
    pickle.UnpicklingError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
    MemoryError,
    OverflowError,
    RecursionError,
  ) as error:
    raise client_lib.BadReply(
      f"it must be a pickle of plain values: {type(error).__name__}"
    ) from error
