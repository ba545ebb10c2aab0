"""The files of a BAGEL folder that make its tokenizer."""

import json

from etils import epath
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from r3jax.sequence import tokenization

FAST_FILE = "tokenizer.json"  # has the whole tokenizer; the others are read only without it
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
ADDED_TOKENS_FILE = "tokenizer_config.json"
FILES = (FAST_FILE, VOCABULARY_FILE, MERGES_FILE, ADDED_TOKENS_FILE)

# How Qwen2 splits text before byte-level BPE: contractions, words, single digits, punctuation,
# white space.
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(folder: epath.PathLike) -> tokenization.TextTokenizer:
  """Loads the tokenizer of a BAGEL folder.

  Args:
    folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt` (byte-level BPE as in Qwen2,
      with its added tokens in `tokenizer_config.json`); on a disk or in a bucket.

  Returns:
    The tokenizer.

  Raises:
    ValueError: the folder holds neither set of files, or a file is broken.
  """
  folder = epath.Path(folder)
  fast = folder / FAST_FILE
  vocabulary = folder / VOCABULARY_FILE
  merges = folder / MERGES_FILE
  if fast.exists():
    content = json.dumps(_json_object(fast))
    return tokenization.TextTokenizer(tokenizers.Tokenizer.from_str(content))
  if vocabulary.exists() and merges.exists():
    return tokenization.TextTokenizer(_byte_level_bpe(folder))
  raise ValueError(
    f"a tokenizer folder must hold {FAST_FILE}, or {VOCABULARY_FILE} and {MERGES_FILE}: {folder}"
  )


def _byte_level_bpe(folder: epath.Path) -> tokenizers.Tokenizer:
  """Builds Qwen2's tokenizer from its vocabulary, merges and added tokens."""
  vocabulary = _json_object(folder / VOCABULARY_FILE)
  merges = _read_merges(folder / MERGES_FILE)
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(_read_added_tokens(folder / ADDED_TOKENS_FILE))
  return tokenizer


def _read_merges(path: epath.Path) -> list[tuple[str, str]]:
  """Reads the pairs of tokens that BPE merges, the most frequent first."""
  pairs = []
  for line in path.read_text().splitlines():
    if not line or line.startswith("#version"):
      continue
    tokens = line.split(" ")
    if len(tokens) != 2:
      raise ValueError(f"{path} must have two tokens a line; one is {line!r}")
    pairs.append((tokens[0], tokens[1]))
  return pairs


def _read_added_tokens(path: epath.Path) -> list[tokenizers.AddedToken]:
  """Reads the tokens beside the vocabulary, in the order of their ids; none without the file."""
  if not path.exists():
    return []
  entries = _json_object(path).get("added_tokens_decoder", {})
  tokens = []
  for token_id in sorted(entries, key=int):
    entry = entries[token_id]
    token = tokenizers.AddedToken(
      entry["content"], normalized=False, special=entry["special"]
    )
    tokens.append(token)
  return tokens


def _json_object(path: epath.Path) -> dict:
  """Reads the object in a JSON file; a ValueError names the file that has none."""
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} must be JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(
      f"{path} must hold a JSON object; it holds a {type(content).__name__}"
    )
  return content
