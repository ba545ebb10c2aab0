"""Tests of rewards/from_host/user_function.py and of docs/howto/add_a_reward.md."""

import sys

import jax
import numpy as np
import pytest

from configs import r3_geneval
from r3jax import plugins
from r3jax.data import records
from r3jax.files import jsonl
from r3jax.parallel import meshes
from r3jax.rewards import outcome
from r3jax.rewards import registry
from r3jax.rewards.from_host import scorer
from r3jax.rewards.from_host import user_function
from r3jax.worlds.shapes import prompts
from tests import pages

PROMPTS = [records.Prompt("t", f"prompt {i}") for i in range(3)]
IMAGES = np.full((3, 4, 4, 3), np.uint8([0, 102, 255])[:, None, None, None])
HERE = "tests.rewards.test_user_function"
NO_FUNCTION = 3


def brightness(image, prompt):
  del prompt
  return image.mean() / 255


def outcomes(image, prompt):
  if prompt.text == "prompt 0":
    return outcome.Failed("down")
  if prompt.text == "prompt 1":
    return outcome.Invalid("odd")
  return outcome.Ok(0.5, {}, {"note": "n"})


def whole_batch(images, prompts):
  assert len(images) == len(prompts)
  return images.mean(axis=(1, 2, 3)) / 255


whole_batch.batched = True


def with_parts(image, prompt):
  return outcome.Ok(1.0, {"sharp": 0.25})


with_parts.parts = ("sharp",)


def too_few(images, prompts):
  return [0.5] * (len(images) - 1)


too_few.batched = True


def raises(image, prompt):
  raise ZeroDivisionError("a bug")


def too_large(image, prompt):
  return 1.5


def text(image, prompt):
  return "good"


def truth(image, prompt):
  return True


def exits(image, prompt):
  sys.exit(3)


def endless_detail(image, prompt):
  detail = {}
  detail["again"] = detail
  return outcome.Ok(1.0, {}, detail)


def nan_detail(image, prompt):
  return outcome.Ok(1.0, {}, {"x": float("nan")})


def numpy_detail(image, prompt):
  return outcome.Ok(1.0, {}, {"x": np.float32(1)})


def of_numpy(image, prompt):
  return outcome.Ok(np.float32(0.5), {"strict": np.bool_(False)}, None)


def undeclared_parts(image, prompt):
  return outcome.Ok(1.0, {"sharp": 0.25})


def score(name, images=IMAGES):
  function = user_function.UserFunction(f"{HERE}:{name}", (4, 4))
  return function.score(images, PROMPTS)


class TestScore:
  def test_number_is_the_score_and_strict_where_it_is_one(self):
    assert score("brightness") == [
      outcome.Ok(0.0, {"strict": 0.0}),
      outcome.Ok(0.4, {"strict": 0.0}),
      outcome.Ok(1.0, {"strict": 1.0}),
    ]

  def test_batch_has_the_scores_of_single_images(self):
    assert score("whole_batch") == score("brightness")

  def test_outcomes_pass_through(self):
    failed, invalid, ok = score("outcomes")
    assert failed == outcome.Failed("down")
    assert invalid == outcome.Invalid("odd")
    assert ok == outcome.Ok(0.5, {"strict": 0.0}, {"note": "n"})

  def test_named_parts_are_kept(self):
    assert score("with_parts")[0].parts == {"strict": 1.0, "sharp": 0.25}

  def test_numbers_of_numpy_are_written_to_the_log(self, tmp_path):
    function = user_function.UserFunction(f"{HERE}:of_numpy", (4, 4))
    at_work = scorer.Scorer(function)
    at_work.log_to(tmp_path / "log.jsonl", None)
    numbers = at_work.encode(PROMPTS)
    assert at_work._score(IMAGES, numbers).value.tolist() == [0.5] * 3
    at_work.flush()
    line = jsonl.read(tmp_path / "log.jsonl")[0]
    assert (line["score"], line["parts"]) == (0.5, {"strict": 0.0})

  @pytest.mark.parametrize(
    "name, reason",
    [
      ("exits", "raised SystemExit: 3"),
      ("endless_detail", "its detail must hold JSON values: it must be nested"),
      ("nan_detail", "its detail must hold JSON values: Out of range"),
      ("numpy_detail", "its detail must hold JSON values: Object of type"),
      ("raises", "raised ZeroDivisionError: a bug"),
      ("too_large", "a score must be in [0, 1]; got 1.5"),
      ("text", "must return a number in [0, 1], or an outcome.Ok"),
      ("truth", "got a bool"),
      ("too_few", "must return 3 results, one for each image; got 2"),
      ("undeclared_parts", "must have the parts ['strict']; got ['sharp'"),
    ],
  )
  def test_anything_else_is_a_failure_with_its_reason(self, name, reason):
    results = score(name)
    assert len(results) == 3
    for result in results:
      assert isinstance(result, outcome.Failed)
      assert f"{HERE}:{name}" in result.reason and reason in result.reason


class TestBuild:
  @pytest.mark.parametrize(
    "name, message",
    [
      ("tests.rewards.nowhere:f", "module tests.rewards.nowhere must be"),
      (f"{HERE}:nothing", f"{HERE} must define nothing; it does not"),
      (f"{HERE}:NO_FUNCTION", "must name a function; it is a int"),
    ],
  )
  def test_name_of_no_function_is_refused(self, name, message):
    with pytest.raises(ValueError, match=message):
      registry.build(_section(name))

  @pytest.mark.parametrize("name", ["raises", "too_large", "text", "too_few"])
  def test_broken_function_is_refused_before_a_run_starts(self, name):
    reward = registry.build(_section(f"{HERE}:{name}"), None, (4, 4))
    with pytest.raises(
      ValueError, match="must score a first image before a run starts"
    ):
      reward.encode(PROMPTS)

  def test_function_is_tried_once_with_an_image_of_the_run(self):
    function = user_function.UserFunction(f"{HERE}:brightness", (6, 8))
    shapes = []
    function._function = lambda image, prompt: shapes.append(image.shape) or 1
    for prompt in PROMPTS:
      function.check(prompt)
    assert shapes == [(6, 8, 3)]

  def test_source_identifies_the_function(self):
    first, second = (
      user_function.UserFunction(f"{HERE}:{name}", (4, 4)).describe()
      for name in ("brightness", "whole_batch")
    )
    assert first["function"] == f"{HERE}:brightness"
    assert first["source_sha256"] != second["source_sha256"]

  def test_member_of_a_sum(self):
    members = {"own": {"name": f"{HERE}:brightness", "weight": 1.0}}
    reward = registry.build(_section("sum", members=members))
    assert reward.parts == ("strict", "own", "own/strict")
    assert list(reward.scorers) == ["own/brightness"]


def _section(name, **changes):
  section = r3_geneval.get_config().unlock().reward
  section.update({"name": name} | changes)
  return section


class TestHowTo:
  """What docs/howto/add_a_reward.md shows."""

  @pytest.fixture
  def module(self, tmp_path, monkeypatch):
    """Writes the page's code to a module of its name."""
    code = pages.code_blocks("howto/add_a_reward.md", "python")
    (tmp_path / "my_rewards.py").write_text("\n\n".join(code))
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)

  def test_example_scores_images_inside_the_step(self, module, tmp_path):
    reward = registry.build(_section(f"{module}:colorfulness"), None, (4, 4))
    target = reward.encode(prompts.heldout_records()[:3])
    reward.log_to(tmp_path / "rewards", 0)
    mesh = meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 255
    images[2] = 255
    rows = jax.sharding.PartitionSpec("data")
    with jax.set_mesh(mesh):
      step = jax.shard_map(
        reward.on(mesh),
        in_specs=rows,
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,
      )
      scores = jax.device_get(jax.jit(step)(images, target))
    reward.raise_together()
    assert scores.valid.tolist() == [False, True, True]
    assert scores.value[1:].tolist() == [1, 0]
    assert scores.parts["strict"][1:].tolist() == [1, 0]
    lines = jsonl.read(tmp_path / "rewards" / "colorfulness.0.jsonl")
    assert sorted(line["status"] for line in lines) == ["invalid", "ok", "ok"]
    metrics = reward.metrics()
    assert metrics["service/colorfulness/images_ok"] == 2
    assert metrics["service/colorfulness/images_invalid"] == 1

  def test_batched_example_names_its_parts(self, module):
    function = user_function.UserFunction(f"{module}:contrast", (4, 4))
    function.check(PROMPTS[0])
    images = IMAGES.copy()
    images[0, 0, 0] = 51
    first, *_ = function.score(images, PROMPTS)
    assert first.score == pytest.approx(0.2)
    assert first.parts == {"strict": 0.0, "brightest": pytest.approx(0.2)}


class TestBrokenModule:
  """A module that cannot be imported is the user's own: the message has its file and line."""

  @pytest.mark.parametrize(
    "source, place",
    [
      (
        "import math\n\nmath.sqrt(number)\n",
        "line 3: NameError: name 'number'",
      ),
      ("import os\nimport nonesuch\n", "line 2: ModuleNotFoundError: No"),
      ("import json\njson.loads('{')\n", "line 2: JSONDecodeError: Expecting"),
      ("def score(image:\n  pass\n", "line 1: SyntaxError: "),
    ],
  )
  def test_is_one_line(self, tmp_path, monkeypatch, source, place):
    path = tmp_path / "broken_reward.py"
    path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="must be importable; ") as refusal:
      plugins.load("broken_reward:score", "reward.name")
    message = str(refusal.value)
    assert f"{path}, {place}" in message and "\n" not in message
