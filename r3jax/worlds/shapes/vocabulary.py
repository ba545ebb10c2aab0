"""The word-level tokenizer of the embedded world."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from r3jax.sequence import protocol
from r3jax.sequence import tokenization
from r3jax.worlds.shapes import grammar
from r3jax.worlds.shapes import prompts
from r3jax.worlds.shapes import scenes

_UNKNOWN = "<unk>"
_SPECIAL = ("<pad>", *tokenization.SPECIAL_TOKENS.values())  # ids 0 to 4
_TAGS = ("<think>", "</think>")  # ids 5 and 6
# The vocabulary is filled up to a multiple of this, so that it splits over devices.
_MULTIPLE = 8


def protocol_sentences() -> tuple[str, ...]:
  """Returns the fixed sentences of the protocol, which are one token each."""
  before, after = protocol.REFLECTION.split("{prompt}")
  return protocol.GEN_THINK, protocol.VLM_THINK, before.strip(), after.strip()


def _words() -> list[str]:
  """Returns every ordinary word, sorted."""
  records = prompts.train_records() + prompts.heldout_records()
  texts = [record.text for record in records]
  texts += [*scenes.SHAPES, *scenes.COLORS, *scenes.CELLS]
  texts += [*prompts.PLURALS.values(), *grammar.WORDS, *grammar.NUMBERS]
  # What the protocol says after its last tag: the tag parser can meet it as an instruction.
  for sentence in (protocol.GEN_THINK, protocol.VLM_THINK):
    texts.append(sentence.rpartition("</think>")[2])
  return sorted(set(" ".join(texts).split()))


def build_tokenizer() -> tokenizers.Tokenizer:
  """Builds the tokenizer of the embedded world.

  Words are lower-cased and split at white space. Padding has id 0, the special tokens ids 1 to 4,
  the tags 5 and 6, an unknown word 7. Words follow from 8 in alphabetical order, then the sentences
  of the protocol, each one token that is matched verbatim. A decoded text of the protocol is the
  text itself.

  Returns:
    An equal tokenizer every time.
  """
  tokens = [*_SPECIAL, *_TAGS, _UNKNOWN, *_words(), *protocol_sentences()]
  tokens += [f"<reserved-{i}>" for i in range(-len(tokens) % _MULTIPLE)]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel(vocabulary, unk_token=_UNKNOWN)
  )
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  # The last sentence of the protocol stands on a line of its own.
  last = protocol_sentences()[-1]
  join_by_spaces = decoders.WordPiece(prefix="##", cleanup=False)
  break_line = decoders.Replace(f" {last}", f"\n{last}")
  tokenizer.decoder = decoders.Sequence(
    [join_by_spaces, decoders.Fuse(), break_line]
  )
  tokenizer.add_special_tokens(_verbatim(_SPECIAL, special=True))
  sentences = (*_TAGS, *protocol_sentences())
  tokenizer.add_tokens(_verbatim(sentences, special=False))
  return tokenizer


def _verbatim(
  tokens: Sequence[str], special: bool
) -> list[tokenizers.AddedToken]:
  """Returns tokens that are matched as they are, before words are split and lower-cased."""
  return [
    tokenizers.AddedToken(token, normalized=False, special=special)
    for token in tokens
  ]
