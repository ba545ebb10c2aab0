"""Tests of rewards/serving/preferences.py and local.Preference.

Tiny random models of the same architectures: pip install -e ".[preferences]" &&
python -m pytest tests/rewards/test_preferences.py
"""

import importlib.util
import sys

import numpy as np
from PIL import Image
import pytest

from r3jax.data import records
from r3jax.rewards import outcome
from r3jax.rewards.serving import geneval
from r3jax.rewards.serving import local
from r3jax.rewards.serving import preferences

HAS_EXTRA = all(map(importlib.util.find_spec, ("torch", "transformers")))
needs_extra = pytest.mark.skipif(
  not HAS_EXTRA, reason="needs the extra preferences: torch and transformers"
)
WORDS = ("<start>", "<end>", "a", "red", "cat", "dog", "<unknown>")
SIZE = 28
TEXTS = ("a red cat", "dog", "a red red dog cat a cat dog dog red")
IMAGES = tuple(
  np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)
)


class TestFit:
  def test_a_crop_is_the_middle_of_the_shorter_side(self):
    image = np.zeros((28, 56, 3), np.uint8)
    image[:, 14:42] = 255
    white = (1 - preferences._MEAN) / preferences._STD
    fitted = preferences.fit(image, 28, pads=False)
    assert fitted.shape == (3, 28, 28) and fitted.dtype == np.float32
    np.testing.assert_allclose(
      fitted, np.full_like(fitted, 1) * white[:, None, None], rtol=1e-6
    )

  def test_padding_is_black_and_keeps_all_of_the_image(self):
    fitted = preferences.fit(np.full((14, 28, 3), 255, np.uint8), 28, pads=True)
    is_white = fitted[0] > 0
    assert (
      is_white[7:21].all()
      and not is_white[:7].any()
      and not is_white[21:].any()
    )

  def test_a_large_image_is_resized_bicubic(self):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    resized = Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)
    expected = (
      np.asarray(resized) / 255 - preferences._MEAN
    ) / preferences._STD
    for pads in (True, False):
      fitted = preferences.fit(image, 28, pads)
      np.testing.assert_allclose(fitted.transpose(1, 2, 0), expected, atol=1e-6)


class TestScore:
  def rewarded(self, *numbers):
    def rate(images, texts):
      assert len(images) == len(texts) <= 16
      return np.array(numbers[: len(images)])

    model = preferences.Preference({"model": "scripted"}, rate, (10.0, 30.0))
    reward = local.Preference(model)
    prompts = [records.Prompt("untagged", "a cat")] * len(numbers)
    return reward.score(np.zeros((len(numbers), 4, 4, 3), np.uint8), prompts)

  def test_numbers_of_the_span_become_scores(self):
    scores = [result.score for result in self.rewarded(10.0, 15.0, 30.0)]
    assert scores == [0, 0.25, 1]

  @pytest.mark.parametrize("number", [9.9, 30.1, np.nan, np.inf])
  def test_a_number_outside_has_no_score(self, number):
    right, wrong = self.rewarded(20.0, number)
    assert right == outcome.Ok(0.5, {"strict": 0.0}, {"number": 20.0})
    assert isinstance(wrong, outcome.Failed)
    assert "must be in 10.0 to 30.0 (--span)" in wrong.reason

  def test_images_are_rated_in_batches(self):
    assert len(self.rewarded(*[20.0] * 40)) == 40


class TestLoad:
  @pytest.mark.parametrize("name", ["hpsv2", "aesthetic"])
  def test_missing_weights_are_named(self, name):
    with pytest.raises(ValueError, match=f"{name} needs --weights, the path"):
      preferences.load(name, preferences.Options())

  def test_missing_extra_is_named(self, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"install r3jax\[preferences\]"):
      preferences.load("pickscore", preferences.Options())

  def test_a_span_must_rise(self):
    options = preferences.Options(span=(1.0, 1.0))
    with pytest.raises(ValueError, match="--span must be two numbers that"):
      preferences.load("pickscore", options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with a tiny CLIP of random weights, and a tokenizer of words."""
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "projection_dim": 12,
  }
  config = transformers.CLIPConfig(
    text_config=dict(
      vocab_size=len(WORDS),
      max_position_embeddings=8,
      bos_token_id=0,
      eos_token_id=1,
      pad_token_id=1,
      **sizes,
    ),
    vision_config=dict(image_size=SIZE, patch_size=14, **sizes),
    projection_dim=12,
  )
  folder = tmp_path_factory.mktemp("clip")
  model = transformers.CLIPModel(config)
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
  with torch.no_grad():
    model.logit_scale.fill_(2.5)
  model.save_pretrained(folder)
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, eos_token="<end>", pad_token="<end>"
  ).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def expected(folder):
  """Returns embeddings of IMAGES and TEXTS, not normalized, and the factor of PickScore."""
  import torch
  import transformers

  model = transformers.CLIPModel.from_pretrained(folder).eval()
  pixels = [preferences.fit(image, SIZE, pads=False) for image in IMAGES]
  # Start, at most six words, end: eight positions.
  ids = [[0, 2, 3, 4, 1], [0, 5, 1], [0, 2, 3, 3, 5, 4, 2, 1]]
  with torch.inference_mode():
    image = model.visual_projection(
      model.vision_model(torch.from_numpy(np.stack(pixels))).pooler_output
    )
    text = torch.cat(
      [
        model.text_projection(
          model.text_model(input_ids=torch.tensor([row])).pooler_output
        )
        for row in ids
      ]
    )
  return image.numpy(), text.numpy(), float(model.logit_scale.exp())


def normalized(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@needs_extra
class TestTinyModels:
  def rated(self, name, folder, **options):
    options = preferences.Options(model=str(folder), **options)
    return preferences.load(name, options).rate(IMAGES, TEXTS)

  def test_pickscore_is_the_scaled_cosine(self, folder, expected):
    image, text, factor = expected
    cosines = (normalized(image) * normalized(text)).sum(-1)
    rated = self.rated("pickscore", folder)
    np.testing.assert_allclose(rated, factor * cosines, atol=1e-4)
    assert (
      len(set(np.sign(rated))) > 1
    )  # so that the next test has something to clip

  def test_clipscore_is_a_hundred_cosines_and_not_negative(
    self, folder, expected
  ):
    image, text, _ = expected
    cosines = (normalized(image) * normalized(text)).sum(-1)
    rated = self.rated("clipscore", folder)
    np.testing.assert_allclose(rated, 100 * cosines.clip(0), atol=1e-4)

  def test_aesthetic_is_a_linear_head_on_the_image(
    self, folder, expected, tmp_path
  ):
    import torch

    rng = np.random.default_rng(2)
    tensors = {}
    value = normalized(expected[0])
    # Numbers of LAION's layers: dropout takes those in between.
    for number, (inputs, outputs) in {
      0: (12, 8),
      2: (8, 6),
      4: (6, 5),
      6: (5, 4),
      7: (4, 1),
    }.items():
      weight, bias = (
        rng.normal(size=(outputs, inputs)),
        rng.normal(size=outputs),
      )
      value = value @ weight.T + bias
      tensors[f"layers.{number}.weight"] = torch.tensor(weight)
      tensors[f"layers.{number}.bias"] = torch.tensor(bias)
    torch.save(tensors, tmp_path / "head.pth")
    rated = self.rated("aesthetic", folder, weights=str(tmp_path / "head.pth"))
    np.testing.assert_allclose(rated, value[:, 0], rtol=1e-4, atol=1e-4)

  def test_hpsv2_reads_weights_of_open_clip(self, folder, tmp_path):
    """A file in open_clip's names has the cosine of the model that it is of."""
    import torch
    import transformers

    source = transformers.CLIPModel.from_pretrained(folder)
    file = tmp_path / "hps.pt"
    torch.save({"state_dict": as_open_clip(source.state_dict())}, file)
    # A model of other weights and the same sizes, which the file must replace.
    other = transformers.CLIPModel(source.config)
    other.save_pretrained(tmp_path / "other")
    options = preferences.Options(
      model=str(tmp_path / "other"), tokenizer=str(folder), weights=str(file)
    )
    rated = preferences.load("hpsv2", options).rate(IMAGES, TEXTS)
    pixels = [preferences.fit(image, SIZE, pads=True) for image in IMAGES]
    ids = torch.tensor([[0, 2, 3, 4, 1], [0, 5, 1, 1, 1]])
    with torch.inference_mode():
      output = source.eval()(
        input_ids=ids, pixel_values=torch.from_numpy(np.stack(pixels[:2]))
      )
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    np.testing.assert_allclose(rated[:2], cosines.numpy(), atol=1e-5)

  def test_query_key_and_value_are_in_the_order_of_pytorch(self):
    """open_clip's attention is PyTorch's, whose in_proj_weight this is."""
    import torch

    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 5, 8)
    q, k, v = (x @ part.T for part in attention.in_proj_weight.chunk(3))
    heads = [y.view(1, 5, 2, 4).transpose(1, 2) for y in (q, k, v)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
    ours = attention.out_proj(mixed.transpose(1, 2).reshape(1, 5, 8))
    theirs, _ = attention(x, x, x)
    torch.testing.assert_close(ours, theirs)

  def test_files_of_another_model_are_refused(self, folder, tmp_path):
    import torch

    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for name, file, message in (
      ("hpsv2", "other.pt", "must have the tensors of the CLIP model"),
      ("aesthetic", "other.pt", "must have tensors layers.N.weight"),
      ("aesthetic", "text.pt", "must be a file of tensors by PyTorch"),
      ("hpsv2", "nowhere.pt", "must be a file of tensors by PyTorch"),
    ):
      with pytest.raises(ValueError, match=message):
        self.rated(name, folder, weights=str(tmp_path / file))
    with pytest.raises(ValueError, match="must be readable by transformers"):
      preferences.load("pickscore", preferences.Options(model=str(tmp_path)))

  def test_identity_follows_the_weights(self, folder, tmp_path):
    import transformers

    first = local.load(
      "clipscore", "", "", geneval.OFFICIAL, preferences.Options(str(folder))
    )
    identity = first.describe()
    assert identity["span"] == [0, 50]
    model = transformers.CLIPModel.from_pretrained(folder)
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path)
    options = preferences.Options(str(tmp_path), str(folder))
    other = preferences.load("clipscore", options).identity
    assert other["weights"] != identity["weights"]


def as_open_clip(tensors):
  """Returns the tensors of transformers' CLIP under open_clip's names."""
  import torch

  names = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
  }
  renamed = {}
  for name, tensor in tensors.items():
    if name.endswith("position_ids"):
      continue
    if name == "text_projection.weight":
      renamed["text_projection"] = tensor.T
      continue
    if name == "visual_projection.weight":
      renamed["visual.proj"] = tensor.T
      continue
    if ".k_proj." in name or ".v_proj." in name:
      continue
    if ".q_proj." in name:
      parts = [
        tensors[name.replace("q_proj", x)]
        for x in ("q_proj", "k_proj", "v_proj")
      ]
      tensor = torch.cat(parts)
      name = name.replace(".q_proj.", ".in_proj_")
    for theirs, ours in names.items():
      name = name.replace(theirs, ours)
    renamed[name] = tensor
  return renamed
