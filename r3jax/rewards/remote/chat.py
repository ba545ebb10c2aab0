"""Replies of OpenAI's chat protocol, and the JSON answers inside them.

A reply that breaks the protocol is a `http_client.BadReply` and is asked for again. A whole reply
without an answer, or with one that cannot be read, is none.
"""

from collections.abc import Sequence
import dataclasses
import json
import re

from r3jax.files import bounded
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol

# Characters of a refusal that a reason for the log holds.
_MAX_REFUSAL = 1000
_OBJECT_START = re.compile(r'\{\s*["}]')
# An answer is a few hundred characters; every brace that begins no object costs a search.
_MAX_ANSWER = 1_000_000
_MAX_BRACES = 500
# Characters of a key or a value in a message.
_MAX_SHOWN = 40


def read_models(body: bytes) -> list[str]:
  """Returns the names of the models that a server lists; raises http_client.BadReply."""
  models = protocol.read_object(body).get("data")
  if not isinstance(models, list) or not all(map(_has_id, models)):
    raise http_client.BadReply("it must list models as data: [{id}, ...]")
  return sorted(model["id"] for model in models)


def _has_id(model: object) -> bool:
  return isinstance(model, dict) and isinstance(model.get("id"), str)


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a server answers to a chat request.

  Attributes:
    text: the answer; "" where the server gives none.
    finish_reason: why the answer ends: "stop", "length", "content_filter", ...
    refusal: why the model refuses to answer; "" where it does not.
  """

  text: str
  finish_reason: str
  refusal: str

  def missing_answer(self, max_tokens: int) -> str:
    """Returns why there is no answer to read; "" where there is one.

    Args:
      max_tokens: the limit that was asked for.
    """
    # Half an answer may look like a whole one, so this comes first.
    if self.finish_reason == "length":
      return (
        "the answer ran out of tokens (finish_reason 'length'; reward.judge.max_tokens is "
        f"{max_tokens})"
      )
    if self.refusal:
      return f"the judge refuses: {self.refusal[:_MAX_REFUSAL]}"
    if self.finish_reason == "content_filter":
      return "the server withholds the answer (finish_reason 'content_filter')"
    if not self.text.strip():
      return "the answer is empty"
    return ""


def read_completion(body: bytes) -> Completion:
  """Returns a chat completion; raises http_client.BadReply where it is none."""
  choices = protocol.read_object(body).get("choices")
  choice = choices[0] if isinstance(choices, list) and choices else None
  message = choice.get("message") if isinstance(choice, dict) else None
  if not isinstance(choice, dict) or not isinstance(message, dict):
    raise http_client.BadReply("it must hold choices[0].message")
  texts = {
    "content": message.get("content"),
    "finish_reason": choice.get("finish_reason"),
    "refusal": message.get("refusal"),
  }
  for name, text in texts.items():
    if text is not None and not isinstance(text, str):
      raise http_client.BadReply(f"its {name} must be a text")
  return Completion(
    text=texts["content"] or "",
    finish_reason=texts["finish_reason"] or "",
    refusal=texts["refusal"] or "",
  )


def read_answers(
  text: str, keys: Sequence[str], allowed: tuple
) -> dict[str, object]:
  """Returns the answers by key.

  They are read from a JSON object that holds all keys; what else it holds, and the text around it,
  do not count: a sentence, a code fence, a thought that ends in </think>. Answers are compared
  without case; 0 and 1 may be given as text.

  Args:
    text: the judge's answer.
    keys: the keys of the answers.
    allowed: the allowed values of an answer.

  Raises:
    ValueError: there is no such object, there are two with other answers, a key is repeated, a
      value is not allowed, or the text is too long.
  """
  if len(text) > _MAX_ANSWER:
    raise ValueError(
      f"the answer must have at most {_MAX_ANSWER} characters; it has {len(text)}"
    )
  thought, end, content = text.rpartition("</think>")
  del thought
  if not end and content.lstrip().startswith("<think>"):
    raise ValueError("the thought has no end")
  objects = _objects(content)
  complete = [obj for obj in objects if obj.keys() >= set(keys)]
  if not complete:
    keys_of_last = _shown(sorted(objects[-1])) if objects else "no object"
    raise ValueError(
      f"the answer must hold a JSON object with the keys {list(keys)}; it holds {keys_of_last}"
    )
  answers = _answers_of(complete[0], keys, allowed)
  for other in complete[1:]:
    if _answers_of(other, keys, allowed) != answers:
      raise ValueError("the answer holds verdicts that contradict each other")
  return answers


def _answers_of(
  obj: dict, keys: Sequence[str], allowed: tuple
) -> dict[str, object]:
  """Returns the allowed values of an object's keys; raises ValueError for another value."""
  return {key: _allowed_value(obj[key], allowed) for key in keys}


def _objects(text: str) -> list[dict]:
  """Returns the JSON objects of a text, without those inside of others.

  Raises:
    ValueError: one is nested too deep, or repeats a key, or there are too many.
  """
  # Not strict: where no schema holds them, models break lines inside of texts.
  decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, strict=False)
  objects = []
  position = 0
  num_braces = 0
  while start := _OBJECT_START.search(text, position):
    num_braces += 1
    if num_braces > _MAX_BRACES:
      raise ValueError(
        f"the answer must hold at most {_MAX_BRACES} JSON objects"
      )
    try:
      obj, position = decoder.raw_decode(text, start.start())
    except json.JSONDecodeError:
      position = start.end()  # a brace in a sentence
      continue
    except RecursionError as error:
      raise ValueError("the answer is nested too deep") from error
    bounded.check_levels(obj, bounded.MESSAGE_LIMITS)
    objects.append(obj)
  return objects


def _allowed_value(value: object, allowed: tuple) -> object:
  """Returns the allowed value that an answer equals; raises ValueError where there is none."""
  if isinstance(value, (str, int)) and not isinstance(value, bool):
    text = str(value).strip().lower()
    for answer in allowed:
      if text == str(answer):
        return answer
  raise ValueError(
    f"an answer must be one of {list(allowed)}; got {value!r:.40}"
  )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
  """Builds an object whose keys appear once; raises ValueError otherwise."""
  obj = dict(pairs)
  if len(obj) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"a key is there twice among {_shown(keys)}")
  return obj


def _shown(keys: Sequence[str]) -> list[str]:
  """Returns the first keys, cut short, for a message."""
  return [key[:_MAX_SHOWN] for key in keys[:20]]


def schema(keys: Sequence[str], allowed: tuple) -> dict:
  """Returns the JSON schema of the answers."""
  properties: dict[str, dict] = {key: {"enum": list(allowed)} for key in keys}
  # A verdict comes after its reason: the model then decides with the reason in view.
  if list(keys) == ["correct"]:
    properties = {"reason": {"type": "string"}} | properties
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }
