"""Importance weights: the product of a ratio and a number, and weights for an inexact sampler.

A sampler of lower precision, with top-k, or of another implementation draws from a policy that is
not quite the trainer's. The ratio of the two policies corrects for this, except for the part of the
ratio that a cap cuts off.
"""

import jax
import jax.numpy as jnp

from klrl.ops.masking import masked_mean, zero_padding


@jax.custom_jvp
def weighted(log_weight: jax.Array, x: jax.Array) -> jax.Array:
  """Returns [...] `exp(log_weight) * x`, which is finite wherever the product is.

  A weight that overflows float32 may have a finite product with a small `x`, and 0 times any weight
  is 0. Both arguments carry gradient; that of `log_weight` is the product.

  >>> print(ops.weighted(jnp.float32(100.0), jnp.array([0.0, 1e-30])))  # exp(100) is inf
  [0.000e+00 2.688e+13]
  """
  # Half of the exponent at a time: what overflows then overflows in the product.
  half = jnp.exp(log_weight / 2)
  return jnp.where(x == 0, 0.0, half * x * half)


@weighted.defjvp
def _weighted_jvp(primals, tangents):
  log_weight, x = primals
  product, half = weighted(log_weight, x), jnp.exp(log_weight / 2)
  return product, product * tangents[0] + half * (half * tangents[1])


SAMPLER_MASKS = ("token_mask", "sequence_mask", "geometric_mask")
SAMPLER_CORRECTIONS = ("none", "token", "sequence", *SAMPLER_MASKS)


def sampler_weights(
  log_probs: jax.Array,
  sampler_log_probs: jax.Array,
  mask: jax.Array,
  *,
  correction: str,
  cap: jax.Array | float,
  floor: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Returns ([B, T] weights, [B, T] bool where a bound acts); no gradient.

  The ratio is the trainer's probability over the sampler's: of each token (`token`), or of the
  whole completion, for all of its tokens (`sequence`), and the weight is min(ratio, cap).
  Expectations under the sampler with the weights of sequences are those of the trainer, as far as
  the cap does not act; the weights of tokens correct each step, but not how its prefix was reached.
  Feng Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025
  (truncated importance sampling).

  `token_mask` and `sequence_mask` have the ratio where it is from `floor` to `cap`, and 0 elsewhere
  (Ling Team, "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking
  Model", 2025, IcePop, for tokens). `geometric_mask` has 1 where the geometric mean of a
  completion's ratios is in these bounds, which do not depend on its length, and 0 elsewhere. A mask
  leaves out what the cap would weigh too little or too much, and so biases what is left. Weights in
  the padding are 1.

  >>> log_probs, sampler_log_probs = jnp.log(jnp.array([[[0.6, 0.8]], [[0.4, 0.4]]]))
  >>> mask = jnp.ones((1, 2), bool)
  >>> print(ops.sampler_weights(log_probs, sampler_log_probs, mask, correction="token", cap=5.0)[0])
  [[1.5 2. ]]
  >>> print(ops.sampler_weights(log_probs, sampler_log_probs, mask, correction="sequence", cap=2.0))
  (Array([[2., 2.]], dtype=float32), Array([[ True,  True]], dtype=bool))

  Args:
    log_probs: [B, T], by the trainer, of the policy that the sampler stands for.
    sampler_log_probs: [B, T], of the distribution that the sampler drew from.
    mask: [B, T] bool.
    correction: one of `SAMPLER_CORRECTIONS` but "none".
    cap: scalar, the largest weight; may be traced, as `floor` may.
    floor: scalar, the smallest ratio that a mask keeps.
  """
  log_ratio = zero_padding(log_probs, mask) - zero_padding(sampler_log_probs, mask)
  if correction.startswith("sequence"):
    log_ratio = jnp.where(mask, log_ratio.sum(axis=-1, keepdims=True), 0.0)
  elif correction == "geometric_mask":
    log_ratio = jnp.where(mask, masked_mean(log_ratio, mask, axis=-1)[..., None], 0.0)
  # The exponent is bounded and not the ratio, so that an infinite ratio has the weight `cap`.
  weights = jnp.exp(jnp.minimum(log_ratio, jnp.log(cap)))
  acts = mask & (log_ratio > jnp.log(cap))
  if correction in SAMPLER_MASKS:
    acts |= mask & (log_ratio < jnp.log(floor))
    weights = jnp.where(acts, 0.0, 1.0 if correction == "geometric_mask" else weights)
  return jax.lax.stop_gradient(weights), acts
