"""Tests of evaluation/labelled_questions.py and labelled_estimates.py."""

import dataclasses

from etils import epath
import numpy as np
import pytest

from r3jax.agent import experience
from r3jax.data import labelled_images
from r3jax.evaluation import comparison
from r3jax.evaluation import labelled_estimates
from r3jax.evaluation import labelled_questions
from tests import documented
from tests.evaluation import fakes

COUNT = labelled_images.Question("count", "how many ?", "two")


def make_images(num_per_tag=20):
  """Returns images of two tags, half of them right; ten prompts a tag."""
  images = []
  for tag in ("colors", "position"):
    for number in range(num_per_tag):
      image = labelled_images.LabelledImage(
        name=f"{tag} {number}",
        pixels=np.full((48, 48, 3), number, np.uint8),
        prompt=f"{tag} prompt {number % 10}",
        matches=number % 2 == 0,
        tag=tag,
        questions=(COUNT,),
      )
      images.append(image)
  return images


class Sampler:
  """Answers every question by a text that `reply` makes of its number."""

  batch_size = 7
  question_tokens = 4

  def __init__(self, reply, fails_at=None):
    self.reply = reply
    self.fails_at = fails_at
    self.numbers = []

  def ask(self, policy, towers, prompts, image_index, number, pixels):
    del policy, towers
    assert number >= 1000 and not image_index.any()
    assert pixels.shape == (self.batch_size, 48, 48, 3)
    if self.fails_at is not None and len(self.numbers) >= self.fails_at:
      raise KeyboardInterrupt
    self.numbers += prompts.index.tolist()
    return experience.Text(
      prompts.index[:, None], np.ones(len(prompts.index)), None
    )


def questionnaire(sampler, images):
  asked = labelled_questions.questions_about(images, "matches {} ?".format)
  row = np.zeros((1, 4), np.int32)
  return labelled_questions.Questionnaire(
    images=images,
    questions=asked,
    ids=np.zeros((len(asked), 4), np.int32),
    lengths=np.ones(len(asked), np.int32),
    prompts=experience.Prompts(row, row[:, 0], row, row[:, 0], None, row[:, 0]),
    sampler=sampler,
    decode=lambda ids, lengths: [sampler.reply(int(i)) for i in ids[:, 0]],
  )


def answers_of(rule, images):
  """Returns the answers of a model that answers a question by rule(question, image)."""
  asked = labelled_questions.questions_about(images, "matches {} ?".format)

  def reply(number):
    question = asked[number]
    return f"<think> </think> {rule(question, images[question.image])}"

  sampler = Sampler(reply)
  folder = epath.Path("gs://nowhere")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(labelled_questions.jsonl, "append", lambda *arguments: None)
    return questionnaire(sampler, images).ask(None, None, folder, 3, {})


def perfect(question, image):
  if question.kind == "judgement":
    return "no further edit needed" if image.matches else "add a red ring"
  return question.expected


def always(word):
  def rule(question, image):
    del image
    if question.kind == "judgement":
      return {"yes": "No further edit needed"}.get(word, "remove the ring")
    return word

  return rule


class TestAsking:
  def test_every_image_is_asked_in_all_three_forms(self):
    images = make_images(2)
    asked = labelled_questions.questions_about(images, "matches {} ?".format)
    assert [question.kind for question in asked] == (
      ["judgement"] * 4 + ["match"] * 4 + ["count"] * 4
    )
    assert "colors prompt 0" in asked[0].text
    assert "no further edit needed" in asked[0].text
    assert asked[4].text == "matches colors prompt 0 ?"
    expected = [question.expected for question in asked]
    assert expected[:4] == ["stop", "edit"] * 2
    assert expected[4:] == ["yes", "no"] * 2 + ["two"] * 4

  def test_answers_resume_where_they_were_cut(self, tmp_path):
    images = make_images()
    folder = epath.Path(tmp_path)

    def reply(number):
      return f"<think> {number} </think> yes"

    cut = Sampler(reply, fails_at=14)
    with pytest.raises(KeyboardInterrupt):
      questionnaire(cut, images).ask(None, None, folder, 3, {})
    complete = labelled_questions.read(folder)
    assert len(complete) == 14
    again = Sampler(reply)
    answers = questionnaire(again, images).ask(None, None, folder, 3, complete)
    assert len(answers) == 120 and not set(range(14)) & set(again.numbers)
    assert list(labelled_questions.read(folder).values()) == answers

  def test_evaluation_keeps_its_answers_and_drops_those_of_others(
    self, tmp_path
  ):
    images = make_images(2)
    folder = epath.Path(tmp_path)

    def evaluation(**settings):
      asking = Sampler(lambda number: "<think> </think> yes")
      made = fakes.evaluation(fakes.Sampler(), **settings)
      labelled = questionnaire(asking, images)
      return dataclasses.replace(made, labelled=labelled), asking

    first, _ = evaluation()
    assert first.finished_labelled(folder) is None
    first.run(None, None, folder, 40)
    answers = first.ask_labelled(None, None, folder, 40)
    assert first.finished_labelled(folder) == answers
    again, asking = evaluation()
    again.run(None, None, folder, 40)
    assert again.ask_labelled(None, None, folder, 40) == answers
    assert asking.numbers == []
    other, asking = evaluation(points=5)
    other.run(None, None, folder, 40)
    assert other.finished_labelled(folder) is None
    other.ask_labelled(None, None, folder, 40)
    assert len(set(asking.numbers)) == 12


class TestEstimates:
  def test_a_constant_answer_is_worth_half_and_a_perfect_one_all(self):
    images = make_images()
    constant = labelled_estimates.table_of(answers_of(always("yes"), images))
    right = labelled_estimates.table_of(answers_of(perfect, images))
    for kind, word in (("judgement", "stop"), ("match", "yes")):
      numbers = labelled_estimates.by_kind(constant, 0)[kind]
      assert numbers.affirmation == word and numbers.questions == 40
      assert numbers.accuracy.mean == 0.5
      assert numbers.precision == (0.5, 0.5, 0.5)
      assert (numbers.recall.mean, numbers.recall_of_denial.mean) == (1, 0)
      assert numbers.tags["position"].mean == 0.5
      best = labelled_estimates.by_kind(right, 0)[kind]
      assert (best.accuracy.mean, best.precision.mean) == (1, 1)
    assert labelled_estimates.by_kind(constant, 0)["count"].accuracy.mean == 0
    assert labelled_estimates.by_kind(right, 0)["count"].precision is None

  def test_base_rates_do_not_count(self):
    # Nine right images of ten: the constant answer is right nine times of ten, and worth half.
    images = [
      dataclasses.replace(image, matches=number % 10 != 0)
      for number, image in enumerate(make_images())
    ]
    answers = answers_of(always("yes"), images)
    assert np.mean([x.answer == x.expected for x in answers[40:80]]) == 0.9
    table = labelled_estimates.table_of(answers)
    assert labelled_estimates.by_kind(table, 0)["match"].accuracy.mean == 0.5

  def test_precision_is_over_the_affirmed(self):
    images = make_images()

    def rule(question, image):
      # Affirms the right ones and, of the wrong ones, those of prompt 1.
      affirms = image.matches or image.prompt.endswith("1")
      if question.kind == "judgement":
        return "no further edit needed" if affirms else "remove it"
      return "yes" if affirms else "no"

    table = labelled_estimates.table_of(answers_of(rule, images))
    numbers = labelled_estimates.by_kind(table, 0)["judgement"]
    # Of 40 images 20 are right, and 4 of the 20 wrong ones are of prompt 1.
    assert numbers.precision.mean == pytest.approx(20 / 24)
    assert numbers.recall_of_denial.mean == pytest.approx(16 / 20)
    assert numbers.precision.low < 20 / 24 < numbers.precision.high

  def test_differences_are_paired(self):
    images = make_images()
    before = labelled_estimates.table_of(answers_of(always("yes"), images))
    after = labelled_estimates.table_of(answers_of(perfect, images))
    compared = comparison.compare_answers(before, after, 0)
    judgement = compared["judgement"]
    assert judgement.difference == (0.5, 0.5, 0.5)
    assert judgement.prompts == 20
    assert compared["judgement, recall of stop"].difference.mean == 0
    assert compared["judgement, position"].before.mean == 0.5
    assert compared["count"].difference.mean == 1
    same = comparison.compare_answers(before, before, 0)
    assert all(x.difference.mean == 0 for x in same.values())

  def test_other_questions_are_not_compared(self):
    images = make_images()
    before = labelled_estimates.table_of(answers_of(perfect, images))
    after = labelled_estimates.table_of(answers_of(perfect, images[:20]))
    assert comparison.compare_answers(before, after, 0) == {}

  def test_curves_show_accuracy_and_both_recalls(self):
    table = labelled_estimates.table_of(
      answers_of(always("yes"), make_images())
    )
    values = labelled_estimates.curve_values(table)
    documented.check(values, "labelled")
    assert values == {
      "evaluation/labelled/judgement": 0.5,
      "evaluation/labelled/match": 0.5,
      "evaluation/labelled/count": 0,
      "evaluation/labelled/judgement_recall_of_stop": 1,
      "evaluation/labelled/judgement_recall_of_edit": 0,
    }
