"""Tests of evaluation/second_judge.py and report/judge_report.py."""

import dataclasses
import json

from etils import epath
import jax
import numpy as np
import pytest

from r3jax.evaluation import second_judge
from r3jax.parallel import meshes
from r3jax.report import judge_report
from r3jax.rewards import combine
from r3jax.rewards import outcome
from r3jax.rewards.from_host import scorer
from r3jax.worlds.shapes import batches
from r3jax.worlds.shapes import readings
from r3jax.worlds.shapes import scenes as scenes_lib
from r3jax.worlds.shapes import world
from tests.evaluation import fakes


def line(
  key: str,
  score: float | None,
  strict: float | None,
  turn: int = 0,
  tag: str = "a",
) -> second_judge.ImageScore:
  return second_judge.ImageScore(
    key=key,
    round=turn,
    tag=tag,
    prompt=key,
    score=score,
    parts={"strict": strict},
  )


FIRST = [
  line("p", 1.0, 1.0),
  line("q", 0.5, 0.0),
  line("r", 0.0, 0.0),
  line("s", 1.0, 1.0),
  line("t", None, None),
  line("u", 0.2, 0.0),
]
SECOND = [
  line("p", 0.8, 1.0),
  line("q", 0.7, 1.0),
  line("r", 0.1, 0.0),
  line("s", 0.4, 0.0),
  line("t", 0.5, 0.0),
  line("u", None, None),
]


class TestAgreement:
  def test_numbers_by_hand(self):
    found = second_judge.agreement(FIRST, SECOND, seed=0)
    assert found.images == 4  # two lack one of the scores
    assert found.mean == pytest.approx([2.5 / 4, 2.0 / 4])
    assert found.difference[0] == pytest.approx(-0.125)
    assert found.confusion == second_judge.Confusion(1, 1, 1, 1)
    assert (found.agreement, found.kappa) == (0.5, 0.0)
    a, b = [1, 0.5, 0, 1], [0.8, 0.7, 0.1, 0.4]
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1])
    # Ranks: 3.5, 2, 1, 3.5 and 4, 3, 1, 2.
    assert found.spearman == pytest.approx(
      np.corrcoef([3.5, 2, 1, 3.5], [4, 3, 1, 2])[0, 1]
    )

  def test_a_reward_agrees_with_itself(self):
    found = second_judge.agreement(FIRST, FIRST, seed=0)
    assert (found.agreement, found.kappa, found.difference) == (
      1.0,
      1.0,
      (0.0, 0.0, 0.0),
    )
    assert found.pearson == pytest.approx(1.0) == found.spearman

  def test_what_does_not_vary_has_no_correlation(self):
    same = [line(key, 1.0, 1.0) for key in "pq"]
    found = second_judge.agreement(same, same, seed=0)
    assert (found.pearson, found.spearman, found.kappa) == (
      None,
      None,
      None,
    )

  def test_means_are_of_tags_as_their_difference_is(self):
    first = [line(str(i), 0.9, 0.0, tag="a") for i in range(9)] + [
      line("z", 0.9, 0.0, tag="b")
    ]
    second = [line(str(i), 0.5, 0.0, tag="a") for i in range(9)] + [
      line("z", 1.0, 0.0, tag="b")
    ]
    found = second_judge.agreement(first, second, seed=0)
    assert found.mean == pytest.approx([0.9, 0.75]) and found.difference[
      0
    ] == pytest.approx(-0.15)

  def test_nothing_in_common(self):
    assert second_judge.agreement(FIRST, [line("z", 1.0, 1.0)], seed=0) is None

  def test_by_tag_adds_up(self):
    first = [line("p", 1.0, 1.0, tag="a"), line("q", 0.5, 0.0, tag="b")]
    found = second_judge.by_tag(first, SECOND, seed=0)
    assert {tag: one.images for tag, one in found.items()} == {
      "all": 2,
      "a": 1,
      "b": 1,
    }
    assert len(judge_report.table(found, ("own", "other")).rows) == 3


@pytest.fixture(name="evaluation", scope="module")
def fixture_evaluation(tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp("evaluation"))
  return folder, fakes.evaluation(fakes.Sampler()).run(None, None, folder, 0)


class TestRescore:
  @pytest.mark.parametrize("devices", [1, 2])
  def test_every_image_is_scored_once_by_the_reward(self, evaluation, devices):
    folder, samples = evaluation
    mesh = meshes.make_mesh_on(jax.devices()[:devices], devices, 1, 1)
    scores = second_judge.rescore(
      combine.of_world(world.WORLD), mesh, folder, samples, fakes.RECORDS, 4
    )
    assert len(scores) == 20 + 10  # a round that stops has no image of its own
    assert {(one.key, one.round) for one in scores} == {
      (one.key, one.round) for one in second_judge.scores_of(samples)
    }
    # plain grey: nothing is there
    assert all(one.score == 0.0 for one in scores)
    assert set(scores[0].parts) == {"correct", "strict", "clutter"}

  def test_a_host_reward_is_asked_about_every_image_once(self, evaluation):
    folder, samples = evaluation
    asked = []

    class Half:
      parts = ("strict",)

      def check(self, prompt):
        pass

      def score(self, images, prompts):
        asked.extend(prompt.text for prompt in prompts)
        return [outcome.Ok(0.5, {"strict": 0.0})] * len(images)

    reward = combine.on_host("half", scorer.Scorer(Half()))
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    scores = second_judge.rescore(
      reward, mesh, folder, samples, fakes.RECORDS, 4
    )
    # 30 images in batches of 4: the last batch has two more rows.
    assert sorted(asked) == sorted(score.prompt for score in scores)
    assert len(asked) == 30
    assert {score.score for score in scores} == {0.5}

  def test_other_prompts_are_refused(self, evaluation):
    folder, samples = evaluation
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    with pytest.raises(ValueError, match="must be those of the evaluation"):
      second_judge.rescore(
        combine.of_world(world.WORLD),
        mesh,
        folder,
        samples,
        fakes.RECORDS[1:],
        4,
      )

  def test_files(self, tmp_path):
    found = second_judge.by_tag(FIRST, SECOND, seed=0)
    judge_report.write(
      epath.Path(tmp_path), "other", SECOND, found, ["CONTAMINATED: so it is."]
    )
    kept = json.loads((tmp_path / "judges" / "other.json").read_text())
    assert kept["agreement"]["all"]["images"] == 4 and kept["scores"] == [
      dataclasses.asdict(score) for score in SECOND
    ]
    text = (tmp_path / "judges" / "other.md").read_text()
    assert "| all | 4 |" in text and text.startswith(
      "**CONTAMINATED: so it is.**"
    )


class TestSeen:
  def test_boxes_and_objects_are_those_of_the_scene(self):
    scenes = [batches.dense_scene(i, seed=4) for i in range(6)]
    stacked = jax.tree.map(
      lambda *x: np.stack(x),
      *[scene.replace(ghost_shape=np.full(9, -1)) for scene in scenes],
    )
    images = np.asarray(scenes_lib.render(stacked))
    for i, (objects, boxes) in enumerate(
      zip(readings.objects(images), readings.boxes(images), strict=True)
    ):
      scene = jax.tree.map(lambda x, i=i: x[i], stacked)
      assert objects == scenes_lib.objects_of(scene)
      for (shape, color, cell), box in zip(objects, boxes, strict=True):
        assert (
          box["label"]
          == f"{scenes_lib.COLORS[color]} {scenes_lib.SHAPES[shape]}"
        )
        size, row, column = int(scene.size[cell]), *divmod(cell, 3)
        corner = (
          np.array([row, column]) * 16
          + scenes_lib.margin(size)
          + [scene.dy[cell], scene.dx[cell]]
        )
        np.testing.assert_allclose(
          np.array(box["box"]) * 48, [*corner, *(corner + size)], atol=0.51
        )
