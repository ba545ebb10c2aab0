"""Evaluates a policy on the held-out prompts into a folder; continues an interrupted evaluation."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

from r3jax.agent import experience
from r3jax.data import records
from r3jax.evaluation import chains
from r3jax.evaluation import console
from r3jax.evaluation import labelled_questions
from r3jax.evaluation import questions
from r3jax.evaluation import reasons
from r3jax.evaluation import sample_log
from r3jax.evaluation import summary as summary_lib
from r3jax.files import atomic
from r3jax.files import config_guard
from r3jax.files import damage
from r3jax.parallel import multihost
from r3jax.rewards import outcome
from r3jax.sequence import thoughts

SETTINGS = "settings.json"
SUMMARY = "summary.json"
# Keys of the settings that do not change a result: hashes of prompts and images stand for them.
MAY_DIFFER = ("heldout.source", "labelled.source")
_LAST_STEP = 2**31  # after every iteration
# Follows the kind of a question about the last image of a chain.
LAST_IMAGE = ", last image"
# Beyond the numbers of questions about drafts, from which noise follows.
_FIRST_ABOUT_LAST = 500
# What judges and rewards write: NAME.json, NAME.md, NAME.PROCESS.jsonl or a folder of its parts.
_OWN_FILE = re.compile(r"[\w-][\w.-]*\.(json|md|\d+\.jsonl(\.parts)?)")

Boxes = Callable[[np.ndarray], list[list[dict]]]


def key_of(prompt_index: int, image_index: int) -> str:
  """Returns the key of a sample by the indices of its prompt and image."""
  return f"{prompt_index:05d}_{image_index:02d}"


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rounds of one batch of chains, in numpy; rows of padding are included.

  Attributes:
    step: Iteration of the policy.
    rows: Indices of prompt and image, int32 [B, 2].
    records: Data of the prompts, one per row.
    rounds: One per image of a chain.
    questions: Questions about drafts and last images by kind, None where the image gives none.
    answers: Texts that answer them, by kind.
  """

  step: int
  rows: np.ndarray
  records: Sequence[records.Prompt]
  rounds: Sequence[chains.TimedRound]
  questions: Mapping[str, Sequence[questions.Question | None]]
  answers: Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluation of policies on held-out prompts.

  Attributes:
    sampler: Draws and scores chains of images.
    records: Data of the prompts.
    prompts: The same prompts as token ids, one row per record.
    images_per_prompt: Chains per prompt.
    questionnaire: Asks about drafts and last images.
    segments: (texts, capacity) -> ids and lengths of text segments.
    decode: (ids [B, T], lengths [B]) -> texts.
    boxes: Objects that the verifier recognizes in images; None if the reward cannot say.
    flush: Called after every batch, on every process: writes the reward's log, raises its errors.
    flops: Operations of a draft and of a revision of one image, with texts at their longest.
    settings: JSON values of all that the results depend on, except the policy.
    labelled: Asks about labelled images; None asks about none.
  """

  sampler: chains.Sampler
  records: Sequence[records.Prompt]
  prompts: experience.Prompts
  images_per_prompt: int
  questionnaire: questions.Questionnaire
  segments: Callable
  decode: Callable[[np.ndarray, np.ndarray], list[str]]
  boxes: Boxes | None
  flush: Callable[[], None]
  flops: tuple[float, float]
  settings: dict
  labelled: labelled_questions.Questionnaire | None = None

  def rows(self) -> dict[str, tuple[int, int]]:
    """Returns the indices of prompt and image of every sample, by key."""
    rows = {}
    for prompt_index in range(len(self.records)):
      for image_index in range(self.images_per_prompt):
        row = (prompt_index, image_index)
        rows[key_of(*row)] = row
    return rows

  def run(
    self, policy, towers, folder: epath.Path, step: int
  ) -> list[sample_log.Sample]:
    """Evaluates a policy on every prompt.

    Samples that are in the folder with all their scores are not drawn again if they were drawn with
    the same settings.

    Args:
      policy: Parameters on the sampler's mesh.
      towers: Frozen parameters on the same mesh.
      folder: Gets samples.jsonl and images/.
      step: Iteration of the policy, which the samples record.

    Returns:
      All samples, prompt by prompt.
    """
    rows = self.rows()
    previous = self.read(folder)
    if jax.process_index() == 0:
      self._open(folder, keep=bool(previous))

    # A sample that lacks a score is drawn again: its reward may have failed.
    complete = {
      key: sample for key, sample in previous.items() if _is_scored(sample)
    }
    read_by_all = _read_by_all(complete)
    remaining = [row for key, row in rows.items() if key not in read_by_all]
    self._announce(len(rows), len(remaining), step)
    done = len(rows) - len(remaining)
    progress = console.EvaluationProgress(len(rows), done)
    for batch_rows, count in chains.batches(remaining, self.sampler.batch_size):
      with progress.waiting_for_the_first():
        batch = self._draw(policy, towers, batch_rows, count, step)
      # First, so that no sample is stored without its reward's log, or in spite of its error.
      self.flush()
      samples, images = self.samples_of(batch, count)
      complete.update({sample.key: sample for sample in samples})
      if jax.process_index() == 0:
        sample_log.append(folder, samples, images)
      progress.add(count)
    return [complete[key] for key in rows]

  def ask_labelled(
    self, policy, towers, folder: epath.Path, step: int
  ) -> list[labelled_questions.Answer]:
    """Asks a policy about labelled images, after `run`; answers in the folder are not asked again.

    For the arguments see `run`.

    Returns:
      All answers, in the order of the questions; none without labelled images.
    """
    if self.labelled is None:
      return []
    previous = labelled_questions.read(folder)
    read_by_all = _read_by_all(previous)
    complete = {key: previous[key] for key in previous if key in read_by_all}
    return self.labelled.ask(policy, towers, folder, step, complete)

  def finished_labelled(
    self, folder: epath.Path
  ) -> list[labelled_questions.Answer] | None:
    """Returns the answers about labelled images that a finished evaluation has.

    Every process must call it at the same point; all return answers, or None if one is missing.
    """
    if self.labelled is None:
      return []
    answers = labelled_questions.read(folder)
    keys = [question.key for question in self.labelled.questions]
    if not _read_by_all(answers) >= set(keys):
      return None
    return [answers[key] for key in keys]

  def _announce(self, num_rows: int, num_remaining: int, step: int) -> None:
    """Logs what is about to be evaluated; only process 0 does."""
    if jax.process_index() or not num_remaining:
      return
    kept = num_rows - num_remaining
    logging.info(
      "evaluating iteration %d: %d samples of %d prompts, up to %d rounds each, %d at a time%s",
      step,
      num_remaining,
      len(self.records),
      self.sampler.rounds,
      self.sampler.batch_size,
      f"; {kept} are there already" if kept else "",
    )

  def read(self, folder: epath.Path) -> dict[str, sample_log.Sample]:
    """Returns the latest sample of every key in a folder, none if the settings differ."""
    path = folder / SETTINGS
    settings = _read_or_none(
      path, "the settings of an evaluation", "All samples are drawn again", dict
    )
    if settings is None:
      return {}
    if not config_guard.agree(settings, self.settings, MAY_DIFFER):
      return {}
    return sample_log.read_evaluated(folder)

  def finished(self, folder: epath.Path) -> list[sample_log.Sample] | None:
    """Returns the samples of a finished evaluation with the same settings.

    Every process must call it at the same point; all return samples, or None.

    Args:
      folder: Folder of an evaluation, which may not exist.

    Returns:
      All samples, prompt by prompt; None if the evaluation has not finished, or other settings.
    """
    summary = _read_or_none(
      folder / SUMMARY,
      "the summary of an evaluation",
      "It is written again",
      summary_lib.Summary.from_json,
    )
    samples = self.read(folder) if summary else {}
    keys = self.rows().keys()
    if not _read_by_all(samples) >= keys:
      return None
    return [samples[key] for key in keys]

  def _open(self, folder: epath.Path, keep: bool) -> None:
    """Prepares a folder for further samples, or for the first ones if not `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    # A summary means that the evaluation has finished, which is no longer so.
    (folder / SUMMARY).unlink(missing_ok=True)
    # This also removes a last line that a killed process left incomplete.
    last_step = _LAST_STEP if keep else None
    sample_log.drop_after(folder, last_step)
    labelled_questions.drop_after(folder, last_step)
    if keep:
      return
    # What judges and rewards have logged is about other images.
    for name in ("judges", "rewards"):
      _empty(folder / name)
    atomic.write_text(folder / SETTINGS, json.dumps(self.settings, indent=1))

  def _draw(
    self, policy, towers, rows: np.ndarray, count: int, step: int
  ) -> Batch:
    """Draws the chains of a batch whose first `count` rows count, and asks about their images."""
    prompt_index, image_index = rows.T
    prompts = jax.tree.map(lambda leaf: leaf[prompt_index], self.prompts)
    row_records = [self.records[i] for i in prompt_index]
    rounds = self.sampler.run(policy, towers, prompts, image_index, count)
    questions_by_kind = {}
    answers = {}
    for turn, suffix in self._turns_asked_about(len(rounds)):
      images = rounds[turn].round.kept
      for kind, kind_questions in self.questionnaire.questions(
        images, row_records, rows
      ).items():
        name = f"{kind}{suffix}"
        questions_by_kind[name] = kind_questions
        number = self.questionnaire.index_of(kind)
        if turn:
          number += _FIRST_ABOUT_LAST
        answers[name] = self._ask(
          policy, towers, prompts, image_index, number, kind_questions, images
        )
    return Batch(step, rows, row_records, rounds, questions_by_kind, answers)

  @staticmethod
  def _turns_asked_about(num_rounds: int) -> list[tuple[int, str]]:
    """Returns (index of a round, what follows the kinds of its questions): drafts, last images."""
    if num_rounds == 1:
      return [(0, "")]
    return [(0, ""), (num_rounds - 1, LAST_IMAGE)]

  def _ask(
    self,
    policy,
    towers,
    prompts: experience.Prompts,
    image_index: np.ndarray,
    number: int,
    kind_questions: Sequence[questions.Question | None],
    images: chains.ScoredImages,
  ) -> list[str]:
    """Returns the texts that answer one question about every image of a batch."""
    # Rows without a question stay in the batch, whose shape is fixed; their answers are unused.
    texts = [question.text if question else "" for question in kind_questions]
    ids, lengths = self.segments(texts, self.sampler.question_tokens)
    reply = self.sampler.ask(
      policy,
      towers,
      prompts.replace(question=ids, question_length=lengths),
      image_index,
      number,
      images.images,
    )
    return self.decode(reply.ids, reply.lengths)

  def samples_of(
    self, batch: Batch, count: int
  ) -> tuple[list[sample_log.Sample], dict[str, np.ndarray]]:
    """Returns the first `count` samples of a batch, and their images by path."""
    texts = []
    boxes = []
    for timed in batch.rounds:
      text = timed.round.text
      texts.append(self.decode(text.ids, text.lengths))
      if self.boxes:
        boxes.append(self.boxes(timed.round.kept.images))
      else:
        boxes.append([None] * len(batch.rows))

    samples = []
    images = {}
    for i in range(count):
      key = key_of(*batch.rows[i].tolist())
      turns = []
      for number, timed in enumerate(batch.rounds):
        previous = turns[-1] if turns else None
        turn = _turn(timed, i, texts[number][i], previous)
        if previous and turn.stop:
          # The image has not changed, so it is not written again.
          path = previous.image
        else:
          path = f"images/{key}_{number}.png"
          images[path] = timed.round.kept.images[i]
        turn = dataclasses.replace(
          turn,
          image=path,
          boxes=boxes[number][i],
          reason=reasons.of_turn(turn, batch.records[i], boxes[number][i]),
        )
        turns.append(turn)
      sample = sample_log.Sample(
        step=batch.step,
        key=key,
        prompt=batch.records[i].text,
        tag=batch.records[i].tag,
        turns=tuple(turns),
        answers=_answers(batch, i),
      )
      samples.append(sample)
    return samples, images


def seconds(samples: Sequence[sample_log.Sample]) -> float:
  """Returns the time that the rounds of an evaluation took, without compilation and questions."""
  total = 0.0
  for sample in samples:
    for turn in sample.turns:
      if isinstance(turn, sample_log.EvaluatedTurn):
        total += turn.seconds
  return total


def outputs(folder: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
  """Returns the files that an evaluation writes, and the folders; not the images."""
  files = (
    "samples.jsonl",
    "labelled.jsonl",
    SETTINGS,
    SUMMARY,
    "tables.md",
    "index.html",
  )
  folders = ("images", "tables", "judges", "rewards")
  return [folder / name for name in files], [folder / name for name in folders]


def _read_or_none(
  path: epath.Path, meaning: str, consequence: str, build: Callable[[dict], Any]
) -> Any | None:
  """Returns what a JSON file holds; None where it is missing or, with a warning, damaged.

  Args:
    path: File of an object.
    meaning: What it must be.
    consequence: What follows where it is damaged, as a sentence without its full stop.
    build: Returns the result from the object.
  """
  if not path.exists():
    return None
  try:
    with damage.explained(path, meaning, consequence):
      return build(damage.read_object(path))
  except ValueError as error:
    logging.warning("%s", error)
    return None


def _read_by_all(entries: Mapping[str, object]) -> set[str]:
  """Returns the keys of the samples, or of the answers, that every process has read.

  A shared disk may show the last lines late to other hosts, and all must draw the same samples.
  """
  texts = multihost.exchange(json.dumps(sorted(entries)))
  return set.intersection(*(set(json.loads(text)) for text in texts))


def _is_scored(sample: sample_log.Sample) -> bool:
  """Returns whether all images of a sample have a score; those behind its stop do not matter."""
  return all(turn.score is not None for turn in sample.turns)


def _empty(folder: epath.Path) -> None:
  """Removes the logs and verdicts of a folder, if there is one."""
  if not folder.exists():
    return
  for path in folder.iterdir():
    if not _OWN_FILE.fullmatch(path.name):
      continue
    if path.is_dir():
      path.rmtree()
    else:
      path.unlink()


def _turn(
  timed: chains.TimedRound,
  i: int,
  text: str,
  previous: sample_log.EvaluatedTurn | None,
) -> sample_log.EvaluatedTurn:
  """Returns row `i` of a round, without image and boxes.

  Args:
    timed: Round of the batch.
    i: Row of the batch.
    text: What the model wrote in that row.
    previous: The same row's turn before, None for drafts.
  """
  drawn = timed.round
  score = outcome.as_json(drawn.kept.score, i)
  stop = bool(drawn.stop[i])
  if drawn.chain is not None:
    chain_score = outcome.as_json(drawn.chain.score, i)["score"]
  else:
    # Until it stops, the chain is what is kept; then there is none.
    chain_score = None if stop else score["score"]
  turn = sample_log.EvaluatedTurn(
    image="",
    text="",
    instruction="",
    **score,
    stop=stop,
    chain_score=chain_score,
    says_stop=bool(drawn.says_stop[i]),
    format=float(drawn.format[i]),
    tokens=0,
    instruction_tokens=0,
    seconds=timed.seconds / len(drawn.stop),
  )
  if previous and previous.stop:
    # The chain has finished: what it writes afterwards is no part of the sample.
    if drawn.chain is None:
      return dataclasses.replace(turn, says_stop=False)
    return dataclasses.replace(turn, chain_text=text)
  return dataclasses.replace(
    turn,
    text=text,
    instruction=thoughts.edit_instruction(text) if previous else "",
    tokens=int(drawn.text.lengths[i]),
    instruction_tokens=int(drawn.instruction_tokens[i]),
  )


def _answers(batch: Batch, i: int) -> tuple[sample_log.Answer, ...]:
  """Returns the questions about the draft of row `i`, with their answers."""
  answers = []
  for kind, kind_questions in batch.questions.items():
    question = kind_questions[i]
    if question is None:
      continue
    text = batch.answers[kind][i]
    answer = sample_log.Answer(
      kind=kind,
      question=question.text,
      expected=question.expected,
      answer=questions.answer_in(text),
      text=text,
    )
    answers.append(answer)
  return tuple(answers)
