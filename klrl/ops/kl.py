"""Divergences between a policy and another one, in nats per token.

An estimator is a function of the log-probabilities of the tokens taken, `[..., T]`. Below, pi is
the policy of `log_probs`, and log_ratio = log_probs - ref_log_probs. No gradient is stopped here:
both arguments carry it, and whoever puts an estimator in a loss or a reward decides. An estimator
means different things in these two places, so each docstring says for tokens drawn from pi what its
expected value is, its expected gradient as a loss (differentiated), and its expected gradient as a
cost in the reward (the value, stopped, times the score function). The value holds for sums over a
sequence too. The gradient as a loss is that of the divergence at the given prefixes, and leaves out
how pi chooses the prefixes.

Nothing is masked here. Where the padding may hold values that are far apart or not finite, make
both arguments equal there first.

Names and formulas: John Schulman, "Approximating KL Divergence", 2020,
http://joschu.net/blog/kl-approx.html.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from klrl.ops.divergences import jsd_slope
from klrl.ops.importance import weighted
from klrl.ops.log_probs import vocab_log_probs
from klrl.ops.logits import Unembedding
from klrl.ops.masking import at_least_float32
from klrl.ops.vocabulary import over_vocabulary


def _log_ratio(log_probs, other_log_probs):
  chex.assert_equal_shape([log_probs, other_log_probs])
  chex.assert_type([log_probs, other_log_probs], float)
  return at_least_float32(log_probs) - at_least_float32(other_log_probs)


def k1(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `log_ratio`, of either sign.

  For tokens from pi the value is KL(pi || ref), unbiased. As a loss its expected gradient is zero:
  it only adds noise. In the reward the expected gradient is that of KL(pi || ref).

  >>> log_probs, ref_log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> print(ops.k1(log_probs, ref_log_probs))  # their mean under pi is the KL, 0.144
  [ 0.693 -0.405]
  """
  return _log_ratio(log_probs, ref_log_probs)


def k2(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `log_ratio**2 / 2`, not negative.

  For tokens from pi the value is biased; it is KL(pi || ref) to second order. As a loss its
  expected gradient is exactly that of KL(pi || ref). In the reward it is the gradient of no
  divergence.

  >>> log_probs, ref_log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> print(ops.k2(log_probs, ref_log_probs))  # mean under pi 0.161, the KL is 0.144
  [0.24  0.082]
  """
  return 0.5 * _log_ratio(log_probs, ref_log_probs) ** 2


def k3(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `exp(-log_ratio) - 1 + log_ratio`, not negative.

  For tokens from pi the value is KL(pi || ref), unbiased if ref has no mass outside the support of
  pi; the variance is unbounded where ref is much larger than pi. As a loss its expected gradient is
  that of KL(ref || pi), the other direction. In the reward it is that of KL(pi || ref) minus that
  of KL(ref || pi), which vanishes to first order at pi = ref.

  >>> log_probs, ref_log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> print(ops.k3(log_probs, ref_log_probs))  # their mean under pi is the KL, 0.144
  [0.193 0.095]
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
  log_prefix_weight: jax.Array | float = 0.0,
  log_cap: jax.Array | float = jnp.inf,
) -> jax.Array:
  """Returns [..., T] `min(exp(log_prefix_weight) * pi / old, exp(log_cap)) * estimate`.

  Value and gradient are finite wherever the product is: exponents are summed before anything is
  exponentiated. The gradient of k1 is weight * (log_ratio + 1). That of k3 is weight * log_ratio;
  the two terms of its product rule are as large as ref / old and cancel. The weight of k2 is
  stopped, since the derivative of k2 has the right mean and its value has not, so its gradient is
  weight * log_ratio as well. The cap bounds the value of the weight and leaves the gradient of its
  logarithm.

  >>> log_probs, old, ref = jnp.log(jnp.array([[0.5], [0.25], [0.25]]))
  >>> print(ops.weighted_estimate("k1", log_probs, old, ref))  # 2 * log 2
  [1.386]

  Args:
    estimator: the name of an estimator of pi against the reference: k1, k2 or k3.
    log_probs: [..., T], of pi; carries gradient.
    old_log_probs: [..., T], of the policy that sampled; carries no gradient.
    ref_log_probs: [..., T]; carries no gradient.
    log_prefix_weight: [..., T], of what came before the token; carries gradient, except for k2.
    log_cap: scalar, may be traced.

  Raises:
    ValueError: it is another estimator, whose derivative is not known here.
  """
  if estimator not in ("k1", "k2", "k3"):
    raise ValueError(
      f"weighted_estimate knows the derivatives of k1, k2 and k3, not of {estimator}."
    )
  chex.assert_equal_shape([log_probs, old_log_probs, ref_log_probs])
  chex.assert_type([log_probs, old_log_probs, ref_log_probs], float)
  log_probs, old, ref = map(at_least_float32, (log_probs, old_log_probs, ref_log_probs))
  old, ref = jax.lax.stop_gradient((old, ref))
  prefix = jnp.broadcast_to(log_prefix_weight, log_probs.shape).astype(log_probs.dtype)
  if estimator == "k2":
    prefix = jax.lax.stop_gradient(prefix)
  log_cap = jnp.asarray(log_cap, log_probs.dtype)
  return _weighted_estimate(estimator, prefix, log_probs, old, ref, log_cap)


# Where ref / pi is above exp(50), k3 equals ref / pi up to a relative 1e-20.
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

  For tokens from old (not from pi) the value is KL(old || pi), unbiased. As a loss its expected
  gradient is that of KL(old || pi) at the prefixes that old visits. It is k3 of old against pi.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> print(ops.kl_old_new(log_probs, old_log_probs))  # mean under old: the KL, 0.131
  [0.307 0.072]
  """
  return k3(old_log_probs, log_probs)


def kl_new_old(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
  """Returns [..., T] `ratio * log(ratio) - (ratio - 1)`, ratio = pi / old, not negative.

  For tokens from old (not from pi) the value is KL(pi || old), unbiased. As a loss its expected
  gradient is that of KL(pi || old) at the prefixes that old visits. It is k3 of pi against old,
  weighted by the ratio.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> print(ops.kl_new_old(log_probs, old_log_probs))  # mean under old: the KL, 0.144
  [0.386 0.063]
  """
  log_ratio = _log_ratio(log_probs, old_log_probs)
  return weighted_estimate("k3", log_ratio, jnp.zeros_like(log_ratio), jnp.zeros_like(log_ratio))


def exact_kl(
  logits: jax.Array, ref_logits: jax.Array, *, temperature: jax.Array | float = 1.0
) -> jax.Array:
  """Returns [..., T] KL(pi || ref) of the two next-token distributions, summed over the vocabulary.

  It is in nats per token, and not negative up to rounding. It is inf where ref excludes (logit
  -inf) a token that pi does not; a token that pi excludes adds nothing. Summed over the prefixes of
  a completion from pi it is an unbiased estimate of the KL of sequences (Afra Amini, Tim Vieira and
  Ryan Cotterell, "Better Estimation of the KL Divergence Between Language Models", 2025). It has no
  variance at a given prefix, and over completions usually, though not always, less than k1.
  Differentiated, it gives the gradient at those prefixes only.

  >>> logits, ref_logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
  >>> print(ops.exact_kl(logits, ref_logits), ops.exact_kl(ref_logits, logits))
  0.144 0.131

  Args:
    logits: [..., T, V], of pi; carries gradient.
    ref_logits: [..., T, V]; carries gradient too, which a frozen reference does not use.
    temperature: scalar of both, may be traced; carries gradient.
  """
  return kl_of(*_both_vocab_log_probs(logits, ref_logits, temperature))


def exact_jsd(
  logits: jax.Array,
  ref_logits: jax.Array,
  *,
  weight: jax.Array | float,
  temperature: jax.Array | float = 1.0,
) -> jax.Array:
  """Returns [..., T] the Jensen-Shannon divergence of the two next-token distributions.

  It is in nats per token. With the teacher P = `ref_logits`, the student Q = `logits` and the
  mixture M = weight * P + (1 - weight) * Q it is

      weight * KL(P || M) + (1 - weight) * KL(Q || M),

  equation 1 of Rishabh Agarwal et al., "On-Policy Distillation of Language Models", 2024. It is not
  negative up to rounding, and at most the entropy of (weight, 1 - weight), even where one of the
  two excludes (logit -inf) what the other does not. It tends to weight * KL(P || Q) as weight -> 0
  and to (1 - weight) * KL(Q || P) as weight -> 1; at weight 1/2 it is symmetric.

  >>> logits, ref_logits = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])  # no token in common
  >>> print(ops.exact_jsd(logits, ref_logits, weight=0.5))  # log 2, the largest
  0.693

  Args:
    logits: [..., T, V], of the student; carries gradient.
    ref_logits: [..., T, V], of the teacher; carries gradient too.
    weight: scalar in [0, 1], the share of the teacher in the mixture; 0 and 1 give 0. It may be
      traced and carries gradient.
    temperature: scalar of both, may be traced; carries gradient.
  """
  return jsd_of(*_both_vocab_log_probs(logits, ref_logits, temperature), weight)


def _both_vocab_log_probs(logits, ref_logits, temperature):
  chex.assert_equal_shape([logits, ref_logits])
  log_probs = vocab_log_probs(logits, temperature=temperature)
  return log_probs, vocab_log_probs(ref_logits, temperature=temperature)


@jax.custom_jvp
def kl_of(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
  """Returns KL [...] of two distributions given by their log-probs [..., V], nats.

  Its derivative is p log(p / q) in log p and q - p in log q, so equal distributions have none. The
  plain formula's, p log(p / q) + p and -p, are the same for log-probs that stay normalised, but
  only up to a rounding, which Adam would make a whole step of.

  >>> print(ops.kl_of(*jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))))
  0.144
  """
  return _weighted_log_ratio(log_probs, ref_log_probs).sum(axis=-1)


@kl_of.defjvp
def _kl_jvp(primals, tangents):
  log_probs, ref_log_probs = primals
  terms = _weighted_log_ratio(log_probs, ref_log_probs)
  difference = jnp.exp(ref_log_probs) - jnp.exp(log_probs)
  d, ref_d = tangents
  return terms.sum(axis=-1), (terms * d + difference * ref_d).sum(axis=-1)


def _weighted_log_ratio(log_probs, ref_log_probs):
  """Returns p log(p / q) [..., V], 0 where p is."""
  excluded = jnp.isneginf(log_probs)
  log_ratio = jnp.where(excluded, 0.0, log_probs) - jnp.where(excluded, 0.0, ref_log_probs)
  return jnp.exp(log_probs) * log_ratio


@jax.custom_jvp
def jsd_of(log_probs: jax.Array, ref_log_probs: jax.Array, weight: jax.Array | float) -> jax.Array:
  """Returns `exact_jsd` [...] of two distributions given by their log-probs [..., V], nats.

  Its derivative in log p is p times `jsd_slope`, and likewise in log q, so equal distributions have
  none.

  >>> print(ops.jsd_of(*jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])), 0.5))
  0.034
  """
  to_mixture, ref_to_mixture = _kls_to_mixture(log_probs, ref_log_probs, weight)
  return weight * ref_to_mixture + (1 - weight) * to_mixture


@jsd_of.defjvp
def _jsd_jvp(primals, tangents):
  log_probs, ref_log_probs, weight = primals
  to_mixture, ref_to_mixture = _kls_to_mixture(*primals)
  excluded, ref_excluded = jnp.isneginf(log_probs), jnp.isneginf(ref_log_probs)
  log_ratio = jnp.where(excluded & ref_excluded, 0.0, log_probs - ref_log_probs)
  slope = jnp.exp(log_probs) * jnp.where(excluded, 0.0, jsd_slope(log_ratio, weight))
  ref_slope = jsd_slope(-log_ratio, 1 - weight)
  ref_slope = jnp.exp(ref_log_probs) * jnp.where(ref_excluded, 0.0, ref_slope)
  d, ref_d, weight_d = tangents
  of_policies = (slope * d + ref_slope * ref_d).sum(axis=-1)
  value = weight * ref_to_mixture + (1 - weight) * to_mixture
  return value, of_policies + (ref_to_mixture - to_mixture) * weight_d


def _kls_to_mixture(log_probs, ref_log_probs, weight):
  mixture = weight * jnp.exp(ref_log_probs) + (1 - weight) * jnp.exp(log_probs)
  # Where the mixture is zero, so is what its logarithm is multiplied by.
  log_mixture = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
  return [_weighted_log_ratio(x, log_mixture).sum(axis=-1) for x in (log_probs, ref_log_probs)]


def exact_kl_from_hidden(
  hidden: jax.Array,
  unembedding: Unembedding,
  ref_hidden: jax.Array,
  ref_unembedding: Unembedding,
  *,
  temperature: jax.Array | float = 1.0,
  chunk_size: int | None = None,
) -> jax.Array:
  """Returns `exact_kl` of `hidden @ unembedding` against the reference's, without the logits.

  The result is [..., T], in nats per token; see `over_vocabulary`.

  >>> hidden, ref_hidden = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
  >>> print(ops.exact_kl_from_hidden(hidden, jnp.eye(2), ref_hidden, jnp.eye(2)))
  [0.144]

  Args:
    hidden: [..., T, D]; carries gradient, as the other arrays do.
    unembedding: [D, V], or a `CappedUnembedding`, as the other may be.
    ref_hidden: [..., T, D_ref]; D_ref may differ from D.
    ref_unembedding: [D_ref, V].
    temperature: scalar of both, may be traced; carries gradient.
    chunk_size: as in `token_log_probs_from_hidden`.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  models = (hidden, unembedding), (ref_hidden, ref_unembedding)
  return over_vocabulary(kl_of, models, temperature=temperature, chunk_size=chunk_size)


def exact_jsd_from_hidden(
  hidden: jax.Array,
  unembedding: Unembedding,
  ref_hidden: jax.Array,
  ref_unembedding: Unembedding,
  *,
  weight: jax.Array | float,
  temperature: jax.Array | float = 1.0,
  chunk_size: int | None = None,
) -> jax.Array:
  """Returns `exact_jsd` of `hidden @ unembedding` and the teacher's, without the logits.

  The result is [..., T], in nats per token; see `over_vocabulary`. `weight` is the share of the
  teacher, whose arrays begin with `ref_`; it may be traced and carries gradient. The other
  arguments and the errors are those of `exact_kl_from_hidden`.

  >>> hidden, teacher = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
  >>> print(ops.exact_jsd_from_hidden(hidden, jnp.eye(2), teacher, jnp.eye(2), weight=0.5))
  [0.034]
  """
  models = (hidden, unembedding), (ref_hidden, ref_unembedding)
  options = {"temperature": temperature, "chunk_size": chunk_size}
  return over_vocabulary(jsd_of, models, coefficients=[weight], **options)
