"""A tiny random BAGEL with a byte-level vocabulary, which can read any prompt."""

import dataclasses
import pathlib

import ml_collections
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import tokenizer_files
from r3jax.model import architecture
from r3jax.sequence import tokenization
from r3jax.sft import small_bagel
from r3jax.worlds.shapes import vocabulary
from tests import tiny


def tokenizer() -> tokenizers.Tokenizer:
  """Returns bytes, markers, and the protocol's sentences as one token each."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(
    models.BPE({letter: i for i, letter in enumerate(letters)}, [])
  )
  made.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(list(tokenization.SPECIAL_TOKENS.values()))
  made.add_tokens(["<think>", "</think>", *vocabulary.protocol_sentences()])
  made.add_tokens(
    [f"<reserved-{i}>" for i in range(-made.get_vocab_size() % 8)]
  )
  return made


def write(folder: pathlib.Path):
  """Writes the model in BAGEL's format."""
  folder.mkdir(parents=True)
  tokenizer().save(str(folder / "tokenizer.json"))
  found, small = (
    tokenizer_files.load(folder),
    small_bagel.sizes(ml_collections.ConfigDict(tiny.SIZES)),
  )
  llm = dataclasses.replace(small.llm, vocab_size=found.size)
  sizes: architecture.BagelConfig = dataclasses.replace(
    small, llm=llm, special_ids=found.special_ids
  )
  bagel_files.save(tiny.random_weights(sizes), sizes, folder)
