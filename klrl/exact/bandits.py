"""Closed forms of one choice among N: optima under divergences and KL budgets, and best-of-n.

A whole completion is such a choice too: functions of `probs [N]` or `log_probs [N]` take those of
`oracle.log_probs`, and `sequence_surrogate` is a penalty that treats a completion as one choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm.kl_terms import TokenTerms


class Divergence(NamedTuple):
  """D_f(pi || ref) = sum ref * f(pi / ref), where f is convex and f(1) = 0.

  Its gradient is E_pi[f'(ratio) grad log pi], so f'(ratio) is the cost to put in the reward.
  """

  f: Callable
  f_prime: Callable
  inverse: Callable  # of f_prime; inf above its range and 0 below


def _inverse_js(y):
  double = jnp.exp(2 * y)
  return jnp.where(double < 2, double / (2 - double), jnp.inf)


DIVERGENCES = {
  # KL(pi || ref) and KL(ref || pi).
  "reverse": Divergence(
    lambda t: t * jnp.log(t), lambda t: jnp.log(t) + 1, lambda y: jnp.exp(y - 1)
  ),
  "forward": Divergence(
    lambda t: -jnp.log(t), lambda t: -1 / t, lambda y: jnp.where(y < 0, -1 / y, jnp.inf)
  ),
  # Jensen-Shannon: the mean KL of the two to their mixture.
  "js": Divergence(
    lambda t: (t * jnp.log(2 * t / (1 + t)) + jnp.log(2 / (1 + t))) / 2,
    lambda t: jnp.log(2 * t / (1 + t)) / 2,
    _inverse_js,
  ),
  "chi_square": Divergence(
    lambda t: (t - 1) ** 2 / 2, lambda t: t - 1, lambda y: jnp.maximum(1 + y, 0.0)
  ),
  # This is what max(log_ratio, 0) in the reward penalises: excluding a choice costs nothing.
  "clamp": Divergence(
    lambda t: jnp.where(t > 1, t * jnp.log(t) - t + 1, 0.0),
    lambda t: jnp.maximum(jnp.log(t), 0.0),
    lambda y: jnp.where(y >= 0, jnp.exp(y), 0.0),
  ),
}


def optimal_under(divergence: str, ref_probs, scores, *, beta) -> tuple[jax.Array, jax.Array]:
  """Returns (probs [N], multiplier) of the maximum of E[score] - beta * D_f(pi || ref).

      pi = ref * f'^-1((score - multiplier) / beta),   with the multiplier that makes it sum to 1

  The multiplier is found by bisection, exact to rounding. Chaoqi Wang et al., "Beyond Reverse KL:
  Generalizing Direct Preference Optimization with Diverse Divergence Constraints", 2023.

  Args:
    divergence: a name in DIVERGENCES.
    ref_probs: [N].
    scores: [N].
    beta: positive scalar, may be traced.
  """
  _, f_prime, inverse = DIVERGENCES[divergence]
  return _tilted(inverse, f_prime(jnp.ones_like(scores.max())), ref_probs, scores, beta)


def optimal_under_slope(slope: Callable, ref_probs, scores, *, beta) -> tuple[jax.Array, jax.Array]:
  """Returns `optimal_under` of the f whose slope a penalty puts in the reward.

  The slope is inverted by bisection as well, within ratios of exp(-80) to exp(80); beyond these a
  ratio is 0 or inf.

  Args:
    slope: log_ratio -> f'(exp(log_ratio)), rising and 0 at 0, as of `kl_terms.DIVERGENCES`.
    ref_probs: [N].
    scores: [N].
    beta: positive scalar, may be traced.
  """

  def inverse(y):
    def halve(_, bounds):
      low, high = bounds
      middle = (low + high) / 2
      too_low = slope(middle) < y
      return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    lowest, highest = jnp.full_like(y, -80.0), jnp.full_like(y, 80.0)
    ratio = jnp.exp(jax.lax.fori_loop(0, 70, halve, (lowest, highest))[1])
    ratio = jnp.where(y <= slope(lowest), 0.0, ratio)
    return jnp.where(y >= slope(highest), jnp.inf, ratio)

  return _tilted(inverse, 0.0, ref_probs, scores, beta)


def _tilted(inverse: Callable, one, ref_probs, scores, beta):
  """Returns (ref * inverse((score - multiplier) / beta), multiplier); `one` is f' at ratio 1."""
  best = scores.max()
  advantages = (scores - best) / beta
  # The multiplier is in units of beta and relative to the best score, so that one close to it keeps
  # its digits. At the lower bound no ratio is below 1, and at the upper bound none is above.
  bounds = advantages.min() - one, jnp.zeros_like(advantages.min()) - one

  def probs(multiplier):
    return ref_probs * inverse(advantages - multiplier)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    too_much = probs(middle).sum() > 1
    return jnp.where(too_much, middle, low), jnp.where(too_much, high, middle)

  low, high = jax.lax.fori_loop(0, 200, halve, bounds)
  # If f' has a flat piece, the sum jumps across 1, and the choices at the jump share the rest.
  more, less = probs(low), probs(high)
  excess = more.sum() - less.sum()
  share = jnp.where(excess > 0, (1 - less.sum()) / jnp.where(excess > 0, excess, 1.0), 0.0)
  return less + share * (more - less), best + beta * high


def optimal_within(ref_probs, scores, *, max_kl) -> tuple[jax.Array, jax.Array]:
  """Returns (probs [N], beta) of the maximum of E[score] with KL(pi || ref) at most `max_kl` nats.

      pi = ref * exp(score / beta) / Z,   where beta minimises beta * (max_kl + log Z)

  Beta is found by bisection: this dual function falls with beta while the KL exceeds `max_kl`. If
  even the best choices alone do not exceed it, they are returned, and beta is next to 0. Abbas
  Abdolmaleki et al., "Maximum a Posteriori Policy Optimisation", 2018, the E-step.

  Args:
    ref_probs: [N].
    scores: [N].
    max_kl: positive scalar, may be traced.
  """
  ref_log_probs, spread = jnp.log(ref_probs), scores.max() - scores.min()
  advantages = ops.divide(scores - scores.max(), spread)

  def logits(log_beta):  # of beta / spread
    return ref_log_probs + advantages * jnp.exp(-log_beta)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    too_far = ops.exact_kl(logits(middle), ref_log_probs) > max_kl
    return jnp.where(too_far, middle, low), jnp.where(too_far, high, middle)

  # The KL is at most (spread / beta)**2 / 8, since no variance exceeds spread**2 / 4.
  high = -jnp.log(8 * max_kl) / 2
  _, log_beta = jax.lax.fori_loop(0, 100, halve, (high - 40, high))
  return jax.nn.softmax(logits(log_beta)), spread * jnp.exp(log_beta)


def best_of_n(probs, scores, n) -> jax.Array:
  """Returns [N], the probabilities of the best of n draws; choices of equal score share theirs.

  Args:
    probs: [N], of one draw.
    scores: [N].
    n: at least 1, may be traced and fractional.
  """
  order = jnp.argsort(scores)
  cumulative = jnp.concatenate([jnp.zeros(1, probs.dtype), jnp.cumsum(probs[order])])
  below, upto = (
    cumulative[jnp.searchsorted(scores[order], scores, side=s)] for s in ("left", "right")
  )
  tied = upto - below
  return probs * jnp.where(tied > 0, (upto**n - below**n) / jnp.where(tied > 0, tied, 1.0), 0.0)


def best_of_n_reward(probs, scores, n) -> jax.Array:
  """Returns [N], the log of `best_of_n` over `probs`, with the same arguments; also for a large n.

  Args:
    probs: [N], of one draw, positive.
    scores: [N].
    n: at least 1, may be traced and fractional.
  """
  upto, tied = (
    jnp.where(which, probs[None], 0.0).sum(axis=-1)
    for which in (scores[None] <= scores[:, None], scores[None] == scores[:, None])
  )
  return ops.best_of_n_reward(upto, tied, n)


def total_variation(probs, others):
  """Returns the total variation of two distributions, between 0 and 1.

  Args:
    probs: [N], of NumPy or JAX.
    others: [N].
  """
  return abs(probs - others).sum() / 2


def best_of_n_kl_bound(n) -> jax.Array:
  """Returns log(n) - (n - 1) / n, the KL of best-of-n to one draw if no two scores tie.

  In general it is an upper bound. Ahmad Beirami et al., "Theoretical guarantees on the best-of-n
  alignment policy", 2024.
  """
  return jnp.log(n) - (n - 1) / n


class GoldLaw(NamedTuple):
  """A law, fitted to experiments, of the true score while a learnt imitation of it is optimised."""

  score: Callable  # (distance, alpha, slope) -> gain of true score; distance = sqrt(KL), nats
  peak: Callable  # (alpha, slope) -> the distance where that is largest


# Leo Gao, John Schulman and Jacob Hilton, "Scaling Laws for Reward Model Overoptimization", 2022,
# section 1, whose beta is `slope` here.
GOLD_LAWS = {
  "rl": GoldLaw(
    lambda d, alpha, slope: alpha * d - slope * jax.scipy.special.xlogy(d, d),
    lambda alpha, slope: jnp.exp(alpha / slope - 1),
  ),
  "best_of_n": GoldLaw(
    lambda d, alpha, slope: alpha * d - slope * d**2, lambda alpha, slope: alpha / (2 * slope)
  ),
}


def fitted_gold_law(law: str, distances, gains) -> tuple[jax.Array, jax.Array]:
  """Returns (alpha, slope) of the law in GOLD_LAWS that is nearest to K gains by least squares.

  Args:
    law: a name in GOLD_LAWS.
    distances: [K], sqrt(KL) of nats, not all 0.
    gains: [K], the true score less that at distance 0.
  """
  score = GOLD_LAWS[law].score  # It is linear in both coefficients.
  columns = jnp.stack([score(distances, 1.0, 0.0), score(distances, 0.0, 1.0)], axis=1)
  alpha, slope = jnp.linalg.lstsq(columns, gains)[0]
  return alpha, slope


def mirror_step(ref_log_probs, log_probs, scores, *, beta, eta) -> jax.Array:
  """Returns [N] log-probs of the maximum of E[score] - beta KL(. || ref) - KL(. || pi) / eta.

  This has both a global and a local KL. Each step multiplies the log-ratio to the optimum under the
  global KL by (1 / eta) / (beta + 1 / eta), so the local KL sets the pace and not the end.

  Args:
    ref_log_probs: [N].
    log_probs: [N] of pi, the policy to stay close to.
    scores: [N].
    beta: scalar, as eta may be traced.
    eta: positive scalar.
  """
  return jax.nn.log_softmax((beta * ref_log_probs + log_probs / eta + scores) / (beta + 1 / eta))


def sequence_surrogate(
  estimator: str, weight: str = "none", *, in_reward: bool = False, cap=jnp.inf
) -> Callable[[TokenTerms], jax.Array]:
  """Returns f(terms) -> [N, T], an estimate for the whole completion, put on its first token.

  Args:
    estimator: k1, k2 or k3 of the sums over the completion; stale_k1 is k1 of the old policy.
    weight: none, ratio (W = pi / old of the completion, differentiated) or stopped_ratio.
    in_reward: the estimate is stopped, so that only a differentiated ratio carries gradient.
    cap: largest value of W; the gradient of its logarithm stays.
  """

  def f(terms: TokenTerms):
    log_probs, old, ref = (
      ops.zero_padding(x, terms.mask).sum(axis=-1, keepdims=True)
      for x in (terms.log_probs, terms.old_log_probs, terms.ref_log_probs)
    )
    of, name = (old, "k1") if estimator == "stale_k1" else (log_probs, estimator)
    kl = ops.KL_ESTIMATORS[name](of, ref)
    log_ratio = log_probs - old
    capped = log_ratio + jax.lax.stop_gradient(jnp.minimum(log_ratio, jnp.log(cap)) - log_ratio)
    log_weight = {
      "none": jnp.zeros_like(capped),
      "ratio": capped,
      "stopped_ratio": jax.lax.stop_gradient(capped),
    }[weight]
    term = ops.weighted(log_weight, jax.lax.stop_gradient(kl) if in_reward else kl)
    return jnp.zeros_like(terms.log_probs).at[..., :1].set(term)

  return f
