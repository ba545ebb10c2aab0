"""Format reward and edit instruction of a sampled thought, from its string or from its token ids.

The string rules (docs/algorithm.md#rewards, docs/algorithm.md#sampling-text) define the result.
`parse_tokens` computes the same inside a compiled program for word-level vocabularies, whose
decoded words are joined by spaces; `parse_strings` computes it on the host for any vocabulary.
"""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Int
import numpy as np

from r3jax import types
from r3jax.sequence import tokenization

OPEN = "<think>"
CLOSE = "</think>"
NO_EDIT = "No further edit needed"  # the instruction of a text without CLOSE
_STOP = "no further edit"
_STAGES = ("reason", "reflect")


@dataclasses.dataclass(frozen=True)
class TaggedToken:
  """A single token that holds several tags: a sentence of the protocol.

  A thought with one of them never has the right format.

  Attributes:
    token_id: id of the token.
    tail: ids of the token's text after its last CLOSE.
  """

  token_id: int
  tail: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TagIds:
  """Token ids that the token-level parser compares with; `tag_ids` looks them up.

  Attributes:
    text_begin: marker before a text.
    text_end: marker after a text.
    think_open: OPEN.
    think_close: CLOSE.
    no: the word "no".
    further: the word "further".
    edit: the word "edit".
    no_edit: NO_EDIT.
    tagged: tokens that hold several tags.
    stop_tokens: single tokens whose text contains "no further edit".
  """

  text_begin: int
  text_end: int
  think_open: int
  think_close: int
  no: int
  further: int
  edit: int
  no_edit: tuple[int, ...]
  tagged: tuple[TaggedToken, ...] = ()
  stop_tokens: tuple[int, ...] = ()


@flax.struct.dataclass
class Parsed:
  """What the parsers read off B thoughts: jax arrays in a compiled program, numpy on the host.

  Attributes:
    format: format reward, 0 or 1.
    instruction: edit instructions as text segments: begin, ids, end, zeros.
    instruction_length: slots of the instruction in use, begin and end included.
    stop: the instruction contains "no further edit".
    truncated: the instruction did not fit into its I slots.
  """

  format: jax.Array | np.ndarray  # [B] float32
  instruction: jax.Array | np.ndarray  # [B, I] int32
  instruction_length: jax.Array | np.ndarray  # [B] int32
  stop: jax.Array | np.ndarray  # [B] bool
  truncated: jax.Array | np.ndarray  # [B] bool


# (ids [B, T], lengths [B], stage "reason" or "reflect") -> Parsed, in a compiled program
Parse = Callable[[types.TokenIds, types.Lengths, str], Parsed]


# --- The rules, on strings --------------------------------------------------------------------


def format_reward(text: str, stage: str) -> float:
  """Returns 1.0 if the stripped text is one `<think>...</think>` block, alone or with an answer.

  In stage "reason" nothing may follow the block, in "reflect" something must. Tags are
  case-sensitive and neither may occur again. Anything but a string gets 0.0
  (docs/algorithm.md#rewards).

  Raises:
    ValueError: another stage is named.
  """
  _check_stage(stage)
  if not isinstance(text, str):
    return 0.0
  text = text.strip()
  has_tags_once = text.count(OPEN) == 1 and text.count(CLOSE) == 1
  opens = text.startswith(OPEN)
  ends_right = text.endswith(CLOSE) == (stage == "reason")
  return float(opens and has_tags_once and ends_right)


def edit_instruction(text: str) -> str:
  """Returns what follows the last `</think>`, stripped; without that tag, `NO_EDIT`."""
  _, close, instruction = text.rpartition(CLOSE)
  return instruction.strip() if close else NO_EDIT


def says_stop(instruction: str) -> bool:
  """Returns whether an instruction contains "no further edit", in any case."""
  return _STOP in instruction.lower()


def parse_strings(
  ids: np.ndarray,
  lengths: np.ndarray,
  stage: str,
  tokenizer: tokenization.TextTokenizer,
  instruction_capacity: int,
) -> Parsed:
  """Parses sampled thoughts on the host: decode, string rules, encode; for any vocabulary.

  Args:
    ids: int32 [B, T] text segments, begin token at 0 and end token at lengths - 1.
    lengths: int32 [B] slots in use, at least 2.
    stage: "reason" or "reflect".
    tokenizer: the tokenizer of the ids.
    instruction_capacity: slots of the instruction, at least 2.

  Returns:
    The fields of `parse_tokens` as numpy arrays of the same dtypes.
  """
  ids = np.asarray(ids)
  lengths = np.asarray(lengths)
  rows = len(ids)
  special = tokenizer.special_ids
  formats = np.zeros(rows, np.float32)
  segments = np.zeros((rows, instruction_capacity), np.int32)
  full_lengths = np.zeros(
    rows, np.int32
  )  # of the instructions before truncation
  stops = np.zeros(rows, bool)
  for row in range(rows):
    text = tokenizer.decode(ids[row, 1 : lengths[row] - 1].tolist())
    instruction = edit_instruction(text)
    tokens = tokenizer.encode(instruction)
    fitting = tokens[: instruction_capacity - 2]
    segment = [special.text_begin, *fitting, special.text_end]
    segments[row, : len(segment)] = segment
    formats[row] = format_reward(text, stage)
    full_lengths[row] = len(tokens) + 2
    stops[row] = says_stop(instruction)
  return Parsed(
    format=formats,
    instruction=segments,
    instruction_length=np.minimum(full_lengths, instruction_capacity),
    stop=stops,
    truncated=full_lengths > instruction_capacity,
  )


def _check_stage(stage: str) -> None:
  if stage not in _STAGES:
    raise ValueError(f"stage must be one of {_STAGES}, was {stage!r}")


# --- The vocabularies on which token ids are enough -------------------------------------------


def tag_ids(tokenizer: tokenization.TextTokenizer) -> TagIds:
  """Looks up the ids for `parse_tokens` in a word-level vocabulary.

  Raises:
    ValueError: the token-level parser would not equal the string rules on this vocabulary.
  """
  words = [OPEN, CLOSE, *_STOP.split()]
  vocabulary = tokenizer.vocabulary
  missing = [word for word in words if word not in vocabulary]
  word_ids = [vocabulary[word] for word in words if word in vocabulary]
  if missing or tokenizer.decode(word_ids) != " ".join(words):
    raise ValueError(
      f"the token parser needs {words} as whole words joined by spaces (missing: {missing});"
      " use parse_strings for other vocabularies"
    )
  _check_exact(vocabulary, words)
  stop_tokens = [
    token_id for token, token_id in vocabulary.items() if says_stop(token)
  ]
  _, _, no, further, edit = word_ids
  return TagIds(
    text_begin=tokenizer.special_ids.text_begin,
    text_end=tokenizer.special_ids.text_end,
    think_open=vocabulary[OPEN],
    think_close=vocabulary[CLOSE],
    no=no,
    further=further,
    edit=edit,
    no_edit=tuple(tokenizer.encode(NO_EDIT)),
    tagged=_tagged_tokens(tokenizer),
    stop_tokens=tuple(sorted(stop_tokens)),
  )


def _check_exact(vocabulary: dict[str, int], words: list[str]) -> None:
  """Checks that "no further edit" cannot arise across tokens other than `words`."""
  for token in set(vocabulary) - set(words):
    text = token.lower()
    may_begin = text.endswith(("no", "no further"))
    may_end = text.startswith(("edit", "further edit"))
    if may_begin or may_end:
      raise ValueError(
        f"no token may hold a part of {_STOP!r} at its edge; saw {token!r}"
      )


def _tagged_tokens(
  tokenizer: tokenization.TextTokenizer,
) -> tuple[TaggedToken, ...]:
  """Returns the tokens with tags inside, by id; ValueError for one whose tags could count."""
  tagged = []
  for token, token_id in tokenizer.vocabulary.items():
    has_tag = OPEN in token or CLOSE in token
    if token in (OPEN, CLOSE) or not has_tag:
      continue
    # Twice the same tag: the format is wrong, whatever else the thought holds.
    repeats = max(token.count(OPEN), token.count(CLOSE)) >= 2
    if not repeats or CLOSE not in token:
      raise ValueError(
        f"a token that holds tags must hold one of them twice; saw {token!r}"
      )
    tail = tokenizer.encode(edit_instruction(token))
    tagged.append(TaggedToken(token_id, tuple(tail)))
  return tuple(sorted(tagged, key=lambda token: token.token_id))


# --- The same rules, on token ids -------------------------------------------------------------


def parse_tokens(
  ids: types.TokenIds,
  lengths: types.Lengths,
  stage: str,
  tags: TagIds,
  instruction_capacity: int,
) -> Parsed:
  """Parses sampled thoughts inside a compiled program; equals `parse_strings`.

  Special-token ids between the first and the last slot in use are text and end nothing.

  Args:
    ids: int32 [B, T] text segments, begin token at 0 and end token at lengths - 1.
    lengths: int32 [B] slots in use, at least 2.
    stage: "reason" or "reflect".
    tags: ids of a word-level vocabulary.
    instruction_capacity: slots of the instruction, at least 2.

  Returns:
    The format rewards and instructions.
  """
  _check_stage(stage)
  slot = jnp.arange(ids.shape[1])
  is_body = (slot >= 1) & (slot < lengths[:, None] - 1)

  closing_ids = [tags.think_close, *(token.token_id for token in tags.tagged)]
  closes = is_body & _is_any_of(ids, closing_ids)
  has_close = closes.any(1)
  last_close = jnp.max(jnp.where(closes, slot, 0), 1)

  # The instruction is what follows the last closing tag, or NO_EDIT.
  max_tokens = instruction_capacity - 2
  no_edit = np.zeros(max_tokens, np.int32)
  no_edit[: len(tags.no_edit)] = tags.no_edit[:max_tokens]
  after_close, num_after = _after_close(
    ids, lengths, last_close, tags, max_tokens
  )
  tokens = jnp.where(has_close[:, None], after_close, no_edit)
  num_tokens = jnp.where(has_close, num_after, len(tags.no_edit))
  num_fitting = jnp.minimum(num_tokens, max_tokens)

  # "no further edit" counts behind the last closing tag; NO_EDIT contains it.
  is_stop_token = is_body & _is_any_of(ids, tags.stop_tokens)
  stops = _starts_stop_phrase(ids, is_body, tags) | is_stop_token
  is_after_close = slot > last_close[:, None]
  stops_after_close = (stops & is_after_close).any(1)

  return Parsed(
    format=_token_format_reward(ids, is_body, stage, tags),
    instruction=_text_segment(tokens, num_fitting, tags),
    instruction_length=(num_fitting + 2).astype(jnp.int32),
    stop=~has_close | stops_after_close,
    truncated=num_tokens > max_tokens,
  )


def _token_format_reward(
  ids: types.TokenIds, is_body: types.TokenFlags, stage: str, tags: TagIds
) -> types.PerSample:
  """Computes `format_reward`, [B]; `is_body` [B, T] marks the slots between begin and end."""
  opens = is_body & (ids == tags.think_open)
  closes = is_body & (ids == tags.think_close)
  has_tags_once = (opens.sum(1) == 1) & (closes.sum(1) == 1)
  tagged_ids = [token.token_id for token in tags.tagged]
  has_tagged_token = (is_body & _is_any_of(ids, tagged_ids)).any(1)
  # `roll` wraps around, which is harmless: neither the first nor the last slot is in the body.
  is_last = is_body & ~jnp.roll(is_body, -1, 1)
  ends_with_close = (closes & is_last).any(1)
  ends_right = ends_with_close == (stage == "reason")
  reward = opens[:, 1] & has_tags_once & ~has_tagged_token & ends_right
  return reward.astype(jnp.float32)


def _is_any_of(ids: types.TokenIds, values) -> types.TokenFlags:
  """Marks the slots [B, T] whose id is among `values`."""
  return jnp.isin(ids, jnp.asarray(values, jnp.int32))


def _starts_stop_phrase(
  ids: types.TokenIds, is_body: types.TokenFlags, tags: TagIds
) -> types.TokenFlags:
  """Marks the slots [B, T] where "no further edit" begins inside the body."""
  next_ids = jnp.roll(ids, -1, 1)
  third_ids = jnp.roll(ids, -2, 1)
  is_phrase = (
    (ids == tags.no) & (next_ids == tags.further) & (third_ids == tags.edit)
  )
  third_is_body = jnp.roll(is_body, -2, 1)
  return is_body & third_is_body & is_phrase


def _after_close(
  ids: types.TokenIds,
  lengths: types.Lengths,
  last_close: Int[Array, " B"],
  tags: TagIds,
  max_tokens: int,
) -> tuple[Int[Array, "B max_tokens"], types.Lengths]:
  """Returns the text after the closing token in slot `last_close`.

  A closing token that holds several tags brings a tail of its own, which comes first.

  Returns:
    ids [B, max_tokens], which are arbitrary behind the text, and the length of the text [B] before
    truncation.
  """
  tails, tail_lengths = _tail_table(tags)
  closing_id = jnp.take_along_axis(ids, last_close[:, None], 1)[:, 0]
  kind = jnp.zeros_like(last_close)  # row of the table; 0 is a plain CLOSE
  for row, token in enumerate(tags.tagged):
    kind = jnp.where(closing_id == token.token_id, row + 1, kind)
  tail = jnp.asarray(tails)[kind]
  tail_length = jnp.asarray(tail_lengths)[kind]

  # First the tail's tokens, then those after the closing token.
  slot = jnp.arange(max_tokens)
  last_column = tails.shape[1] - 1
  from_tail = jnp.take(tail, jnp.minimum(slot, last_column), axis=1)
  source_slot = (last_close + 1 - tail_length)[:, None] + slot
  in_range = jnp.clip(source_slot, 0, ids.shape[1] - 1)
  from_ids = jnp.take_along_axis(ids, in_range, 1)
  tokens = jnp.where(slot < tail_length[:, None], from_tail, from_ids)
  return tokens, tail_length + lengths - 2 - last_close


def _tail_table(tags: TagIds) -> tuple[np.ndarray, np.ndarray]:
  """Returns the texts that closing tokens bring with them, CLOSE itself (nothing) first.

  Returns:
    int32 [1 + tagged, longest], filled up with zeros, and the lengths, int32 [1 + tagged].
  """
  tails = [(), *(token.tail for token in tags.tagged)]
  lengths = [len(tail) for tail in tails]
  table = np.zeros((len(tails), max(1, *lengths)), np.int32)
  for row, tail in zip(table, tails, strict=True):
    row[: len(tail)] = tail
  return table, np.asarray(lengths, np.int32)


def _text_segment(
  tokens: Int[Array, "B max_tokens"], num_tokens: types.Lengths, tags: TagIds
) -> Int[Array, "B capacity"]:
  """Puts markers around the first tokens of each row, and zeros behind them.

  Args:
    tokens: [B, I - 2].
    num_tokens: [B] how many to take.
    tags: the ids of the markers.

  Returns:
    int32 [B, I].
  """
  slot = jnp.arange(tokens.shape[1] + 2)
  end_slot = num_tokens[:, None] + 1
  shifted = jnp.pad(tokens, ((0, 0), (1, 1)), constant_values=tags.text_begin)
  with_end = jnp.where(slot == end_slot, tags.text_end, shifted)
  return jnp.where(slot <= end_slot, with_end, 0).astype(jnp.int32)
