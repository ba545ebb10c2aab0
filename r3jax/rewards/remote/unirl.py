"""UniRL's reward service: models such as CLIP, PickScore or HPS behind one gateway.

  POST /score  {"protocol_version": "1", "requests": [
                 {"history": [{"text": prompt, "image_b64": base64 text}],
                  "required_rewards": [reward], "metadata": {...}}, ...]}
           ->  {"results": [{reward: {number's name: number}}, ...],
                "errors": [{reward: text}, ...]}
  GET /rewards ->  {"rewards": [name, ...]}

Results and errors come in the order of the requests. A reward that fails for an image is missing
in its result and has an error. Metadata is the JSON form of the prompt, see `data/records.py`.
"""

from collections.abc import Sequence
import dataclasses
import json
import math

from absl import logging
import numpy as np

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import services

VERSION = "1"
SCORE_PATH = "/score"
REWARDS_PATH = "/rewards"
# A number that a model computes in float32, a cosine of 1.0000001, may be outside of the range by
# rounding; this is how far, as a share of the range.
_ROUNDING = 1e-6
# Characters of an error that a reason for the log holds.
_MAX_ERROR = 2_000


@dataclasses.dataclass(frozen=True)
class UniRlSettings:
  """What is asked of the service: the config's `reward.unirl`.

  Attributes:
    reward: name of the reward on the service; "" takes the only one that it has.
    number: name of the number that is the score; "" takes the reward's only one.
    range: the least and the greatest value of that number, which become the scores 0 and 1.
  """

  reward: str
  number: str
  range: tuple[float, float]

  def __post_init__(self):
    is_pair = len(self.range) == 2 and all(map(math.isfinite, self.range))
    if not is_pair or not self.range[0] < self.range[1]:
      raise ValueError(
        "reward.unirl.range must be two finite numbers, the smaller one first; "
        f"got {self.range}"
      )


class UniRlService(services.BatchService):
  """A reward of a UniRL service."""

  parts = ("strict",)

  def __init__(
    self,
    client: http_client.Client,
    batch: int,
    kind: str,
    settings: UniRlSettings,
    image_size: tuple[int, int],
  ):
    """Asks the service which rewards it has.

    Args:
      client: knows the endpoints.
      batch: images per request.
      kind: the format in which images are sent, see `protocol.encode_image`.
      settings: which reward, and how its number becomes a score.
      image_size: height and width of the run's images, which the first image has too.

    Raises:
      ValueError: no endpoint answers, or the service does not have the reward.
    """
    super().__init__(client, batch)
    protocol.check_format("reward.image_format", kind)
    self._kind = kind
    self._settings = settings
    self._image_size = image_size
    self._reward = self._find_reward()
    self._was_tried = False

  def _find_reward(self) -> str:
    """Returns the name of the reward to ask for."""
    names = services.survey(self._client, REWARDS_PATH, _read_names)
    return services.choose("reward.unirl.reward", self._settings.reward, names)

  def check(self, prompt: records.Prompt) -> None:
    """Scores a grey image of the first prompt, so that a wrong setting stops before compilation.

    Raises:
      ValueError: the service does not give the number.
    """
    if self._was_tried:
      return
    self._was_tried = True
    image = np.full((1, *self._image_size, 3), 128, np.uint8)
    try:
      (answer,) = self._ask(image, [prompt])
    except http_client.RequestFailed as error:
      raise _no_first_score(str(error)) from error
    if isinstance(answer, outcome.Failed):
      raise _no_first_score(answer.reason)
    result = self._to_outcome(answer)
    if not isinstance(result, outcome.Ok):
      logging.warning("a grey image has no score: %s", result.reason)

  def _send(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    return [self._to_outcome(answer) for answer in self._ask(images, prompts)]

  def _ask(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[float | outcome.Failed | outcome.Invalid]:
    """Returns the number of every image, or why there is none.

    Raises:
      http_client.RequestFailed: there is no usable reply.
    """
    requests = []
    for image, prompt in zip(images, prompts, strict=True):
      file = protocol.encode_base64(image, self._kind)
      request = {
        "history": [{"text": prompt.text, "image_b64": file}],
        "required_rewards": [self._reward],
        "metadata": prompt.to_json(),
      }
      requests.append(request)
    message = {"protocol_version": VERSION, "requests": requests}

    def read(reply: bytes) -> list[float | outcome.Failed | outcome.Invalid]:
      rows = _read_rows(reply, len(requests))
      return [self._number(result, errors) for result, errors in rows]

    body = json.dumps(message).encode()
    return self._client.post(SCORE_PATH, body, "application/json", read)

  def _number(
    self, result: dict, errors: dict
  ) -> float | outcome.Failed | outcome.Invalid:
    """Returns the number of an image, or why there is none."""
    reward = self._reward
    error = errors.get(reward)
    # A service may write null for a reward that has no error.
    if error is not None:
      return outcome.Failed(f"{reward}: {error}"[:_MAX_ERROR])
    numbers = result.get(reward)
    if not isinstance(numbers, dict):
      return outcome.Failed(f"{reward} gave neither a score nor an error")
    name = self._settings.number
    if not name and len(numbers) == 1:
      (name,) = numbers
    if name not in numbers:
      return outcome.Failed(
        f"reward.unirl.number must be one that {reward} gives, {sorted(numbers)[:20]}; "
        f"got {self._settings.number!r}"
      )
    number = numbers[name]
    # A model whose answer cannot be read gives NaN, which some servers write as null.
    if number is None or number != number:
      return outcome.Invalid(f"{reward} gave no number for {name}")
    try:
      return protocol.as_number(number)
    except http_client.BadReply as error:
      return outcome.Failed(f"{reward}: {error}")

  def _to_outcome(
    self, answer: float | outcome.Failed | outcome.Invalid
  ) -> outcome.Outcome:
    """Returns the outcome of an answer: the number's place in the range, where it is inside."""
    if not isinstance(answer, float):
      return answer
    low, high = self._settings.range
    place = (answer - low) / (high - low)
    if not -_ROUNDING <= place <= 1 + _ROUNDING:
      # A clipped score would hide that the range is wrong.
      return outcome.Failed(
        f"{self._reward} gave {answer}, outside of reward.unirl.range ({low}, {high})"
      )
    score = min(max(place, 0.0), 1.0)
    return outcome.Ok(score, {"strict": float(score == 1)}, {"number": answer})

  def describe(self) -> dict:
    """Returns the reward and the settings; the service does not say which weights it has."""
    low, high = self._settings.range
    return {
      "service": "unirl",
      "reward": self._reward,
      "number": self._settings.number,
      "range": [low, high],
    }


def _no_first_score(reason: str) -> ValueError:
  return ValueError(
    f"the UniRL service must score a first image before a run starts: {reason}"
  )


def _read_names(body: bytes) -> list[str]:
  """Returns the names of a service's rewards; raises http_client.BadReply."""
  names = protocol.read_object(body).get("rewards")
  if isinstance(names, list) and all(isinstance(name, str) for name in names):
    return sorted(names)
  raise http_client.BadReply("it must list names as rewards: [...]")


def _read_rows(body: bytes, count: int) -> list[tuple[dict, dict]]:
  """Returns the result and the errors of every request.

  Raises:
    http_client.BadReply: the reply is not of the protocol.
  """
  reply = protocol.read_object(body, allow_nan=True)
  version = reply.get("protocol_version", VERSION)
  if version != VERSION:
    raise http_client.BadReply(
      f"protocol_version must be {VERSION!r}; got {version!r:.40}"
    )
  # A service without errors may leave them out.
  columns = {
    "results": reply.get("results"),
    "errors": reply.get("errors") or [{}] * count,
  }
  for name, column in columns.items():
    if not isinstance(column, list) or len(column) != count:
      actual = protocol.count_or_type(column)
      raise http_client.BadReply(
        f"{name} must be {count} objects; got {actual}"
      )
    if not all(isinstance(row, dict) for row in column):
      raise http_client.BadReply(f"{name} must be a list of objects")
  return list(zip(columns["results"], columns["errors"], strict=True))
