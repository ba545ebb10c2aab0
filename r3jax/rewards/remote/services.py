"""Rewards that a service computes: r3jax's JSON protocol, and Flow-GRPO's server."""

from collections.abc import Callable, Sequence
import pickle
from typing import TypeVar
import uuid

import numpy as np

from r3jax.data import records
from r3jax.files import texts
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import plain_pickle
from r3jax.rewards.remote import protocol

T = TypeVar("T")
_MAX_ANSWERS = 1000  # characters of what services answered, in a message


class BatchService:
  """What the adapters share: batches of images over a client."""

  def __init__(self, client: http_client.Client, batch: int):
    """Sends up to `batch` images in a request.

    Raises:
      ValueError: the batch is empty.
    """
    if batch < 1:
      raise ValueError(f"reward.batch must be at least 1; got {batch}")
    self._client = client
    self._batch = batch

  def check(self, prompt: records.Prompt) -> None:
    """Accepts every prompt: a service itself answers which images it cannot score."""

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images in batches; all images of a batch that fails have the outcome `Failed`."""

    def score_batch(rows: slice) -> list[outcome.Outcome]:
      try:
        return self._send(images[rows], prompts[rows])
      except http_client.RequestFailed as error:
        return [outcome.Failed(str(error))] * len(images[rows])

    batches = [
      slice(start, start + self._batch)
      for start in range(0, len(images), self._batch)
    ]
    results = []
    for batch_results in self._client.map(score_batch, batches):
      results += batch_results
    return results

  def _send(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Returns the outcomes of one request.

    Raises:
      http_client.RequestFailed: there is no usable reply.
    """
    raise NotImplementedError

  def metrics(self) -> dict[str, float]:
    """Returns the client's metrics."""
    return self._client.metrics()


def survey(
  client: http_client.Client, path: str, read: Callable[[bytes], T]
) -> T:
  """Returns the answer of the endpoints to a GET; those that do not answer now may do so later.

  Args:
    client: knows the endpoints.
    path: the path of the request.
    read: parses the body of an answer.

  Raises:
    ValueError: no endpoint answers, or two answer differently.
  """
  answers = client.ask_each(path, read)
  good = [
    answer
    for answer in answers.values()
    if not isinstance(answer, http_client.RequestFailed)
  ]
  if not good:
    lines = [f"\n  {url}: {error}" for url, error in answers.items()]
    raise ValueError(
      f"a reward service must answer GET {path} before a run starts; the answers were:"
      + "".join(lines)
    )
  if any(answer != good[0] for answer in good):
    raise ValueError(
      "all endpoints must serve the same reward; they answer: "
      + texts.shorten(str(good), _MAX_ANSWERS)
    )
  return good[0]


def choose(key: str, wanted: str, served: Sequence[str]) -> str:
  """Returns the name that the config wants; where it wants none, the only one that is served.

  Args:
    key: the key of the config, for the message.
    wanted: its value, "" for none.
    served: the names that the service has.

  Raises:
    ValueError: the service has no such name, or several where none is wanted.
  """
  name = wanted
  if not name and len(served) == 1:
    name = served[0]
  if name not in served:
    raise ValueError(
      f"{key} must be one that the service has, "
      f"{texts.shorten(str(served), _MAX_ANSWERS)}; got {wanted!r}"
    )
  return name


class JsonService(BatchService):
  """A service of the protocol in `protocol.py`, for example `r3jax serve-reward`."""

  def __init__(
    self,
    client: http_client.Client,
    batch: int,
    kind: str,
    image_size: tuple[int, int],
  ):
    """Asks the service which reward it serves.

    Args:
      client: knows the endpoints.
      batch: images per request.
      kind: the format in which images are sent, see `protocol.encode_image`.
      image_size: height and width of the run's images, for a trial before the
        run starts.

    Raises:
      ValueError: no endpoint answers as it should.
    """
    super().__init__(client, batch)
    protocol.check_format("reward.image_format", kind)
    health = survey(client, protocol.HEALTH_PATH, protocol.read_health)
    self.parts = health.parts
    self._kind = kind
    self._image_size = image_size
    self._tried: set[bool] = set()
    self._reward = health.reward
    self._identity = protocol.identity(health.reward)

  def check(self, prompt: records.Prompt) -> None:
    """Has a grey image of the first prompt without `include` scored.

    Only the service knows whether it needs that field. Prompts with an inscription and prompts
    without one are tried apart. A failure is none of the prompt's, and counts against the run's
    budget when it happens again.

    Raises:
      ValueError: the service cannot score the prompt.
    """
    has_inscription = prompt.inscription is not None
    if prompt.include or has_inscription in self._tried:
      return
    self._tried.add(has_inscription)
    image = np.full((1, *self._image_size, 3), 128, np.uint8)
    (result,) = self.score(image, [prompt])
    if isinstance(result, outcome.Invalid):
      raise ValueError(
        f"the service must be able to score the prompt {prompt.text!r}, which "
        f"has no field include; it answers: {result.reason}"
      )

  def _send(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    request_id = uuid.uuid4().hex
    body = protocol.make_request(request_id, images, prompts, self._kind)

    def read(reply: bytes) -> list[outcome.Outcome]:
      return protocol.read_reply(
        reply, request_id, len(images), self.parts, self._identity
      )

    return self._client.post(
      protocol.SCORE_PATH, body, "application/json", read
    )

  def describe(self) -> dict:
    """Returns the reward that the service said it serves."""
    return {"service": "json"} | self._reward


class FlowGrpoService(BatchService):
  """Flow-GRPO's reward server for GenEval: pickles over `POST /`.

  The score is the shaped one, clipped to [0, 1].

  Reading a pickle can run code. Replies are read only if they are made of numbers, strings, lists,
  tuples and dicts, see `plain_pickle`; numpy's numbers and arrays are refused. The server reads
  pickles too and asks for no key: use it on a network that you trust. It has no health route, so
  that a run starts without a check.
  """

  parts = ("correct", "strict")

  def check(self, prompt: records.Prompt) -> None:
    """Checks that a prompt has what GenEval's rules read, see `outcome.HostReward`."""
    if not prompt.include:
      raise ValueError(
        f"GenEval's server needs prompts with the field include; {prompt.text!r} has none"
      )

  def _send(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    message = {
      "images": [protocol.encode_image(image, "jpeg") for image in images],
      "meta_datas": [prompt.to_json() for prompt in prompts],
      "only_strict": False,
    }

    def read(reply: bytes) -> list[outcome.Outcome]:
      values = plain_pickle.read(reply)
      if not isinstance(values, dict):
        raise http_client.BadReply(
          f"it must be a dict, not a {type(values).__name__}"
        )
      scores = _column(values, "scores", len(images))
      correct = _column(values, "rewards", len(images))
      strict = _column(values, "strict_rewards", len(images))
      results = []
      for row, score in enumerate(scores):
        parts = {
          "correct": protocol.as_share(correct[row]),
          "strict": protocol.as_share(strict[row]),
        }
        results.append(_clipped(score, parts))
      return results

    return self._client.post(
      "/", pickle.dumps(message), "application/octet-stream", read
    )

  def describe(self) -> dict:
    """Returns the kind of service; it does not say which reward it serves."""
    return {"service": "flow_grpo"}


def _column(reply: dict, name: str, count: int) -> list[float]:
  """Returns one number per image of a reply; raises http_client.BadReply where they are missing."""
  values = reply.get(name)
  if not isinstance(values, list) or len(values) != count:
    raise http_client.BadReply(
      f"{name} must be {count} numbers; got {protocol.count_or_type(values)}"
    )
  return [protocol.as_number(value) for value in values]


def _clipped(score: float, parts: dict[str, float]) -> outcome.Ok:
  """Returns an outcome with the score clipped to [0, 1]; its detail holds the original score."""
  clipped = min(max(score, 0.0), 1.0)
  detail = {} if clipped == score else {"unclipped": score}
  return outcome.Ok(clipped, {"strict": float(score >= 1)} | parts, detail)
