"""Format reward and edit instruction of a thought, from its string or from its token ids.

The string rules (R3.md sections 4 and 7) define the result. `parse_tokens` computes the same inside
a compiled program for word-level vocabularies, whose decoded words are joined by spaces;
`parse_strings` computes it on the host for any vocabulary.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
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
class TagIds:
  """Token ids that the token-level parser looks for; `tag_ids` reads them off a tokenizer."""

  text_begin: int
  text_end: int
  think_open: int
  think_close: int
  no: int
  further: int
  edit: int
  fallback: tuple[int, ...]  # NO_EDIT
  # Single tokens that hold several tags (protocol sentences), with the ids of their text after
  # the last CLOSE. A thought with one of them never has the right format.
  tagged: tuple[tuple[int, tuple[int, ...]], ...] = ()
  stopping: tuple[int, ...] = ()  # single tokens that hold "no further edit"


@flax.struct.dataclass
class Parsed:
  """What the tag parser makes of B thoughts."""

  format: jax.Array  # float32 [B], 0 or 1
  instruction: jax.Array  # int32 [B, I], text segments: begin, ids, end, zeros
  # int32 [B], slots in use, begin and end included
  instruction_length: jax.Array
  stop: jax.Array  # bool [B], the whole instruction says "no further edit"
  truncated: jax.Array  # bool [B], the instruction did not fit into I slots


def _check_stage(stage: str) -> None:
  if stage not in _STAGES:
    raise ValueError(f"stage must be one of {_STAGES}, was {stage!r}")


def format_reward(text: str, stage: str) -> float:
  """Returns 1.0 if the stripped text is one `<think>...</think>` block, alone or with an answer.

  In stage "reason" nothing may follow the block, in "reflect" something must. Tags are
  case-sensitive and neither may occur again. Anything but a string gets 0.0 (R3.md section 7).

  Raises:
    ValueError: another stage is named.
  """
  _check_stage(stage)
  if not isinstance(text, str):
    return 0.0
  text = text.strip()
  once = text.count(OPEN) == 1 and text.count(CLOSE) == 1
  ends = text.endswith(CLOSE)
  return float(text.startswith(OPEN) and once and ends == (stage == "reason"))


def edit_instruction(text: str) -> str:
  """Returns what follows the last `</think>`, stripped; without that tag, `NO_EDIT`."""
  _, close, instruction = text.rpartition(CLOSE)
  return instruction.strip() if close else NO_EDIT


def says_stop(instruction: str) -> bool:
  """Tells whether an instruction contains "no further edit", in any case."""
  return _STOP in instruction.lower()


def _check_exact(vocabulary: dict[str, int], words: list[str]) -> None:
  """Checks that "no further edit" cannot arise across tokens other than `words`."""
  for token in set(vocabulary) - set(words):
    text = token.lower()
    if text.endswith(("no", "no further")) or text.startswith(
      ("edit", "further edit")
    ):
      raise ValueError(
        f"no token may hold a part of {_STOP!r} at its edge; saw {token!r}"
      )


def _tagged_tokens(
  tokenizer: tokenization.TextTokenizer,
) -> list[tuple[int, tuple[int, ...]]]:
  tagged = []
  for token, token_id in tokenizer.vocabulary.items():
    if token in (OPEN, CLOSE) or not (OPEN in token or CLOSE in token):
      continue
    if max(token.count(OPEN), token.count(CLOSE)) < 2 or CLOSE not in token:
      raise ValueError(
        f"a token that holds tags must hold one of them twice; saw {token!r}"
      )
    tagged.append((token_id, tuple(tokenizer.encode(edit_instruction(token)))))
  return sorted(tagged)


def tag_ids(tokenizer: tokenization.TextTokenizer) -> TagIds:
  """Reads the ids for `parse_tokens` off a word-level tokenizer.

  Raises:
    ValueError: the token-level parser would not equal the string rules on this vocabulary.
  """
  words = [OPEN, CLOSE, *_STOP.split()]
  vocabulary = tokenizer.vocabulary
  missing = [word for word in words if word not in vocabulary]
  if missing or tokenizer.decode(
    [vocabulary[word] for word in words]
  ) != " ".join(words):
    raise ValueError(
      f"the token parser needs {words} as whole words joined by spaces (missing: {missing});"
      " use parse_strings for other vocabularies"
    )
  _check_exact(vocabulary, words)
  think_open, think_close, no, further, edit = [
    vocabulary[word] for word in words
  ]
  special = tokenizer.special_ids
  return TagIds(
    text_begin=special.text_begin,
    text_end=special.text_end,
    think_open=think_open,
    think_close=think_close,
    no=no,
    further=further,
    edit=edit,
    fallback=tuple(tokenizer.encode(NO_EDIT)),
    tagged=tuple(_tagged_tokens(tokenizer)),
    stopping=tuple(
      sorted(i for token, i in vocabulary.items() if says_stop(token))
    ),
  )


def _token_format(
  ids: types.TokenIds, body: Bool[Array, "B T"], stage: str, tags: TagIds
) -> types.PerSample:
  """Computes `format_reward` [B]; `body` [B, T] marks the slots between begin and end."""
  opens = body & (ids == tags.think_open)
  closes = body & (ids == tags.think_close)
  once = (opens.sum(1) == 1) & (closes.sum(1) == 1)
  tagged = (body & _any_of(ids, [token for token, _ in tags.tagged])).any(1)
  last = body & ~jnp.roll(body, -1, 1)
  ends = (closes & last).any(1)
  return (opens[:, 1] & once & ~tagged & (ends == (stage == "reason"))).astype(
    jnp.float32
  )


def _any_of(ids: types.TokenIds, values) -> Bool[Array, "B T"]:
  return jnp.isin(ids, jnp.asarray(values, jnp.int32))


def _starts_phrase(
  ids: types.TokenIds, body: Bool[Array, "B T"], tags: TagIds
) -> Bool[Array, "B T"]:
  """Marks slots [B, T] where "no further edit" begins inside the body."""
  further, edit = jnp.roll(ids, -1, 1), jnp.roll(ids, -2, 1)
  phrase = (ids == tags.no) & (further == tags.further) & (edit == tags.edit)
  return body & jnp.roll(body, -2, 1) & phrase


def _tail_table(tags: TagIds) -> tuple[np.ndarray, np.ndarray]:
  """Returns the texts after a closing token, int32 [1 + tagged, W], and their lengths."""
  tails = [(), *(tail for _, tail in tags.tagged)]
  table = np.zeros((len(tails), max(1, max(map(len, tails)))), np.int32)
  for row, tail in zip(table, tails, strict=True):
    row[: len(tail)] = tail
  return table, np.asarray([len(tail) for tail in tails], np.int32)


def _instruction_ids(
  ids: types.TokenIds,
  lengths: types.Lengths,
  last: Int[Array, " B"],
  tags: TagIds,
  width: int,
) -> tuple[Int[Array, "B width"], types.Lengths]:
  """Returns the ids after the closing token at `last` [B], int32 [B, width], and their number."""
  table, sizes = _tail_table(tags)
  closing = jnp.take_along_axis(ids, last[:, None], 1)[:, 0]
  kind = jnp.zeros_like(last)  # row of the table
  for row, (token, _) in enumerate(tags.tagged):
    kind = jnp.where(closing == token, row + 1, kind)
  tail, size = jnp.asarray(table)[kind], jnp.asarray(sizes)[kind]
  slot = jnp.arange(width)
  from_tail = jnp.take(tail, jnp.minimum(slot, table.shape[1] - 1), axis=1)
  at = (last + 1 - size)[:, None] + slot
  from_ids = jnp.take_along_axis(ids, jnp.clip(at, 0, ids.shape[1] - 1), 1)
  return jnp.where(
    slot < size[:, None], from_tail, from_ids
  ), size + lengths - 2 - last


def _segment(
  ids: Int[Array, "B width"], count: types.Lengths, tags: TagIds
) -> Int[Array, "B capacity"]:
  """Puts markers around the first `count` of ids [B, I - 2], zeros after; int32 [B, I]."""
  count = count[:, None]
  slot = jnp.arange(ids.shape[1] + 2)
  shifted = jnp.pad(ids, ((0, 0), (1, 1)), constant_values=tags.text_begin)
  ended = jnp.where(slot == count + 1, tags.text_end, shifted)
  return jnp.where(slot <= count + 1, ended, 0).astype(jnp.int32)


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
  body = (slot >= 1) & (slot < lengths[:, None] - 1)
  closers = [tags.think_close, *(token for token, _ in tags.tagged)]
  closes = body & _any_of(ids, closers)
  found, last = closes.any(1), jnp.max(jnp.where(closes, slot, 0), 1)

  width = instruction_capacity - 2
  fallback = np.zeros(width, np.int32)
  fallback[: len(tags.fallback)] = tags.fallback[:width]
  after, count = _instruction_ids(ids, lengths, last, tags, width)
  after = jnp.where(found[:, None], after, fallback)
  count = jnp.where(found, count, len(tags.fallback))

  stops = _starts_phrase(ids, body, tags) | (body & _any_of(ids, tags.stopping))
  kept = jnp.minimum(count, width)
  return Parsed(
    format=_token_format(ids, body, stage, tags),
    instruction=_segment(after, kept, tags),
    instruction_length=(kept + 2).astype(jnp.int32),
    stop=~found | (stops & (slot > last[:, None])).any(1),
    truncated=count > width,
  )


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
  ids, lengths = np.asarray(ids), np.asarray(lengths)
  rows = [
    row[1 : length - 1].tolist()
    for row, length in zip(ids, lengths, strict=True)
  ]
  texts = [tokenizer.decode(row) for row in rows]
  instructions = [edit_instruction(text) for text in texts]
  encoded = [tokenizer.encode(instruction) for instruction in instructions]
  special = tokenizer.special_ids
  segments = np.zeros((len(rows), instruction_capacity), np.int32)
  for segment, tokens in zip(segments, encoded, strict=True):
    kept = [
      special.text_begin,
      *tokens[: instruction_capacity - 2],
      special.text_end,
    ]
    segment[: len(kept)] = kept
  sizes = np.asarray([len(tokens) + 2 for tokens in encoded], np.int32)
  return Parsed(
    format=np.asarray(
      [format_reward(text, stage) for text in texts], np.float32
    ),
    instruction=segments,
    instruction_length=np.minimum(sizes, instruction_capacity),
    stop=np.asarray([says_stop(instruction) for instruction in instructions]),
    truncated=sizes > instruction_capacity,
  )
