"""Cases c, d, e, i and m: time and positions, text, reflection, sampling, format."""

import ast
from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax.model import layers
from r3jax.model import mot
from r3jax.model import network
from r3jax.parity import goldens
from r3jax.parity import model
from r3jax.parity import perception
from r3jax.parity import seen
from r3jax.sampling import decoding
from r3jax.sequence import segments as segments_lib
from r3jax.sequence import thoughts

Golden, Seen = goldens.Golden, seen.Seen
GREEDY = decoding.TextSampling(0.0)


def tables(golden: Golden, case: str) -> Iterator[Seen]:
  """Case c: time embedding and the fixed position tables."""
  arrays, config = golden.arrays(case), golden.config
  t, width = jnp.asarray(arrays["t"]), config.llm.hidden_size
  yield Seen("freq_embedding", layers.timestep_features(t))
  yield Seen(
    "time_embed",
    golden.bagel.apply({"params": golden.policy}, t, method="embed_time"),
  )
  yield Seen(
    "latent_pos_embed", layers.sincos_table(width, config.max_latent_side)
  )
  yield Seen(
    "vit_pos_embed", layers.sincos_table(width, config.max_patches_per_side)
  )
  cells, small = arrays["sincos_check_16x5"].shape
  yield Seen("sincos_check_16x5", layers.sincos_table(small, round(cells**0.5)))


@functools.partial(jax.jit, static_argnames="golden")
def _advance(golden: Golden, policy, residual, positions, masks, kernels):
  """Runs one decoder layer, without the final norm."""
  llm = dataclasses.replace(golden.config.llm, num_layers=1)
  config = dataclasses.replace(golden.config, llm=llm)
  layer = network.Bagel(config, golden.dtype)

  def run_layers(module: network.Bagel, x: mot.Streams) -> mot.Streams:
    x, _ = module.layers(x, positions, masks, ())
    return x

  params = policy | {"layers": kernels}
  return layer.apply({"params": params}, residual, method=run_layers)


def _after_every_layer(
  golden: Golden, layout, ids, lengths
) -> Iterator[jax.Array]:
  """Yields the residual stream [B, T, D] of the prompts after every layer."""
  rows, names = len(ids), ("prompt",)
  positions = segments_lib.positions(layout, names, lengths, rows)
  masks = (segments_lib.mask(layout, names, names, lengths, rows).dense(),)
  residual = golden.bagel.apply(
    {"params": golden.policy}, layout, {"prompt": ids}, method="embed"
  )
  for i in range(golden.config.llm.num_layers):
    kernels = jax.tree.map(lambda x: x[i : i + 1], golden.policy["layers"])
    residual = _advance(
      golden, golden.policy, residual, positions, masks, kernels
    )
    yield residual.und


@functools.partial(jax.jit, static_argnames=("golden", "layout", "sampling"))
def _decode(
  golden: Golden, policy, layout, past, lengths, uniforms, sampling
) -> decoding.Decoded:
  return decoding.decode(
    golden.bagel, policy, layout, "answer", past, lengths, uniforms, sampling
  )


@functools.partial(jax.jit, static_argnames=("golden", "layout"))
def _forced(golden: Golden, policy, layout, ids, lengths, past) -> jax.Array:
  """Feeds ids [B, S] one by one; returns the logits [S, B, V]."""
  depth, rows, _, *entry = past[0].key.shape
  empty = jnp.zeros(
    (depth, rows, layout["answer"].capacity, *entry), past[0].key.dtype
  )

  def step(own, place):
    logits, own = golden.bagel.apply(
      {"params": policy},
      layout,
      ids[:, place],
      place,
      lengths,
      past,
      own,
      method="step",
    )
    return own, logits

  return jax.lax.scan(
    step, network.Cache(empty, empty, ("answer",)), jnp.arange(ids.shape[1])
  )[1]


def _answers(
  golden: Golden, case: str, layout, past, lengths
) -> Iterator[Seen]:
  """Yields the greedy answers of a case and their logits."""
  steps = golden.arrays(case)["decode_logits"].shape[0]
  uniforms = jnp.zeros((len(next(iter(lengths.values()))), steps))
  decoded = _decode(
    golden, golden.policy, layout, past, lengths, uniforms, GREEDY
  )
  yield from _rows(golden, case, "greedy", decoded)
  recorded, _ = model.texts(golden, case, "greedy_ids")
  yield Seen(
    "decode_logits",
    _forced(golden, golden.policy, layout, recorded[:, :steps], lengths, past),
  )


def _rows(
  golden: Golden, case: str, prefix: str, decoded: decoding.Decoded
) -> Iterator[Seen]:
  """Yields ids, and probabilities where the case has them, of every row."""
  for row, length in enumerate(decoded.lengths.tolist()):
    yield Seen(f"{prefix}_ids_{row}", decoded.ids[row, :length])
    if f"{prefix}_probs_{row}" in golden.arrays(case):
      yield Seen(
        f"{prefix}_probs_{row}",
        jnp.exp(decoded.behavior_logprob[row, : length - 1]),
      )


def _with_answer(segments, max_length: int) -> segments_lib.Layout:
  """Returns the segments with an answer of at most `max_length` tokens, begin apart, after them."""
  return segments_lib.Layout(
    (
      *segments,
      segments_lib.text("answer", max_length + 1, [s.name for s in segments]),
    )
  )


def text(golden: Golden, case: str) -> Iterator[Seen]:
  """Case d: prefill and greedy decoding."""
  ids, prompt_lengths = model.texts(golden, case, "prompt_ids")
  lengths, length = {"prompt": prompt_lengths}, int(prompt_lengths[0])
  steps = golden.arrays(case)["decode_logits"].shape[0]
  layout = _with_answer((segments_lib.text("prompt", ids.shape[1]),), steps)
  for i, residual in enumerate(
    _after_every_layer(golden, layout, ids, lengths)
  ):
    yield Seen(f"prefill0_layer{i}", residual[0, :length])
  output = model.run(golden, layout, {"prompt": ids}, lengths)
  hidden = output.text("prompt")[0, :length]
  yield Seen("prefill0_hidden", hidden)
  yield Seen("prefill0_logits", model.read(golden, hidden, "logits"))
  yield Seen("prefill0_k_layer0", output.cache.key[0, 0, :length])
  yield Seen("prefill0_v_layer0", output.cache.value[0, 0, :length])
  yield from _answers(golden, case, layout, (output.cache,), lengths)


def _counters(layout, names, lengths, rows: int) -> np.ndarray:
  """Returns [stages, (filled slots, next position), rows] after each of the segments."""
  found = []
  for i in range(len(names)):
    held = segments_lib.filled(layout, names[: i + 1], lengths, rows).sum(
      axis=1
    )
    following = [*names, "answer"][i + 1]
    found.append(
      [
        held,
        np.broadcast_to(segments_lib.start(layout, following, lengths), rows),
      ]
    )
  return np.asarray(found)


def reflection(golden: Golden, case: str) -> Iterator[Seen]:
  """Case e: an image between texts, and greedy decoding after them."""
  arrays = golden.arrays(case)
  question, question_lengths = model.texts(golden, case, "text_ids")
  rows = len(question)
  system, system_lengths = model.padded([arrays["system_ids"]] * rows)
  pictures = model.images(golden, case)
  segments = (
    segments_lib.text("system", system.shape[1]),
    segments_lib.image(
      "vision", "vit", golden.towers(pictures.shape[1:3]).vit_grid, ("system",)
    ),
    segments_lib.text("question", question.shape[1], ("system", "vision")),
  )
  layout = _with_answer(segments, arrays["decode_logits"].shape[0])
  for i, pixels in enumerate(
    perception.transformed(pictures, golden.config.vision_transform)
  ):
    yield Seen(f"vit_tensor_{i}", pixels)
  inputs = {
    "system": system,
    "vision": model.look(golden, pictures)[0],
    "question": question,
  }
  lengths = {"system": system_lengths, "question": question_lengths}
  yield Seen(
    "kv_len_rope_after", _counters(layout, tuple(inputs), lengths, rows)
  )
  output = model.run(golden, layout, inputs, lengths)
  text_block = model.filled(output.text("question"), question_lengths)
  yield Seen("hidden_image_block", model.packed(output.text("vision")))
  yield Seen("hidden_text_block", text_block)
  yield Seen(
    "logits_text_block", model.read(golden, jnp.asarray(text_block), "logits")
  )
  yield from _answers(golden, case, layout, (output.cache,), lengths)


def _sampling(row) -> decoding.TextSampling:
  """Returns a recorded combination; where both filters are set, top_p is the one in effect."""
  temperature, top_k, top_p = (float(x) for x in row)
  return decoding.TextSampling(
    temperature, top_p, 0 if top_p < 1 else max(int(top_k), 0)
  )


def _distribution(
  logits: jax.Array, sampling: decoding.TextSampling
) -> jax.Array:
  ids, probabilities = decoding.candidates(logits, sampling)
  return (
    jnp.zeros(logits.shape)
    .at[jnp.arange(len(logits))[:, None], ids]
    .add(probabilities)
  )


def sampling(golden: Golden, case: str) -> Iterator[Seen]:
  """Case i: distributions, draws and recorded probabilities; a sampled text."""
  arrays = golden.arrays(case)
  logits, rows = (
    jnp.asarray(arrays["logits"]),
    jnp.arange(len(arrays["logits"])),
  )
  for i, combination in enumerate(arrays["combos"]):
    settings = _sampling(combination)
    filtered = _distribution(logits, settings)
    yield Seen(f"c{i}_dist", filtered)
    if f"c{i}_big_dist" in arrays:
      yield Seen(
        f"c{i}_big_dist",
        _distribution(jnp.asarray(arrays["logits_big"]), settings),
      )
    tokens = decoding.draw(logits, jnp.asarray(arrays["u"]), settings)
    yield Seen(f"c{i}_token", tokens)
    yield Seen(f"c{i}_raw_prob", jnp.exp(decoding.logprob(logits, tokens)))
    # The reference returns the filtered probability, but for top_p that of the whole softmax.
    warm = logits / settings.temperature
    whole = jnp.exp(warm - jax.nn.logsumexp(warm, axis=-1, keepdims=True))
    returned = whole if settings.top_p < 1 else filtered
    yield Seen(f"c{i}_ret_prob", returned[rows, tokens])
  yield from _sampled_text(golden, case)


def _sampled_text(golden: Golden, case: str) -> Iterator[Seen]:
  arrays = golden.arrays(case)
  rows, limit = (
    arrays["gen_u"].shape[1],
    max(map(len, model.numbered(golden, case, "gen_ids"))) - 1,
  )
  ids, prompt_lengths = model.padded([arrays["gen_prompt_ids"]] * rows)
  lengths = {"prompt": prompt_lengths}
  layout = _with_answer((segments_lib.text("prompt", ids.shape[1]),), limit)
  past = (model.run(golden, layout, {"prompt": ids}, lengths).cache,)
  uniforms = jnp.asarray(arrays["gen_u"][:limit].T)
  settings = decoding.TextSampling(0.9, top_p=0.9)
  yield from _rows(
    golden,
    case,
    "gen",
    _decode(golden, golden.policy, layout, past, lengths, uniforms, settings),
  )


def formats(golden: Golden, case: str) -> Iterator[Seen]:
  """Case m: format rewards and instructions out of texts."""
  rules = golden.rules(case)
  rows = rules["rows"]
  for name, stage in (("format_gen", "reason"), ("format_edit", "reflect")):
    found = [thoughts.format_reward(row["text"], stage) for row in rows]
    yield Seen(
      name, np.array(found), np.array([row[name] for row in rows]), "exact"
    )
  equal = [
    thoughts.edit_instruction(row["text"]) == row["edit_operation"]
    for row in rows
  ]
  yield Seen(
    "edit_operation", np.array(equal), np.ones(len(rows), bool), "exact"
  )
  others = rules["non_string"]
  found = [
    thoughts.format_reward(ast.literal_eval(row["value"]), "reason")
    for row in others
  ]
  yield Seen(
    "non_string",
    np.array(found),
    np.array([row["format_gen"] for row in others]),
    "exact",
  )
