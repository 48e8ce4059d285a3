"""Tests of `ops.over_vocabulary`, beside those of the functions that are made of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.ops import vocabulary

B, T, V, D, D_REF = 2, 5, 11, 8, 6


def inputs():
  keys = jax.random.split(jax.random.key(0), 5)
  hidden, ref_hidden = (
    jax.random.normal(key, (B, T, d)) for key, d in zip(keys[:2], (D, D_REF), strict=True)
  )
  table, ref_table = (
    jax.random.normal(key, (d, V)) for key, d in zip(keys[2:4], (D, D_REF), strict=True)
  )
  tokens = jax.random.randint(keys[4], (B, T), 0, V)
  return (hidden, table, ref_hidden, ref_table), tokens


WEIGHTS = jnp.sin(1.0 + jnp.arange(3 * B * T)).reshape(3, B, T)  # no two weigh the same


def total(figures):
  return sum((weights * x).sum() for weights, x in zip(WEIGHTS, figures, strict=True))


def separate(arrays, tokens, weight, temperature):
  options = {"temperature": temperature, "chunk_size": 3}
  return total(
    (
      *ops.token_log_probs_and_entropy_from_hidden(*arrays[:2], tokens, **options),
      ops.exact_jsd_from_hidden(*arrays, weight=weight, **options),
    )
  )


def together(arrays, tokens, weight, temperature):
  def figures(log_probs, ref_log_probs, tokens, weight):
    of_tokens = ops.taken(log_probs, tokens), ops.entropy_of(log_probs)
    return *of_tokens, ops.jsd_of(log_probs, ref_log_probs, weight)

  models = arrays[:2], arrays[2:]
  options = {"temperature": temperature, "chunk_size": 3}
  return total(ops.over_vocabulary(figures, models, [tokens], [weight], **options))


def gradient_of(fn):
  arrays, tokens = inputs()
  gradient = jax.jit(jax.value_and_grad(fn, argnums=(0, 2, 3)))
  return gradient.lower(arrays, tokens, jnp.float32(0.3), jnp.float32(0.7)).compile()


def test_what_is_asked_for_together_is_what_each_is_alone_and_shares_its_products():
  arrays, tokens = inputs()
  coefficients = jnp.float32(0.3), jnp.float32(0.7)
  alone, joint = gradient_of(separate), gradient_of(together)
  found, expected = (fn(arrays, tokens, *coefficients) for fn in (joint, alone))
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
  # The logits of both models in each pass, and two gradients of each. Alone, those of the policy
  # are computed for the log-probs too.
  assert joint.as_text().count(" dot(") == 8
  assert alone.as_text().count(" dot(") == 12


def test_rows_that_fill_no_chunk_and_one_chunk_for_all_are_the_same():
  arrays, _ = inputs()

  def entropies(chunk_size):
    return ops.over_vocabulary(ops.entropy_of, [arrays[:2]], chunk_size=chunk_size)

  np.testing.assert_allclose(entropies(4), entropies(None), rtol=1e-6)
  np.testing.assert_allclose(entropies(4), ops.entropy(arrays[0] @ arrays[1]), rtol=1e-5)


@pytest.fixture
def many_tiles(monkeypatch):
  monkeypatch.setattr(vocabulary, "_FEWEST_TOKENS", 2)


@pytest.mark.usefixtures("many_tiles")
def test_the_gradient_of_a_table_in_tiles_is_that_of_the_plain_formula():
  (hidden, table, *_), tokens = inputs()

  def plain(hidden, table):
    return (WEIGHTS[0] * ops.token_log_probs(hidden @ table, tokens)).sum()

  def ours(hidden, table):
    log_probs = ops.token_log_probs_from_hidden(hidden, table, tokens, chunk_size=3)
    return (WEIGHTS[0] * log_probs).sum()

  gradients = (jax.jit(jax.value_and_grad(fn, (0, 1))) for fn in (plain, ours))
  expected, found = (fn(hidden, table) for fn in gradients)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_table_is_held_once_and_its_gradient_once():
  num_rows, vocab_size, width = 256, 2**15, 128
  table = jax.ShapeDtypeStruct((vocab_size, width), jnp.float32)
  hidden = jax.ShapeDtypeStruct((num_rows, width), jnp.float32)
  tokens = jnp.zeros(num_rows, int)

  def mean(hidden, table):
    return ops.token_log_probs_from_hidden(hidden, table.T, tokens, chunk_size=32).mean()

  def temporaries(fn):
    memory = jax.jit(fn).lower(hidden, table).compile().memory_analysis()
    return memory.temp_size_in_bytes

  chunk, whole = 4 * 32 * vocab_size, 4 * vocab_size * width
  assert temporaries(mean) < 1.1 * chunk
  # Their gradient takes the place of the logits, and that of the table is added to by fifteenths.
  assert temporaries(jax.grad(mean, (0, 1))) < 1.1 * chunk + 1.3 * whole / 15


def test_equal_distributions_have_no_gradient_at_all():
  (hidden, table, *_), _ = inputs()

  def kl(hidden, table, ref_hidden):
    return ops.exact_kl_from_hidden(hidden, table, ref_hidden, table, chunk_size=3).sum()

  for found in jax.jit(jax.grad(kl, argnums=(0, 1, 2)))(hidden, table, hidden):
    assert not np.any(found)


def test_a_second_derivative_is_that_of_the_plain_formula():
  logits, ref_logits = 2 * jax.random.normal(jax.random.key(1), (2, V))

  def plain(logits):
    log_probs, ref_log_probs = (x - jax.nn.logsumexp(x) for x in (logits, ref_logits))
    return (jnp.exp(log_probs) * (log_probs - ref_log_probs)).sum() + log_probs[3]

  def ours(logits):
    return ops.exact_kl(logits, ref_logits) + ops.token_log_probs(logits, jnp.array(3))

  np.testing.assert_allclose(jax.hessian(ours)(logits), jax.hessian(plain)(logits), atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"ref_hidden": jnp.zeros((B, T + 1, D_REF))}, "shape"),
    ({"ref_table": jnp.zeros((D_REF, V + 1))}, "shape"),
    ({"tokens": jnp.zeros((B, T - 1), int)}, "shape"),
    ({"hidden": jnp.zeros((B, T, D), int)}, "type"),
  ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
  arrays, tokens = inputs()
  names = ("hidden", "table", "ref_hidden", "ref_table", "tokens")
  named = dict(zip(names, (*arrays, tokens), strict=True)) | change
  models = [(named["hidden"], named["table"]), (named["ref_hidden"], named["ref_table"])]
  with pytest.raises(AssertionError, match=message):
    ops.over_vocabulary(lambda lp, ref, tokens: lp[:, 0], models, [named["tokens"]])
