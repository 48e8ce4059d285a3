"""f-divergences of two distributions beside the KL, and the slopes that stand for them in a reward.

    D_f(pi || ref) = sum_v ref(v) * f(pi(v) / ref(v)),    f convex, f(1) = f'(1) = 0

    grad D_f(pi || ref) = E_pi[f'(pi / ref) grad log pi]

So the cost to put in a reward is f'(ratio) of the choice that was made, and no estimate of D_f. An
f may be given any linear term without a change of D_f. Here f'(1) is 0, so that equal distributions
have a gradient of exactly 0, and a choice that the policies agree on costs nothing.
"""

import jax
import jax.numpy as jnp

from klrl.ops.masking import at_least_float32


def alpha_divergence_of(
  log_probs: jax.Array, ref_log_probs: jax.Array, alpha: jax.Array | float
) -> jax.Array:
  """Returns the alpha-divergence [...] of two distributions given by their log-probs [..., V].

      f(t) = (t**(1 - alpha) - (1 - alpha) t - alpha) / (alpha (alpha - 1))

  It tends to KL(pi || ref) as alpha -> 0 and to KL(ref || pi) as alpha -> 1. At 1/2 it is four
  times the squared Hellinger distance, 2 sum (sqrt(pi) - sqrt(ref))**2, and at -1 half of the
  chi-squared divergence, sum (pi - ref)**2 / (2 ref). Close to ref it is the KL, whatever alpha is,
  since f''(1) = 1. Between 0 and 1 it is finite even where one of the two excludes what the other
  does not. The parametrisation is that of Chaoqi Wang et al., "Beyond Reverse KL: Generalizing
  Direct Preference Optimization with Diverse Divergence Constraints", 2023, table 1.

  >>> print(ops.alpha_divergence_of(*jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])), -1.0))
  0.167

  Args:
    log_probs: [..., V], of pi; carries gradient, as `ref_log_probs` does.
    ref_log_probs: [..., V].
    alpha: scalar, neither 0 nor 1; may be traced; carries no gradient.
  """
  log_probs, ref_log_probs = at_least_float32(log_probs), at_least_float32(ref_log_probs)
  alpha = jax.lax.stop_gradient(jnp.asarray(alpha, log_probs.dtype))
  return _alpha_divergence(log_probs, ref_log_probs, alpha)


@jax.custom_jvp
def _alpha_divergence(log_probs, ref_log_probs, alpha):
  return _alpha_parts(log_probs, ref_log_probs, alpha)[0].sum(axis=-1)


@_alpha_divergence.defjvp
def _alpha_jvp(primals, tangents):
  value, slope, ref_slope = _alpha_parts(*primals)
  d, ref_d, _ = tangents
  return value.sum(axis=-1), (slope * d + ref_slope * ref_d).sum(axis=-1)


def _alpha_parts(log_probs, ref_log_probs, alpha):
  """Returns ref * f(t), and its derivatives in log pi and log ref where both stay normalised."""
  both_exclude = jnp.isneginf(log_probs) & jnp.isneginf(ref_log_probs)
  log_ratio = jnp.where(both_exclude, 0.0, log_probs - ref_log_probs)
  probs, ref_probs = jnp.exp(log_probs), jnp.exp(ref_log_probs)
  # Far apart nothing cancels, and the product of powers is finite where a ratio need not be.
  mixed = jnp.exp((1 - alpha) * log_probs + alpha * ref_log_probs)
  far = (
    probs / alpha + ref_probs / (1 - alpha) - mixed / (alpha * (1 - alpha)),
    (probs - mixed) / alpha,
    (ref_probs - mixed) / (1 - alpha),
  )
  is_near = jnp.abs(log_ratio) < 1
  x = jnp.where(is_near, log_ratio, 0.0)
  near = (
    probs * (alpha * jnp.expm1(-x) - jnp.expm1(-alpha * x)) / (alpha * (1 - alpha)),
    -probs * jnp.expm1(-alpha * x) / alpha,
    -ref_probs * jnp.expm1((1 - alpha) * x) / (1 - alpha),
  )
  return [jnp.where(is_near, *both) for both in zip(near, far, strict=True)]


def alpha_slope(log_ratio: jax.Array, alpha: jax.Array | float) -> jax.Array:
  """Returns f'(exp(log_ratio)) = (1 - exp(-alpha * log_ratio)) / alpha, any shape.

  It is the slope of `alpha_divergence_of`; at alpha = 1 that of KL(ref || pi), 1 - ref / pi.

  >>> print(ops.alpha_slope(jnp.log(jnp.array([0.5, 1.0, 2.0])), -1.0))  # ratio - 1
  [-0.5  0.   1. ]
  """
  return -jnp.expm1(-alpha * at_least_float32(log_ratio)) / alpha


def jsd_slope(log_ratio: jax.Array, weight: jax.Array | float) -> jax.Array:
  """Returns f'(exp(log_ratio)) = (1 - weight) * log(pi / mixture), any shape.

  It is the slope of `jsd_of`, whose mixture is weight * ref + (1 - weight) * pi. It is at most
  -(1 - weight) * log(1 - weight).

  >>> print(ops.jsd_slope(jnp.log(jnp.array([0.5, 1.0, 1e6])), 0.5))  # at most log(2) / 2
  [-0.203  0.     0.347]
  """
  # Each of the two is computed where its exponential is at most 1; at 0 both are exactly 0.
  log_ratio = at_least_float32(log_ratio)
  above = -jnp.log1p(weight * jnp.expm1(-jnp.maximum(log_ratio, 0.0)))
  below = jnp.minimum(log_ratio, 0.0)
  below -= jnp.log1p((1 - weight) * jnp.expm1(below))
  return (1 - weight) * jnp.where(log_ratio < 0, below, above)
