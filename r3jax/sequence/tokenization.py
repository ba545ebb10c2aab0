"""Text to token ids and back, for byte-level BPE and for word-level vocabularies."""

import dataclasses
import functools
import re

import numpy as np
import tokenizers

from r3jax.sequence import protocol

SPECIAL_TOKENS = {  # field of SpecialIds -> content of the token
  "text_begin": "<|im_start|>",
  "text_end": "<|im_end|>",
  "image_begin": "<|vision_start|>",
  "image_end": "<|vision_end|>",
}
# How the markers of Qwen2 and its relatives are written: those four and, for example,
# <|endoftext|> and <|image_pad|>.
_MARKER = re.compile(r"<\|\w{1,40}\|>", re.ASCII)


def marker_in(text: str) -> str:
  """Returns the first marker in a text of people, "" where there is none.

  A tokenizer would turn it into the token itself, and so would the chat template of a judge: the
  text could end its own segment and begin another one.
  """
  match = _MARKER.search(text)
  return match[0] if match else ""


def _refuse_marker(marker: str, text: str) -> None:
  """Raises a ValueError if there is a marker."""
  if marker:
    raise ValueError(
      f"a text must not hold the marker {marker}, which the model would take for the end or the "
      f"begin of a segment: leave it out of {text!r:.200}"
    )


class TextTokenizer:
  """Wraps a Hugging Face tokenizer in the few calls that r3jax makes."""

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
    """Ids of the four markers, looked up by content.

    Raises:
      ValueError: the vocabulary lacks a marker; names all that are missing.
    """
    ids = {}
    missing = []
    for field, token in SPECIAL_TOKENS.items():
      token_id = self._tokenizer.token_to_id(token)
      if token_id is None:
        missing.append(token)
      else:
        ids[field] = token_id
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
      ValueError: the text holds words that a word-level vocabulary lacks, or halves of surrogate
        pairs, as an argument of a command line that is not UTF-8.
    """
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"a text must be Unicode without lone surrogates; got {text!r:.200}"
      ) from error
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    unknown_token = getattr(self._tokenizer.model, "unk_token", None)
    if unknown_token is not None:
      unknown_id = self._tokenizer.token_to_id(unknown_token)
      unknown_words = {
        text[start:stop]
        for token_id, (start, stop) in zip(
          encoding.ids, encoding.offsets, strict=True
        )
        if token_id == unknown_id
      }
      # The text may hold the unknown token itself, which is no error.
      unknown_words -= {unknown_token}
      if unknown_words:
        shown = [f"{word:.40}" for word in sorted(unknown_words)[:10]]
        raise ValueError(
          f"words must be in the vocabulary; unknown {shown} in {text!r:.200}"
        )
    return encoding.ids

  def decode(self, ids: list[int]) -> str:
    """Decodes ids; markers stay as text, ids beyond the vocabulary (padded rows) leave nothing."""
    return self._tokenizer.decode(list(ids), skip_special_tokens=False)

  def segment(self, text: str, capacity: int) -> tuple[np.ndarray, int]:
    """Makes a text segment: begin token, ids, end token, then zeros.

    Args:
      text: the text of the segment, of people or of the protocol.
      capacity: slots of the segment.

    Returns:
      ids int32 [capacity] and the number of slots in use, both markers included.

    Raises:
      ValueError: the text does not fit, holds unknown words, or holds a marker.
    """
    special = self.special_ids
    _refuse_marker(marker_in(text), text)
    body = self.encode(text)
    # A vocabulary may fold letters before it looks for markers.
    _refuse_marker(self._first_marker(body), text)
    ids = [special.text_begin, *body, special.text_end]
    if len(ids) > capacity:
      raise ValueError(
        f"a text must fit its segment: {len(ids)} tokens (begin and end included) exceed the"
        f" capacity {capacity}: {text!r:.200}"
      )
    slots = np.zeros(capacity, np.int32)
    slots[: len(ids)] = ids
    return slots, len(ids)

  def _first_marker(self, ids: list[int]) -> str:
    """Returns the first of the four markers among ids, "" where there is none."""
    marker_ids = dataclasses.astuple(self.special_ids)
    for token_id in ids:
      if token_id in marker_ids:
        return self.decode([token_id])
    return ""
