"""Losses per token, and the named ways to aggregate them.

A loss is `[..., T]`, to be minimised, and zero in the padding; `dpo_loss` and `ipo_loss` are of
whole completions, `[...]`. Gradient flows through `log_probs` or `values` (and through `kl`, where
it is an argument) only; everything else is stopped. Here ratio = exp(log_probs - old_log_probs).
Its bounds are put on its logarithm, and `weighted` multiplies it. So a ratio that overflows float32
has value and gradient 0, and not NaN, where the clip ignores it or the advantage is 0.

An aggregation takes the loss and the mask and returns (sum, count), which add up over
micro-batches and devices; `divide(sum, count)` is the loss. A row without a real token is not a
sequence and is not counted.
"""

import chex
import jax
import jax.numpy as jnp

from klrl.ops.importance import weighted
from klrl.ops.masking import at_least_float32, masked_mean, masked_sum_count, zero_padding


def clipped_policy_loss(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps_low: jax.Array | float,
  clip_eps_high: jax.Array | float,
  dual_clip: jax.Array | float = jnp.inf,
) -> jax.Array:
  """Returns [..., T] `-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)`.

  Where A < 0, the ratio is bounded by `dual_clip` as well. John Schulman et al., "Proximal Policy
  Optimization Algorithms", 2017, eq. 7; two clip ranges: Qiying Yu et al., "DAPO", 2025, eq. 10;
  dual clip: Deheng Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement
  Learning", 2020, eq. 5.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.8, 0.8], [0.4, 0.4]]))  # ratio 2
  >>> advantages, mask = jnp.array([1.0, -1.0]), jnp.ones(2, bool)
  >>> loss = lambda x: ops.clipped_policy_loss(
  ...   x, old_log_probs, advantages, mask, clip_eps_low=0.2, clip_eps_high=0.2
  ... )
  >>> print(loss(log_probs), jax.grad(lambda x: loss(x).sum())(log_probs))
  [-1.2  2. ] [0. 2.]

  Args:
    log_probs: [..., T], of the current policy; carries gradient.
    old_log_probs: [..., T], of the policy that sampled.
    advantages: [..., T].
    mask: [..., T] bool.
    clip_eps_low: scalar in [0, 1]; it may be traced, as the next two may.
    clip_eps_high: scalar, at least 0.
    dual_clip: scalar above 1; inf is off.
  """
  log_ratio, advantages = _stopped_inputs(log_probs, old_log_probs, advantages, mask)
  lower, upper = jnp.log1p(-clip_eps_low), jnp.log1p(clip_eps_high)
  log_ratio = jnp.where(
    advantages >= 0,
    jnp.minimum(log_ratio, upper),
    jnp.clip(log_ratio, lower, jnp.log(dual_clip)),
  )
  return -weighted(log_ratio, advantages)


def gspo_loss(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps_low: jax.Array | float,
  clip_eps_high: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] `clipped_policy_loss` with the ratio of the sequence, the same at each token.

  That ratio is the geometric mean of the ratios of the tokens. With one advantage for a sequence,
  the mean over its tokens is the published loss. Chujie Zheng et al., "Group Sequence Policy
  Optimization", 2025, eqs. 5 and 7.

  >>> log_ratio, zeros, mask = jnp.log(jnp.array([4.0, 0.25])), jnp.zeros(2), jnp.ones(2, bool)
  >>> print(ops.gspo_loss(log_ratio, zeros, zeros + 1, mask, clip_eps_low=0.2, clip_eps_high=0.2))
  [-1. -1.]

  Args:
    log_probs: as in `clipped_policy_loss`, and so are the arguments that follow.
    old_log_probs: [..., T].
    advantages: [..., T].
    mask: [..., T] bool.
    clip_eps_low: scalar.
    clip_eps_high: scalar.
  """
  log_ratio, _ = _stopped_inputs(log_probs, old_log_probs, advantages, mask)
  mean = jnp.broadcast_to(masked_mean(log_ratio, mask, axis=-1)[..., None], log_ratio.shape)
  zeros = jnp.zeros_like(mean)
  return clipped_policy_loss(
    mean, zeros, advantages, mask, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high
  )


def cispo_loss(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  max_ratio: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] `-min(ratio, max_ratio) * A * log_probs`, whose ratio carries no gradient.

  So a token beyond the bound keeps a gradient, of bounded weight, where `clipped_policy_loss` has
  none. MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", 2025,
  eqs. 4 and 5, without a lower bound, as in that paper's training.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.8], [0.2]]))  # ratio 4
  >>> args = old_log_probs, jnp.ones(1), jnp.ones(1, bool)
  >>> print(jax.grad(lambda x: ops.cispo_loss(x, *args, max_ratio=2.0).sum())(log_probs))
  [-2.]

  Args:
    log_probs: [..., T], of the current policy; carries gradient.
    old_log_probs: [..., T], of the policy that sampled.
    advantages: [..., T].
    mask: [..., T] bool.
    max_ratio: positive scalar, may be traced.
  """
  log_ratio, advantages = _stopped_inputs(log_probs, old_log_probs, advantages, mask)
  log_weights = jnp.minimum(log_ratio, jnp.log(max_ratio))
  return reinforce_loss(log_probs, weighted(log_weights, advantages), mask)


def clip_fraction(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_eps_low: jax.Array | float,
  clip_eps_high: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] float, 1 where `clipped_policy_loss` clips and so has no gradient, else 0.

  A ratio outside the range is clipped only on the side to which the advantage pushes. The result
  carries no gradient, and `dual_clip` is not counted.

  >>> log_ratio, zeros, mask = jnp.log(jnp.array([2.0, 2.0])), jnp.zeros(2), jnp.ones(2, bool)
  >>> advantages = jnp.array([1.0, -1.0])
  >>> args = log_ratio, zeros, advantages, mask
  >>> print(ops.clip_fraction(*args, clip_eps_low=0.2, clip_eps_high=0.2))
  [1. 0.]
  """
  log_ratio, advantages = _stopped_inputs(log_probs, old_log_probs, advantages, mask)
  above = (advantages > 0) & (log_ratio > jnp.log1p(clip_eps_high))
  below = (advantages < 0) & (log_ratio < jnp.log1p(-clip_eps_low))
  return (above | below).astype(log_ratio.dtype)


def kl_penalised_policy_loss(
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  kl: jax.Array,
  mask: jax.Array,
  *,
  trust_region_beta: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] `-ratio * A + trust_region_beta * kl`, without a clip.

  John Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. 8.

  >>> log_probs, old_log_probs = jnp.log(jnp.array([[0.5], [0.25]]))
  >>> kl, ones, mask = ops.kl_old_new(log_probs, old_log_probs), jnp.ones(1), jnp.ones(1, bool)
  >>> args = (log_probs, old_log_probs, ones, kl, mask)
  >>> print(ops.kl_penalised_policy_loss(*args, trust_region_beta=2.0))  # -2 + 2 * 0.307
  [-1.386]

  Args:
    log_probs: [..., T], of the current policy; carries gradient.
    old_log_probs: [..., T], of the policy that sampled.
    advantages: [..., T].
    kl: [..., T], `kl_old_new` or `kl_new_old` of the two; carries gradient.
    mask: [..., T] bool.
    trust_region_beta: scalar, may be traced; reward per nat.
  """
  log_ratio, advantages = _stopped_inputs(log_probs, old_log_probs, advantages, mask)
  return -weighted(log_ratio, advantages) + trust_region_beta * zero_padding(kl, mask)


def reinforce_loss(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns [..., T] `-log_probs * A`, whose expected gradient is minus the policy gradient.

  Ronald Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
  Reinforcement Learning", 1992.

  >>> args = jnp.array([2.0, -1.0]), jnp.ones(2, bool)
  >>> print(jax.grad(lambda x: ops.reinforce_loss(x, *args).sum())(jnp.zeros(2)))
  [-2.  1.]
  """
  chex.assert_equal_shape([log_probs, advantages])
  return -zero_padding(log_probs, mask) * jax.lax.stop_gradient(zero_padding(advantages, mask))


def exponential_weights(
  advantages: jax.Array, *, temperature: jax.Array | float, largest: float = 20.0
) -> jax.Array:
  """Returns [...] `min(exp(A / temperature), largest)`, the weight of a completion; no gradient.

  As a likelihood weighted so, completions of `old` lead to old * exp(A / temperature) / Z, which is
  the policy that maximises E[A] - temperature * KL(pi || old). Where A has the cost
  beta * log(old / ref), that is ref**w * old**(1 - w) * exp(score / temperature) / Z with
  w = beta / temperature: a tilt of what lies between both in log-probs. Xue Bin Peng et al.,
  "Advantage-Weighted Regression", 2019, who bound the weight by 20; Li He et al., "Unifying Stable
  Optimization and Reference Regularization in RLHF", 2026 (DAR).

  >>> print(ops.exponential_weights(jnp.array([-2.0, 0.0, 2.0, 90.0]), temperature=2.0))
  [ 0.368  1.     2.718 20.   ]

  Args:
    advantages: [...].
    temperature: positive scalar, in units of the advantages; may be traced.
    largest: the bound.
  """
  weights = jnp.minimum(jnp.exp(at_least_float32(advantages) / temperature), largest)
  return jax.lax.stop_gradient(weights)


def centred_policy_loss(
  log_probs: jax.Array, mean_log_probs: jax.Array, advantages: jax.Array, mask: jax.Array
) -> jax.Array:
  """Returns [..., T] `-(log_probs - mean_log_probs) * A`, whose score has mean 0 under the sampler.

  If the sampler is not the policy, the mean score is not 0, so that a baseline of the advantages
  has a gradient: it draws the policy to its sampler, or away from it. Here it has none. The
  expected gradient is the covariance of advantage and score under the sampler. On-policy it is the
  policy gradient; elsewhere it is no ratio's, and has none of a ratio's variance. Martin Marek and
  Max Ryabinin, "Score Centering Stabilizes Off-policy Reinforcement Learning", 2026.

  >>> args = jnp.array([0.5]), jnp.ones(1), jnp.ones(1, bool)
  >>> print(ops.centred_policy_loss(jnp.array([2.0]), *args))
  [-1.5]

  Args:
    log_probs: [..., T], of the current policy; carries gradient.
    mean_log_probs: [..., T], `mean_under` of the sampler before each token; carries gradient.
    advantages: [..., T].
    mask: [..., T] bool.
  """
  chex.assert_equal_shape([log_probs, mean_log_probs])
  return reinforce_loss(log_probs - mean_log_probs, advantages, mask)


def dpo_loss(
  chosen_log_probs: jax.Array,
  rejected_log_probs: jax.Array,
  ref_chosen_log_probs: jax.Array,
  ref_rejected_log_probs: jax.Array,
  *,
  beta: jax.Array | float,
) -> jax.Array:
  """Returns [...] `-log sigmoid(beta * (log_ratio of the chosen - log_ratio of the rejected))`.

  There is one number per pair of completions; the log-probs are those of whole completions. On
  pairs that the reference drew, with labels of the Bradley-Terry model, the minimum is the policy
  that maximises `E[score] - beta * KL(pi || ref)`. Rafael Rafailov et al., "Direct Preference
  Optimization: Your Language Model is Secretly a Reward Model", 2023, eq. 7.

  >>> ref = jnp.array([-5.0]), jnp.array([-5.0])
  >>> print(ops.dpo_loss(*ref, *ref, beta=0.1))  # log 2: the policy is the reference
  [0.693]
  >>> print(ops.dpo_loss(ref[0] + 10.0, ref[1], *ref, beta=0.1))  # -log sigmoid(1)
  [0.313]

  Args:
    chosen_log_probs: [...], of the current policy; carries gradient.
    rejected_log_probs: [...], of the current policy; carries gradient.
    ref_chosen_log_probs: [...], of the reference.
    ref_rejected_log_probs: [...], of the reference.
    beta: scalar, may be traced; score per nat.
  """
  margin = _margin(
    chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
  )
  return -jax.nn.log_sigmoid(beta * margin)


def ipo_loss(
  chosen_log_probs: jax.Array,
  rejected_log_probs: jax.Array,
  ref_chosen_log_probs: jax.Array,
  ref_rejected_log_probs: jax.Array,
  *,
  beta: jax.Array | float,
) -> jax.Array:
  """Returns [...] `(log_ratio of the chosen - log_ratio of the rejected - 1 / (2 * beta))**2`.

  On pairs that the reference drew the minimum is `ref * exp(p / beta) / Z`, where p is the
  probability that a completion wins against one that the reference draws. So labels that are
  certain do not drive the margin to infinity, as they do with `dpo_loss`, and labels of the
  Bradley-Terry model lead to another policy than with `dpo_loss`. Mohammad Gheshlaghi Azar et al.,
  "A General Theoretical Paradigm to Understand Learning from Human Preferences", 2023, eq. 17,
  where `beta` is called tau.

  >>> ref = jnp.array([-5.0, -5.0]), jnp.array([-5.0, -5.0])
  >>> margin = jnp.array([0.0, 5.0])  # the best margin is 1 / (2 * beta) = 5
  >>> print(ops.ipo_loss(ref[0] + margin, ref[1], *ref, beta=0.1))
  [25.  0.]

  Args:
    chosen_log_probs: as in `dpo_loss`, and so are the arguments that follow.
    rejected_log_probs: [...].
    ref_chosen_log_probs: [...].
    ref_rejected_log_probs: [...].
    beta: positive scalar, may be traced; win rate per nat.
  """
  margin = _margin(
    chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
  )
  return (margin - 1 / (2 * beta)) ** 2


def _margin(*log_probs):
  """Returns [...], by how many nats the policy prefers the chosen more than the reference does."""
  chex.assert_equal_shape(log_probs)
  chex.assert_type(log_probs, float)
  chosen, rejected, ref_chosen, ref_rejected = map(at_least_float32, log_probs)
  return (chosen - rejected) - jax.lax.stop_gradient(ref_chosen - ref_rejected)


def value_loss(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns [..., T] `(values - returns)**2 / 2`; gradient flows to `values` only.

  >>> print(ops.value_loss(jnp.array([1.0]), jnp.array([4.0]), jnp.array([True])))
  [4.5]
  """
  return 0.5 * _error(zero_padding(values, mask), returns, mask) ** 2


def clipped_value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  value_clip_eps: jax.Array | float,
) -> jax.Array:
  """Returns [..., T] the larger `value_loss` of `values` and of `values` clipped to `old_values`.

  They are clipped to within `value_clip_eps` of `old_values` (in units of the reward; a scalar, may
  be traced, inf is off). Gradient flows to `values` only. This is from the PPO code of OpenAI
  baselines, 2017; no paper of its authors has it.

  >>> args = jnp.array([1.0]), jnp.array([4.0]), jnp.array([True])  # old value, return, mask
  >>> print(ops.clipped_value_loss(jnp.array([4.0]), *args, value_clip_eps=1.0))  # as if it were 2
  [2.]
  """
  values = zero_padding(values, mask)
  old_values = jax.lax.stop_gradient(zero_padding(old_values, mask))
  near = jnp.clip(values, old_values - value_clip_eps, old_values + value_clip_eps)
  return 0.5 * jnp.maximum(_error(values, returns, mask) ** 2, _error(near, returns, mask) ** 2)


def _stopped_inputs(log_probs, old_log_probs, advantages, mask):
  """Returns (log_ratio, advantages), 0 in the padding; only `log_probs` carries gradient."""
  chex.assert_equal_shape([log_probs, old_log_probs, advantages])
  chex.assert_type([log_probs, old_log_probs, advantages], float)
  data = zero_padding(old_log_probs, mask), zero_padding(advantages, mask)
  old_log_probs, advantages = jax.lax.stop_gradient(data)
  return zero_padding(log_probs, mask) - old_log_probs, advantages


def _error(values, returns, mask):
  return values - jax.lax.stop_gradient(zero_padding(returns, mask))


def token_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (sum over tokens, number of tokens): every token weighs the same.

  >>> loss = jnp.array([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> print(ops.divide(*ops.token_mean(loss, mask)))
  1.75
  """
  return masked_sum_count(loss, mask)


def sequence_mean_token_mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of the means of sequences, their number): tokens of long sequences weigh less.

  >>> loss = jnp.array([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> print(ops.divide(*ops.sequence_mean_token_mean(loss, mask)))
  2.5
  """
  return masked_mean(loss, mask, axis=-1).sum(), _num_sequences(loss, mask)


def sequence_mean_token_sum(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (sum over tokens, number of sequences): the loss of a sequence is its tokens' sum.

  >>> loss = jnp.array([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> print(ops.divide(*ops.sequence_mean_token_sum(loss, mask)))
  3.5
  """
  return zero_padding(loss, mask).sum(), _num_sequences(loss, mask)


def constant(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (sum over tokens, number of sequences * T), where T is the longest that one can be.

  >>> loss = jnp.array([[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> print(ops.divide(*ops.constant(loss, mask)))
  1.167

  Zichen Liu et al., "Understanding R1-Zero-Like Training", 2025 (Dr. GRPO), divide by a constant.
  """
  return zero_padding(loss, mask).sum(), _num_sequences(loss, mask) * mask.shape[-1]


def _num_sequences(loss, mask):
  return mask.any(axis=-1).sum(dtype=jnp.promote_types(loss.dtype, jnp.float32))


AGGREGATIONS = {
  "token_mean": token_mean,
  "sequence_mean_token_mean": sequence_mean_token_mean,
  "sequence_mean_token_sum": sequence_mean_token_sum,
  "constant": constant,
}
