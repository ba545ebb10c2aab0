"""Tests of token sampling and decoding with a scripted model; golden texts: tests/parity."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3jax.model import network
from r3jax.sampling import decoding
from r3jax.sequence import segments as segments_lib
from tests import goldens_lib

SAMPLING = "i_sampling"
PLAIN = decoding.TextSampling(1.0)
GREEDY = decoding.TextSampling(0.0)


class TestTextSampling:
  def test_refuses_both_filters(self):
    with pytest.raises(ValueError, match="not both; got top_p=0.9, top_k=50"):
      decoding.TextSampling(0.9, top_p=0.9, top_k=50)


class TestCandidates:
  def test_keeps_the_candidate_that_crosses_top_p(self):
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    ids, probabilities = decoding.candidates(
      logits, decoding.TextSampling(1.0, top_p=0.6)
    )
    np.testing.assert_array_equal(ids, [[1, 2, 0]])
    np.testing.assert_allclose(probabilities, [[5 / 8, 3 / 8, 0]], rtol=1e-6)

  def test_top_k_beyond_the_vocabulary_keeps_all(self):
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    _, probabilities = decoding.candidates(
      logits, decoding.TextSampling(1.0, top_k=9)
    )
    np.testing.assert_allclose(probabilities, [[0.5, 0.3, 0.2]], rtol=1e-6)


class TestDraw:
  def test_takes_the_best_at_temperature_zero(self):
    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(
      decoding.draw(logits, jnp.array([0.99, 0.99]), GREEDY), [1, 0]
    )

  @pytest.mark.parametrize(
    "sampling", [PLAIN, decoding.TextSampling(1.0, top_p=0.9)]
  )
  def test_never_draws_what_has_no_probability(self, sampling):
    logits = jnp.array([[-jnp.inf, 1.0, 0.0, -jnp.inf]] * 2)
    uniform = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    order = [1, 2]  # candidates by index and by probability
    np.testing.assert_array_equal(
      decoding.draw(logits, uniform, sampling), order
    )


class TestLogprob:
  def test_is_exact_for_large_logits(self):
    logits = jnp.array([[1000.0, 997.0]])
    expected = -np.log1p(np.exp(-3.0))
    found = decoding.logprob(logits, jnp.array([0]))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)

  def test_gradient_is_one_hot_minus_softmax(self):
    logits = jnp.log(jnp.array([0.2, 0.8]))
    gradient = jax.grad(lambda x: decoding.logprob(x, jnp.array(1)))(logits)
    np.testing.assert_allclose(gradient, [-0.2, 0.2], rtol=1e-5)

  def test_is_the_log_of_the_softmax(self):
    logits = jnp.log(jnp.array([[[0.2, 0.8], [0.5, 0.5]]])) + 7
    found = decoding.logprob(logits, jnp.array([[1, 0]]))
    np.testing.assert_allclose(found, [[np.log(0.8), np.log(0.5)]], rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("layout", "sampling", "attention"))
def _decode(layout, past, lengths, uniforms, sampling, attention="xla"):
  model = goldens_lib.bagel_model().clone(attention=attention)
  policy = goldens_lib.weights()["policy"]
  return decoding.decode(
    model, policy, layout, "answer", past, lengths, uniforms, sampling
  )


def _context(segments, inputs, lengths, max_length: int):
  """Runs the segments and returns a layout with an answer after them, and the cache."""
  seen = [segment.name for segment in segments]
  layout = segments_lib.Layout(
    (*segments, segments_lib.text("answer", max_length + 1, seen))
  )
  return layout, (goldens_lib.run(layout, inputs, lengths).cache,)


def _text_context(prompt, lengths, max_length: int):
  return _context(
    (segments_lib.text("prompt", prompt.shape[1]),),
    {"prompt": prompt},
    lengths,
    max_length,
  )


class TestDecode:
  def test_recorded_logprobs_and_cache_equal_one_forward_pass(self):
    arrays = goldens_lib.case(SAMPLING)
    rows = arrays["gen_u"].shape[1]
    prompt, prompt_lengths = goldens_lib.repeated(
      arrays["gen_prompt_ids"], rows
    )
    lengths = {"prompt": prompt_lengths}
    limit = max(len(arrays[f"gen_ids_{row}"]) for row in range(rows)) - 1
    layout, past = _text_context(prompt, lengths, limit)
    uniforms = jnp.asarray(arrays["gen_u"][:limit].T)
    decoded = _decode(
      layout, past, lengths, uniforms, decoding.TextSampling(0.9, top_p=0.9)
    )
    whole = goldens_lib.run(
      layout,
      {"answer": decoded.ids},
      lengths | {"answer": decoded.lengths},
      past,
    )
    logits = goldens_lib.read(whole.text("answer")[:, :-1], "logits")
    scored = decoding.logprob(logits, decoded.ids[:, 1:])
    # the last entry belongs to the token that the end replaced
    free = slice(0, limit - 1)
    np.testing.assert_allclose(
      decoded.behavior_logprob[:, free], scored[:, free], atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(
      decoded.cache.key, whole.cache.key, atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(
      decoded.cache.value, whole.cache.value, atol=1e-5, rtol=0
    )


@pytest.fixture(scope="module")
def arguments():
  """Returns the arguments of `_decode` for three rows and five tokens."""
  prompt, prompt_lengths = goldens_lib.repeated(
    goldens_lib.case(SAMPLING)["gen_prompt_ids"], 3
  )
  lengths = {"prompt": prompt_lengths}
  layout, past = _text_context(prompt, lengths, 5)
  uniforms = jax.random.uniform(jax.random.key(0), (3, 5))
  return layout, past, lengths, uniforms, PLAIN


class TestSeparateLayers:
  """On CPUs every layer is decoded with weights and caches of its own."""

  def test_decodes_what_stacked_layers_do(self, arguments):
    separate = _decode(*arguments, attention="by_head")
    expected = _decode(*arguments)
    np.testing.assert_array_equal(separate.ids, expected.ids)
    np.testing.assert_array_equal(separate.lengths, expected.lengths)
    assert separate.cache.names == expected.cache.names
    pairs = zip(
      jax.tree.leaves(separate), jax.tree.leaves(expected), strict=True
    )
    for x, y in pairs:
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

  def test_no_token_copies_weights(self, arguments):
    llm = goldens_lib.config().llm
    kernel = f"{llm.hidden_size},{llm.intermediate_size}]"
    copies = {}
    for attention in ("xla", "by_head"):
      lowered = _decode.lower(*arguments, attention=attention)
      text = lowered.compile().as_text()
      copies[attention] = [
        line
        for line in text.splitlines()
        if "dynamic-slice(" in line
        and "while/body" in line
        and f"f32[1,{kernel}" in line
      ]
    assert copies["xla"]  # what is searched for can be found
    assert not copies["by_head"]


BEGIN, END, VOCABULARY, MAX_TOKENS = 1, 2, 8, 6


class Scripted:
  """Stands in for `bagel.Bagel`: wants script[row][step] next; its cache counts the steps."""

  config = types.SimpleNamespace(
    special_ids=types.SimpleNamespace(text_begin=BEGIN, text_end=END)
  )
  dtype = jnp.float32
  attention = "xla"

  def apply(self, variables, layout, ids, place, lengths, past, own, method):
    del layout, lengths, past
    assert method == "step"
    script = variables["params"]
    wanted = jax.nn.one_hot(script[:, place], VOCABULARY)
    logits = wanted * (3.0 + place) + 0 * ids[:, None]
    return logits, own.replace(
      key=own.key.at[0, :, place, 0, 0].set(ids), value=own.value + 1
    )


@functools.cache
def _scripted(script: tuple[tuple[int, ...], ...]) -> decoding.Decoded:
  layout = segments_lib.Layout((segments_lib.text("answer", MAX_TOKENS + 1),))
  entry = jnp.zeros((1, 1, 1, 1, 1))
  past = (network.Cache(entry, entry, ("context",)),)
  rows = jnp.array(
    [list(row) + [7] * (MAX_TOKENS + 1 - len(row)) for row in script]
  )
  uniforms = jnp.zeros((len(script), MAX_TOKENS))
  return decoding.decode(
    Scripted(), rows, layout, "answer", past, {}, uniforms, GREEDY
  )


def _entry(step: int) -> float:
  """Returns the log-prob of what the script wants at a step."""
  # its logit is 3 + step, the others 0
  return -np.log1p((VOCABULARY - 1) * np.exp(-(3.0 + step)))


class TestDecodeEnds:
  """`decode` with a scripted model, where it is known which token comes when."""

  def test_stops_when_every_row_has_ended(self):
    decoded = _scripted(((5, END), (6, 4, 3, END)))
    np.testing.assert_array_equal(decoded.lengths, [3, 5])
    assert float(decoded.cache.value.max()) == 5  # begin, three tokens, the end

  def test_feeds_the_end_token(self):
    decoded = _scripted(((5, END), (6, 4, 3, END)))
    fed = decoded.cache.key[0, :, :, 0, 0]
    np.testing.assert_array_equal(fed[0, :3], [BEGIN, 5, END])
    np.testing.assert_array_equal(fed[1, :5], [BEGIN, 6, 4, 3, END])

  def test_pads_after_the_end(self):
    decoded = _scripted(((5, END), (6, 4, 3, END)))
    np.testing.assert_array_equal(decoded.ids[0], [BEGIN, 5, END, 0, 0, 0, 0])
    np.testing.assert_array_equal(
      decoded.behavior_logprob[0, 2:], np.zeros(MAX_TOKENS - 2)
    )

  def test_entry_j_belongs_to_the_next_token(self):
    decoded = _scripted(((5, END), (6, 4, 3, END)))
    np.testing.assert_allclose(
      decoded.behavior_logprob[1, :4], [_entry(j) for j in range(4)], rtol=1e-5
    )

  def test_forces_the_end_at_the_limit(self):
    decoded = _scripted(((5,) * MAX_TOKENS, (5, END)))
    np.testing.assert_array_equal(
      decoded.ids[0], [BEGIN, *[5] * (MAX_TOKENS - 1), END]
    )
    np.testing.assert_array_equal(decoded.lengths, [MAX_TOKENS + 1, 3])
    assert float(decoded.cache.value.max()) == MAX_TOKENS + 1

  def test_records_the_replaced_token_where_the_end_is_forced(self):
    decoded = _scripted(((5,) * MAX_TOKENS, (5, END)))
    last = float(decoded.behavior_logprob[0, -1])
    assert last == pytest.approx(_entry(MAX_TOKENS - 1), rel=1e-4)

  def test_an_end_at_the_limit_counts_once(self):
    decoded = _scripted(((5,) * (MAX_TOKENS - 1) + (END,),))
    np.testing.assert_array_equal(decoded.lengths, [MAX_TOKENS + 1])
    assert int((decoded.ids == END).sum()) == 1

  def test_the_begin_token_ends_nothing(self):
    decoded = _scripted(((BEGIN, END),))
    np.testing.assert_array_equal(decoded.ids[0, :3], [BEGIN, BEGIN, END])
