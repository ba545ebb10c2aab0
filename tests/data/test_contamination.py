"""Tests of data/contamination.py."""

import json
import unicodedata

import pytest

from r3jax.data import contamination
from r3jax.data import records
from r3jax.worlds.shapes import prompts


def record(prompt, *items, tag="two_object"):
  """Returns the prompt of items: class names, or JSON items."""
  include = [
    item if isinstance(item, dict) else {"class": item, "count": 1}
    for item in items
  ]
  return records.Prompt.from_json(
    {"tag": tag, "prompt": prompt, "include": include}
  )


def asking(prompt, *questions, tag="style"):
  pairs = tuple(records.Question(*pair) for pair in questions)
  return records.Prompt(tag, prompt, questions=pairs)


def above(name, index):
  return {"class": name, "count": 1, "position": ["above", index]}


DOG_CAT = record("a photo of a dog and a cat", "dog", "cat")
BEAR = record("a photo of a bear", "bear", tag="single_object")
BUS = record("a photo of a bus", "bus", tag="single_object")
CUP = record("a photo of a cup and a fork", "cup", "fork")


class TestOccurrences:
  @pytest.mark.parametrize(
    "train, kind",
    [
      (DOG_CAT, "text"),
      (record("a photo of a dog and a cat", "other"), "text"),
      (record("A  photo of the dog, and cat.", "other"), "folded"),
      (record("An photo of a DOG -\nand a cat", "dog", "cat"), "folded"),
      (record("a photo of a cat and a dog", "cat", "dog"), "include"),
      (record("a photo of a dog and a cat twice", "dog", "cat", "cat"), None),
      (
        record(
          "a photo of the cats and a dog", {"class": "cat", "count": 2}, "dog"
        ),
        None,
      ),
      (record("ａ photo of a d\u200bog and a ca\u00adt", "other"), "folded"),
      (record("a photo of a dog", "dog"), None),
      (
        record(
          "a photo of a dog and a cat+",
          {"class": "dog", "count": 1, "color": "red"},
          "cat",
        ),
        None,
      ),
      (asking("a dog and a cat", ("Is there a dog?", "yes")), None),
    ],
  )
  def test_first_kind_that_applies(self, train, kind):
    assert contamination.occurrences([BEAR, train], [CUP, DOG_CAT]) == [
      None,
      kind,
    ]

  @pytest.mark.parametrize(
    "items, same",
    [
      ((above("dog", 1), "cat"), True),
      (("cat", above("dog", 0)), True),
      (("dog", above("cat", 0)), False),
      (("cat", {"class": "dog", "count": 1, "position": ["below", 0]}), False),
      (("cat", "dog"), False),
      (("cat", above("dog", 0), "cup"), False),
    ],
  )
  def test_relations_are_equal_in_any_order(self, items, same):
    test = record("the dog above the cat", "cat", above("dog", 0))
    (found,) = contamination.occurrences(
      [record("another text", *items)], [test]
    )
    assert found == ("include" if same else None)

  def test_relation_names_which_of_two_objects_of_a_class(self):
    red, blue = (
      {"class": "cat", "count": 1, "color": color} for color in ("red", "blue")
    )
    test = record("x", red, blue, above("dog", 0))
    trains = [
      record("y", blue, red, above("dog", 1)),
      record("z", blue, red, above("dog", 0)),
    ]
    assert contamination.occurrences(trains, [test]) == ["include", None]

  @pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
  def test_forms_of_unicode_are_one_text(self, form):
    text = "a café at the île de Ré, ﬁve o'clock"
    other = asking(unicodedata.normalize(form, text), ("Is it evening?", "yes"))
    test = asking(text, ("Is there an island?", "yes"))
    kind = "text" if form == "NFC" else "folded"
    assert contamination.occurrences([other], [test]) == [kind]

  def test_forms_of_unicode_are_one_question_and_one_class(self):
    train = asking("x", ("Is it a cafe\u0301?", "yes"), ("Is it red?", "yes"))
    test = asking("y", ("Is it red?", "yes"), ("Is it a caf\u00e9?", "yes"))
    assert contamination.occurrences([train], [test]) == ["include"]
    train, test = record("x", "cafe\u0301"), record("y", "caf\u00e9")
    assert contamination.occurrences([train], [test]) == ["include"]

  def test_prompts_that_say_no_more_than_their_text_are_equal_by_it(self):
    train = [records.Prompt("a", "a red cat"), records.Prompt("a", "a dog")]
    assert contamination.occurrences(train, train[1:]) == [None, "text"]

  def test_one_question_alone_does_not_say_what_is_asked_for(self):
    question = ("Is the image in the style of a woodcut?", "yes")
    train, test = (
      asking("A fox, as a woodcut.", question),
      asking("A mill, as a woodcut.", question),
    )
    assert contamination.occurrences([train, test], [test]) == [None, "text"]

  @pytest.mark.parametrize(
    "train, kind",
    [
      (
        asking("A cat in red", ("Is it red?", "yes"), ("Is it a cat?", "yes")),
        "include",
      ),
      (
        asking("A cat in red", ("Is it red?", "yes"), ("Is it a cat?", "no")),
        None,
      ),
      (asking("A cat in red", ("Is it red?", "yes")), None),
      (asking("red cat!", ("Is it blue?", "yes")), "folded"),
    ],
  )
  def test_questions_are_equal_in_any_order(self, train, kind):
    test = asking("A red cat", ("Is it a cat?", "yes"), ("Is it red?", "yes"))
    assert contamination.occurrences([train], [test]) == [kind]

  def test_inscription_is_one_in_every_scene(self):
    test = records.Prompt(
      "word", 'a mug, "Don’t Stop"', inscription="Don’t Stop"
    )
    same = records.Prompt("word", "a van", inscription="DON'T  STOP")
    other = records.Prompt(
      "word", "a mug, so to speak", inscription="Dont stop"
    )
    alone = records.Prompt("word", "don't stop")
    found = contamination.occurrences([same, other, alone], [test])
    assert found == ["include", None, None]

  def test_prompts_of_punctuation_and_articles_are_not_all_one(self):
    tests = [record("...", "cat"), record("the a", "dog")]
    assert contamination.occurrences(
      [record("!", "cup"), record("A", "bus")], tests
    ) == [None, None]

  def test_nothing_is_found_in_nothing(self):
    assert contamination.occurrences([], [DOG_CAT]) == []
    assert contamination.occurrences([DOG_CAT], []) == [None]


TRAIN = [
  DOG_CAT,
  BEAR,
  CUP,
  record("a photo of the cat and the dog", "cat", "dog"),
  BUS,
  record("a photo of a bird", "bird", tag="single_object"),
]
TESTS = [
  record("a photo of a cat and a dog", "cat", "dog"),
  record("A photo of the bear", "bear", tag="single_object"),
  BUS,
  record("a photo of a bird", "bird", tag="single_object"),
]


class TestClean:
  def test_overlap_is_dropped_and_counted(self):
    kept, found = contamination.clean(TRAIN, TESTS)
    assert kept == [CUP]
    assert found.tags == {
      "two_object": contamination.TagOverlap(
        3, text=0, folded=1, include=1, dropped=2, kept=0
      ),
      "single_object": contamination.TagOverlap(
        3, text=2, folded=1, include=0, dropped=3, kept=0
      ),
    }
    assert found.vanished == ("single_object",)
    assert not found.contaminated

  def test_tag_to_keep_is_kept_and_called_contaminated(self):
    kept, found = contamination.clean(
      TRAIN, TESTS, keep_tags=("single_object",)
    )
    assert kept == [BEAR, CUP, *TRAIN[4:]]
    assert found.tags["single_object"] == contamination.TagOverlap(
      3, text=2, folded=1, include=0, dropped=0, kept=3
    )
    assert found.vanished == ()
    assert found.contaminated

  def test_kept_tag_without_overlap_is_not_contaminated(self):
    kept, found = contamination.clean(
      [CUP, BUS], [DOG_CAT], keep_tags=("two_object",)
    )
    assert kept == [CUP, BUS] and not found.contaminated

  def test_everything_dropped_is_refused(self):
    with pytest.raises(ValueError) as error:
      contamination.clean([BUS, DOG_CAT], [DOG_CAT, BUS])
    assert str(error.value) == (
      "all 2 training prompts (tags ['single_object', 'two_object']) are in the test set, and "
      "none may be trained on; keep_tags keeps the prompts of a tag, and the run is then called "
      "contaminated"
    )

  def test_unknown_tag_to_keep_is_refused(self):
    with pytest.raises(ValueError) as error:
      contamination.clean(TRAIN, TESTS, keep_tags=("single", "two_object"))
    assert str(error.value) == (
      "keep_tags must be tags of the training set, ['two_object', 'single_object']; "
      "got ['single']"
    )

  def test_embedded_world_trains_on_no_test_prompt(self):
    train = prompts.train_records()
    kept, found = contamination.clean(train, prompts.heldout_records())
    assert kept == train
    assert sum(overlap.total for overlap in found.tags.values()) == 740
    assert found.vanished == () and not found.contaminated


class TestContamination:
  def test_json_says_everything(self):
    _, found = contamination.clean(TRAIN, TESTS)
    assert json.loads(json.dumps(found.to_json())) == {
      "contaminated": False,
      "vanished": ["single_object"],
      "tags": {
        "two_object": {
          "total": 3,
          "text": 0,
          "folded": 1,
          "include": 1,
          "dropped": 2,
          "kept": 0,
        },
        "single_object": {
          "total": 3,
          "text": 2,
          "folded": 1,
          "include": 0,
          "dropped": 3,
          "kept": 0,
        },
      },
    }

  def test_description_has_a_line_per_tag(self):
    _, found = contamination.clean(TRAIN, TESTS)
    assert found.describe().splitlines() == [
      "two_object: of 3 training prompts 2 are in the test set (0 by text, 1 by folded, "
      "1 by include): 2 dropped, 0 kept",
      "single_object: of 3 training prompts 3 are in the test set (2 by text, 1 by folded, "
      "0 by include): 3 dropped, 0 kept; none is left",
    ]
