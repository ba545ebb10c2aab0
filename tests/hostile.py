"""Readers of what others write, each with inputs that Hypothesis draws and what must hold of them.

`TARGETS` has one entry a reader. `tests/test_hostile.py` tries some inputs of each in every run of
the tests; `tests/fuzz.py` tries them for as long as it is told. What holds of all: an input is
read, or refused by the documented exception with a message that is not longer than a screen.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import io
import json
import math
import pathlib
import pickle
import tempfile

from absl import flags
from etils import epath
from hypothesis import strategies as st
from ml_collections import config_flags
import numpy as np
from PIL import Image
import safetensors.numpy
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from configs import r3_geneval
from r3jax.checkpoint import bagel_config
from r3jax.checkpoint import bagel_headers
from r3jax.checkpoint import folder_digests
from r3jax.checkpoint import peft_files
from r3jax.checkpoint import safetensors_files
from r3jax.checkpoint import tokenizer_files
from r3jax.checkpoint import verification
from r3jax.data import labelled_images
from r3jax.data import records
from r3jax.files import bounded
from r3jax.files import image_files
from r3jax.files import jsonl
from r3jax.files import rules
from r3jax.files import texts
from r3jax.model import architecture
from r3jax.rewards import outcome
from r3jax.rewards.remote import chat
from r3jax.rewards.remote import http_client
from r3jax.rewards.remote import plain_pickle
from r3jax.rewards.remote import protocol
from r3jax.rewards.remote import unirl
from r3jax.run import config_rules
from r3jax.sequence import thoughts
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import vocabulary
from tests import tiny_bagel


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader.

  Attributes:
    inputs: draws inputs.
    check: reads one, and raises an error where something does not hold.
  """

  inputs: st.SearchStrategy
  check: Callable


def read_or_refuse(refusals, function: Callable, *arguments):
  """Returns function(*arguments), None where it raises one of `refusals` with a short message."""
  try:
    return function(*arguments)
  except refusals as error:
    message = str(error)
    # Lists of problems are cut where they are printed.
    for line in message.splitlines():
      assert len(line) <= texts.MAX_MESSAGE, f"{len(line)} characters: {line}"
    assert len(message) <= 60 * texts.MAX_MESSAGE
    return None


# --- inputs

_ODD_TEXTS = (
  "",
  " ",
  "\0",
  "\ud800",
  "\u2028",
  "<think>",
  "</think>",
  "<|im_end|>",
  "<|vision_start|>",
  "../../etc/passwd",
  "/dev/zero",
  "x" * 5000,
)
_TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(_ODD_TEXTS))
_NUMBERS = st.one_of(
  st.integers(),
  st.floats(),
  st.sampled_from([0, 1, -1, 2**31, 2**63, 10**9, 10**399, 1e308, 1e-320]),
)
_VALUES = st.recursive(
  st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)
  ),
  max_leaves=12,
)
_TOKENS = (
  b"",
  b"[" * 200,
  b"]",
  b"{",
  b"}",
  b'"',
  b"\\",
  b",",
  b":",
  b"\n",
  b"NaN",
  b"1e999",
  b"-",
  b"9" * 5000,
  b"\0",
  b"\xff" * 8,
  b"\\ud800",
  b"null",
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
  """Draws a file with up to four spans replaced by something else."""
  content = whole
  for _ in range(draw(st.integers(0, 4))):
    start = draw(st.integers(0, len(content)))
    stop = start + draw(st.integers(0, 12))
    new = draw(
      st.one_of(
        st.sampled_from(_TOKENS),
        st.binary(max_size=8),
        st.just(content[start:stop] * 2),
      )
    )
    content = content[:start] + new + content[stop:]
  if draw(st.booleans()):
    content = content[: draw(st.integers(0, len(content)))]
  return content


@st.composite
def changed(draw, value):
  """Draws a JSON value in which some places hold another value, or are missing."""
  if draw(st.integers(0, 11)) == 0:
    return draw(_VALUES)
  if isinstance(value, dict):
    changed_dict = {}
    for key, inner in value.items():
      if draw(st.integers(0, 15)) > 0:
        changed_dict[key] = draw(changed(inner))
    if draw(st.integers(0, 7)) == 0:
      changed_dict[draw(_TEXTS)] = draw(_VALUES)
    return changed_dict
  if isinstance(value, list):
    items = [draw(changed(inner)) for inner in value[:8]]
    return items * draw(st.sampled_from([1, 1, 1, 0, 2]))
  return value


def files_of(*values) -> st.SearchStrategy[bytes]:
  """Draws JSON files: some of the values, changed, and damaged texts of them."""
  parts = [
    st.binary(max_size=60),
    _VALUES.map(lambda value: json.dumps(value).encode()),
  ]
  for value in values:
    parts.append(damaged(json.dumps(value).encode()))
    parts.append(changed(value).map(lambda other: json.dumps(other).encode()))
  return st.one_of(parts)


# --- prompts

_RECORDS = (
  {"prompt": "a cat"},
  {"tag": "word", "prompt": 'a mug that says "hi"', "inscription": "hi"},
  {
    "tag": "position",
    "prompt": "a dog right of a bear",
    "include": [
      {"class": "bear", "count": 1},
      {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
    "exclude": [{"class": "bear", "count": 2}],
  },
  {"tag": "x", "prompt": "two cats", "questions": [["Two?", "yes"]]},
  {
    "type": "x",
    "short_description": "a",
    "yn_question_list": ["b?"],
    "yn_answer_list": ["Yes"],
  },
)


def _check_prompts(content: bytes) -> None:
  prompts = read_or_refuse(ValueError, records.parse, content, "file")
  for prompt in prompts or []:
    line = json.dumps(prompt.to_json()).encode()
    assert records.parse(line, "again") == [prompt]
    assert not tokenization.marker_in(prompt.text)


_LABELS = {
  "image": "image.png",
  "prompt": "a cat",
  "matches": True,
  "tag": "x",
  "questions": [{"kind": "count", "question": "How many?", "answer": "one"}],
}


def _check_labels(content: bytes) -> None:
  folder = _folder()
  Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(folder / "image.png")
  path = folder / "labels.jsonl"
  path.write_bytes(content)
  images = read_or_refuse(ValueError, labelled_images.read, str(path), (2, 3))
  for image in images or []:
    again = labelled_images.from_labels(image.labels(), image.pixels)
    assert again.labels() == image.labels()


# --- tokenizer and parsers


@functools.cache
def _tokenizers() -> tuple[tokenization.TextTokenizer, ...]:
  return (
    tokenization.TextTokenizer(tiny_bagel.tokenizer()),
    tokenization.TextTokenizer(vocabulary.build_tokenizer()),
  )


def _check_segment(text: str) -> None:
  for tokenizer in _tokenizers():
    segment = read_or_refuse(ValueError, tokenizer.segment, text, 64)
    if segment is None:
      continue
    ids, length = segment
    special = dataclasses.astuple(tokenizer.special_ids)
    assert ids.shape == (64,) and 2 <= length <= 64
    assert not set(ids[1 : length - 1].tolist()) & set(special)
  byte_level = _tokenizers()[0]
  if not any("\ud800" <= letter <= "\udfff" for letter in text):
    assert byte_level.decode(byte_level.encode(text)) == text


def _check_thoughts(text: str) -> None:
  for stage in ("reason", "reflect"):
    assert thoughts.format_reward(text, stage) in (0.0, 1.0)
  instruction = thoughts.edit_instruction(text)
  assert instruction == instruction.strip()
  assert thoughts.CLOSE not in instruction
  tokenizer = _tokenizers()[0]
  if any("\ud800" <= letter <= "\udfff" for letter in text):
    return
  special = tokenizer.special_ids
  ids = [special.text_begin, *tokenizer.encode(text)[:90], special.text_end]
  parsed = thoughts.parse_strings(
    np.array([ids], np.int32), np.array([len(ids)]), "reflect", tokenizer, 16
  )
  assert parsed.instruction.shape == (1, 16)
  assert 2 <= parsed.instruction_length[0] <= 16


_THOUGHTS = st.lists(
  st.one_of(
    _TEXTS,
    st.sampled_from(
      ["<think>", "</think>", "no further edit", *tokenization.SPECIAL_TOKENS]
    ),
  ),
  max_size=6,
).map("".join)


# --- services


def _check_answer(text: str) -> None:
  answers = read_or_refuse(
    ValueError, chat.read_answers, text, ["1", "2"], ("yes", "no")
  )
  assert answers is None or set(answers.values()) <= {"yes", "no"}


_ANSWERS = st.one_of(
  _TEXTS,
  files_of({"1": "yes", "2": "no"}, {"reason": "x", "1": "No", "2": "yes"}).map(
    lambda content: content.decode(errors="replace")
  ),
  st.lists(
    st.sampled_from(
      ['{"1": "yes", "2": "no"}', "{", '{"', "<think>", "</think>", " and "]
    ),
    max_size=20,
  ).map("".join),
)

_COMPLETION = {
  "choices": [
    {
      "message": {"content": '{"correct": 1}', "refusal": None},
      "finish_reason": "stop",
    }
  ],
  "data": [{"id": "judge"}],
}


def _check_completion(body: bytes) -> None:
  completion = read_or_refuse(http_client.BadReply, chat.read_completion, body)
  if completion is not None:
    problem = completion.missing_answer(100)
    assert len(outcome.Invalid(problem).reason) <= texts.MAX_MESSAGE
  read_or_refuse(http_client.BadReply, chat.read_models, body)
  assert "\n" not in http_client.error_message(body)


_REPLY = {
  "protocol": 1,
  "request_id": "a",
  "reward_id": "r",
  "status": "ready",
  "parts": ["strict"],
  "reward": {"model": "x"},
  "outcomes": [
    {
      "status": "ok",
      "score": 0.5,
      "parts": {"strict": 0},
      "detail": {"a": [1]},
    },
    {"status": "failed", "reason": "x"},
  ],
}
_UNIRL_REPLY = {
  "protocol_version": "1",
  "results": [{"clip": {"score": 0.5}}, {}],
  "errors": [{}, {"clip": "down"}],
  "rewards": ["clip"],
}
_REQUEST = {
  "protocol": 1,
  "request_id": "a",
  "items": [
    {"image": "aGVsbG8=", "format": "png", "record": {"prompt": "a cat"}}
  ],
}


def _check_reply(body: bytes) -> None:
  outcomes = read_or_refuse(
    http_client.BadReply,
    protocol.read_reply,
    body,
    "a",
    2,
    ("strict",),
    "r",
  )
  for result in outcomes or []:
    if isinstance(result, outcome.Ok):
      assert 0 <= result.score <= 1
      json.dumps(outcome.to_json(result), allow_nan=False)
    else:
      assert len(result.reason) <= texts.MAX_MESSAGE
  read_or_refuse(http_client.BadReply, protocol.read_health, body)
  read_or_refuse(http_client.BadReply, unirl._read_names, body)
  read_or_refuse(http_client.BadReply, unirl._read_rows, body, 2)
  read_or_refuse(protocol.ProtocolError, protocol.read_request, body)


_PLAIN = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**100), 2**100),
    st.floats(allow_nan=False),
    st.text(max_size=10),
  ),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.lists(inner, max_size=4).map(tuple),
    st.dictionaries(st.text(max_size=5), inner, max_size=4),
  ),
  max_leaves=12,
)
_OPCODES = [bytes([number]) for number in range(256)]
_PICKLES = st.one_of(
  st.tuples(st.just("value"), _PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL)),
  st.tuples(
    st.just("bytes"),
    st.lists(
      st.one_of(
        st.sampled_from(_OPCODES),
        st.sampled_from(
          [b"]", b"}", b")", b"(", b"q\0", b"h\0", b"a", b"K\1", b"\x86", b"s"]
        ),
        st.sampled_from([b"\x85" * 500, b"(" * 500, b"l" * 500, b"h\0h\0\x86"]),
        st.binary(max_size=4),
      ),
      max_size=40,
    ).map(b"".join),
    st.just(0),
  ),
  st.tuples(
    st.just("bytes"),
    damaged(pickle.dumps({"scores": [0.5, 1], "rewards": [0, 1.0]})),
    st.just(0),
  ),
)


def _check_pickle(drawn: tuple) -> None:
  kind, value, level = drawn
  if kind == "value":
    assert plain_pickle.read(pickle.dumps(value, level)) == value
  else:
    read_or_refuse(http_client.BadReply, plain_pickle.read, value + b".")


# --- files


@functools.cache
def _folder() -> pathlib.Path:
  """Returns a folder of its own for the files of one example."""
  holder = tempfile.TemporaryDirectory(prefix="hostile-")
  _HOLDERS.append(holder)
  return pathlib.Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory] = []  # removed when Python ends


def _check_header(content: bytes) -> None:
  path = _folder() / "a.safetensors"
  path.write_bytes(content)
  entries = read_or_refuse(ValueError, safetensors_files.read_header, path)
  for entry in (entries or {}).values():
    if entry.dtype in safetensors_files.DTYPES and entry.shape:
      assert safetensors_files.read(entry).shape == entry.shape


_WEIGHTS = safetensors.numpy.save(
  {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)}
)


@st.composite
def _headers(draw) -> bytes:
  """Draws safetensors files with a changed header of the right length."""
  header = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
  }
  text = draw(files_of(header))
  return len(text).to_bytes(8, "little") + text + bytes(32)


def _check_index(content: bytes) -> None:
  path = _folder() / bagel_headers.INDEX_FILE
  path.write_bytes(content)
  files = read_or_refuse(ValueError, bagel_headers._read_index, path)
  for name in set((files or {}).values()):
    assert (_folder() / name).parent == _folder() and name != ".."


_INDEX = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y"}}


@st.composite
def _digest_files(draw) -> bytes:
  """Draws files of digests, many with the right check value of another content."""
  fields = {"size": 3, "blocks": ["0123456789abcdef"]}
  content = {
    "version": 1,
    "block_bytes": 16 << 20,
    "files": {"a.safetensors": fields, "orbax/d/x": fields},
  }
  if draw(st.booleans()):
    return draw(files_of(content))
  content = draw(changed(content))
  if isinstance(content, dict):
    content["check"] = verification.hash_of_json(content)
  return json.dumps(content).encode()


def _check_digests(content: bytes) -> None:
  path = _folder() / folder_digests.FILE
  path.write_bytes(content)
  files = read_or_refuse(ValueError, folder_digests._read, epath.Path(path))
  for name in files or {}:
    assert (_folder() / name).resolve().is_relative_to(_folder().resolve())
  read_or_refuse(ValueError, folder_digests.check, epath.Path(_folder()), True)


_ADAPTER = {
  "peft_type": "LORA",
  "base_model_name_or_path": "model",
  "r": 2,
  "lora_alpha": 4.0,
  "bias": "none",
  "use_dora": False,
  "rank_pattern": {},
}


def _check_adapter(content: bytes) -> None:
  path = epath.Path(_folder()) / peft_files.CONFIG_FILE
  path.write_bytes(content)
  config = read_or_refuse(ValueError, peft_files.read_config, path.parent)
  if config is not None:
    base, rank, alpha = config
    assert base and rank > 0 and alpha > 0


@functools.cache
def _sizes() -> dict[str, dict]:
  return bagel_config.to_json(architecture.BagelConfig())


@st.composite
def _configs(draw) -> dict[str, bytes]:
  """Draws the JSON files of a model's sizes, one of them changed."""
  chosen = draw(st.sampled_from(bagel_config.FILES))
  files = {name: json.dumps(raw).encode() for name, raw in _sizes().items()}
  files[chosen] = draw(files_of(_sizes()[chosen]))
  return files


def _check_config(files: Mapping[str, bytes]) -> None:
  for name, content in files.items():
    (_folder() / name).write_bytes(content)
  sizes = read_or_refuse(ValueError, bagel_config.load, _folder())
  if sizes is not None:
    assert sizes.llm.head_dim >= 1 and 1 <= sizes.vision.num_layers <= 1001
    assert sizes.latent_dim >= 1 and sizes.pixels_per_token >= 1


def _small_tokenizer() -> dict:
  """Returns the JSON of a tokenizer with one of each part."""
  letters = {letter: number for number, letter in enumerate("abcĠ")}
  tokenizer = tokenizers.Tokenizer(
    models.BPE(letters | {"ab": 4}, [("a", "b")])
  )
  tokenizer.normalizer = normalizers.NFC()
  pattern = tokenizers.Regex(r"[^\s]+|\s+")
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(pattern, "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(tokenization.SPECIAL_TOKENS.values()))
  return json.loads(tokenizer.to_str())


_ADDED = {
  "added_tokens_decoder": {
    "3": {"content": "<|im_end|>", "special": True},
    "4": {"content": "x", "special": False},
  }
}


@st.composite
def _tokenizer_folders(draw) -> dict[str, bytes]:
  """Draws the files of a tokenizer."""
  if draw(st.booleans()):
    return {tokenizer_files.FAST_FILE: draw(files_of(_small_tokenizer()))}
  merges = draw(damaged(b"#version: 0.2\na b\nab c\n"))
  letters = {letter: number for number, letter in enumerate(["a", "b", "c"])}
  return {
    tokenizer_files.VOCABULARY_FILE: draw(files_of(letters | {"ab": 3})),
    tokenizer_files.MERGES_FILE: merges,
    tokenizer_files.ADDED_TOKENS_FILE: draw(files_of(_ADDED)),
  }


def _check_tokenizer_folder(files: Mapping[str, bytes]) -> None:
  for name in tokenizer_files.FILES:
    (_folder() / name).unlink(missing_ok=True)
  for name, content in files.items():
    (_folder() / name).write_bytes(content)
  tokenizer = read_or_refuse(ValueError, tokenizer_files.load, _folder())
  if tokenizer is not None:
    assert tokenizer.size >= 1
    for text in ("ab c", "", "x\u0301 <|im_end|>", "é" * 50):
      read_or_refuse(ValueError, tokenizer.segment, text, 16)
      ids = read_or_refuse(ValueError, tokenizer.encode, text)
      read_or_refuse(ValueError, tokenizer.decode, ids or [0, 1])


def _image_file(kind: str) -> bytes:
  pixels = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


_IMAGES = st.one_of(
  st.binary(max_size=60),
  *(
    damaged(_image_file(kind))
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")
  ),
)


def _check_image(content: bytes) -> None:
  path = _folder() / "image"
  path.write_bytes(content)
  image = read_or_refuse(ValueError, image_files.read, path)
  if image is not None:
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
  for kind in protocol.FORMATS:
    read_or_refuse(
      protocol.ProtocolError, protocol.decode_image, content, kind, 10**6
    )


def _check_log(content: bytes) -> None:
  path = _folder() / "log.jsonl"
  path.write_bytes(content)
  read_or_refuse(ValueError, jsonl.read, path)


# --- configs

_OVERRIDES = st.tuples(
  st.sampled_from(sorted(config_rules.RULES)),
  st.one_of(
    _TEXTS,
    _VALUES.map(str),
    st.sampled_from(["nan", "inf", "1e999", "()", "(1,2)", "9" * 5000, "@"]),
  ),
)


def _check_override(override: tuple[str, str]) -> None:
  key, value = override
  config = r3_geneval.get_config()
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=values)
  refusals = (flags.Error, ValueError, KeyError, AttributeError, TypeError)
  parsed = read_or_refuse(
    refusals, values, ["r3jax", f"--config.{key}={value}"]
  )
  if parsed is not None:
    read_or_refuse(ValueError, config_rules.check, values["config"].value)


def _check_rule(drawn: tuple[str, object]) -> None:
  key, value = drawn
  line = rules.problem(key, config_rules.RULES[key], value)
  assert len(line) <= texts.MAX_MESSAGE and "\n" not in line


def _check_json(content: bytes) -> None:
  value = read_or_refuse(ValueError, bounded.parse_json, content)
  if value is not None:
    assert bounded.parse_json(json.dumps(value)) == value


def _check_shortened(text: str) -> None:
  short = texts.shorten(text, 60)
  assert len(short) <= 60 and (short == text or len(text) > 60)
  assert math.isclose(len(short), min(len(text), 60))


TARGETS: dict[str, Target] = {
  "adapters": Target(files_of(_ADAPTER), _check_adapter),
  "answers": Target(_ANSWERS, _check_answer),
  "completions": Target(files_of(_COMPLETION), _check_completion),
  "configs": Target(_configs(), _check_config),
  "digests": Target(_digest_files(), _check_digests),
  "headers": Target(st.one_of(damaged(_WEIGHTS), _headers()), _check_header),
  "images": Target(_IMAGES, _check_image),
  "indexes": Target(files_of(_INDEX), _check_index),
  "json": Target(files_of(*_RECORDS), _check_json),
  "labels": Target(files_of(_LABELS), _check_labels),
  "logs": Target(
    st.one_of(damaged(b'{"step": 1}\n{"step": 2, "loss": 0.5}\n'), st.binary()),
    _check_log,
  ),
  "overrides": Target(_OVERRIDES, _check_override),
  "pickles": Target(_PICKLES, _check_pickle),
  "prompts": Target(
    st.one_of(
      files_of(*_RECORDS),
      st.lists(files_of(*_RECORDS), max_size=4).map(b"\n".join),
    ),
    _check_prompts,
  ),
  "replies": Target(files_of(_REPLY, _UNIRL_REPLY, _REQUEST), _check_reply),
  "rules": Target(
    st.tuples(st.sampled_from(sorted(config_rules.RULES)), _VALUES), _check_rule
  ),
  "segments": Target(_THOUGHTS, _check_segment),
  "shortened": Target(st.text(max_size=200), _check_shortened),
  "thoughts": Target(_THOUGHTS, _check_thoughts),
  "tokenizers": Target(_tokenizer_folders(), _check_tokenizer_folder),
}
