"""Asks a model about labelled images: the same questions about the same images for every model.

Questions about a model's own images compare badly: another model draws other images, of which more
are right. Labelled images are the same before and after training, and the right answers are
balanced. There are three forms:

- JUDGEMENT, R3's own: the reflection question. Does the model stop or edit?
- MATCH, ITA-style: does the image match the prompt?
- the kinds of the images' own questions, VQA-style.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

from etils import epath
import jax
import numpy as np

from r3jax.agent import experience
from r3jax.data import labelled_images
from r3jax.evaluation import chains
from r3jax.evaluation import console
from r3jax.evaluation import questions as questions_lib
from r3jax.files import jsonl
from r3jax.sequence import protocol
from r3jax.sequence import thoughts

JUDGEMENT = labelled_images.JUDGEMENT
MATCH = labelled_images.MATCH
# Answers of JUDGEMENT.
STOP = "stop"
EDIT = "edit"
_FILE = "labelled.jsonl"
# Beyond the numbers of questions about a model's own images, from which noise follows.
_FIRST_NUMBER = 1_000


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about a labelled image.

  Attributes:
    key: Name that is unique among the questions.
    image: Index of the image.
    kind: JUDGEMENT, MATCH, or a kind of the images' own questions.
    text: The question.
    expected: Word that is the right answer.
  """

  key: str
  image: int
  kind: str
  text: str
  expected: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What a model answered, a line of labelled.jsonl.

  Attributes:
    step: Iteration of the policy.
    key: Key of the question.
    image: Name of the image.
    tag: Tag of the image's prompt.
    prompt: Text of the image's prompt.
    kind: Kind of the question.
    question: Its text.
    expected: Word that is the right answer.
    answer: Word that the model answered, "" if there is none in its text.
    text: All that the model wrote.
  """

  step: int
  key: str
  image: str
  tag: str
  prompt: str
  kind: str
  question: str
  expected: str
  answer: str
  text: str

  @classmethod
  def from_json(cls, values: Mapping) -> "Answer":
    """Returns the answer of a line; raises TypeError where it is none."""
    answer = cls(**values)
    for name, value in values.items():
      if name != "step" and not isinstance(value, str):
        raise TypeError(f"{name} must be a text")
    return answer


def questions_about(
  images: Sequence[labelled_images.LabelledImage],
  match_question: Callable[[str], str],
) -> list[Question]:
  """Returns all questions about labelled images, kind by kind.

  Args:
    images: Labelled images.
    match_question: Writes the question whether an image matches a prompt.
  """
  by_kind = {JUDGEMENT: [], MATCH: []}
  for number, image in enumerate(images):
    key = f"{number:05d}"
    by_kind[JUDGEMENT].append(
      Question(
        key=f"{key}_{JUDGEMENT}",
        image=number,
        kind=JUDGEMENT,
        text=protocol.reflection_question(image.prompt),
        expected=STOP if image.matches else EDIT,
      )
    )
    by_kind[MATCH].append(
      Question(
        key=f"{key}_{MATCH}",
        image=number,
        kind=MATCH,
        text=match_question(image.prompt),
        expected="yes" if image.matches else "no",
      )
    )
    for index, question in enumerate(image.questions):
      by_kind.setdefault(question.kind, []).append(
        Question(
          key=f"{key}_{index}",
          image=number,
          kind=question.kind,
          text=question.text,
          expected=question.answer,
        )
      )
  questions = []
  for kind_questions in by_kind.values():
    questions += kind_questions
  return questions


@dataclasses.dataclass(frozen=True)
class Questionnaire:
  """Questions about labelled images, ready to be asked.

  Attributes:
    images: Labelled images.
    questions: All questions about them, in the order of asking.
    ids: Questions as segments, int32 [n, T].
    lengths: Their lengths, int32 [n].
    prompts: Prompts as token ids, at least one row; a batch has the shapes of theirs.
    sampler: Asks.
    decode: (ids [B, T], lengths [B]) -> texts.
  """

  images: Sequence[labelled_images.LabelledImage]
  questions: Sequence[Question]
  ids: np.ndarray
  lengths: np.ndarray
  prompts: experience.Prompts
  sampler: chains.Sampler
  decode: Callable[[np.ndarray, np.ndarray], list[str]]

  def ask(
    self,
    policy,
    towers,
    folder: epath.Path,
    step: int,
    complete: Mapping[str, Answer],
  ) -> list[Answer]:
    """Asks a policy the questions that it has not answered yet.

    Args:
      policy: Parameters on the sampler's mesh.
      towers: Frozen parameters on the same mesh.
      folder: Process 0 appends the answers to its labelled.jsonl, batch by batch.
      step: Iteration of the policy.
      complete: Answers that every process has read, by key.

    Returns:
      All answers, in the order of the questions.
    """
    answers = dict(complete)
    rows = []
    for number, question in enumerate(self.questions):
      if question.key not in answers:
        rows.append((number, question.image))
    progress = console.EvaluationProgress(
      len(self.questions), len(answers), "questions about labelled images"
    )
    for batch_rows, count in chains.batches(rows, self.sampler.batch_size):
      with progress.waiting_for_the_first():
        batch = self._ask_batch(policy, towers, batch_rows, step)[:count]
      answers.update({answer.key: answer for answer in batch})
      if jax.process_index() == 0:
        lines = [dataclasses.asdict(answer) for answer in batch]
        jsonl.append(folder / _FILE, lines)
      progress.add(count)
    return [answers[question.key] for question in self.questions]

  def _ask_batch(
    self, policy, towers, rows: np.ndarray, step: int
  ) -> list[Answer]:
    """Asks one batch; rows are indices of question and image, int32 [B, 2]."""
    numbers, image_numbers = rows.T
    padded = np.zeros(len(rows), np.int32)
    prompts = jax.tree.map(lambda leaf: leaf[padded], self.prompts)
    prompts = prompts.replace(
      question=self.ids[numbers],
      question_length=self.lengths[numbers],
      # The noise of an answer follows from the number of its question.
      index=numbers.astype(np.int32),
    )
    pixels = np.stack([self.images[i].pixels for i in image_numbers])
    reply = self.sampler.ask(
      policy, towers, prompts, padded, _FIRST_NUMBER, pixels
    )
    texts = self.decode(reply.ids, reply.lengths)
    return [
      self._answer(self.questions[number], text, step)
      for number, text in zip(numbers, texts, strict=True)
    ]

  def _answer(self, question: Question, text: str, step: int) -> Answer:
    """Returns what a text answers to a question."""
    image = self.images[question.image]
    if question.kind == JUDGEMENT:
      instruction = thoughts.edit_instruction(text)
      word = STOP if thoughts.says_stop(instruction) else EDIT
    else:
      word = questions_lib.answer_in(text)
    return Answer(
      step=step,
      key=question.key,
      image=image.name,
      tag=image.tag,
      prompt=image.prompt,
      kind=question.kind,
      question=question.text,
      expected=question.expected,
      answer=word,
      text=text,
    )


def read(folder: epath.Path) -> dict[str, Answer]:
  """Returns the answers of an evaluation by key; lines that are of no answer are left out."""
  answers = {}
  for line in jsonl.read(folder / _FILE):
    try:
      answer = Answer.from_json(line)
    except TypeError:
      continue
    answers[answer.key] = answer
  return answers


def drop_after(folder: epath.Path, step: int | None) -> None:
  """Drops the answers of iterations after `step`, or all if it is None."""
  jsonl.drop_after(folder / _FILE, step)


def path(folder: epath.Path) -> epath.Path:
  """Returns the file of an evaluation's answers, whose parts may take its place."""
  return folder / _FILE
