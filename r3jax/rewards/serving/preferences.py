"""Models of human preference and of agreement with the prompt, by CLIP from Hugging Face.

Needs the extra `r3jax[preferences]`. No weights were at hand: tests build the architectures with
small random weights, and compare with PyTorch.

With e_i and e_t the normalized embeddings of image and prompt, and s the model's logit scale:
- pickscore: exp(s) <e_i, e_t> (Kirstain et al., arXiv 2305.01569);
- clipscore: 100 max(<e_i, e_t>, 0), as torchmetrics has it; 2.5 max(<e_i, e_t>, 0) of Hessel et al.
  (arXiv 2104.08718) is this / 40, without their prefix "A photo depicts";
- hpsv2: <e_i, e_t> of a CLIP that was tuned on preferences (Wu et al., arXiv 2306.09341);
- aesthetic: a linear head on e_i, LAION's improved aesthetic predictor; the prompt does not count.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import math
import re
from typing import Any

import numpy as np
from PIL import Image

from r3jax.files import paths

# Those of OpenAI's CLIP, which all of these models share.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_VIT_L = "openai/clip-vit-large-patch14"
_LETTERS = 500  # of another library's error that are repeated


@dataclasses.dataclass(frozen=True)
class Kind:
  """A preference model.

  Attributes:
    model: name of its CLIP at Hugging Face.
    tokenizer: name of the model that has the tokenizer; "" where no text is read.
    weights: name of the file beside the CLIP that it needs; "" for none.
    span: the numbers that become the scores 0 and 1.
    pads: whether the longer side of an image is fitted and the rest black, or the shorter side
      is fitted and the middle cut out.
  """

  model: str
  tokenizer: str
  weights: str
  span: tuple[float, float]
  pads: bool = False


KINDS = {
  "aesthetic": Kind(_VIT_L, "", "sac+logos+ava1-l14-linearMSE.pth", (0, 10)),
  "clipscore": Kind(_VIT_L, _VIT_L, "", (0, 50)),
  "hpsv2": Kind(_VIT_H, _VIT_H, "HPS_v2.1_compressed.pt", (0, 0.5), pads=True),
  "pickscore": Kind("yuvalkirstain/PickScore_v1", _VIT_H, "", (10, 30)),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user sets of a preference model; "" and None take what its kind has.

  Attributes:
    model: folder or name of the CLIP model.
    tokenizer: folder or name of the model with the tokenizer.
    weights: path of the file that the kind needs beside it.
    span: the numbers that become the scores 0 and 1.
  """

  model: str = ""
  tokenizer: str = ""
  weights: str = ""
  span: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Preference:
  """A loaded preference model.

  Attributes:
    identity: what scores, as JSON values for the run's manifest.
    rate: images, a list of uint8 [H, W, 3], and the texts of their prompts -> float [n], in the
      model's own numbers.
    span: the numbers that become the scores 0 and 1.
  """

  identity: dict
  rate: Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
  span: tuple[float, float]


def fit(image: np.ndarray, size: int, pads: bool) -> np.ndarray:
  """Returns an image as CLIP sees it: float32 [3, size, size], normalized.

  Args:
    image: uint8 [H, W, 3].
    size: of the model's images.
    pads: see `Kind`.
  """
  height, width = image.shape[:2]
  side = max(height, width) if pads else min(height, width)
  # Sizes are rounded as the libraries that trained these models round them.
  scaled = round if pads else math.floor
  new_width = max(1, scaled(width * size / side))
  new_height = max(1, scaled(height * size / side))
  resized = Image.fromarray(image).resize(
    (new_width, new_height), Image.Resampling.BICUBIC
  )
  left = round((new_width - size) / 2)
  top = round((new_height - size) / 2)
  # Outside of the image a crop is black.
  square = resized.crop((left, top, left + size, top + size))
  pixels = np.asarray(square, np.float32) / 255
  return ((pixels - _MEAN) / _STD).transpose(2, 0, 1)


@dataclasses.dataclass(frozen=True)
class _Rater:
  """Computes the numbers of a preference model, see the module's docstring.

  Attributes:
    name: one of KINDS.
    torch: the module.
    model: CLIP of transformers, in float32; its image half where there is a head.
    tokenizer: of the prompts; None where no text is read.
    head: computes a number from an image's normalized embedding; None where there is none.
    device: where `model` and `head` are.
  """

  name: str
  torch: Any
  model: Any
  tokenizer: Any
  head: Any
  device: str

  def rate(
    self, images: Sequence[np.ndarray], texts: Sequence[str]
  ) -> np.ndarray:
    """Returns a number for every image, see `Preference.rate`."""
    with self.torch.inference_mode():
      pixels = self._pixels(images)
      if self.head is None:
        numbers = self._agreement(pixels, texts)
      else:
        embeddings = self.model(pixel_values=pixels).image_embeds
        normalized = self.torch.nn.functional.normalize(embeddings, dim=-1)
        numbers = self.head(normalized)[:, 0]
      return numbers.float().cpu().numpy()

  def _pixels(self, images: Sequence[np.ndarray]):
    """Returns images as CLIP sees them, [n, 3, size, size]."""
    config = self.model.config
    vision = config.vision_config if self.head is None else config
    pads = KINDS[self.name].pads
    pixels = np.stack([fit(image, vision.image_size, pads) for image in images])
    return self.torch.from_numpy(pixels).to(self.device)

  def _agreement(self, pixels, texts: Sequence[str]):
    """Returns a number for every image and its prompt, [n]."""
    tokens = self.tokenizer(
      list(texts),
      padding=True,
      truncation=True,
      max_length=self.model.config.text_config.max_position_embeddings,
      return_tensors="pt",
    ).to(self.device)
    output = self.model(
      input_ids=tokens.input_ids,
      attention_mask=tokens.attention_mask,
      pixel_values=pixels,
    )
    # Both embeddings are normalized.
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    if self.name == "pickscore":
      return self.model.logit_scale.exp() * cosines
    if self.name == "clipscore":
      return 100 * cosines.clamp(min=0)
    return cosines


def load(name: str, options: Options) -> Preference:
  """Loads a preference model, and tries it once.

  Args:
    name: one of KINDS.
    options: what differs from the kind.

  Raises:
    ValueError: the extra is not installed, or the model or its weights cannot be used.
  """
  kind = KINDS[name]
  if kind.weights and not options.weights:
    raise ValueError(
      f"the reward {name} needs --weights, the path of {kind.weights}"
    )
  span = options.span or kind.span
  if not span[0] < span[1]:
    raise ValueError(f"--span must be two numbers that rise; got {span}")
  try:
    import torch  # an optional extra
    import transformers  # likewise, and slow to import
  except ImportError as error:
    raise ValueError(
      f"the reward {name} needs `pip install r3jax[preferences]`: {error}"
    ) from error
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model, tokenizer = _load_clip(transformers, kind, options)
  head = None
  if kind.weights:
    tensors = _read(torch, options.weights)
    if name == "hpsv2":
      _load_open_clip(model, tensors, options.weights)
    else:
      head = _linear_head(torch, tensors, options.weights).to(device)
  # Some versions of transformers keep the dtype of the file.
  model = model.float().to(device).eval()
  rater = _Rater(name, torch, model, tokenizer, head, device)
  rater.rate([np.zeros((64, 64, 3), np.uint8)], ["a photo"])
  modules = [model] if head is None else [model, head]
  identity = {
    "model": f"{name}: {options.model or kind.model}",
    "weights": _digest(modules),
    "span": list(span),
  }
  return Preference(identity, rater.rate, span)


def _load_clip(transformers, kind: Kind, options: Options) -> tuple[Any, Any]:
  """Returns CLIP and its tokenizer; its image half and None where no text is read.

  Raises:
    ValueError: transformers cannot read them.
  """
  source = options.model or kind.model
  try:
    if not kind.tokenizer:
      vision = transformers.CLIPVisionModelWithProjection
      return vision.from_pretrained(source), None
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      options.tokenizer or options.model or kind.tokenizer
    )
    return transformers.CLIPModel.from_pretrained(source), tokenizer
  # Whatever the libraries raise: a name that is unknown, no network, a file of another model.
  except (OSError, ValueError, RuntimeError) as error:
    raise ValueError(
      f"the CLIP model {source} must be readable by transformers: {_short(error)}"
    ) from error


def _short(error: Exception) -> str:
  """Returns the text of another library's error in one line."""
  return " ".join(str(error).split())[:_LETTERS]


def _read(torch, path: str) -> dict:
  """Returns the tensors of a file that PyTorch has saved, by name.

  Raises:
    ValueError: it cannot be read, or holds anything but tensors.
  """
  try:
    content = torch.load(
      paths.of_user(path), map_location="cpu", weights_only=True
    )
  # torch.load raises many kinds of errors at a damaged file.
  except Exception as error:
    raise ValueError(
      f"--weights must be a file of tensors by PyTorch; {path}: {_short(error)}"
    ) from error
  return content.get("state_dict", content)


def _linear_head(torch, tensors: dict, path: str):
  """Returns the head of the aesthetic predictor: linear layers with nothing in between.

  Raises:
    ValueError: the tensors are not those of layers that fit behind each other.
  """
  numbers = sorted(
    int(match[1])
    for match in map(re.compile(r"layers\.(\d+)\.weight").fullmatch, tensors)
    if match
  )
  if not numbers:
    raise ValueError(
      f"{path} must have tensors layers.N.weight and layers.N.bias; it has {list(tensors)[:5]}"
    )
  layers = []
  for number in numbers:
    weight = tensors[f"layers.{number}.weight"].float()
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict(
      {"weight": weight, "bias": tensors[f"layers.{number}.bias"].float()}
    )
    layers.append(layer)
  return torch.nn.Sequential(*layers).eval()


# The names of open_clip's tensors -> those of transformers' CLIPModel, in this order.
_RENAMED = (
  (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
  (
    r"^visual\.conv1\.weight$",
    "vision_model.embeddings.patch_embedding.weight",
  ),
  (
    r"^visual\.positional_embedding$",
    "vision_model.embeddings.position_embedding.weight",
  ),
  (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
  (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
  (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
  (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
  (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
  (
    r"^positional_embedding$",
    "text_model.embeddings.position_embedding.weight",
  ),
  (r"^ln_final\.", "text_model.final_layer_norm."),
  (r"\.ln_(\d)\.", r".layer_norm\1."),
  (r"\.attn\.", ".self_attn."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _load_open_clip(model, tensors: dict, path: str) -> None:
  """Loads open_clip's tensors of a CLIP into transformers' model of the same sizes.

  Raises:
    ValueError: names or shapes differ.
  """
  renamed = {}
  for name, tensor in tensors.items():
    tensor = tensor.float()
    if name in ("text_projection", "visual.proj"):
      # open_clip multiplies by them from the right.
      projection = "text" if name == "text_projection" else "visual"
      renamed[f"{projection}_projection.weight"] = tensor.T
      continue
    if name == "attn_mask":  # the causal mask, which transformers makes
      continue
    for pattern, replacement in _RENAMED:
      name = re.sub(pattern, replacement, name)
    kind = re.search(r"\.in_proj_(weight|bias)$", name)
    if not kind:
      renamed[name] = tensor
      continue
    # Query, key and value are one tensor there.
    prefix = name[: kind.start()]
    for projection, part in zip("qkv", tensor.chunk(3), strict=True):
      renamed[f"{prefix}.{projection}_proj.{kind[1]}"] = part
  expected = {name: x.shape for name, x in model.state_dict().items()}
  for name in list(expected):
    if name.endswith("position_ids"):  # a buffer of older versions
      del expected[name]
  shapes = {name: tensor.shape for name, tensor in renamed.items()}
  wrong = sorted(
    name
    for name in expected.keys() | shapes.keys()
    if expected.get(name) != shapes.get(name)
  )
  if wrong:
    raise ValueError(
      f"{path} must have the tensors of the CLIP model; {len(wrong)} differ, such as {wrong[:3]}"
    )
  model.load_state_dict(renamed, strict=False)


def _digest(modules: Sequence) -> str:
  """Returns the SHA-256, 16 hex digits, of all parameters."""
  digest = hashlib.sha256()
  for module in modules:
    for name, tensor in sorted(module.state_dict().items()):
      digest.update(name.encode())
      digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
  return digest.hexdigest()[:16]
