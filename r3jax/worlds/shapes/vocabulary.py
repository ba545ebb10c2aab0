"""The word-level tokenizer of the embedded world."""

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
_TAGS = ("<think>", "</think>")  # ids 5 and 6; ordinary words start at 8
# the vocabulary is filled up to a multiple, so that it divides over devices
_MULTIPLE = 8


def protocol_sentences() -> tuple[str, ...]:
  """Returns the fixed sentences that cost one token each."""
  before, after = protocol.REFLECTION.split("{prompt}")
  return protocol.GEN_THINK, protocol.VLM_THINK, before.strip(), after.strip()


def _words() -> list[str]:
  """Returns every ordinary word, sorted."""
  records = prompts.train_records() + prompts.heldout_records()
  texts = [record.text for record in records]
  texts += [
    *scenes.SHAPES,
    *prompts.PLURALS.values(),
    *scenes.COLORS,
    *scenes.CELLS,
  ]
  texts += [*grammar.WORDS, *grammar.NUMBERS]
  # What the protocol says after its last tag: the tag parser can meet it as an instruction.
  texts += [
    text.rpartition("</think>")[2]
    for text in (protocol.GEN_THINK, protocol.VLM_THINK)
  ]
  return sorted(set(" ".join(texts).split()))


def build_tokenizer() -> tokenizers.Tokenizer:
  """Builds the tokenizer of the embedded world.

  Words are lower-cased and split at white space. Special tokens have ids 1 to 4 (0 pads), the tags
  5 and 6; words follow from 8 in alphabetical order, then the protocol sentences, each one token
  matched verbatim. A decoded protocol text is the text itself.

  Returns:
    The tokenizer; the same one every time.
  """
  tokens = [*_SPECIAL, *_TAGS, _UNKNOWN, *_words(), *protocol_sentences()]
  tokens += [f"<reserved-{i}>" for i in range(-len(tokens) % _MULTIPLE)]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel(vocabulary, unk_token=_UNKNOWN)
  )
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  last = protocol_sentences()[-1]
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.WordPiece(prefix="##", cleanup=False),  # joins words by spaces
      decoders.Fuse(),
      decoders.Replace(f" {last}", f"\n{last}"),
    ]
  )
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=True)
      for token in _SPECIAL
    ]
  )
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=False)
      for token in (*_TAGS, *protocol_sentences())
    ]
  )
  return tokenizer
