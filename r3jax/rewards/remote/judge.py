"""A vision-language model as judge, behind an OpenAI-compatible endpoint (vLLM and others).

One request an image, at temperature 0. Three tasks (docs/algorithm.md#rewards):
- "geneval_plus": does the image meet every expectation of the prompt, and is it one natural,
  photo-like picture? One verdict, {"correct": 0 | 1}.
- "tiif": the prompt's own yes/no questions; the score is the share of the questions that are
  answered as expected.
- "checklist": a question for every expectation of the prompt, all of them expected to be "yes".

The wording is our own; `prompt_file` replaces it by a benchmark's official one, `system_file` adds
a system message, and both may differ in evaluation. Answers are read by key. Where they cannot be
read, where the judge refuses, says nothing or runs out of tokens, there is no verdict: the image
is invalid, never wrong, and the judge is not asked again.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import string
import threading

from absl import logging
import numpy as np

from r3jax.data import records
from r3jax.files import paths
from r3jax.files import texts
from r3jax.rewards import outcome
from r3jax.rewards.remote import chat
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import services

CHAT_PATH = "/v1/chat/completions"
MODELS_PATH = "/v1/models"
# The keys of `reward.judge` that name files. What is in them is part of a judge's identity, and
# where they lie is not.
FILES = (
  "prompt_file",
  "system_file",
  "eval_prompt_file",
  "eval_system_file",
)
# The fields that a wording may insert.
_FIELDS = {"prompt", "expectations", "questions"}
# Characters of a judge's answer that a reason for the log holds.
_MAX_SHOWN_ANSWER = 1000
# Codes of errors by which a server refuses what an image or a prompt shows.
_REFUSED_CONTENT = ("content_filter", "content_policy_violation")

_VERDICT = """\
You check a generated image against its instruction and a list of expectations.

Instruction: $prompt
Expectations, all of which must hold:
$expectations

Look at every expectation by itself: the class of the objects, their exact number, their colour, \
the part of the frame they are in (region), their size compared with each other. The image must \
also be one natural, coherent picture that could be a photograph: a cartoon, drawing or sketch, \
a collage, several panels, writing that stands for an object, or impossible objects fail. If in \
doubt, it fails.

Answer with a JSON object and nothing else: {"reason": one short sentence, "correct": 1 if \
everything holds and 0 otherwise}."""

_QUESTIONS = """\
You answer questions about an image. Go by what can be seen in it, not by what is likely.

$questions

Answer with a JSON object and nothing else: each question's number, as text, is a key, and its \
value is "yes" or "no". All questions must be answered."""


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """The judge and its task: the config's `reward.judge`.

  Attributes:
    task: "geneval_plus", "tiif" or "checklist".
    model: name of the model on the server; "" takes the only one that it serves.
    prompt_file: file with another wording; $prompt, $expectations and $questions are filled in.
    system_file: file with a system message, sent as it is; "" sends none.
    eval_prompt_file: file with the wording of evaluations; "" takes that of training.
    eval_system_file: file with the system message of evaluations; "" takes that of training.
    max_tokens: the longest answer.
    image_format: "jpeg" or "png".
  """

  task: str
  model: str
  prompt_file: str
  system_file: str
  eval_prompt_file: str
  eval_system_file: str
  max_tokens: int
  image_format: str

  def __post_init__(self):
    if self.task not in _TASKS:
      raise ValueError(
        f"reward.judge.task must be one of {sorted(_TASKS)}; got {self.task!r}"
      )
    if self.max_tokens < 1:
      raise ValueError(
        f"reward.judge.max_tokens must be at least 1; got {self.max_tokens}"
      )
    protocol.check_format("reward.judge.image_format", self.image_format)

  def for_evaluation(self) -> "JudgeSettings":
    """Returns the settings with the wordings of evaluations in place of those of training."""
    return dataclasses.replace(
      self,
      prompt_file=self.eval_prompt_file or self.prompt_file,
      system_file=self.eval_system_file or self.system_file,
      eval_prompt_file="",
      eval_system_file="",
    )

  def read_system_message(self) -> str:
    """Returns the system message; "" without one.

    Raises:
      ValueError: the file cannot be read.
    """
    if not self.system_file:
      return ""
    return _read_text("reward.judge.system_file", self.system_file)

  def read_wording(self) -> string.Template:
    """Returns the template of the instruction.

    Raises:
      ValueError: the file cannot be read, inserts an unknown field, or does not say what to judge.
    """
    task = _TASKS[self.task]
    if not self.prompt_file:
      return string.Template(task.wording)
    text = _read_text("reward.judge.prompt_file", self.prompt_file)
    template = string.Template(text)
    names = {"an invalid $"}
    if template.is_valid():
      names = set(template.get_identifiers())
    if names - _FIELDS or not names & task.needed_fields:
      raise ValueError(
        f"{self.prompt_file} must insert ${' or $'.join(sorted(task.needed_fields))}, and may "
        f"insert {sorted(_FIELDS)}; it has {sorted(names)}"
      )
    return template


def _read_text(key: str, path: str) -> str:
  """Returns the text of a file that a config key names; raises ValueError where it has none."""
  try:
    return texts.read(path)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{key} must be readable text: {error}{paths.did_you_mean(path)}"
    ) from error


@dataclasses.dataclass(frozen=True)
class Question:
  """A question to the judge.

  Attributes:
    key: the key of its answer in the judge's JSON.
    text: the question; "" where the wording says everything.
    expected: the answer of a right image.
  """

  key: str
  text: str
  expected: object


@dataclasses.dataclass(frozen=True)
class _Task:
  """A kind of judgement.

  Attributes:
    wording: template of the instruction.
    questions: returns the questions about a prompt's image; raises ValueError where there are none.
    answers: the allowed values of an answer, "yes" first, "no" second.
    needed_fields: the fields of which a wording must insert one, so that the judge knows its task.
  """

  wording: str
  questions: Callable[[records.Prompt], list[Question]]
  answers: tuple
  needed_fields: frozenset[str]


def _verdict_questions(prompt: records.Prompt) -> list[Question]:
  """Returns the one question whether everything is right."""
  _expectations(prompt)  # raises an error where there are none
  return [Question("correct", "", 1)]


def _tiif_questions(prompt: records.Prompt) -> list[Question]:
  """Returns the prompt's own questions."""
  if not prompt.questions:
    raise ValueError(
      f"the task tiif needs prompts with questions; {prompt.text!r} has none"
    )
  return [
    Question(str(number), question.text, question.answer)
    for number, question in enumerate(prompt.questions, start=1)
  ]


def _checklist_questions(prompt: records.Prompt) -> list[Question]:
  """Returns a question for every expectation."""
  return [
    Question(str(number), f"Does the image show {phrase}?", "yes")
    for number, phrase in enumerate(_expectations(prompt), start=1)
  ]


def _expectations(prompt: records.Prompt) -> list[str]:
  """Returns a phrase for every include item, "exactly 2 x red clock on the left side ...".

  Raises:
    ValueError: the prompt has none.
  """
  if not prompt.include:
    raise ValueError(
      f"a judge of expectations needs prompts with include items; {prompt.text!r} has none"
    )
  return [_phrase(item, prompt.include) for item in prompt.include]


def _phrase(
  item: records.Expectation, others: Sequence[records.Expectation]
) -> str:
  """Returns an include item in words."""
  # "2 x clock" needs no plural, which naive rules get wrong.
  words = [item.size, item.color, item.class_name]
  text = f"exactly {item.count} x {' '.join(word for word in words if word)}"
  if item.region == "above":
    text += " in the upper part of the frame"
  elif item.region == "below":
    text += " in the lower part of the frame"
  elif item.region is not None:
    text += f" on the {item.region} side of the frame"
  if item.position is not None:
    relation, other = item.position
    text += f" {relation} the {others[other].class_name}"
  return text


_TASKS = {
  "geneval_plus": _Task(
    wording=_VERDICT,
    questions=_verdict_questions,
    answers=(1, 0),
    needed_fields=frozenset(["expectations", "prompt"]),
  ),
  "tiif": _Task(
    wording=_QUESTIONS,
    questions=_tiif_questions,
    answers=("yes", "no"),
    needed_fields=frozenset(["questions"]),
  ),
  "checklist": _Task(
    wording=_QUESTIONS,
    questions=_checklist_questions,
    answers=("yes", "no"),
    needed_fields=frozenset(["questions"]),
  ),
}


class Judge:
  """Scores images by asking a vision-language model."""

  parts = ("strict",)

  def __init__(
    self,
    client: http_client.Client,
    settings: JudgeSettings,
    image_size: tuple[int, int],
  ):
    """Asks the server for its models, and a first question about an image.

    Args:
      client: knows the endpoints.
      settings: the judge and its task.
      image_size: height and width of the run's images, which the first image has too.

    Raises:
      ValueError: no server answers, it does not serve the model, it refuses images, its first
        answer gives no verdict, or a wording cannot be used.
    """
    self._client = client
    self._settings = settings
    self._task = _TASKS[settings.task]
    self._wording = settings.read_wording()
    self._system_message = settings.read_system_message()
    self._model = self._find_model()
    self._structured = self._accepts_schema(image_size)
    self._lock = threading.Lock()
    self._tally = _Tally()

  def _find_model(self) -> str:
    """Returns the name of the model to ask."""
    served = services.survey(self._client, MODELS_PATH, chat.read_models)
    return services.choose("reward.judge.model", self._settings.model, served)

  def _accepts_schema(self, image_size: tuple[int, int]) -> bool:
    """Returns whether the server accepts response_format; otherwise requests leave it out.

    Raises:
      ValueError: the server does not answer a question about an image in either form.
    """
    try:
      self._probe(image_size, structured=True)
      return True
    except http_client.RequestFailed as error:
      refusal = error
      if not error.refused:
        raise _no_first_answer(str(error)) from error
    try:
      self._probe(image_size, structured=False)
    except http_client.RequestFailed as error:
      raise _no_first_answer(str(error)) from error
    logging.warning(
      "the judge's server refuses response_format; asking without it: %s",
      refusal,
    )
    return False

  def _probe(self, image_size: tuple[int, int], structured: bool) -> None:
    """Asks about a grey image.

    Raises:
      http_client.RequestFailed: the server does not answer.
      ValueError: the answer gives no verdict.
    """
    image = np.full((*image_size, 3), 128, np.uint8)
    text = 'This is a first question. Answer {"correct": 1}.'
    question = Question("correct", "", 1)
    body = self._body(
      self._content(image, text), [question], (1, 0), structured
    )
    verdict = self._answers(self._ask(body), [question], (1, 0))
    if isinstance(verdict, outcome.Invalid):
      raise _no_first_answer(verdict.reason)

  def _answers(
    self,
    completion: chat.Completion,
    questions: Sequence[Question],
    allowed: tuple,
  ) -> dict | outcome.Invalid:
    """Returns the answers that a completion gives, by key of the question."""
    keys = [question.key for question in questions]
    problem = completion.missing_answer(self._settings.max_tokens)
    if not problem:
      try:
        return chat.read_answers(completion.text, keys, allowed)
      except ValueError as error:
        problem = str(error)
    excerpt = completion.text[:_MAX_SHOWN_ANSWER]
    return outcome.Invalid(f"no verdict: {problem}; the judge said {excerpt!r}")

  def _ask(self, body: bytes) -> chat.Completion:
    """Sends a request; raises http_client.RequestFailed."""
    return self._client.post(
      CHAT_PATH, body, "application/json", chat.read_completion
    )

  def check(self, prompt: records.Prompt) -> None:
    """Checks that there is something to ask about a prompt, see `outcome.HostReward`."""
    self._task.questions(prompt)

  def score(
    self, images: np.ndarray, prompts: Sequence[records.Prompt]
  ) -> list[outcome.Outcome]:
    """Scores images, one request each, see `outcome.HostReward`."""

    def score_pair(pair: tuple[np.ndarray, records.Prompt]) -> outcome.Outcome:
      return self._score_image(*pair)

    pairs = list(zip(images, prompts, strict=True))
    return self._client.map(score_pair, pairs)

  def _score_image(
    self, image: np.ndarray, prompt: records.Prompt
  ) -> outcome.Outcome:
    questions = self._task.questions(prompt)
    body = self._body(
      self._content(image, self._instruction(prompt, questions)),
      questions,
      self._task.answers,
      self._structured,
    )
    try:
      completion = self._ask(body)
    except http_client.RequestFailed as error:
      if error.code in _REFUSED_CONTENT:
        return outcome.Invalid(f"no verdict: the judge refuses: {error}")
      return outcome.Failed(str(error))
    answers = self._answers(completion, questions, self._task.answers)
    if isinstance(answers, outcome.Invalid):
      return answers
    # Requests run in several threads.
    with self._lock:
      self._tally.add(questions, answers, self._task.answers)
    right = [
      answers[question.key] == question.expected for question in questions
    ]
    return outcome.Ok(
      score=float(np.mean(right)),
      parts={"strict": float(all(right))},
      detail={"answer": completion.text},
    )

  def _instruction(
    self, prompt: records.Prompt, questions: Sequence[Question]
  ) -> str:
    """Returns the text that goes with an image."""
    expectations = _expectations(prompt) if prompt.include else []
    return self._wording.substitute(
      prompt=prompt.text,
      expectations="\n".join(f"- {phrase}" for phrase in expectations),
      questions="\n".join(
        f"{question.key}. {question.text}" for question in questions
      ),
    )

  def _content(self, image: np.ndarray, text: str) -> list[dict]:
    """Returns an image and a text as the content of a chat message."""
    kind = self._settings.image_format
    url = f"data:image/{kind};base64,{protocol.encode_base64(image, kind)}"
    return [
      {"type": "image_url", "image_url": {"url": url}},
      {"type": "text", "text": text},
    ]

  def _body(
    self,
    content: list[dict],
    questions: Sequence[Question],
    answers: tuple,
    structured: bool,
  ) -> bytes:
    """Returns the body of a request."""
    messages: list[dict] = [{"role": "user", "content": content}]
    if self._system_message:
      messages.insert(0, {"role": "system", "content": self._system_message})
    message = {
      "model": self._model,
      "temperature": 0,
      "max_tokens": self._settings.max_tokens,
      "messages": messages,
    }
    if structured:
      keys = [question.key for question in questions]
      message["response_format"] = {
        "type": "json_schema",
        "json_schema": {
          "name": "answers",
          "schema": chat.schema(keys, answers),
        },
      }
    return json.dumps(message).encode()

  def describe(self) -> dict:
    """Returns the model, hashes of the wordings and the settings, see `outcome.HostReward`."""
    settings = dataclasses.asdict(self._settings)
    for name in FILES:
      del settings[name]
    identity = {
      "judge": self._model,
      "wording_sha256": sha256(self._wording.template),
      "system_message_sha256": sha256(self._system_message),
      "structured": self._structured,
    }
    return identity | settings

  def metrics(self) -> dict[str, float]:
    """Returns the client's metrics, and how the judge answered, see `_Tally`."""
    with self._lock:
      tally = self._tally
      self._tally = _Tally()
    return self._client.metrics() | tally.metrics()


def sha256(text: str) -> str:
  """Returns the hash of a text that stands for it in identities, in hex digits."""
  return hashlib.sha256(text.encode()).hexdigest()


def _no_first_answer(reason: str) -> ValueError:
  return ValueError(
    "the judge must answer a first question, which shows an image, before a run starts: "
    f"{reason}"
  )


class _Tally:
  """How a judge answers: one that always says the same is right where that is what was expected.

  yes_rate: share of "yes" answers (of verdicts: "correct"). always_yes, always_no: share of images
  whose answers are all so. right_on_yes, right_on_no: share of right answers among the questions
  whose expected answer is yes, no. A share is missing where there was nothing to count.
  """

  def __init__(self):
    self._values: dict[str, list[bool]] = {}

  def add(
    self,
    questions: Sequence[Question],
    answers: Mapping[str, object],
    allowed: tuple,
  ) -> None:
    """Adds the answers about one image."""
    yes, no = allowed
    said_yes = [answers[question.key] == yes for question in questions]
    self._extend("yes_rate", said_yes)
    self._extend("always_yes", [all(said_yes)])
    self._extend("always_no", [not any(said_yes)])
    for name, expected in (("right_on_yes", yes), ("right_on_no", no)):
      right = [
        answers[question.key] == expected
        for question in questions
        if question.expected == expected
      ]
      self._extend(name, right)

  def _extend(self, name: str, values: list[bool]) -> None:
    self._values.setdefault(name, []).extend(values)

  def metrics(self) -> dict[str, float]:
    """Returns the shares by name."""
    return {
      name: float(np.mean(values))
      for name, values in self._values.items()
      if values
    }
