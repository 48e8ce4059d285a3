"""Advantages and returns.

Per-token functions take `[..., T]` arrays and a bool mask, and walk back over the real tokens only:
a masked token is skipped, wherever it stands, and the next value and the trace are carried over it.
After the last real token nothing follows, unless `bootstrap_values` say what that state is worth.
Results are zero in the padding. Per-group functions take `scores [..., G]`, the G completions of
one prompt on the last axis. Everything is in units of the reward except where a standard deviation
divides. Nothing is stopped: the losses stop the advantages and returns they are given.
"""

import chex
import jax
import jax.numpy as jnp

from klrl.ops.masking import deviation, masked_var, mean_and_deviations, zero_padding

# Under the root, as in the code that published whitening for RLHF (see `whiten`).
WHITEN_EPS = 1e-8


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma,
  gae_lambda,
  bootstrap_values: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (advantages, returns), each [..., T]; returns = advantages + values.

      delta_t = rewards_t + gamma * values_{t+1} - values_t
      advantages_t = delta_t + gamma * gae_lambda * advantages_{t+1}

  John Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
  Estimation", 2015, eq. 16. The returns are the lambda-returns.

  Args:
    rewards: [..., T] received for emitting token t.
    values: [..., T] of the state before token t.
    mask: [..., T] bool.
    gamma: scalar or [..., T], may be traced; discount of what follows token t, 0 ends an episode.
    gae_lambda: scalar, may be traced.
    bootstrap_values: [...] value after the last real token; None means it is terminal.
  """
  return _walk_back(rewards, values, mask, 1.0, gamma, gae_lambda, bootstrap_values)


def vtrace(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma,
  gae_lambda=1.0,
  max_ratio=1.0,
  bootstrap_values: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (advantages, returns), each [..., T], corrected from the old policy to the current one.

      weight_t = min(ratio_t, max_ratio)
      advantages_t = weight_t * (delta_t + gamma * gae_lambda * advantages_{t+1})

  Lasse Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
  Actor-Learner Architectures", 2018, eqs. 1 and 4, with one truncation level, `max_ratio`, for its
  three; policy-gradient advantage and value error are then the same number. On-policy it is `gae`.

  Args:
    log_probs: [..., T] of the current policy.
    old_log_probs: [..., T] of the policy that sampled.
    rewards: as in `gae`, and so are the arguments that follow.
    values: [..., T].
    mask: [..., T] bool.
    gamma: scalar or [..., T].
    gae_lambda: scalar.
    max_ratio: scalar, where the importance ratio is truncated.
    bootstrap_values: [...].
  """
  chex.assert_equal_shape([log_probs, old_log_probs, rewards])
  log_ratio = zero_padding(log_probs, mask) - zero_padding(old_log_probs, mask)
  # The bound is on the exponent, so that a ratio beyond float32 has gradient 0 and not NaN.
  weights = jnp.exp(jnp.minimum(log_ratio, jnp.log(max_ratio)))
  return _walk_back(rewards, values, mask, weights, gamma, gae_lambda, bootstrap_values)


def discounted_returns(
  rewards: jax.Array, mask: jax.Array, *, gamma, bootstrap_values: jax.Array | None = None
) -> jax.Array:
  """Returns [..., T] `rewards_t + gamma * returns_{t+1}`; arguments as in `gae`."""
  values = jnp.zeros_like(rewards)
  return _walk_back(rewards, values, mask, 1.0, gamma, 1.0, bootstrap_values)[1]


def _walk_back(rewards, values, mask, weights, gamma, gae_lambda, bootstrap_values):
  rewards, values = zero_padding(rewards, mask), zero_padding(values, mask)
  chex.assert_equal_shape([rewards, values])
  if bootstrap_values is None:
    bootstrap_values = jnp.zeros(rewards.shape[:-1], values.dtype)
  chex.assert_shape(bootstrap_values, rewards.shape[:-1])
  dtype = jnp.result_type(rewards, values, bootstrap_values)
  weights, gamma = (jnp.broadcast_to(x, rewards.shape).astype(dtype) for x in (weights, gamma))

  def step(carry, token):
    next_value, trace = carry
    reward, value, real, weight, gamma = token
    delta = reward + gamma * next_value - value
    advantage = (weight * (delta + gamma * gae_lambda * trace)).astype(dtype)
    carry = jnp.where(real, value, next_value), jnp.where(real, advantage, trace)
    return carry, jnp.where(real, advantage, 0.0)

  initial = (bootstrap_values.astype(dtype), jnp.zeros(rewards.shape[:-1], dtype))
  tokens = (rewards, values.astype(dtype), mask, weights, gamma)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tokens)
  _, advantages = jax.lax.scan(step, initial, tokens, reverse=True)
  advantages = jnp.moveaxis(advantages, 0, -1)
  return advantages, advantages + values


def group_relative(scores: jax.Array, *, eps=1e-4) -> jax.Array:
  """Returns [..., G] `(score - mean) / (std + eps)` of the group; 0 in a group of equals.

  In standard deviations, so beta's effective size becomes beta times the group's. The standard
  deviation is the sample's (divisor G - 1), which the paper leaves open and the common code takes.
  Zhihong Shao et al., "DeepSeekMath", 2024, section 4.1.2.
  """
  return group_centred(scores) / (deviation(scores, axis=-1, ddof=1, keepdims=True) + eps)


def group_centred(scores: jax.Array) -> jax.Array:
  """Returns [..., G] `score - mean` of the group; exactly 0 where all are equal up to rounding.

  Zichen Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective" (Dr. GRPO), 2025.
  """
  return mean_and_deviations(scores, axis=-1)[1]


def leave_one_out(scores: jax.Array) -> jax.Array:
  """Returns [..., G] `score - mean of the others`; 0 for a group of one.

  Wouter Kool, Herke van Hoof and Max Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!",
  2019; Arash Ahmadian et al., "Back to Basics" (RLOO), 2024.
  """
  group_size = scores.shape[-1]
  return group_centred(scores) * (group_size / max(1, group_size - 1))


def mean_and_std(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (mean, standard deviation) of `x` [...] over all real tokens, scalars.

  The variance is the population's, plus 1e-8 so that nothing is divided by zero.
  """
  mean, _ = mean_and_deviations(x, mask)
  return mean.reshape(()), jnp.sqrt(masked_var(x, mask) + WHITEN_EPS)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
  """Returns `x` [...] scaled to unit variance over all real tokens, zero in the padding.

  The mean becomes 0, or stays with `shift_mean=False`. Equal tokens give exactly 0 (or
  themselves), no token gives zeros. Daniel Ziegler et al., "Fine-Tuning Language Models from Human
  Preferences", 2019, code: rewards keep their mean, advantages do not.
  """
  mean, std = mean_and_std(x, mask)
  whitened = mean_and_deviations(x, mask)[1] / std
  return zero_padding(whitened if shift_mean else whitened + mean, mask)
