"""Importance weights: the product of a ratio and a number, and weights for an inexact sampler.

A sampler in lower precision, with top-k or of another implementation draws from a policy that is
not quite the trainer's. The ratio of the two, held under a cap, makes up for it; what it does not
make up for is the share above the cap.
"""

import jax
import jax.numpy as jnp

from klrl.ops.masking import zero_padding


@jax.custom_jvp
def weighted(log_weight: jax.Array, x: jax.Array) -> jax.Array:
  """Returns [...] `exp(log_weight) * x`, which is finite wherever the product is.

  A weight beyond float32, or next to 0, and an `x` that makes up for it have a finite product, and
  0 times any weight is 0. Both arguments carry gradient: that of `log_weight` is the product.
  """
  # Half of the exponent at a time: what overflows then overflows in the product.
  half = jnp.exp(log_weight / 2)
  return jnp.where(x == 0, 0.0, half * x * half)


@weighted.defjvp
def _weighted_jvp(primals, tangents):
  log_weight, x = primals
  product, half = weighted(log_weight, x), jnp.exp(log_weight / 2)
  return product, product * tangents[0] + half * (half * tangents[1])


SAMPLER_CORRECTIONS = ("none", "token", "sequence")


def sampler_weights(log_probs, sampler_log_probs, mask, *, correction: str, cap):
  """Returns ([B, T] weights min(ratio, cap), [B, T] bool where the cap bites); no gradient.

  The ratio is that of the trainer's probability to the sampler's: of each token (`token`), or of
  the whole completion for all of its tokens (`sequence`), whose expectations under the sampler are
  the trainer's where the cap does not bite. Token weights correct each step and not how its prefix
  was reached. Weights in the padding are 1. Feng Yao et al., "Your Efficient RL Framework Secretly
  Brings You Off-Policy RL Training", 2025 (truncated importance sampling).

  Args:
    log_probs: [B, T] the trainer's, of the policy that the sampler stood for.
    sampler_log_probs: [B, T] of the distribution that was drawn from.
    mask: [B, T] bool.
    correction: "token" or "sequence".
    cap: scalar, largest weight; may be traced.
  """
  log_ratio = zero_padding(log_probs, mask) - zero_padding(sampler_log_probs, mask)
  if correction == "sequence":
    log_ratio = jnp.where(mask, log_ratio.sum(axis=-1, keepdims=True), 0.0)
  # The bound is on the exponent: an infinite ratio would have no weight to be cut to.
  weights = jnp.exp(jnp.minimum(log_ratio, jnp.log(cap)))
  return jax.lax.stop_gradient(weights), mask & (log_ratio > jnp.log(cap))
