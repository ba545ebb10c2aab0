"""Tests of calls to the host from inside a mapped program, on one device and on a 2x2x2 mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.parallel import mesh as mesh_lib
from r3jax.rewards import base
from r3jax.rewards import format as format_lib
from r3jax.rewards import host
from r3jax.rewards import shapes as shapes_reward
from r3jax.sequence import tokenizer as tokenizer_lib
from r3jax.worlds import prompts
from r3jax.worlds import shapes
from r3jax.worlds import vocabulary

TEXTS = (
    "<think> a red ring </think>",
    "<think> a red ring </think> add a blue bow",
    "<think> </think> no further edit needed",
    "<think> a red ring </think> change </think> the ring",
    "a red ring",
    "<think> <think> a </think> add a ring",
    "</think> add a red ring and a blue bow and a green heart",
    "<think> no further edit </think> a ring",
)


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=["one device", "2x2x2"])
def mesh(request):
  return mesh_lib.make_mesh_of(jax.devices()[: np.prod(request.param)], *request.param)


def _mapped(mesh, function, *arguments):
  """Runs a function over rows as the step does: mapped over `data`, the rest left to the compiler."""
  rows = jax.sharding.PartitionSpec("data")
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names={"data"}, check_vma=False)
    return jax.device_get(jax.jit(mapped)(*arguments))


def _scenes(number: int):
  """Returns images and targets of scenes that hold what some record asks for."""
  rng = np.random.default_rng(0)
  records = [prompts.train_records()[i] for i in rng.integers(0, 700, number)]
  scenes = [prompts.scene_for(record, rng) for record in records]
  images = np.array(shapes.render(jax.tree.map(lambda *x: jnp.stack(x), *scenes)))
  images[::2] = images[::2, ::-1]  # turned over: some relations fail
  return images, shapes_reward.encode_records(records)


class TestRewardFromHost:

  @pytest.mark.parametrize("rows", [8, 6], ids=["even", "padded"])
  def test_scores_are_those_of_the_graph_and_every_image_is_scored_once(self, mesh, rows):
    images, target = _scenes(rows)
    seen = []

    def reward(images, target):
      seen.extend(np.asarray(image).tobytes() for image in images)
      return jax.tree.map(np.asarray, shapes_reward.verify(np.asarray(images), jax.tree.map(np.asarray, target)))

    parts = ("correct", "strict", "clutter")
    found = _mapped(mesh, host.reward_from_host(reward, parts, mesh), images, target)
    expected = _mapped(mesh, shapes_reward.verify, images, target)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shards, replicas = mesh.shape["fsdp"] * mesh.shape["tensor"], mesh.shape["data"]
    padding = -(rows // replicas) % shards * replicas
    assert len(seen) == rows + padding
    assert set(seen) == {image.tobytes() for image in images}

  def test_missing_score_stays_missing(self, mesh):
    images, target = _scenes(8)

    def reward(images, target):
      bright = np.asarray(images).mean(axis=(1, 2, 3)) > 128
      value = np.where(bright, 0.5, np.nan).astype(np.float32)
      return base.Score(value, bright, {})

    images[3:] //= 4
    images[:3] = 200
    found = _mapped(mesh, host.reward_from_host(reward, (), mesh), images, target)
    assert found.valid.tolist() == [True] * 3 + [False] * 5
    assert found.value[:3].tolist() == [0.5] * 3


class TestParseOnHost:

  @pytest.mark.parametrize("stage", ["reason", "reflect"])
  def test_parsed_is_that_of_the_graph(self, mesh, stage):
    tokenizer = tokenizer_lib.TextTokenizer(vocabulary.build_tokenizer())
    segments = [tokenizer.segment(text, 16) for text in TEXTS]
    ids, lengths = (np.stack(column).astype(np.int32) for column in zip(*segments))
    tags = format_lib.tag_ids(tokenizer)
    in_graph = lambda ids, lengths: format_lib.parse_tokens(ids, lengths, stage, tags, 9)
    on_host = host.parse_on_host(tokenizer, 9)
    found = _mapped(mesh, lambda ids, lengths: on_host(ids, lengths, stage), ids, lengths)
    expected = _mapped(mesh, in_graph, ids, lengths)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.format.sum() == {"reason": 1, "reflect": 3}[stage]
    assert found.truncated.any() and not found.truncated.all()
