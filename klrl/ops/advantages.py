"""Advantages and returns.

Functions of tokens take `[..., T]` arrays and a bool mask, and walk back over the real tokens only:
a masked token is skipped, wherever it stands, and the next value and the trace are carried over it.
Nothing follows the last real token, unless `bootstrap_values` say what the state after it is worth.
The results are zero in the padding. Functions of groups take `scores [..., G]`, with the G
completions of one prompt on the last axis, and a bool mask of those that have a score (None: all
have); the others are in no mean and no deviation, and get 0. Everything is in units of the reward,
except where a standard deviation divides. No gradient is stopped here: the losses stop the
advantages and returns that they are given.
"""

import chex
import jax
import jax.numpy as jnp

from klrl.ops.masking import (
  deviation,
  divide,
  masked_var,
  mean_and_deviations,
  zero_padding,
)

# Under the root, as in the code that published whitening for RLHF (see `whiten`).
WHITEN_EPS = 1e-8


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: jax.Array | float,
  gae_lambda: jax.Array | float,
  bootstrap_values: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (advantages, returns), each [..., T]; returns = advantages + values.

      delta_t = rewards_t + gamma * values_{t+1} - values_t
      advantages_t = delta_t + gamma * gae_lambda * advantages_{t+1}

  John Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
  Estimation", 2015, eq. 16. The returns are the lambda-returns.

  >>> rewards, values, mask = jnp.array([0.0, 0.0, 1.0]), jnp.full(3, 0.5), jnp.ones(3, bool)
  >>> print(ops.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)[0])  # outcome - value
  [0.5 0.5 0.5]
  >>> print(ops.gae(rewards, values, mask, gamma=1.0, gae_lambda=0.0)[0])  # one step's surprise
  [0.  0.  0.5]

  Args:
    rewards: [..., T], received for emitting token t.
    values: [..., T], of the state before token t.
    mask: [..., T] bool.
    gamma: scalar or [..., T], may be traced; the discount of what follows token t. 0 ends an
      episode.
    gae_lambda: scalar, may be traced.
    bootstrap_values: [...], the value after the last real token; None means that it is terminal.
  """
  return _walk_back(rewards, values, mask, 1.0, gamma, gae_lambda, bootstrap_values)


def vtrace(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: jax.Array | float,
  gae_lambda: jax.Array | float = 1.0,
  max_ratio: jax.Array | float = 1.0,
  bootstrap_values: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (advantages, returns), each [..., T], corrected from the old policy to the current one.

      weight_t = min(ratio_t, max_ratio)
      advantages_t = weight_t * (delta_t + gamma * gae_lambda * advantages_{t+1})

  Lasse Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
  Actor-Learner Architectures", 2018, eqs. 1 and 4, with one truncation level, `max_ratio`, in place
  of its three; the advantage of the policy gradient and the error of the value are then the same
  number. On-policy it is `gae`.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.8, 0.2], [0.4, 0.4]]))  # ratios 2 and 1/2
  >>> rewards, values, mask = jnp.array([0.0, 1.0]), jnp.zeros(2), jnp.ones(2, bool)
  >>> print(ops.vtrace(log_probs, old_log_probs, rewards, values, mask, gamma=1.0)[0])
  [0.5 0.5]

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
  rewards: jax.Array,
  mask: jax.Array,
  *,
  gamma: jax.Array | float,
  bootstrap_values: jax.Array | None = None,
) -> jax.Array:
  """Returns [..., T] `rewards_t + gamma * returns_{t+1}`; the arguments are those of `gae`.

  >>> print(ops.discounted_returns(jnp.array([0.0, 0.0, 1.0]), jnp.ones(3, bool), gamma=0.9))
  [0.81 0.9  1.  ]
  """
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


def group_relative(
  scores: jax.Array, mask: jax.Array | None = None, *, eps: jax.Array | float = 1e-4
) -> jax.Array:
  """Returns [..., G] `(score - mean) / (std + eps)` of the group; 0 in a group of equals.

  The result is in standard deviations, so the effective beta becomes beta times the group's
  deviation. The deviation is the sample's (divisor G - 1): the paper leaves this open, and the
  common code takes it. Zhihong Shao et al., "DeepSeekMath", 2024, section 4.1.2.

  >>> print(ops.group_relative(jnp.array([0.0, 0.0, 0.0, 1.0])))
  [-0.5 -0.5 -0.5  1.5]
  """
  spread = deviation(scores, mask, axis=-1, ddof=1, keepdims=True)
  return group_centred(scores, mask) / (spread + eps)


def group_centred(scores: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Returns [..., G] `score - mean` of the group; exactly 0 where all are equal up to rounding.

  Zichen Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective" (Dr. GRPO), 2025.

  >>> print(ops.group_centred(jnp.array([0.0, 0.0, 0.0, 1.0])))
  [-0.25 -0.25 -0.25  0.75]
  """
  return mean_and_deviations(scores, mask, axis=-1)[1]


def leave_one_out(scores: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Returns [..., G] `score - mean of the others`; 0 where there are no others.

  Wouter Kool, Herke van Hoof and Max Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!",
  2019; Arash Ahmadian et al., "Back to Basics" (RLOO), 2024.

  >>> print(ops.leave_one_out(jnp.array([0.0, 0.0, 0.0, 1.0])))
  [-0.333 -0.333 -0.333  1.   ]
  """
  mask = jnp.ones(scores.shape, bool) if mask is None else mask
  num = mask.sum(axis=-1, keepdims=True, dtype=scores.dtype)
  return group_centred(scores, mask) * (num / jnp.maximum(1, num - 1))


def best_of_n_reward(upto: jax.Array, tied: jax.Array, n: jax.Array | float) -> jax.Array:
  """Returns [...] log(best-of-n / reference), the reward whose best policy is best-of-n.

  With beta 1, that is: the maximum of E[reward] - KL(pi || reference). Where no two scores tie it
  is (n - 1) log F + log n, with F the reference's chance to score no more; of equal scores the mean
  of F^(n - 1) over their part of the ranks is meant. Pier Giuseppe Sessa et al., "BOND: Aligning
  LLMs with Best-of-N Distillation", 2024, theorem 2; Afra Amini, Tim Vieira and Ryan Cotterell,
  "Variational Best-of-N Alignment", 2024, which leaves ties out.

  >>> print(ops.best_of_n_reward(jnp.array([0.5, 1.0]), 0.5, 2))  # 1/4 and 3/4 for a coin's 1/2
  [-0.693  0.405]

  Args:
    upto: [...], the reference's chance of a score that is not higher, positive.
    tied: [...], its chance of an equal score; taken to be `upto` where it is more.
    n: at least 1, may be traced and fractional.
  """
  # (upto^n - below^n) / tied, in a form that keeps its digits where few tie or all do.
  share = jnp.clip(divide(tied, upto), 0.0, 1.0)
  gained = -jnp.expm1(n * jnp.log1p(-share))
  return (n - 1) * jnp.log(upto) + jnp.log(jnp.where(share > 0, divide(gained, share), n))


def mean_and_std(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (mean, standard deviation) of `x` [...] over all real tokens, scalars.

  The variance is the population's, plus 1e-8 so that nothing is divided by zero.

  >>> mean, std = ops.mean_and_std(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False]))
  >>> print(mean, std)
  2.0 1.0
  """
  mean, _ = mean_and_deviations(x, mask)
  return mean.reshape(()), jnp.sqrt(masked_var(x, mask) + WHITEN_EPS)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
  """Returns `x` [...] scaled to unit variance over all real tokens, zero in the padding.

  The mean becomes 0; with `shift_mean=False` it stays. Equal tokens give exactly 0 (or themselves),
  and no token gives zeros. Daniel Ziegler et al., "Fine-Tuning Language Models from Human
  Preferences", 2019, code: rewards keep their mean, advantages do not.

  >>> print(ops.whiten(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False])))
  [-1.  1.  0.]
  """
  mean, std = mean_and_std(x, mask)
  whitened = mean_and_deviations(x, mask)[1] / std
  return zero_padding(whitened if shift_mean else whitened + mean, mask)
