"""What studies compare: their arms, what is measured, and the claims with their criteria.

Everything here is fixed before a run. `verdicts.py` says when a claim is held.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Literal

# The model that all arms start from, in the place of an arm.
BEFORE = "before"
# Nothing, in the place of the arm that another is compared with: the measure itself.
ZERO = ""
# The smallest difference of a score that matters.
LEAST = 0.02


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train.

  Attributes:
    name: A word, for folders and tables.
    meaning: What it is, for people.
    overrides: Keys of the config that it sets.
    as_costly_as: Arm that it computes as much as: its iterations are scaled by the operations of
      an iteration. "" keeps `total_steps`.
    train_tags: Tags of the world's training prompts that it trains on; all if empty.
  """

  name: str
  meaning: str
  overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
  as_costly_as: str = ""
  train_tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Claim:
  """A sentence that a study tests: a difference is positive, or is too small to matter.

  Attributes:
    text: The sentence.
    measure: Name of what is measured, see `measures.MEASURES`.
    arm: Arm that the sentence is about.
    than: Arm that it is compared with, BEFORE, or ZERO where the measure is a difference itself.
    says: "more": the difference, arm minus other, is positive, and not too small to matter;
      "not more": it is below `least`; "less": as "more", of the other minus the arm.
    least: Smallest difference that matters.
  """

  text: str
  measure: str
  arm: str
  than: str
  says: Literal["more", "not more", "less"] = "more"
  least: float = LEAST


@dataclasses.dataclass(frozen=True)
class Study:
  """Arms that are trained alike but for a few keys.

  Attributes:
    title: What it is about.
    arms: In the order of the tables.
    measures: Names of what the tables show, see `measures.MEASURES`.
    claims: Tested together: the verdicts are corrected for their number.
    overrides: Keys of the config that all arms set.

  Raises:
    ValueError: A claim names no arm.
  """

  title: str
  arms: Sequence[Arm]
  measures: Sequence[str]
  claims: Sequence[Claim]
  overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    names = {arm.name for arm in self.arms}
    for claim in self.claims:
      if claim.arm not in names | {BEFORE}:
        raise ValueError(f"a claim must name an arm of {names}: {claim.arm!r}")
      if claim.than not in names | {BEFORE, ZERO}:
        raise ValueError(f"a claim must name an arm of {names}: {claim.than!r}")


_UNDERSTANDING = ("judgement", "stop_recall", "edit_recall", "match", "vqa")
_SCORES = ("draft", "last_round", "refinement")

_MAIN = Study(
  title="Which part of R3 raises what?",
  arms=(
    Arm("reason", "the reason stage alone", {"reflect_rounds": 0}),
    Arm(
      "images",
      "R3 without the loss of texts",
      {"loss.text_weight": 0.0},
    ),
    Arm(
      "texts",
      "R3 without the loss of images",
      {"loss.image_weight": 0.0, "loss.image_kl": 0.0},
    ),
    Arm("r3", "R3: both stages, texts and images"),
  ),
  measures=(*_SCORES, *_UNDERSTANDING),
  claims=(
    Claim("R3 raises the drafts' score", "draft", "r3", BEFORE),
    Claim("R3 raises the last round's score", "last_round", "r3", BEFORE),
    Claim(
      "after R3, the rounds behind the draft still add to it",
      "refinement",
      "r3",
      ZERO,
      least=0.005,
    ),
    Claim(
      "R3 raises judgement: when to stop and when to edit",
      "judgement",
      "r3",
      BEFORE,
    ),
    Claim("R3 raises ITA-style accuracy", "match", "r3", BEFORE),
    Claim("R3 raises VQA-style accuracy", "vqa", "r3", BEFORE),
    Claim(
      "R3's last round is better than that of the reason stage alone",
      "last_round",
      "r3",
      "reason",
    ),
    Claim(
      "R3's judgement is better than that of the reason stage alone",
      "judgement",
      "r3",
      "reason",
    ),
    Claim(
      "R3's last round is better than with images alone",
      "last_round",
      "r3",
      "images",
    ),
    Claim(
      "R3's last round is better than with texts alone",
      "last_round",
      "r3",
      "texts",
    ),
  ),
)

_TREE = Study(
  title="Does the tree train better than the full chain?",
  arms=(
    Arm("tree", "R3's tree"),
    Arm(
      "chain-samples",
      "the full chain with as many samples",
      {"step.chain": "full"},
    ),
    Arm(
      "chain-flops",
      "the full chain with as many operations",
      {"step.chain": "full"},
      as_costly_as="tree",
    ),
  ),
  measures=(
    *_SCORES,
    "judgement",
    "training_draft",
    "training_edit",
    "training_variation",
  ),
  claims=(
    Claim(
      "the tree's last round is better at equal samples",
      "last_round",
      "tree",
      "chain-samples",
    ),
    Claim(
      "the tree's last round is better at equal operations",
      "last_round",
      "tree",
      "chain-flops",
    ),
    Claim(
      "the tree's drafts earn more at the end of training, at equal samples",
      "training_draft",
      "tree",
      "chain-samples",
    ),
    Claim(
      "the tree's drafts earn more at the end of training, at equal operations",
      "training_draft",
      "tree",
      "chain-flops",
    ),
    Claim(
      "the tree's reward varies less from one iteration to the next",
      "training_variation",
      "tree",
      "chain-samples",
      says="less",
      least=0.002,
    ),
  ),
)

_ROUNDS = Study(
  title="How many rounds does it take, in training and in inference?",
  arms=(
    Arm("rounds-0", "no refine round in training", {"reflect_rounds": 0}),
    Arm("rounds-1", "one refine round in training", {"reflect_rounds": 1}),
    Arm("rounds-2", "two refine rounds in training", {"reflect_rounds": 2}),
  ),
  measures=(
    "draft",
    "round_2",
    "round_3",
    "round_4",
    "round_5",
    "round_6",
    "late_gain",
    "never_stopped",
    "best_image",
    "stops_minus_never",
    "judgement",
  ),
  claims=(
    Claim(
      "one refine round in training is better than none",
      "last_round",
      "rounds-1",
      "rounds-0",
    ),
    Claim(
      "two refine rounds in training are not better than one",
      "last_round",
      "rounds-2",
      "rounds-1",
      says="not more",
    ),
    Claim(
      "in inference, rounds after the second refinement add nothing that matters",
      "late_gain",
      "rounds-1",
      ZERO,
      says="not more",
      least=0.01,
    ),
    Claim(
      "its own stops are better than never stopping",
      "stops_minus_never",
      "rounds-1",
      ZERO,
    ),
  ),
  # The draft and five refinements, and what would follow the stops.
  overrides={"eval.rounds": 6, "eval.never_stop": True},
)

_STOP_REWARD = Study(
  title="How many perfect images does the pool need?",
  arms=(
    Arm("perfect-0", "none on purpose", {"pool.perfect": 0.0}),
    Arm("perfect-15", "the paper's share, 0.15", {"pool.perfect": 0.15}),
    Arm("perfect-50", "half", {"pool.perfect": 0.5}),
  ),
  measures=(*_SCORES, *_UNDERSTANDING),
  claims=(
    Claim(
      "without perfect images the model stops less often where it should",
      "stop_recall",
      "perfect-0",
      "perfect-15",
      says="less",
    ),
    Claim(
      "with many of them it edits less often where it should",
      "edit_recall",
      "perfect-50",
      "perfect-15",
      says="less",
    ),
    Claim(
      "the paper's share leads to a better last round than none",
      "last_round",
      "perfect-15",
      "perfect-0",
    ),
    Claim(
      "the paper's share leads to a better last round than half",
      "last_round",
      "perfect-15",
      "perfect-50",
    ),
  ),
)

_TRANSFER = Study(
  title="Does what is learned about counting help with colours, and back?",
  arms=(
    Arm("counting", "trained on counting alone", train_tags=("counting",)),
    Arm("colors", "trained on colors alone", train_tags=("colors",)),
  ),
  measures=(
    "last_round",
    "last_round_counting",
    "last_round_colors",
    "judgement_counting",
    "judgement_colors",
  ),
  claims=(
    Claim(
      "training on counting raises colors",
      "last_round_colors",
      "counting",
      BEFORE,
    ),
    Claim(
      "training on colors raises counting",
      "last_round_counting",
      "colors",
      BEFORE,
    ),
    Claim(
      "training on counting raises the judgement of colors",
      "judgement_colors",
      "counting",
      BEFORE,
    ),
    Claim(
      "training on colors raises the judgement of counting",
      "judgement_counting",
      "colors",
      BEFORE,
    ),
  ),
)

_DEFECTS = Study(
  title="What do the defects of the reference's loss cost?",
  arms=(
    Arm("ours", "r3jax's loss"),
    Arm(
      "reference",
      "the reference's literal loss",
      {"compat.reference_loss": True},
    ),
  ),
  measures=(*_SCORES, "judgement", "training_draft", "training_variation"),
  claims=(
    Claim(
      "r3jax's loss leads to a better last round",
      "last_round",
      "ours",
      "reference",
    ),
    Claim(
      "r3jax's loss leads to better drafts",
      "draft",
      "ours",
      "reference",
    ),
  ),
)

STUDIES: Mapping[str, Study] = {
  "main": _MAIN,
  "tree": _TREE,
  "rounds": _ROUNDS,
  "stop-reward": _STOP_REWARD,
  "transfer": _TRANSFER,
  "defects": _DEFECTS,
}
