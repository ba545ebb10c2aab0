"""Text to token ids and back, for byte-level BPE and for word-level vocabularies."""

import functools

import numpy as np
import tokenizers

from r3jax.sequence import protocol

SPECIAL_TOKENS = {  # field of SpecialIds -> content of the token
  "text_begin": "<|im_start|>",
  "text_end": "<|im_end|>",
  "image_begin": "<|vision_start|>",
  "image_end": "<|vision_end|>",
}


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
      ValueError: the text holds words that a word-level vocabulary lacks.
    """
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
        raise ValueError(
          f"words must be in the vocabulary; unknown {sorted(unknown_words)} in {text!r}"
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
