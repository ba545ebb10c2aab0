"""A vision-language model as judge, behind an OpenAI-compatible endpoint (vLLM and others).

One request an image, at temperature 0. Three tasks (R3.md section 10):
- "geneval_plus": does the image meet every expectation of the record, and is it one natural,
  photo-like picture? One verdict, {"correct": 0 | 1}.
- "tiif": the record's own yes/no questions; the score is the share of the questions *asked* that
  are answered as expected.
- "checklist": a question for every expectation of the record, all of them expected to be "yes".

The wording is our own; `prompt_file` takes a benchmark's official one. An answer that is not exactly
what was asked for is no verdict: the image is invalid, never wrong.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import string
import threading

from absl import logging
from etils import epath
import numpy as np

from r3jax.rewards import outcome
from r3jax.rewards.remote import client as client_lib
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import services

CHAT_PATH, MODELS_PATH = "/v1/chat/completions", "/v1/models"
_FIELDS = {"prompt", "expectations", "questions"}  # what a wording may insert

_VERDICT = """\
You check a generated image against its instruction and a list of expectations.

Instruction: $prompt
Expectations, all of which must hold:
$expectations

Look at every expectation by itself: the class of the objects, their exact number, their colour, the \
part of the frame they are in (region), their size compared with each other. The image must also be \
one natural, coherent picture that could be a photograph: a cartoon, drawing or sketch, a collage, \
several panels, writing that stands for an object, or impossible objects fail. If in doubt, it fails.

Answer with a JSON object and nothing else: {"reason": one short sentence, "correct": 1 if everything \
holds and 0 otherwise}."""

_QUESTIONS = """\
You answer questions about an image. Go by what can be seen in it, not by what is likely.

$questions

Answer with a JSON object and nothing else: each question's number, as text, is a key, and its value is \
"yes" or "no". All questions must be answered."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is asked, and of whom.

  Attributes:
    task: "geneval_plus", "tiif" or "checklist".
    model: name on the server; empty takes the only one that it serves.
    prompt_file: file with another wording; $prompt, $expectations and $questions are filled in.
    max_tokens: of an answer.
    image_format: "jpeg" or "png".
  """

  task: str
  model: str = ""
  prompt_file: str = ""
  max_tokens: int = 4096
  image_format: str = "jpeg"

  def __post_init__(self):
    if self.task not in _TASKS:
      raise ValueError(
        f"reward.judge.task must be one of {sorted(_TASKS)}; got {self.task!r}"
      )
    if self.max_tokens < 1:
      raise ValueError(
        f"reward.judge.max_tokens must be at least 1; got {self.max_tokens}"
      )
    if self.image_format not in protocol.FORMATS:
      raise ValueError(
        f"reward.judge.image_format must be one of {list(protocol.FORMATS)}; got {self.image_format!r}"
      )

  @property
  def wording(self) -> string.Template:
    """What the judge is told.

    Raises:
      ValueError: the file cannot be read, inserts something unknown, or does not tell what to judge.
    """
    if not self.prompt_file:
      return string.Template(_TASKS[self.task].wording)
    try:
      template = string.Template(epath.Path(self.prompt_file).read_text())
    except OSError as error:
      raise ValueError(
        f"reward.judge.prompt_file must be readable: {error}"
      ) from error
    names = (
      set(template.get_identifiers())
      if template.is_valid()
      else {"an invalid $"}
    )
    needed = _TASKS[self.task].needed
    if names - _FIELDS or not names & needed:
      raise ValueError(
        f"{self.prompt_file} must insert ${' or $'.join(sorted(needed))}, and may insert {sorted(_FIELDS)}; "
        f"it has {sorted(names)}"
      )
    return template


@dataclasses.dataclass(frozen=True)
class Question:
  """One thing that the judge is asked.

  Attributes:
    key: of the answer in the judge's JSON.
    text: the question; empty where the wording says it all.
    expected: the answer of a right image.
  """

  key: str
  text: str
  expected: object


@dataclasses.dataclass(frozen=True)
class _Task:
  """How a kind of judgement is asked for and read.

  Attributes:
    wording: template of the instruction.
    questions: what is asked about a record; raises ValueError where the record has nothing to ask.
    answers: the allowed values of an answer, "yes" first, "no" second.
    needed: fields of which a wording must insert one, or the judge would not know what it is asked.
  """

  wording: str
  questions: Callable[[dict], list[Question]]
  answers: tuple
  needed: frozenset[str]


def _verdict_questions(record: dict) -> list[Question]:
  _expectations(record)  # there must be some
  return [Question("correct", "", 1)]


def _tiif_questions(record: dict) -> list[Question]:
  if not record.get("questions"):
    raise ValueError(
      f"the task tiif needs records with questions; got {sorted(record)}"
    )
  return [
    Question(str(i), text, answer)
    for i, (text, answer) in enumerate(record["questions"], 1)
  ]


def _checklist_questions(record: dict) -> list[Question]:
  return [
    Question(str(i), f"Does the image show {text}?", "yes")
    for i, text in enumerate(_expectations(record), 1)
  ]


def _expectations(record: dict) -> list[str]:
  """Returns a phrase for every include item, "exactly 2 red clocks on the left".

  Raises:
    ValueError: the record has none.
  """
  if not record.get("include"):
    raise ValueError(
      f"a judge of expectations needs records with include items; got {sorted(record)}"
    )
  return [_phrase(item, record["include"]) for item in record["include"]]


def _phrase(item: dict, others: Sequence[dict]) -> str:
  # "2 x clock" needs no plural, which naive rules get wrong.
  words = [item.get("size"), item.get("color"), item["class"]]
  text = f"exactly {item['count']} x {' '.join(word for word in words if word)}"
  if "region" in item:
    text += {"above": " in the upper part", "below": " in the lower part"}.get(
      item["region"], f" on the {item['region']} side"
    ) + " of the frame"
  if "position" in item:
    relation, other = item["position"]
    text += f" {relation} the {others[other]['class']}"
  return text


_ASKED = frozenset(["questions"])
_TASKS = {
  "geneval_plus": _Task(
    _VERDICT, _verdict_questions, (1, 0), frozenset(["expectations", "prompt"])
  ),
  "tiif": _Task(_QUESTIONS, _tiif_questions, ("yes", "no"), _ASKED),
  "checklist": _Task(_QUESTIONS, _checklist_questions, ("yes", "no"), _ASKED),
}


class Judge:
  """Scores images by asking a vision-language model."""

  parts = ("strict",)

  def __init__(self, client: client_lib.Client, settings: Settings):
    """Asks the server for its models, and whether it can be held to a JSON schema.

    Raises:
      ValueError: no server answers, it does not serve the model, or the wording cannot be used.
    """
    self._client, self._settings, self._task = (
      client,
      settings,
      _TASKS[settings.task],
    )
    self._wording = settings.wording
    self._model = self._find_model()
    self._structured = self._takes_schema()
    self._lock = threading.Lock()
    self._tally = _Tally()

  def _find_model(self) -> str:
    served = services.survey(self._client, MODELS_PATH, _read_models)["models"]
    wanted = self._settings.model or (served[0] if len(served) == 1 else "")
    if wanted not in served:
      raise ValueError(
        f"reward.judge.model must be one that the server has, {served}; got {self._settings.model!r}"
      )
    return wanted

  def _takes_schema(self) -> bool:
    """Tells whether the server accepts response_format; one that refuses it is asked without."""
    try:
      self._probe(structured=True)
      return True
    except client_lib.RequestFailed as error:
      if not error.refused:
        raise ValueError(
          f"the judge must answer a first question before a run starts: {error}"
        ) from error
    try:
      self._probe(structured=False)
    except client_lib.RequestFailed as error:
      raise ValueError(
        f"the judge must answer a first question before a run starts: {error}"
      ) from error
    logging.warning(
      "the judge's server refuses response_format; asking without it"
    )
    return False

  def _probe(self, structured: bool):
    """Asks a question without an image; raises client.RequestFailed."""
    question = [{"type": "text", "text": 'Answer {"correct": 1}.'}]
    body = self._body(
      question, [Question("correct", "", 1)], (1, 0), structured
    )
    self._client.post(CHAT_PATH, body, "application/json", _read_content)

  def check(self, record: dict):
    """See `base.HostReward`."""
    self._task.questions(record)

  def score(
    self, images: np.ndarray, records: Sequence[dict]
  ) -> list[outcome.Outcome]:
    """See `base.HostReward`."""
    return self._client.map(
      lambda pair: self._score_one(*pair),
      list(zip(images, records, strict=True)),
    )

  def _score_one(self, image: np.ndarray, record: dict) -> outcome.Outcome:
    questions = self._task.questions(record)
    body = self._body(
      self._content(image, record, questions),
      questions,
      self._task.answers,
      self._structured,
    )
    try:
      answer = self._client.post(
        CHAT_PATH, body, "application/json", _read_content
      )
    except client_lib.RequestFailed as error:
      return outcome.Failed(str(error))
    try:
      given = read_answers(answer, questions, self._task.answers)
    except ValueError as error:
      return outcome.Invalid(
        f"no verdict: {error}; the judge said {answer[:2000]!r}"
      )
    right = [given[question.key] == question.expected for question in questions]
    with self._lock:
      self._tally.add(questions, given, self._task.answers)
    return outcome.Ok(
      float(np.mean(right)), {"strict": float(all(right))}, {"answer": answer}
    )

  def _content(
    self, image: np.ndarray, record: dict, questions: Sequence[Question]
  ) -> list[dict]:
    kind = self._settings.image_format
    file = base64.b64encode(protocol.encode_image(image, kind)).decode()
    text = self._wording.substitute(
      prompt=record["prompt"],
      expectations="\n".join(f"- {text}" for text in _expectations(record))
      if record.get("include")
      else "",
      questions="\n".join(
        f"{question.key}. {question.text}" for question in questions
      ),
    )
    return [
      {
        "type": "image_url",
        "image_url": {"url": f"data:image/{kind};base64,{file}"},
      },
      {"type": "text", "text": text},
    ]

  def _body(
    self,
    content: list[dict],
    questions: Sequence[Question],
    answers: tuple,
    structured: bool,
  ) -> bytes:
    message = {
      "model": self._model,
      "temperature": 0,
      "max_tokens": self._settings.max_tokens,
      "messages": [{"role": "user", "content": content}],
    }
    if structured:
      schema = {
        "name": "answers",
        "schema": _schema([question.key for question in questions], answers),
      }
      message["response_format"] = {
        "type": "json_schema",
        "json_schema": schema,
      }
    return json.dumps(message).encode()

  def describe(self) -> dict:
    """See `base.HostReward`."""
    wording = hashlib.sha256(self._wording.template.encode()).hexdigest()
    found = {
      "judge": self._model,
      "wording_sha256": wording,
      "structured": self._structured,
    }
    return found | dataclasses.asdict(self._settings)

  def metrics(self) -> dict[str, float]:
    """See `base.HostReward`; adds how the judge answered, see `_Tally`."""
    with self._lock:
      tally, self._tally = self._tally, _Tally()
    return self._client.metrics() | tally.metrics()


class _Tally:
  """How a judge answers: one that always says the same is right where that is what was expected.

  yes_rate: share of "yes" answers (of verdicts: "correct"). always_yes, always_no: share of images
  whose answers are all so. right_on_yes, right_on_no: share of right answers among the questions
  whose expected answer is yes, no. Missing where there were none.
  """

  def __init__(self):
    self._shares: dict[str, list[bool]] = {}

  def add(
    self,
    questions: Sequence[Question],
    given: Mapping[str, object],
    answers: tuple,
  ):
    yes, no = answers
    said = [given[question.key] for question in questions]
    note = lambda name, values: self._shares.setdefault(name, []).extend(values)
    note("yes_rate", [answer == yes for answer in said])
    note("always_yes", [all(answer == yes for answer in said)])
    note("always_no", [all(answer == no for answer in said)])
    for name, expected in (("right_on_yes", yes), ("right_on_no", no)):
      note(
        name,
        [given[q.key] == expected for q in questions if q.expected == expected],
      )

  def metrics(self) -> dict[str, float]:
    return {
      name: float(np.mean(values))
      for name, values in self._shares.items()
      if values
    }


def read_answers(
  text: str, questions: Sequence[Question], answers: tuple
) -> dict[str, object]:
  """Returns the answers by key.

  A JSON object must be all that the judge says, but for a thought that ends in </think> before it and
  a code fence around it. Answers are compared without case; 0 and 1 may be given as text.

  Raises:
    ValueError: it is something else, a key is missing or twice there, or an answer is not allowed.
  """
  inner = text.rpartition("</think>")[2].strip()
  if inner.startswith("```") and inner.endswith("```"):
    inner = inner[3:-3].removeprefix("json")
  try:
    found = json.loads(inner, object_pairs_hook=_unique)
  except RecursionError as error:
    raise ValueError("the answer is nested too deep") from error
  if not isinstance(found, dict):
    raise ValueError(
      f"the answer must be a JSON object, not a {type(found).__name__}"
    )
  keys = {question.key for question in questions}
  extra = set(found) - keys - {"reason"}
  if keys - set(found) or extra:
    raise ValueError(
      f"answers must be for {sorted(keys)}; missing {sorted(keys - set(found))}, extra {sorted(extra)}"
    )
  return {key: _allowed(found[key], answers) for key in keys}


def _allowed(value: object, answers: tuple) -> object:
  said = (
    str(value).strip().lower()
    if isinstance(value, (str, int)) and not isinstance(value, bool)
    else None
  )
  for answer in answers:
    if said == str(answer):
      return answer
  raise ValueError(
    f"an answer must be one of {list(answers)}; got {value!r:.40}"
  )


def _unique(pairs: list[tuple[str, object]]) -> dict:
  if len({key for key, _ in pairs}) < len(pairs):
    raise ValueError(
      f"a key is there twice among {[key for key, _ in pairs][:20]}"
    )
  return dict(pairs)


def _schema(keys: Sequence[str], answers: tuple) -> dict:
  properties = {key: {"enum": list(answers)} for key in keys}
  if list(keys) == ["correct"]:
    properties = {"reason": {"type": "string"}} | properties
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }


def _read_models(body: bytes) -> dict:
  try:
    data = protocol.parse_object(body).get("data")
  except protocol.ProtocolError as error:
    raise client_lib.BadReply(str(error)) from error
  if not isinstance(data, list) or not all(
    isinstance(one, dict) and isinstance(one.get("id"), str) for one in data
  ):
    raise client_lib.BadReply("it must list models as data: [{id}, ...]")
  return {"models": sorted(one["id"] for one in data)}


def _read_content(body: bytes) -> str:
  """Returns the text of a chat completion.

  Raises:
    client.BadReply: it is none.
  """
  try:
    choices = protocol.parse_object(body).get("choices")
  except protocol.ProtocolError as error:
    raise client_lib.BadReply(str(error)) from error
  choice = choices[0] if isinstance(choices, list) and choices else None
  message = choice.get("message") if isinstance(choice, dict) else None
  content = message.get("content") if isinstance(message, dict) else None
  if not isinstance(content, str):
    raise client_lib.BadReply("it must hold choices[0].message.content as text")
  return content
