"""Divergences between a policy and another one, in nats per token.

An estimator is a function of the log-probabilities of the tokens taken, `[..., T]`; below,
log_ratio = log_probs - ref_log_probs, and pi is the policy of `log_probs`. Nothing is stopped here:
both arguments carry gradient, and whoever puts an estimator in a loss or a reward decides. What an
estimator is worth depends on which of the two, so each docstring says, for tokens drawn from pi:
the expected value, the expected gradient as a loss (differentiated) and as a reward cost (the
value, stopped, times the score function). Summed over a sequence the value stays what it says; the
gradient as a loss covers the divergence at given prefixes and not how pi chooses the prefixes.

Nothing is masked here: where the padding may hold values that are far apart or not finite, make
both arguments equal there first.

Names and formulas: John Schulman, "Approximating KL Divergence", 2020,
http://joschu.net/blog/kl-approx.html.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from klrl.ops.importance import weighted
from klrl.ops.log_probs import chunk_rows, matmul, num_chunks_of, unchunk_rows, vocab_log_probs
from klrl.ops.masking import at_least_float32


def _log_ratio(log_probs, other_log_probs):
  chex.assert_equal_shape([log_probs, other_log_probs])
  chex.assert_type([log_probs, other_log_probs], float)
  return at_least_float32(log_probs) - at_least_float32(other_log_probs)


def k1(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `log_ratio`, of either sign.

  Tokens from pi: value KL(pi || ref), unbiased. As a loss the expected gradient is zero (it does
  nothing but add noise); in the reward it is the gradient of KL(pi || ref).
  """
  return _log_ratio(log_probs, ref_log_probs)


def k2(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `log_ratio**2 / 2`, not negative.

  Tokens from pi: value biased, KL(pi || ref) to second order. As a loss the expected gradient is
  that of KL(pi || ref), exactly; in the reward it is no divergence's gradient.
  """
  return 0.5 * _log_ratio(log_probs, ref_log_probs) ** 2


def k3(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `exp(-log_ratio) - 1 + log_ratio`, not negative.

  Tokens from pi: value KL(pi || ref), unbiased if ref has no mass outside pi's support; the
  variance is unbounded where ref is much larger than pi. As a loss the expected gradient is that of
  KL(ref || pi), the other direction; in the reward it is that of KL(pi || ref) minus that of
  KL(ref || pi), which vanishes to first order at pi = ref.
  """
  log_ratio = _log_ratio(log_probs, ref_log_probs)
  # Not `exp(-log_ratio) - 1`: in float32 that makes k3 negative at log_ratio = 1e-4.
  return jnp.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def weighted_estimate(
  estimator: str,
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  ref_log_probs: jax.Array,
  *,
  log_prefix_weight=0.0,
  log_cap=jnp.inf,
) -> jax.Array:
  """Returns [..., T] `min(exp(log_prefix_weight) * pi / old, exp(log_cap)) * estimate`.

  It is finite wherever the product is, and so is its gradient, whose terms are summed before they
  are exponentiated: that of k1 is weight * (log_ratio + 1), that of k3 weight * log_ratio, whose
  two terms by the product rule are as large as ref / old and cancel. The weight of k2 is stopped,
  since its derivative has the right mean and its value has not; so its gradient is
  weight * log_ratio too. The cap bounds the weight's value; the gradient of its logarithm stays.

  Args:
    estimator: k1, k2 or k3 of pi against the reference.
    log_probs: [..., T] of pi; carries gradient.
    old_log_probs: [..., T] of the policy that sampled; no gradient, nor in `ref_log_probs`.
    ref_log_probs: [..., T].
    log_prefix_weight: [..., T], of what came before the token; carries gradient, but for k2.
    log_cap: scalar, may be traced.
  """
  chex.assert_equal_shape([log_probs, old_log_probs, ref_log_probs])
  chex.assert_type([log_probs, old_log_probs, ref_log_probs], float)
  log_probs, old, ref = map(at_least_float32, (log_probs, old_log_probs, ref_log_probs))
  old, ref = jax.lax.stop_gradient((old, ref))
  prefix = jnp.broadcast_to(log_prefix_weight, log_probs.shape).astype(log_probs.dtype)
  if estimator == "k2":
    prefix = jax.lax.stop_gradient(prefix)
  log_cap = jnp.asarray(log_cap, log_probs.dtype)
  return _weighted_estimate(estimator, prefix, log_probs, old, ref, log_cap)


# Where ref / pi is above exp(50), k3 is ref / pi but for a relative 1e-20.
_FAR = 50.0


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_estimate(estimator, prefix, log_probs, old, ref, log_cap):
  log_weight, log_ratio = jnp.minimum(prefix + (log_probs - old), log_cap), log_probs - ref
  if estimator != "k3":
    return weighted(log_weight, log_ratio if estimator == "k1" else 0.5 * log_ratio**2)
  near = log_ratio > -_FAR
  k3_near = jnp.expm1(jnp.where(near, -log_ratio, 0.0)) + jnp.where(near, log_ratio, 0.0)
  return jnp.where(near, weighted(log_weight, k3_near), jnp.exp(log_weight - log_ratio))


@_weighted_estimate.defjvp
def _weighted_estimate_jvp(estimator, primals, tangents):
  prefix, log_probs, old, ref, log_cap = primals
  value = _weighted_estimate(estimator, *primals)
  log_weight, log_ratio = jnp.minimum(prefix + (log_probs - old), log_cap), log_probs - ref
  slope = weighted(log_weight, log_ratio + 1 if estimator == "k1" else log_ratio)
  return value, value * tangents[0] + slope * tangents[1]


def kl_old_new(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `ratio - 1 - log(ratio)`, ratio = pi / old, not negative.

  Tokens from old (not from pi): value KL(old || pi), unbiased, and as a loss the expected gradient
  is that of KL(old || pi) at the prefixes that old visits. It is k3 of old against pi.
  """
  return k3(old_log_probs, log_probs)


def kl_new_old(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `ratio * log(ratio) - (ratio - 1)`, ratio = pi / old, not negative.

  Tokens from old (not from pi): value KL(pi || old), unbiased, and as a loss the expected gradient
  is that of KL(pi || old) at the prefixes that old visits. It is k3 of pi against old, weighted by
  the ratio.
  """
  log_ratio = _log_ratio(log_probs, old_log_probs)
  return weighted_estimate("k3", log_ratio, jnp.zeros_like(log_ratio), jnp.zeros_like(log_ratio))


def exact_kl(logits: jax.Array, ref_logits: jax.Array, *, temperature=1.0) -> jax.Array:
  """Returns [..., T] KL(pi || ref) of the two next-token distributions, summed over the vocabulary.

  Nats per token. Not negative up to rounding; inf where ref excludes (logit -inf) a token that pi
  does not; a token that pi excludes adds nothing. Summed over the prefixes of a completion from pi
  it estimates the sequence KL, unbiased (Afra Amini, Tim Vieira and Ryan Cotterell, "Better
  Estimation of the KL Divergence Between Language Models", 2025): at a given prefix with no
  variance, and over completions usually, not always, with less than k1. Differentiated, it gives
  the gradient at those prefixes only.

  Args:
    logits: [..., T, V] of pi; carries gradient.
    ref_logits: [..., T, V]; carries gradient as well, though a frozen reference has no use for it.
    temperature: scalar of both, may be traced; carries gradient.
  """
  return _kl(*_both_vocab_log_probs(logits, ref_logits, temperature))


def exact_jsd(logits: jax.Array, ref_logits: jax.Array, *, weight, temperature=1.0) -> jax.Array:
  """Returns [..., T] the Jensen-Shannon divergence of the two next-token distributions.

  Nats per token. With the teacher P = `ref_logits`, the student Q = `logits` and M = weight * P +
  (1 - weight) * Q,

      weight * KL(P || M) + (1 - weight) * KL(Q || M),

  equation 1 of Rishabh Agarwal et al., "On-Policy Distillation of Language Models", 2024. Not
  negative up to rounding, and at most the entropy of (weight, 1 - weight), also where one of the
  two excludes (logit -inf) what the other does not. As weight -> 0 it is weight * KL(P || Q), as
  weight -> 1 it is (1 - weight) * KL(Q || P); at weight 1/2 it is symmetric.

  Args:
    logits: [..., T, V] of the student; carries gradient.
    ref_logits: [..., T, V] of the teacher; carries gradient as well.
    weight: scalar in [0, 1], the teacher's share of the mixture; 0 and 1 give 0. May be traced;
      carries gradient.
    temperature: scalar of both, may be traced; carries gradient.
  """
  return _jsd(*_both_vocab_log_probs(logits, ref_logits, temperature), weight)


def _both_vocab_log_probs(logits, ref_logits, temperature):
  chex.assert_equal_shape([logits, ref_logits])
  return tuple(vocab_log_probs(x, temperature=temperature) for x in (logits, ref_logits))


def _kl(log_probs, ref_log_probs):
  """Returns KL [...] of two distributions given by their log-probs [..., V]."""
  excluded = jnp.isneginf(log_probs)
  log_ratio = jnp.where(excluded, 0.0, log_probs) - jnp.where(excluded, 0.0, ref_log_probs)
  return (jnp.exp(log_probs) * log_ratio).sum(axis=-1)


def _jsd(log_probs, ref_log_probs, weight):
  mixture = weight * jnp.exp(ref_log_probs) + (1 - weight) * jnp.exp(log_probs)
  # Where the mixture is zero, so is what its logarithm is multiplied by.
  log_mixture = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
  return weight * _kl(ref_log_probs, log_mixture) + (1 - weight) * _kl(log_probs, log_mixture)


def exact_kl_from_hidden(
  hidden: jax.Array,
  unembedding: jax.Array,
  ref_hidden: jax.Array,
  ref_unembedding: jax.Array,
  *,
  temperature=1.0,
  chunk_size=None,
) -> jax.Array:
  """Returns `exact_kl` of `hidden @ unembedding` and its reference's, without holding the logits.

  [..., T], nats per token. The forward pass keeps both log-sum-exps of each row, the backward pass
  makes each chunk's logits once more. Gradients of weights are accumulated in at least float32.
  Under `jax.jit` a gradient that nobody asks for, as that of a frozen reference, costs nothing.

  Args:
    hidden: [..., T, D]; carries gradient, as do the other arrays.
    unembedding: [D, V].
    ref_hidden: [..., T, D_ref]; D_ref may differ from D.
    ref_unembedding: [D_ref, V].
    temperature: scalar of both, may be traced; carries gradient.
    chunk_size: as in `token_log_probs_from_hidden`.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  arrays = (hidden, unembedding, ref_hidden, ref_unembedding)
  accumulated = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
  temperature = jnp.asarray(temperature, accumulated)

  def kl(rows, ref_rows):
    return _chunked(rows, unembedding, ref_rows, ref_unembedding, temperature)

  return _by_chunks(kl, *arrays, chunk_size)


def exact_jsd_from_hidden(
  hidden: jax.Array,
  unembedding: jax.Array,
  ref_hidden: jax.Array,
  ref_unembedding: jax.Array,
  *,
  weight,
  temperature=1.0,
  chunk_size=None,
) -> jax.Array:
  """Returns `exact_jsd` of `hidden @ unembedding` and its teacher's, without holding the logits.

  [..., T], nats per token. The backward pass makes each chunk's logits once more. `weight` is the
  share of the teacher, whose arrays begin with `ref_`; the other arguments, precision and errors
  are those of `exact_kl_from_hidden`.
  """
  # The gradient of what a chunk reads is summed in its dtype: let the chunks read wide arrays.
  wide, ref_wide = at_least_float32(unembedding), at_least_float32(ref_unembedding)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chunk(rows):
    logits = matmul(rows[0], wide.astype(unembedding.dtype))
    ref_logits = matmul(rows[1], ref_wide.astype(ref_unembedding.dtype))
    return exact_jsd(logits, ref_logits, weight=weight, temperature=temperature)

  def jsd(rows, ref_rows):
    return jax.lax.map(chunk, (rows, ref_rows))

  return _by_chunks(jsd, hidden, unembedding, ref_hidden, ref_unembedding, chunk_size)


def _by_chunks(divergence, hidden, unembedding, ref_hidden, ref_unembedding, chunk_size):
  """Returns `divergence(rows [K, C, D], ref_rows [K, C, D_ref])` [K, C] as [..., T]."""
  chex.assert_shape(ref_hidden, (*hidden.shape[:-1], None))
  chex.assert_shape(unembedding, (hidden.shape[-1], None))
  chex.assert_shape(ref_unembedding, (ref_hidden.shape[-1], unembedding.shape[1]))
  chex.assert_type([hidden, unembedding, ref_hidden, ref_unembedding], float)
  shape, num_rows = hidden.shape[:-1], hidden[..., 0].size
  num_chunks = num_chunks_of(num_rows, unembedding.shape[1], chunk_size)
  rows, ref_rows = (
    chunk_rows(x.reshape(num_rows, x.shape[-1]), num_chunks) for x in (hidden, ref_hidden)
  )
  return unchunk_rows(divergence(rows, ref_rows), num_rows).reshape(shape)


@jax.custom_vjp
def _chunked(hidden, unembedding, ref_hidden, ref_unembedding, temperature):
  """Returns the KL [K, C] of rows `hidden` [K, C, D] and `ref_hidden` [K, C, D_ref]."""
  return _chunked_fwd(hidden, unembedding, ref_hidden, ref_unembedding, temperature)[0]


def _chunked_fwd(hidden, unembedding, ref_hidden, ref_unembedding, temperature):
  def chunk(rows):
    scaled = matmul(rows[0], unembedding) / temperature
    ref_scaled = matmul(rows[1], ref_unembedding) / temperature
    lse, ref_lse = (jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (scaled, ref_scaled))
    log_probs = scaled - lse
    kl = (jnp.exp(log_probs) * (log_probs - (ref_scaled - ref_lse))).sum(axis=-1, keepdims=True)
    return kl, lse, ref_lse

  kl, lse, ref_lse = jax.lax.map(chunk, (hidden, ref_hidden))
  inputs = (hidden, unembedding, ref_hidden, ref_unembedding, temperature)
  return kl[..., 0], (*inputs, kl, lse, ref_lse)


def _chunked_bwd(residuals, cotangents):
  hidden, unembedding, ref_hidden, ref_unembedding, temperature, kl, lse, ref_lse = residuals

  def chunk(sums, rows):
    hidden, ref_hidden, kl, lse, ref_lse, cotangents = rows
    scaled = matmul(hidden, unembedding) / temperature
    ref_scaled = matmul(ref_hidden, ref_unembedding) / temperature
    log_probs, ref_log_probs = scaled - lse, ref_scaled - ref_lse
    probs = jnp.exp(log_probs)
    d_scaled = cotangents[:, None] * probs * (log_probs - ref_log_probs - kl)
    d_ref_scaled = cotangents[:, None] * (jnp.exp(ref_log_probs) - probs)
    d_hidden, d_unembedding = _matmul_vjp(d_scaled / temperature, hidden, unembedding)
    d_ref_hidden, d_ref_unembedding = _matmul_vjp(
      d_ref_scaled / temperature, ref_hidden, ref_unembedding
    )
    d_temperature = -(d_scaled * scaled + d_ref_scaled * ref_scaled).sum() / temperature
    # Each gradient is a sum of its own, so that the compiler can leave out of the loop those that
    # nobody asks for, products included.
    sums = jax.tree.map(jnp.add, sums, (d_unembedding, d_ref_unembedding, d_temperature))
    return sums, (d_hidden, d_ref_hidden)

  zeros = (
    jnp.zeros(unembedding.shape, lse.dtype),
    jnp.zeros(ref_unembedding.shape, ref_lse.dtype),
    jnp.zeros_like(temperature),
  )
  sums, (d_hidden, d_ref_hidden) = jax.lax.scan(
    chunk, zeros, (hidden, ref_hidden, kl, lse, ref_lse, cotangents)
  )
  d_unembedding = sums[0].astype(unembedding.dtype)
  d_ref_unembedding = sums[1].astype(ref_unembedding.dtype)
  return d_hidden, d_unembedding, d_ref_hidden, d_ref_unembedding, sums[2]


def _matmul_vjp(d_logits, hidden, unembedding):
  """Returns the gradients of `hidden`, in its dtype, and `unembedding`, in at least float32."""
  d_logits = d_logits.astype(jnp.result_type(hidden, unembedding))
  return matmul(d_logits, unembedding.T).astype(hidden.dtype), matmul(hidden.T, d_logits)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
