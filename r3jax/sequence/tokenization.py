"""Text to token ids and back, for the released byte-level BPE and for word-level vocabularies."""

import functools
import json

from etils import epath
import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from r3jax.sequence import protocol

# in a folder, where it has them
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
SPECIAL_TOKENS = {  # field of SpecialIds -> content of the token
  "text_begin": "<|im_start|>",
  "text_end": "<|im_end|>",
  "image_begin": "<|vision_start|>",
  "image_end": "<|vision_end|>",
}

# How Qwen2 cuts text before byte-level BPE: contractions, words, single digits, punctuation, space.
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer:
  """A Hugging Face tokenizer behind the few calls that r3jax makes."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer

  @property
  def size(self) -> int:
    """Number of token ids, added tokens included."""
    return self._tokenizer.get_vocab_size(with_added_tokens=True)

  @property
  def vocabulary(self) -> dict[str, int]:
    """Content -> id of every token."""
    return self._tokenizer.get_vocab(with_added_tokens=True)

  @functools.cached_property
  def special_ids(self) -> protocol.SpecialIds:
    """Ids of the four markers, found by content; ValueError names those that are missing."""
    ids = {
      field: self._tokenizer.token_to_id(token)
      for field, token in SPECIAL_TOKENS.items()
    }
    missing = [
      SPECIAL_TOKENS[field]
      for field, token_id in ids.items()
      if token_id is None
    ]
    if missing:
      raise ValueError(
        f"a tokenizer must hold {list(SPECIAL_TOKENS.values())}; missing: {missing}"
      )
    return protocol.SpecialIds(**ids)

  def encode(self, text: str) -> list[int]:
    """Encodes text; adds no markers.

    Args:
      text: any text; the contents of special tokens inside it become those tokens.

    Returns:
      The token ids.

    Raises:
      ValueError: the text holds words that a word-level vocabulary lacks.
    """
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    unknown_token = getattr(self._tokenizer.model, "unk_token", None)
    if unknown_token is not None:
      unknown_id = self._tokenizer.token_to_id(unknown_token)
      at = [
        o
        for i, o in zip(encoding.ids, encoding.offsets, strict=True)
        if i == unknown_id
      ]
      words = {text[start:stop] for start, stop in at} - {unknown_token}
      if words:
        raise ValueError(
          f"words must be in the vocabulary; unknown {sorted(words)} in {text!r}"
        )
    return encoding.ids

  def decode(self, ids: list[int]) -> str:
    """Decodes ids; markers stay as text, ids beyond the vocabulary (padded rows) leave nothing."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=False)

  def segment(self, text: str, capacity: int) -> tuple[np.ndarray, int]:
    """Makes a text segment: begin token, ids, end token, then zeros.

    Args:
      text: the text of the segment.
      capacity: slots of the segment.

    Returns:
      ids int32 [capacity] and the number of slots in use, both markers included.

    Raises:
      ValueError: the text does not fit, or holds unknown words.
    """
    special = self.special_ids
    ids = [special.text_begin, *self.encode(text), special.text_end]
    if len(ids) > capacity:
      raise ValueError(
        f"a text must fit its segment: {len(ids)} tokens (begin and end included) exceed the"
        f" capacity {capacity}: {text!r}"
      )
    slots = np.zeros(capacity, np.int32)
    slots[: len(ids)] = ids
    return slots, len(ids)


def _json(path: epath.Path) -> dict:
  """Returns the object in a JSON file; ValueError names the file if there is none."""
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(
      f"{path} must hold a JSON object; it holds a {type(found).__name__}"
    )
  return found


def _added_tokens(folder: epath.Path) -> list[tokenizers.AddedToken]:
  path = folder / "tokenizer_config.json"
  raw = _json(path).get("added_tokens_decoder", {}) if path.exists() else {}
  return [
    tokenizers.AddedToken(
      raw[key]["content"], normalized=False, special=raw[key]["special"]
    )
    for key in sorted(raw, key=int)
  ]


def _merges(path: epath.Path) -> list[tuple[str, str]]:
  lines = [
    line
    for line in path.read_text().splitlines()
    if line and not line.startswith("#version")
  ]
  pairs = [tuple(line.split(" ")) for line in lines]
  bad = [line for line, pair in zip(lines, pairs) if len(pair) != 2]
  if bad:
    raise ValueError(f"{path} must have two tokens a line; one is {bad[0]!r}")
  return pairs


def _byte_level_bpe(folder: epath.Path) -> tokenizers.Tokenizer:
  """Builds Qwen2's tokenizer from its slow files, added tokens from `tokenizer_config.json`."""
  bpe = models.BPE(_json(folder / "vocab.json"), _merges(folder / "merges.txt"))
  tokenizer = tokenizers.Tokenizer(bpe)
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(_added_tokens(folder))
  return tokenizer


def load(folder: epath.PathLike) -> TextTokenizer:
  """Loads the tokenizer of a BAGEL folder.

  Args:
    folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt` (byte-level BPE as in Qwen2,
      added tokens listed in `tokenizer_config.json`).

  Returns:
    The tokenizer.

  Raises:
    ValueError: neither set of files is there, or one of them is broken.
  """
  folder = epath.Path(folder)
  if (folder / "tokenizer.json").exists():
    return TextTokenizer(
      tokenizers.Tokenizer.from_str(
        json.dumps(_json(folder / "tokenizer.json"))
      )
    )
  if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
    return TextTokenizer(_byte_level_bpe(folder))
  raise ValueError(
    f"a tokenizer folder must hold tokenizer.json, or vocab.json and merges.txt: {folder}"
  )
