"""Cases c, d, e, i and m: time and positions, text, reflection, sampling, format."""

import ast
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r3jax import types
from r3jax.model import layers
from r3jax.model import mot
from r3jax.model import network
from r3jax.parity import case_arrays
from r3jax.parity import goldens
from r3jax.parity import passes
from r3jax.parity import perception
from r3jax.parity import results
from r3jax.sampling import decoding
from r3jax.sequence import segments
from r3jax.sequence import thoughts

Golden = goldens.Golden
Result = results.Result
GREEDY = decoding.TextSampling(0.0)


def tables(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case c: time embedding and the fixed position tables."""
  arrays = golden.arrays(case)
  config = golden.config
  width = config.llm.hidden_size
  t = jnp.asarray(arrays["t"])
  time = golden.bagel.apply({"params": golden.policy}, t, method="embed_time")
  yield Result("freq_embedding", layers.timestep_features(t))
  yield Result("time_embed", time)
  num_cells, small_width = arrays["sincos_check_16x5"].shape
  for name, table_width, side in (
    ("latent_pos_embed", width, config.max_latent_side),
    ("vit_pos_embed", width, config.max_patches_per_side),
    ("sincos_check_16x5", small_width, round(num_cells**0.5)),
  ):
    yield Result(name, layers.sincos_table(table_width, side))


def text(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case d: prefill and greedy decoding."""
  ids, prompt_lengths = case_arrays.texts(golden, case, "prompt_ids")
  lengths = {"prompt": prompt_lengths}
  first_length = int(prompt_lengths[0])
  num_steps = golden.arrays(case)["decode_logits"].shape[0]
  prompt = segments.text("prompt", ids.shape[1])
  layout = _with_answer((prompt,), num_steps)
  residuals = _after_every_layer(golden, layout, ids, lengths)
  for i, residual in enumerate(residuals):
    yield Result(f"prefill0_layer{i}", residual[0, :first_length])

  output = passes.run(golden, layout, {"prompt": ids}, lengths)
  hidden = output.text("prompt")[0, :first_length]
  yield Result("prefill0_hidden", hidden)
  yield Result("prefill0_logits", passes.read(golden, hidden, "logits"))
  yield Result("prefill0_k_layer0", output.cache.key[0, 0, :first_length])
  yield Result("prefill0_v_layer0", output.cache.value[0, 0, :first_length])
  yield from _answers(golden, case, layout, (output.cache,), lengths)


def _after_every_layer(
  golden: Golden,
  layout: segments.Layout,
  ids: jax.Array,
  lengths: Mapping[str, types.Lengths],
) -> Iterator[jax.Array]:
  """Yields the residual stream [B, T, D] of the prompts after every layer."""
  rows = len(ids)
  names = ("prompt",)
  positions = segments.positions(layout, names, lengths, rows)
  mask = segments.mask(layout, names, names, lengths, rows).dense()
  residual = golden.bagel.apply(
    {"params": golden.policy}, layout, {"prompt": ids}, method="embed"
  )
  for i in range(golden.config.llm.num_layers):
    # Layers are stacked along the first axis; a stack of one runs alone.
    layer = jax.tree.map(lambda x, i=i: x[i : i + 1], golden.policy["layers"])
    policy = golden.policy | {"layers": layer}
    residual = _run_layer(golden, policy, residual, positions, mask)
    yield residual.und


@functools.partial(jax.jit, static_argnames="golden")
def _run_layer(golden: Golden, policy, residual, positions, mask):
  """Runs one decoder layer, without the final norm."""
  llm = dataclasses.replace(golden.config.llm, num_layers=1)
  config = dataclasses.replace(golden.config, llm=llm)
  single_layer = network.Bagel(config, golden.dtype)

  def run_layers(module: network.Bagel, x: mot.Streams) -> mot.Streams:
    x, _ = module.layers(x, positions, (mask,), ())
    return x

  return single_layer.apply({"params": policy}, residual, method=run_layers)


def reflection(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case e: an image between texts, and greedy decoding after them."""
  arrays = golden.arrays(case)
  question, question_lengths = case_arrays.texts(golden, case, "text_ids")
  rows = len(question)
  system, system_lengths = case_arrays.padded([arrays["system_ids"]] * rows)
  images = case_arrays.images(golden, case)
  grid = golden.towers(images.shape[1:3]).vit_grid
  context = (
    segments.text("system", system.shape[1]),
    segments.image("siglip", "vit", grid, ("system",)),
    segments.text("question", question.shape[1], ("system", "siglip")),
  )
  layout = _with_answer(context, arrays["decode_logits"].shape[0])
  transform = golden.config.vision_transform
  pixels = perception.transformed(golden, images, transform)
  for i, image_pixels in enumerate(pixels):
    yield Result(f"vit_tensor_{i}", image_pixels)

  features, _ = passes.look(golden, images)
  inputs = {"system": system, "siglip": features, "question": question}
  lengths = {"system": system_lengths, "question": question_lengths}
  counters = _counters(layout, tuple(inputs), lengths, rows)
  yield Result("kv_len_rope_after", counters)

  output = passes.run(golden, layout, inputs, lengths)
  text_block = case_arrays.filled(output.text("question"), question_lengths)
  logits = passes.read(golden, jnp.asarray(text_block), "logits")
  image_block = case_arrays.packed(output.text("siglip"))
  yield Result("hidden_image_block", image_block)
  yield Result("hidden_text_block", text_block)
  yield Result("logits_text_block", logits)
  yield from _answers(golden, case, layout, (output.cache,), lengths)


def _counters(
  layout: segments.Layout,
  names: tuple[str, ...],
  lengths: Mapping[str, types.Lengths],
  rows: int,
) -> np.ndarray:
  """Returns [stages, (filled slots, next position), rows] after each of the segments."""
  counters = []
  next_names = (*names[1:], "answer")
  for i, next_name in enumerate(next_names):
    filled = segments.filled(layout, names[: i + 1], lengths, rows)
    start = segments.start(layout, next_name, lengths)
    counters.append([filled.sum(axis=1), np.broadcast_to(start, rows)])
  return np.asarray(counters)


def _with_answer(
  context: Sequence[segments.Segment], max_length: int
) -> segments.Layout:
  """Returns a layout whose last segment is an answer of at most `max_length` drawn tokens."""
  names = [segment.name for segment in context]
  answer = segments.text("answer", max_length + 1, names)
  return segments.Layout((*context, answer))


def _answers(
  golden: Golden,
  case: str,
  layout: segments.Layout,
  past: tuple[network.Cache, ...],
  lengths: Mapping[str, types.Lengths],
) -> Iterator[Result]:
  """Yields the greedy answers of a case and their logits."""
  num_steps = golden.arrays(case)["decode_logits"].shape[0]
  rows = len(next(iter(lengths.values())))
  uniforms = jnp.zeros((rows, num_steps))
  decoded = _decode(
    golden, golden.policy, layout, past, lengths, uniforms, GREEDY
  )
  yield from _rows(golden, case, "greedy", decoded)
  recorded, _ = case_arrays.texts(golden, case, "greedy_ids")
  fed = recorded[:, :num_steps]
  logits = _forced_logits(golden, golden.policy, layout, fed, lengths, past)
  yield Result("decode_logits", logits)


@functools.partial(jax.jit, static_argnames=("golden", "layout", "sampling"))
def _decode(
  golden: Golden, policy, layout, past, lengths, uniforms, sampling
) -> decoding.Decoded:
  return decoding.decode(
    golden.bagel, policy, layout, "answer", past, lengths, uniforms, sampling
  )


@functools.partial(jax.jit, static_argnames=("golden", "layout"))
def _forced_logits(
  golden: Golden, policy, layout, ids, lengths, past
) -> jax.Array:
  """Feeds ids [B, S] one by one; returns the logits [S, B, V]."""
  num_layers, rows, _, *head_shape = past[0].key.shape
  capacity = layout["answer"].capacity
  empty = jnp.zeros(
    (num_layers, rows, capacity, *head_shape), past[0].key.dtype
  )

  def step(own: network.Cache, place: jax.Array):
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

  own = network.Cache(empty, empty, ("answer",))
  _, logits = jax.lax.scan(step, own, jnp.arange(ids.shape[1]))
  return logits


def _rows(
  golden: Golden, case: str, prefix: str, decoded: decoding.Decoded
) -> Iterator[Result]:
  """Yields ids, and probabilities where the case has them, of every row."""
  for row, length in enumerate(decoded.lengths.tolist()):
    yield Result(f"{prefix}_ids_{row}", decoded.ids[row, :length])
    if f"{prefix}_probs_{row}" in golden.arrays(case):
      logprobs = decoded.behavior_logprob[row, : length - 1]
      yield Result(f"{prefix}_probs_{row}", jnp.exp(logprobs))


def sampling(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case i: distributions, draws and recorded probabilities; a sampled text."""
  arrays = golden.arrays(case)
  logits = jnp.asarray(arrays["logits"])
  rows = jnp.arange(len(logits))
  uniform = jnp.asarray(arrays["u"])
  for i, combination in enumerate(arrays["combos"]):
    settings = _text_sampling(combination)
    filtered = _distribution(logits, settings)
    yield Result(f"c{i}_dist", filtered)
    if f"c{i}_big_dist" in arrays:
      large = jnp.asarray(arrays["logits_big"])
      yield Result(f"c{i}_big_dist", _distribution(large, settings))
    tokens = decoding.draw(logits, uniform, settings)
    yield Result(f"c{i}_token", tokens)
    probabilities = jnp.exp(decoding.logprob(logits, tokens))
    yield Result(f"c{i}_raw_prob", probabilities)
    # The reference returns the filtered probability, but for top_p that of the whole softmax.
    scaled = logits / settings.temperature
    log_sum = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    returned = jnp.exp(scaled - log_sum) if settings.top_p < 1 else filtered
    yield Result(f"c{i}_ret_prob", returned[rows, tokens])
  yield from _sampled_text(golden, case)


def _text_sampling(row: np.ndarray) -> decoding.TextSampling:
  """Returns a recorded combination; where both filters are set, top_p is the one in effect."""
  temperature, top_k, top_p = row.tolist()
  effective_top_k = 0 if top_p < 1 else max(int(top_k), 0)
  return decoding.TextSampling(temperature, top_p, effective_top_k)


def _distribution(
  logits: jax.Array, sampling: decoding.TextSampling
) -> jax.Array:
  """Returns the probability of drawing each token, [B, V]."""
  ids, probabilities = decoding.candidates(logits, sampling)
  rows = jnp.arange(len(logits))[:, None]
  return jnp.zeros(logits.shape).at[rows, ids].add(probabilities)


def _sampled_text(golden: Golden, case: str) -> Iterator[Result]:
  """Yields texts that were sampled with recorded uniform numbers."""
  arrays = golden.arrays(case)
  rows = arrays["gen_u"].shape[1]
  recorded = case_arrays.numbered(golden, case, "gen_ids")
  max_tokens = max(len(ids) for ids in recorded) - 1
  ids, prompt_lengths = case_arrays.padded([arrays["gen_prompt_ids"]] * rows)
  lengths = {"prompt": prompt_lengths}
  prompt = segments.text("prompt", ids.shape[1])
  layout = _with_answer((prompt,), max_tokens)
  output = passes.run(golden, layout, {"prompt": ids}, lengths)
  uniforms = jnp.asarray(arrays["gen_u"][:max_tokens].T)
  settings = decoding.TextSampling(0.9, top_p=0.9)
  decoded = _decode(
    golden, golden.policy, layout, (output.cache,), lengths, uniforms, settings
  )
  yield from _rows(golden, case, "gen", decoded)


def formats(golden: Golden, case: str) -> Iterator[Result]:
  """Yields case m: format rewards and instructions out of texts."""
  rules = golden.rules(case)
  rows = rules["rows"]
  for name, stage in (("format_gen", "reason"), ("format_edit", "reflect")):
    rewards = [thoughts.format_reward(row["text"], stage) for row in rows]
    recorded = [row[name] for row in rows]
    yield Result(name, np.array(rewards), np.array(recorded), "exact")

  is_equal = [
    thoughts.edit_instruction(row["text"]) == row["edit_operation"]
    for row in rows
  ]
  everywhere = np.ones(len(rows), bool)
  yield Result("edit_operation", np.array(is_equal), everywhere, "exact")

  rewards = []
  recorded = []
  for row in rules["non_string"]:
    value = ast.literal_eval(row["value"])
    rewards.append(thoughts.format_reward(value, "reason"))
    recorded.append(row["format_gen"])
  yield Result("non_string", np.array(rewards), np.array(recorded), "exact")
