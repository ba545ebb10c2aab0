"""Measures a small model while it is trained: held-out scores by tag and by kind of question.

- draft/TAG: mean score of drafts for held-out prompts.
- edit/TAG: share of edits after the right instruction that are exactly what was asked for.
- untouched/TAG: share of the other cells of these edits that still hold what they held.
- judgement/TAG: balanced accuracy of stopping or editing; half of the scenes are right.
- answer/KIND: balanced accuracy of answers about these rendered scenes.
- stop_when_right and stop_when_wrong: shares of these scenes that the model stops at.

Prompts, scenes and questions are the same for every model and step; held-out prompts alone occur.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math

from etils import epath
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.agent import actors
from r3jax.agent import experience
from r3jax.agent import random_keys
from r3jax.agent import rollout
from r3jax.agent import rollout_settings
from r3jax.data import records
from r3jax.evaluation import bootstrap
from r3jax.evaluation import chains
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import labelled_questions
from r3jax.parallel import meshes
from r3jax.sequence import protocol
from r3jax.sequence import thoughts
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import examples
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import labelled_set
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes
from r3jax.worlds.shapes import verifier

Scores = dict[str, float]
# Number of the "round" from whose noise edits are drawn; drafts have 0, answers others.
_EDIT_ROUND = 500
# Name of a score -> what the model must do at the scenes that it is about.
_STOPS = {
  "stop_when_right": labelled_questions.STOP,
  "stop_when_wrong": labelled_questions.EDIT,
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured.

  Attributes:
    prompts: Drafts, and edits, of each tag.
    images: Right scenes of each tag that are judged; as many are wrong.
    batch_size: Images at a time.
    seed: Seed of prompts, scenes and noise.
  """

  prompts: int
  images: int
  batch_size: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Window:
  """Where a model is half good: training on texts and images ends inside it.

  Attributes:
    draft: Lowest and highest score of drafts over all tags.
    edit: Lowest share of exact edits over all tags.
    judgement: Lowest and highest balanced accuracy on every tag.
    answer: The same of every kind of question.
  """

  draft: tuple[float, float]
  edit: float
  judgement: tuple[float, float]
  answer: tuple[float, float]

  def holds(self, scores: Scores) -> bool:
    """Returns whether all scores are inside."""
    return not self.outside(scores)

  def outside(self, scores: Scores) -> list[str]:
    """Returns the names of the scores that are not inside."""
    names = []
    for name, value in scores.items():
      group, _, detail = name.partition("/")
      low, high = (-math.inf, math.inf)
      if name == "draft":
        low, high = self.draft
      elif name == "edit":
        low = self.edit
      elif group == "judgement":
        low, high = self.judgement
      elif group == "answer" and detail:
        low, high = self.answer
      if not low <= value <= high:
        names.append(name)
    return names


@flax.struct.dataclass
class _Edits:
  """Instructions, images before them, and what must be there after them.

  Attributes:
    scene: before, numpy [n, 9].
    target: after, likewise.
    instruction: text segments.
  """

  scene: scenes.Scene
  target: scenes.Scene
  instruction: batches.TextRows


@dataclasses.dataclass(frozen=True)
class Exam:
  """The tasks, ready to be given to a model.

  Attributes:
    sampler: Drafts and answers.
    tokenizer: Of the world.
    settings: What is measured.
  """

  sampler: chains.Sampler
  tokenizer: tokenization.TextTokenizer
  settings: Settings

  # --- Texts -----------------------------------------------------------------------------------

  def texts(
    self,
    policy: types.Params,
    towers: types.Params,
    folder: epath.Path,
    step: int,
  ) -> Scores:
    """Returns the scores of judgement and answers, which are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # What an interrupted run has measured at this step, and later ones.
    labelled_questions.drop_after(folder, step - 1)
    with jax.set_mesh(self.sampler.mesh):
      answers = self._questionnaire.ask(policy, towers, folder, step, {})
    table = labelled_estimates.table_of(answers)
    judgement = labelled_questions.JUDGEMENT
    scores = {}
    for name, view in labelled_estimates.views_of(table).items():
      kind, _, detail = name.partition(", ")
      design = labelled_estimates.design(table, view)
      value = bootstrap.mean(view.parts, design)
      if kind == judgement and detail in prompts.TAGS:
        scores[f"judgement/{detail}"] = value
      elif kind != judgement and not detail:
        scores[f"answer/{kind}"] = value
    stop = labelled_questions.STOP
    for name, expected in _STOPS.items():
      stops = [
        answer.answer == stop
        for answer in answers
        if answer.kind == judgement and answer.expected == expected
      ]
      scores[name] = float(np.mean(stops))
    return scores

  @functools.cached_property
  def _questionnaire(self) -> labelled_questions.Questionnaire:
    """Questions about rendered scenes."""
    images = labelled_set.rendered(self.settings.images, self.settings.seed)
    questions = labelled_questions.questions_about(
      images, grammar.match_question
    )
    texts = [question.text for question in questions]
    ids, lengths = self._segments(texts, self.sampler.question_tokens)
    return labelled_questions.Questionnaire(
      images=images,
      questions=questions,
      ids=ids,
      lengths=lengths,
      prompts=self._prompts,
      sampler=self.sampler,
      decode=self._decode,
    )

  def _segments(
    self, texts: Sequence[str], capacity: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns texts as segments [n, capacity] and their lengths [n]."""
    segments = [self.tokenizer.segment(text, capacity) for text in texts]
    ids, lengths = zip(*segments, strict=True)
    return np.stack(ids), np.int32(lengths)

  def _decode(self, ids: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Returns the texts of segments."""
    return [
      self.tokenizer.decode(row[1 : length - 1])
      for row, length in zip(ids, lengths, strict=True)
    ]

  # --- Images ----------------------------------------------------------------------------------

  def images(self, policy: types.Params, towers: types.Params) -> Scores:
    """Returns the scores of drafts and edits."""
    with jax.set_mesh(self.sampler.mesh):
      return self._drafts(policy, towers) | self._edits(policy, towers)

  @functools.cached_property
  def _records(self) -> list[records.Prompt]:
    """Held-out prompts, as many of every tag, tag by tag."""
    rng = np.random.default_rng(self.settings.seed)
    chosen = []
    for of_tag in prompts.by_tag(prompts.heldout_records()):
      order = rng.permutation(len(of_tag)).tolist()
      times = -(-self.settings.prompts // len(order))
      repeated = (order * times)[: self.settings.prompts]
      chosen += [of_tag[number] for number in repeated]
    return chosen

  @functools.cached_property
  def _prompts(self) -> experience.Prompts:
    """The held-out prompts as arrays."""
    capacities = self.sampler.settings.capacities
    texts = [record.text for record in self._records]
    questions = [protocol.reflection_question(text) for text in texts]
    return experience.Prompts(
      *self._segments(texts, capacities.prompt),
      *self._segments(questions, capacities.question),
      verifier.encode_records(self._records),
      np.arange(len(texts), dtype=np.int32),
    )

  def _batches(self) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the numbers of the prompts of a batch, and how many of them count."""
    rows = [(number, 0) for number in range(len(self._records))]
    for batch_rows, count in chains.batches(rows, self.sampler.batch_size):
      yield batch_rows[:, 0], count

  def _drafts(self, policy: types.Params, towers: types.Params) -> Scores:
    values = []
    for numbers, count in self._batches():
      rows = jax.tree.map(lambda leaf, i=numbers: leaf[i], self._prompts)
      # Prompts that occur twice get other noise.
      (draft,) = self.sampler.run(policy, towers, rows, numbers, count)
      values += draft.round.kept.score.value[:count].tolist()
    return self._by_tag("draft", values)

  def _edits(self, policy: types.Params, towers: types.Params) -> Scores:
    exact = []
    untouched = []
    for numbers, count in self._batches():
      rows = jax.tree.map(lambda leaf, i=numbers: leaf[i], self._tasks)
      ids = np.stack([numbers, numbers, np.full_like(numbers, _EDIT_ROUND)], 1)
      is_right = jax.device_get(self._edit(policy, towers, rows, ids))[:count]
      exact += is_right.all(1).tolist()
      other_cells = self._is_untouched(rows)[:count]
      shares = (is_right & other_cells).sum(1) / other_cells.sum(1)
      untouched += shares.tolist()
    return self._by_tag("edit", exact) | self._by_tag("untouched", untouched)

  @functools.cached_property
  def _tasks(self) -> _Edits:
    """An edit for every held-out prompt."""
    rng = np.random.default_rng((self.settings.seed, 1))
    drawn = [examples.mending_example(x, rng) for x in self._records]
    texts = [example.instruction for example in drawn]
    capacity = self.sampler.settings.capacities.instruction
    stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
    return _Edits(
      scene=stack(*[example.scene for example in drawn]),
      target=stack(*[example.target for example in drawn]),
      instruction=batches.TextRows(*self._segments(texts, capacity)),
    )

  @staticmethod
  def _is_untouched(rows: _Edits) -> np.ndarray:
    """Returns which cells the instructions do not name, bool [n, 9]."""
    same = rows.scene.shape == rows.target.shape
    same &= rows.scene.color == rows.target.color
    return same & (rows.scene.ghost_shape == rows.target.ghost_shape)

  @functools.cached_property
  def _edit(self) -> Callable:
    """Compiled edits: (policy, towers, rows, ids of noise) -> cells that are right, [n, 9]."""

    @jax.jit
    def edit(policy, towers, rows: _Edits, ids: jax.Array) -> jax.Array:
      sampler = self.sampler
      actor = actors.Actor(sampler.modules, policy, towers, sampler.settings)
      instruction = experience.Instruction(
        rows.instruction.ids,
        rows.instruction.lengths,
        jnp.zeros(rows.instruction.lengths.shape, bool),
      )
      source = rollout.look(actor, scenes.render(rows.scene))
      keys = random_keys.evaluation_keys(sampler.seed, ids)
      edited = rollout.refine(actor, source, instruction, keys)
      objects = verifier.detect(edited.images)
      is_empty = (objects.shape < 0) & (rows.target.shape < 0)
      has_color = objects.color == rows.target.color
      return is_empty | ((objects.shape == rows.target.shape) & has_color)

    return edit

  def _by_tag(self, name: str, values: Sequence[float]) -> Scores:
    """Returns the mean of every tag, and that of all tags under the name alone."""
    tags = np.array([record.tag for record in self._records])
    array = np.asarray(values, float)
    scores = {name: float(array.mean())}
    for tag in prompts.TAGS:
      scores[f"{name}/{tag}"] = float(array[tags == tag].mean())
    return scores


def exam(
  modules: actors.Modules,
  settings: rollout_settings.RolloutSettings,
  tokenizer: tokenization.TextTokenizer,
  exam_settings: Settings,
) -> Exam:
  """Builds the exam of a model.

  Args:
    modules: The model.
    settings: How it samples.
    tokenizer: Of the world.
    exam_settings: What is measured.
  """
  tags = thoughts.tag_ids(tokenizer)
  capacity = settings.capacities.instruction

  def parse(ids, lengths, stage: str) -> thoughts.Parsed:
    return thoughts.parse_tokens(ids, lengths, stage, tags, capacity)

  def reward(images, target, needed=None) -> types.Score:
    del needed  # the verifier costs nothing
    return verifier.verify(images, target)

  sampler = chains.Sampler(
    modules,
    settings,
    reward,
    parse,
    meshes.make_mesh(data=-1, fsdp=1, tensor=1),
    rounds=1,
    batch_size=exam_settings.batch_size,
    seed=exam_settings.seed,
    question_tokens=settings.capacities.question,
  )
  return Exam(sampler, tokenizer, exam_settings)
