"""Tests that a damaged model's folder gives one clear error before any tensor is read."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from r3jax.checkpoint import bagel_headers
from r3jax.checkpoint import pretrained
from tests.checkpoint import sharded_model

FIRST, SECOND, THIRD = (
  f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
)
INDEX = bagel_headers.INDEX_FILE
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "model"
  folder.mkdir()
  sharded_model.write(folder, sharded_model.tiny_bagel())
  return folder


def _tensors(change):
  """Returns a damage: `change` works on the tensors of a file."""

  def damage(path: pathlib.Path):
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)

  return damage


def _json(change):
  """Returns a damage: `change` works on the contents of a JSON file."""

  def damage(path: pathlib.Path):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  return damage


def _cut(kept: int):
  return lambda path: path.write_bytes(path.read_bytes()[:kept])


def _pipe(path: pathlib.Path):
  """Puts a pipe in the place of a file; opening it would wait for a writer."""
  path.unlink()
  os.mkfifo(path)


def _link_out(path: pathlib.Path):
  path.unlink()
  path.symlink_to("/etc/hostname")


def _name(tensors, ending: str) -> str:
  return next(name for name in sorted(tensors) if name.endswith(ending))


def _transpose(tensors):
  name = _name(tensors, "mlp.gate_proj.weight")
  tensors[name] = np.ascontiguousarray(tensors[name].T)


def _as_integers(tensors):
  name = _name(tensors, "_proj.weight")
  tensors[name] = tensors[name].astype(np.int32)


def _grow_vocabulary(tensors):
  (name,) = [name for name in tensors if "embed_tokens" in name]
  tensors[name] = np.concatenate([tensors[name], tensors[name]])


def _copied_from(file: str):
  """Returns a damage: one tensor of another file is added."""

  def damage(path: pathlib.Path):
    others = safetensors.numpy.load_file(path.with_name(file))
    name = min(others)
    _tensors(lambda t: t.update({name: others[name]}))(path)

  return damage


def _rename_special(content):
  for token in content["added_tokens"]:
    token["content"] = token["content"].replace("<|im_end|>", "<|im_stop|>")
  content["model"]["vocab"] = {
    k.replace("<|im_end|>", "<|im_stop|>"): v
    for k, v in content["model"]["vocab"].items()
  }


DAMAGES = {
  "missing shard": (
    SECOND,
    pathlib.Path.unlink,
    f"missing file {SECOND}: {INDEX} names it",
  ),
  "missing index": (INDEX, pathlib.Path.unlink, f"missing file .*{INDEX}"),
  "missing autoencoder": (
    "ae.safetensors",
    pathlib.Path.unlink,
    "missing file ae.safetensors",
  ),
  "empty shard": (FIRST, _cut(0), f"unreadable file .*{FIRST}"),
  "cut in the header": (FIRST, _cut(100), f"unreadable file .*{FIRST}"),
  "cut in the tensors": (
    THIRD,
    _cut(-1),
    rf"unreadable file .*{THIRD}.* bytes, \d+ are there",
  ),
  "no safetensors file": (
    FIRST,
    lambda p: p.write_text("<html>not found</html>"),
    f"unreadable file .*{FIRST}",
  ),
  "longer than its tensors": (
    FIRST,
    lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    f"unreadable file .*{FIRST}",
  ),
  "missing tensor": (
    FIRST,
    _tensors(lambda t: t.pop(min(t))),
    f"tensor .* must be in {FIRST}, as {INDEX} says",
  ),
  "tensor too many": (
    FIRST,
    _tensors(lambda t: t.update(extra=np.zeros(2, np.float32))),
    f"tensor extra must be in {INDEX}",
  ),
  "transposed tensor": (
    FIRST,
    _tensors(_transpose),
    r"mis-shaped tensor .*gate_proj.* shape \((.*)\), seen \(",
  ),
  "integers": (
    FIRST,
    _tensors(_as_integers),
    "wrong dtype of tensor .*: expected one of F32, F16, BF16, seen I32",
  ),
  "wrong vocabulary in the weights": (
    FIRST,
    _tensors(_grow_vocabulary),
    "mis-shaped tensor .*embed_tokens",
  ),
  "wrong vocabulary in the sizes": (
    "llm_config.json",
    _json(lambda c: c.update(vocab_size=90)),
    r"ids \(96\) must fit the model's vocabulary \(90\)",
  ),
  "index that is no JSON": (
    INDEX,
    _cut(-2),
    f"unreadable file .*{INDEX}: it must be JSON with a weight_map",
  ),
  "index without a map": (
    INDEX,
    _json(lambda c: c.pop("weight_map")),
    "JSON with a weight_map",
  ),
  "index that misplaces a tensor": (
    INDEX,
    _json(
      lambda c: c["weight_map"].update(
        {HEAD: SECOND if c["weight_map"][HEAD] != SECOND else FIRST}
      )
    ),
    f"tensor {HEAD} must be in",
  ),
  "index that lacks a tensor": (
    INDEX,
    _json(lambda c: c["weight_map"].pop(HEAD)),
    f"tensor {HEAD} must be in {INDEX}",
  ),
  "tensor in two shards": (
    SECOND,
    _copied_from(FIRST),
    f"must be in one file; it is in {FIRST} and in {SECOND}",
  ),
  "tensor in both models' files": (
    "ae.safetensors",
    _copied_from(FIRST),
    f"must be in one file; it is in {FIRST} and in ae.safetensors",
  ),
  "missing sizes": (
    "vit_config.json",
    pathlib.Path.unlink,
    "must hold vit_config.json; not found",
  ),
  "sizes that are no JSON": (
    "llm_config.json",
    _cut(20),
    "llm_config.json must be JSON",
  ),
  "sizes without a key": (
    "llm_config.json",
    _json(lambda c: c.pop("hidden_size")),
    "llm_config.json must have the key 'hidden_size'",
  ),
  "other sizes": (
    "llm_config.json",
    _json(lambda c: c.update(num_hidden_layers=2)),
    r"unexpected tensor .*layers\.2\.",
  ),
  "missing tokenizer": (
    "tokenizer.json",
    pathlib.Path.unlink,
    "must hold tokenizer.json",
  ),
  "tokenizer that is no JSON": (
    "tokenizer.json",
    _cut(-2),
    "tokenizer.json must be JSON",
  ),
  "tokenizer that is a list": (
    "tokenizer.json",
    lambda p: p.write_text("[]"),
    "tokenizer.json must hold a JSON object",
  ),
  "sizes that are a list": (
    "llm_config.json",
    lambda p: p.write_text("[]"),
    "llm_config.json must hold a model's sizes",
  ),
  "unknown special id": (
    "constants.json",
    _json(lambda c: c["special_ids"].update(pause=9)),
    "constants.json must hold a model's sizes",
  ),
  "missing special token": (
    "tokenizer.json",
    _json(_rename_special),
    r"must hold .*missing: \['<\|im_end\|>'\]",
  ),
  "tokenizer that is a pipe": (
    "tokenizer.json",
    _pipe,
    "tokenizer.json must be a regular file; it is a pipe",
  ),
  "sizes that are a pipe": (
    "llm_config.json",
    _pipe,
    "llm_config.json must be a regular file; it is a pipe",
  ),
  "shard that is a pipe": (
    FIRST,
    _pipe,
    f"{FIRST} must be a regular file; it is a pipe",
  ),
  "tokenizer elsewhere": (
    "tokenizer.json",
    _link_out,
    "tokenizer.json must not lead out of its folder, as a link to /etc/host",
  ),
  "shard elsewhere": (
    FIRST,
    _link_out,
    f"{FIRST} must not lead out of its folder",
  ),
  "index that leads out": (
    INDEX,
    _json(lambda c: c["weight_map"].update({HEAD: "../x.safetensors"})),
    f"tensor {HEAD} must be in a file NAME.safetensors of the folder; got '../",
  ),
  "index whose files are numbers": (
    INDEX,
    _json(lambda c: c["weight_map"].update({HEAD: 3})),
    f"tensor {HEAD} must be in a file NAME.safetensors of the folder; got 3",
  ),
  "sizes without end": (
    "llm_config.json",
    lambda p: p.write_text("[" * 10**5 + "]" * 10**5),
    "llm_config.json must be JSON: it must be nested at most 50 levels deep",
  ),
  "10^9 layers": (
    "llm_config.json",
    _json(lambda c: c.update(num_hidden_layers=10**9)),
    r"num_hidden_layers must be a whole number in 1\.\.1000; got 1000000000",
  ),
  "sizes below 0": (
    "vit_config.json",
    _json(lambda c: c.update(patch_size=-14, hidden_size=0)),
    "vit_config.json must .*: hidden_size must .* got 0; patch_size .* got -14",
  ),
  "sizes of no kind": (
    "llm_config.json",
    _json(lambda c: c.update(vocab_size="96", rms_norm_eps=True)),
    "vocab_size must be a whole .* got '96'; rms_norm_eps must be a number in",
  ),
  "heads that do not divide": (
    "llm_config.json",
    _json(lambda c: c.update(num_attention_heads=27)),
    "num_attention_heads must divide hidden_size; got 27 and",
  ),
  "transform that does not fit": (
    "constants.json",
    _json(lambda c: c["vae_transform"].update(min=10**4)),
    "constants.json must .* stride <= min <= max",
  ),
  "tokenizer of ids without end": (
    "tokenizer.json",
    _json(lambda c: c["model"]["vocab"].update(zebra=2**31)),
    "tokenizer.json must hold tokens with ids up to 16777216; .* is 2147483648",
  ),
  "tokenizer of no kind": (
    "tokenizer.json",
    _json(lambda c: c.update(model={"type": "BPE", "vocab": 3})),
    "tokenizer.json must hold a tokenizer: ",
  ),
  "other special ids": (
    "constants.json",
    _json(lambda c: c["special_ids"].update(text_end=9)),
    "markers must be .*text_end=9",
  ),
}


def _open(folder: pathlib.Path):
  """Opens a model as all programs do; returns its tensors."""
  found = pretrained.find(str(folder))
  return bagel_headers.find(found.folder, found.sizes)


def test_the_whole_folder_is_fine(whole):
  assert len(_open(whole)) == len(
    sharded_model.tensors(sharded_model.tiny_bagel())
  )


@pytest.mark.parametrize("file, damage, message", DAMAGES.values(), ids=DAMAGES)
def test_damage_gives_one_clear_error(whole, tmp_path, file, damage, message):
  folder = shutil.copytree(whole, tmp_path / "model")
  damage(folder / file)
  with pytest.raises(ValueError, match=message) as refusal:
    _open(folder)
  assert len(str(refusal.value)) < 5000
