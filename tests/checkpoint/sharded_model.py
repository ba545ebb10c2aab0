"""Narrow models with BAGEL's full key set, written in several files and an index."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np

from r3jax.checkpoint import bagel_files
from r3jax.checkpoint import bagel_headers
from r3jax.checkpoint import bagel_names
from r3jax.checkpoint import safetensors_files
from r3jax.model import architecture
from r3jax.sequence import protocol
from r3jax.worlds.shapes import vocabulary

BF16 = np.dtype(ml_dtypes.bfloat16)
FILES = 3


def narrow_bagel() -> architecture.BagelConfig:
  """Returns BAGEL-7B with every layer and head, narrow: the same keys, about 70 M parameters.

  As in BAGEL-7B an MLP matrix of all layers is larger than the token embedding, which is the
  largest tensor.
  """
  full = architecture.bagel_7b()
  return dataclasses.replace(
    full,
    llm=dataclasses.replace(
      full.llm, hidden_size=112, intermediate_size=2816, vocab_size=65536
    ),
    vision=dataclasses.replace(
      full.vision, hidden_size=64, intermediate_size=96, positions_per_side=8
    ),
    autoencoder=dataclasses.replace(full.autoencoder, channels=32),
    # of the embedded world's tokenizer
    special_ids=protocol.SpecialIds(1, 2, 3, 4),
  )


def tiny_bagel() -> architecture.BagelConfig:
  """Returns three layers of the same, with the embedded world's vocabulary."""
  narrow = narrow_bagel()
  return dataclasses.replace(
    narrow,
    llm=dataclasses.replace(narrow.llm, num_layers=3, vocab_size=96),
    vision=dataclasses.replace(narrow.vision, num_layers=2),
    autoencoder=dataclasses.replace(
      narrow.autoencoder, multipliers=(1, 1), num_res_blocks=1
    ),
  )


def tensors(config: architecture.BagelConfig) -> dict[str, np.ndarray]:
  """Returns random weights in bf16 by their released names, always the same."""
  rng = np.random.default_rng(0)
  return {
    tensor.name: rng.standard_normal(tensor.released_shape, np.float32).astype(
      BF16
    )
    for tensor in bagel_names.table(config)
  }


def write(
  folder: pathlib.Path, config: architecture.BagelConfig
) -> dict[str, np.ndarray]:
  """Writes a model's folder; returns its weights."""
  weights = tensors(config)
  names = [
    t.name
    for t in bagel_names.table(config)
    if not t.path.startswith("autoencoder/")
  ]
  place = {
    name: f"model-{i % FILES + 1:05d}-of-{FILES:05d}.safetensors"
    for i, name in enumerate(names)
  }
  place |= dict.fromkeys(weights.keys() - place.keys(), "ae.safetensors")
  for file in sorted(set(place.values())):
    held = {
      name: tensor for name, tensor in weights.items() if place[name] == file
    }
    specs = {name: (tensor.shape, BF16) for name, tensor in held.items()}
    safetensors_files.write(folder / file, specs, held.values())
  index = {"metadata": {}, "weight_map": {name: place[name] for name in names}}
  (folder / bagel_headers.INDEX_FILE).write_text(json.dumps(index))
  bagel_files.save_configs(config, folder)
  vocabulary.build_tokenizer().save(str(folder / "tokenizer.json"))
  return weights
