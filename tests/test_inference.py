"""Tests of a model at work: the same chains as evaluation, edits, answers."""

import dataclasses
import gc
import pathlib
import re
import weakref

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax import inference
from r3jax.agent import rollout
from r3jax.data import records
from r3jax.evaluation import chains
from r3jax.files import config_files
from r3jax.model import preprocess
from r3jax.parallel import meshes
from r3jax.run import setup
from r3jax.run import stage_settings
from tests import tiny

PROMPT, NUMBER, IMAGES, ROUNDS, SEED = "a photo of a ring", 5, 6, 4, 3
SIZE = (48, 48, 3)


@pytest.fixture(scope="module")
def mesh():
  return meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1)


@pytest.fixture(scope="module")
def model(tiny_model, mesh):
  return inference.load(tiny.make_config(tiny_model), mesh)


@pytest.fixture(scope="module")
def said():
  return []


@pytest.fixture(scope="module")
def samples(model, said):
  return model.generate(
    PROMPT, IMAGES, ROUNDS, SEED, NUMBER, lambda *written: said.append(written)
  )


@pytest.fixture(scope="module")
def rounds(tiny_model, mesh):
  """The same chains out of evaluation."""
  config = tiny.make_config(tiny_model)
  experiment = setup.build(config)
  settings = stage_settings.for_evaluation(config, experiment.rollout)
  parse = experiment.parse(mesh)
  sampler = chains.Sampler(
    experiment.modules,
    settings,
    tiny.brightness,
    parse,
    mesh,
    ROUNDS,
    IMAGES,
    SEED,
  )
  prompt = records.Prompt.from_json(
    {
      "prompt": PROMPT,
      "tag": "single_object",
      "include": [{"class": "ring", "count": 1}],
    }
  )
  prompts = dataclasses.replace(
    experiment.encode((prompt,)),
    index=np.array([NUMBER], np.int32),
  )
  with jax.set_mesh(mesh):
    return tiny.draw(sampler, *experiment.load(mesh), prompts, IMAGES)


class TestGenerate:
  def test_makes_the_chains_of_evaluation(self, samples, rounds, model):
    lengths = [len(sample.turns) for sample in samples]
    assert min(lengths) < max(lengths)  # some stop before others
    for i, sample in enumerate(samples):
      assert sample.prompt == PROMPT
      for turn, found in zip(sample.turns, rounds):
        ids = found.text.ids[i, 1 : found.text.lengths[i] - 1]
        assert turn.text == model.base.pretrained.tokenizer.decode(ids.tolist())
        assert turn.stop == found.stop[i]
        assert np.abs(turn.image.astype(int) - found.kept.images[i]).max() <= 1
      stopped = [turn.stop for turn in sample.turns]
      assert not any(stopped[:-1])
      assert stopped[-1] or len(stopped) == ROUNDS

  def test_a_finished_sample_keeps_its_image(self, samples):
    finished = [sample.turns for sample in samples if sample.turns[-1].stop]
    assert finished
    for turns in finished:
      np.testing.assert_array_equal(turns[-1].image, turns[-2].image)

  def test_tells_every_text_once(self, samples, said):
    expected = [
      (i, k, turn.text)
      for i, sample in enumerate(samples)
      for k, turn in enumerate(sample.turns)
    ]
    assert sorted(said) == sorted(expected)

  def test_list_of_prompts_is_drawn_prompt_by_prompt(self, model, samples):
    drawn = model.generate([PROMPT, PROMPT], IMAGES, 1, SEED, NUMBER - 1)
    assert [len(images) for images in drawn] == [IMAGES, IMAGES]
    # The second one has the number of the other test.
    for one, other in zip(drawn[1], samples, strict=True):
      np.testing.assert_array_equal(one.turns[0].image, other.turns[0].image)

  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      ({"prompt": 3}, "prompt must be a text or a list of texts; got int"),
      ({"prompt": None}, "a list of texts; got NoneType"),
      ({"prompt": [PROMPT, 3]}, "prompt must be a text; got int"),
      ({"num_images": 2.0}, "num_images must be a whole number; got float"),
      ({"rounds": True}, "rounds must be a whole number; got bool"),
      ({"seed": "0"}, "seed must be a whole number; got str"),
    ],
  )
  def test_other_types_are_refused(self, model, arguments, message):
    with pytest.raises(TypeError, match=message):
      model.generate(**({"prompt": PROMPT} | arguments))

  def test_is_deterministic_and_seed_and_number_draw_others(
    self, model, samples
  ):
    def draft(**changes):
      return model.generate(
        PROMPT,
        IMAGES,
        **{"rounds": 1, "seed": SEED, "number": NUMBER} | changes,
      )

    again = [sample.turns[0] for sample in draft()]
    for turn, sample in zip(again, samples, strict=True):
      assert turn.text == sample.turns[0].text
      np.testing.assert_array_equal(turn.image, sample.turns[0].image)
    for other in (draft(seed=SEED + 1), draft(number=NUMBER + 1)):
      assert any(
        (sample.turns[0].image != turn.image).any()
        for sample, turn in zip(other, again)
      )

  def test_an_image_does_not_depend_on_how_many_are_drawn(self, model, samples):
    for sample, expected in zip(
      model.generate(PROMPT, 2, 1, SEED, NUMBER), samples
    ):
      assert sample.turns[0].text == expected.turns[0].text
      assert (
        np.abs(
          sample.turns[0].image.astype(int) - expected.turns[0].image
        ).max()
        <= 1
      )

  @pytest.mark.parametrize(
    "arguments, message",
    [
      ({"prompt": "a photo of a dragon"}, r"unknown \['dragon'\]"),
      ({"prompt": "a ring " * 20}, "must fit its segment"),
      ({"prompt": PROMPT, "num_images": 0}, "at least 1; got 0 and 4"),
      ({"prompt": PROMPT, "rounds": 0}, "at least 1; got 1 and 0"),
    ],
  )
  def test_refuses_what_it_cannot_draw(self, model, arguments, message):
    with pytest.raises(ValueError, match=message):
      model.generate(**arguments)


class TestEdit:
  def test_edits_are_images_of_their_own_and_deterministic(
    self, model, samples
  ):
    image = samples[0].turns[0].image
    edited = model.edit(image, "add a red ring", num_images=2, seed=1)
    assert [(one.shape, one.dtype) for one in edited] == [(SIZE, np.uint8)] * 2
    assert (edited[0] != edited[1]).any()
    for one, again in zip(
      edited, model.edit(image, "add a red ring", num_images=2, seed=1)
    ):
      np.testing.assert_array_equal(one, again)
    other = model.edit(image, "remove the red ring", num_images=2, seed=1)
    assert (edited[0] != other[0]).any()

  @pytest.mark.parametrize(
    "image", [np.zeros((48, 32, 3), np.uint8), np.zeros(SIZE, np.float32)]
  )
  def test_refuses_another_size_or_dtype(self, model, image):
    with pytest.raises(ValueError, match=r"must be uint8 \[48, 48, 3\]; got"):
      model.edit(image, "add a red ring")
    with pytest.raises(ValueError, match=r"must be uint8 \[48, 48, 3\]; got"):
      model.ask(image, "what is there ?")

  def test_a_canvas_need_not_be_square(self, tiny_model, mesh):
    config = tiny.make_config(tiny_model)
    image = inference.fit(config, np.full((96, 64, 3), 240, np.uint8))
    assert image.shape == (48, 32, 3)
    (edited,) = inference.load(config, mesh).edit(image, "add a red ring")
    assert edited.shape == (48, 32, 3)


class TestAsk:
  def test_answers_in_its_own_words_and_deterministically(self, model):
    image = np.full(SIZE, 240, np.uint8)
    answers = [model.ask(image, "what is there ?", seed) for seed in range(8)]
    assert set(" ".join(answers).split()) <= {
      *tiny.SCRIPT,
      "<|im_start|>",
      "<|im_end|>",
    }
    assert len(set(answers)) > 1
    assert model.ask(image, "what is there ?", 0) == answers[0]


class TestLoad:
  def test_shards_over_all_devices_and_computes_in_the_models_dtype(
    self, tiny_model
  ):
    model = inference.load(
      tiny.make_config(tiny_model, {"mesh.data": -1, "model.dtype": "bfloat16"})
    )
    assert dict(model.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert {leaf.dtype for leaf in jax.tree.leaves(model.policy)} == {
      jnp.dtype(jnp.bfloat16)
    }

  def test_a_model_is_freed_with_its_last_name(self, tiny_model, mesh):
    model = inference.load(tiny.make_config(tiny_model), mesh)
    model.ask(np.full(SIZE, 240, np.uint8), "what is there ?")
    leaf = weakref.ref(jax.tree.leaves(model.policy)[0])
    del model
    gc.collect()
    assert leaf() is None

  def test_second_start_does_not_trace_and_answers_the_same(
    self, tiny_model, mesh, model, tmp_path, monkeypatch
  ):
    traced = []
    reflect = rollout.reflect

    def counted(*arguments):
      traced.append("reflect")
      return reflect(*arguments)

    monkeypatch.setattr(rollout, "reflect", counted)
    image = np.full(SIZE, 240, np.uint8)
    answers = []
    for seed in (0, 1):
      config = tiny.make_config(tiny_model, {"seed": seed, "eval.rounds": 1})
      started = inference.load(config, mesh, epath.Path(tmp_path))
      # Static arguments of the functions that JAX keeps in this process.
      jax.clear_caches()
      answers.append(started.ask(image, "what is there ?", SEED))
    assert traced == ["reflect"]
    # look and reflect
    assert len(list(tmp_path.iterdir())) == 2
    expected = model.ask(image, "what is there ?", SEED)
    assert answers == [expected, expected]

  def test_refuses_a_size_that_the_model_does_not_keep(self, tiny_model, mesh):
    message = (
      r"must be a size that the model keeps: multiples of \d+ from \d+ to \d+ "
      r"\(constants.json .*set image.height=\d+ and image.width=\d+\)$"
    )
    with pytest.raises(ValueError, match=message):
      inference.load(tiny.make_config(tiny_model, {"image.height": 40}), mesh)


class TestReadme:
  def test_its_example_runs(self, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(
      meshes,
      "make_mesh",
      lambda **unused: meshes.make_mesh_on(jax.devices()[:1], 1, 1, 1),
    )
    config = tiny.make_config(tiny_model, {"sequence.instruction_tokens": 14})
    monkeypatch.setattr(config_files, "load", lambda name: config)
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})  # pylint: disable=exec-used
    assert capsys.readouterr().out


class TestFit:
  def test_resizes_as_the_model_does_and_sets_the_size(self, tiny_model):
    config = tiny.make_config(tiny_model)
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    fitted = inference.fit(config, image)
    assert (config.image.height, config.image.width) == (48, 48)
    np.testing.assert_array_equal(
      fitted, np.asarray(preprocess.resize(image[None], (48, 48)))[0]
    )


class TestOtherTypes:
  def test_image_must_be_an_array(self, model):
    for image in ("drawn.png", [[1]], None):
      with pytest.raises(TypeError, match="an image must be an array, uint8"):
        model.edit(image, "add a ring")
    image = np.zeros(SIZE, np.uint8)
    with pytest.raises(TypeError, match="instruction must be a text; got int"):
      model.edit(image, 3)
    with pytest.raises(TypeError, match="question must be a text; got list"):
      model.ask(image, ["what ?"])

  def test_config_is_one_or_its_name(self):
    with pytest.raises(
      TypeError, match="config must be a ConfigDict.* got dict"
    ):
      inference.load({})
    with pytest.raises(ValueError, match="got 'shape'"):
      inference.load("shape")


class TestPublicNames:
  def test_shipped_model_is_loaded_by_its_world(self, monkeypatch):
    loaded = []
    monkeypatch.setattr(
      inference, "prepare", lambda config, *_: loaded.append(config) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
      inference.load("shapes")
    assert loaded[0].world == "shapes"

  def test_package_has_type_hints(self):
    assert (pathlib.Path(inference.__file__).parent / "py.typed").exists()
