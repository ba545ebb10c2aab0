"""The files of a BAGEL folder that make its tokenizer."""

from collections.abc import Callable
import json
import re

from etils import epath
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from r3jax.files import bounded
from r3jax.files import texts
from r3jax.sequence import tokenization

FAST_FILE = "tokenizer.json"  # has the whole tokenizer; the others are read only without it
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
ADDED_TOKENS_FILE = "tokenizer_config.json"
FILES = (FAST_FILE, VOCABULARY_FILE, MERGES_FILE, ADDED_TOKENS_FILE)

# The largest id that a token may have.
_MAX_ID = 2**24
_PANIC = "PanicException"
_ID = re.compile(r"\d{1,8}", re.ASCII)

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
    ValueError: the folder holds neither set of files, or a file is broken or too large.
  """
  folder = epath.Path(folder)
  fast = folder / FAST_FILE
  vocabulary = folder / VOCABULARY_FILE
  merges = folder / MERGES_FILE
  if fast.exists():
    raw = _json_object(fast)
    _check_fast_merges(fast, raw.get("model"))
    content = json.dumps(raw)
    fast_tokenizer = _built(
      fast, lambda: tokenizers.Tokenizer.from_str(content)
    )
    return tokenization.TextTokenizer(_with_checked_ids(fast, fast_tokenizer))
  if vocabulary.exists() and merges.exists():
    tokenizer = _built(folder, lambda: _byte_level_bpe(folder))
    return tokenization.TextTokenizer(_with_checked_ids(folder, tokenizer))
  raise ValueError(
    f"a tokenizer folder must hold {FAST_FILE}, or {VOCABULARY_FILE} and {MERGES_FILE}: {folder}"
  )


def _built(
  path: epath.Path, build: Callable[[], tokenizers.Tokenizer]
) -> tokenizers.Tokenizer:
  """Returns the tokenizer that a function builds; a ValueError names the files that have none.

  Args:
    path: of the file or the folder that the function reads.
    build: calls the library.
  """
  try:
    return build()
  except BaseException as error:
    # The library raises Exception itself, and where its Rust code panics, as at merges of tokens
    # that are not there, a class that is no Exception and cannot be imported.
    if type(error) is not Exception and type(error).__name__ != _PANIC:
      raise
    raise ValueError(
      f"{path} must hold a tokenizer: {texts.shorten(str(error), 500)}"
    ) from error


def _check_fast_merges(path: epath.Path, model: object) -> None:
  """Checks the merges of the model of a `tokenizer.json`, see `_check_merges`.

  Args:
    path: Of the file.
    model: JSON value; the library refuses one that is no model.
  """
  if not isinstance(model, dict) or model.get("continuing_subword_prefix"):
    return
  vocabulary = model.get("vocab")
  merges = model.get("merges")
  if not isinstance(vocabulary, dict) or not isinstance(merges, list):
    return
  pairs = []
  for merge in merges:
    # Older files have "a b" for ["a", "b"].
    tokens = merge.split(" ") if isinstance(merge, str) else merge
    is_pair = isinstance(tokens, list) and len(tokens) == 2
    if is_pair and all(isinstance(token, str) for token in tokens):
      pairs.append((tokens[0], tokens[1]))
  _check_merges(path, vocabulary, pairs)


def _check_merges(
  path: epath.Path, vocabulary: dict, merges: list[tuple[str, str]]
) -> None:
  """Raises a ValueError where a merge is of tokens that are not there, at which the library panics.

  Args:
    path: File that has the merges, for the message.
    vocabulary: Ids by token.
    merges: Pairs of tokens that become one.
  """
  for first, second in merges:
    for token in (first, second, first + second):
      if token not in vocabulary:
        raise ValueError(
          f"{path} must merge tokens of the vocabulary into one of its tokens; {token!r:.80} is "
          f"none, of the merge {first!r:.80}, {second!r:.80}"
        )


def _with_checked_ids(
  path: epath.Path, tokenizer: tokenizers.Tokenizer
) -> tokenizers.Tokenizer:
  """Returns a tokenizer; raises a ValueError where it has no tokens, or an id is too large."""
  ids = tokenizer.get_vocab(with_added_tokens=True).values()
  if not ids or max(ids) > _MAX_ID:
    raise ValueError(
      f"{path} must hold tokens with ids up to {_MAX_ID}; "
      f"the largest of its {len(ids)} is {max(ids, default=None)}"
    )
  return tokenizer


def _byte_level_bpe(folder: epath.Path) -> tokenizers.Tokenizer:
  """Builds Qwen2's tokenizer from its vocabulary, merges and added tokens."""
  vocabulary_path = folder / VOCABULARY_FILE
  vocabulary = _json_object(vocabulary_path)
  for token, token_id in vocabulary.items():
    if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
      raise ValueError(
        f"{vocabulary_path} must have whole numbers in 0..{_MAX_ID} as ids; token {token!r:.80} "
        f"has {token_id!r:.80}"
      )
  merges_path = folder / MERGES_FILE
  merges = _read_merges(merges_path)
  _check_merges(merges_path, vocabulary, merges)
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
  bounded.check_link(path)
  for line in bounded.read_text(path).splitlines():
    if not line or line.startswith("#version"):
      continue
    tokens = line.split(" ")
    if len(tokens) != 2:
      raise ValueError(
        f"{path} must have two tokens a line; one is {line!r:.200}"
      )
    pairs.append((tokens[0], tokens[1]))
  return pairs


def _read_added_tokens(path: epath.Path) -> list[tokenizers.AddedToken]:
  """Reads the tokens beside the vocabulary, in the order of their ids; none without the file."""
  if not path.exists():
    return []
  entries = _json_object(path).get("added_tokens_decoder", {})
  if not isinstance(entries, dict) or not all(map(_ID.fullmatch, entries)):
    raise ValueError(
      f"{path} must have added_tokens_decoder, an object whose keys are ids"
    )
  tokens = []
  for token_id in sorted(entries, key=int):
    content = special = None
    if isinstance(entries[token_id], dict):
      content = entries[token_id].get("content")
      special = entries[token_id].get("special")
    if not isinstance(content, str) or not isinstance(special, bool):
      raise ValueError(
        f"{path} must give the added token {token_id} as content, a text, and special, true or "
        "false"
      )
    token = tokenizers.AddedToken(content, normalized=False, special=special)
    tokens.append(token)
  return tokens


def _json_object(path: epath.Path) -> dict:
  """Reads the object in a JSON file; a ValueError names the file that has none."""
  bounded.check_link(path)
  return bounded.read_json_object(path)
