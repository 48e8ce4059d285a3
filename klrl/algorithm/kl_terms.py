"""Computes a KL penalty: its loss term, its cost in the reward, and the advantages that follow.

Training and the ground truth of `oracle` call the same functions; `surrogate` is their sum, and
`objective.audit` states its expected gradient. All arrays are [..., T], in nats per token. Masks
are bool and have the tokens that the policy chose. A token that was given to it, wherever it
stands, has no KL and no ratio, and is no token's next one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm.objective import KLPenalty


class TokenTerms(NamedTuple):
  """What a KL term reads of completions that the old policy drew."""

  log_probs: jax.Array  # of pi; carries gradient
  old_log_probs: jax.Array
  ref_log_probs: jax.Array
  mask: jax.Array
  exact_kl: jax.Array | None = None  # the divergence from pi_ref at each prefix; carries gradient
  old_exact_kl: jax.Array | None = None  # the old policy's
  weights: jax.Array | None = None  # `token_weights`; None is 1


class Shape(NamedTuple):
  """The coefficients of divergences; `Hypers` has them too."""

  jsd_weight: jax.Array | float = 0.5
  kl_alpha: jax.Array | float = 0.5


SHAPE = Shape()


class Divergence(NamedTuple):
  """D_f(pi || pi_ref), f convex and f(1) = f'(1) = 0, as a loss and as a cost in the reward."""

  exact: Callable  # (log_probs [..., V], ref_log_probs [..., V], hypers) -> [...], nats
  slope: Callable  # (log pi / pi_ref [...], hypers) -> [...] f'(pi / pi_ref)


def reverse_kl(log_probs, ref_log_probs, hypers):
  """Returns KL(pi || pi_ref) [...] of log-probs over the vocabulary [..., V], nats per token."""
  del hypers
  return ops.kl_of(log_probs, ref_log_probs)


def forward_kl(log_probs, ref_log_probs, hypers):
  """Returns KL(pi_ref || pi)."""
  del hypers
  return ops.kl_of(ref_log_probs, log_probs)


def jensen_shannon(log_probs, ref_log_probs, hypers):
  """Returns the Jensen-Shannon divergence, with `jsd_weight` on the reference."""
  return ops.jsd_of(log_probs, ref_log_probs, hypers.jsd_weight)


def _alpha_divergence(alpha_of: Callable) -> Divergence:
  return Divergence(
    lambda log_probs, ref_log_probs, hypers: ops.alpha_divergence_of(
      log_probs, ref_log_probs, alpha_of(hypers)
    ),
    lambda log_ratio, hypers: ops.alpha_slope(log_ratio, alpha_of(hypers)),
  )


# All but Jensen-Shannon are the KL to second order at pi = pi_ref, so that beta keeps its unit
# there; Jensen-Shannon is jsd_weight * (1 - jsd_weight) of it.
DIVERGENCES = {
  "reverse": Divergence(reverse_kl, lambda log_ratio, hypers: log_ratio),
  "forward": Divergence(forward_kl, lambda log_ratio, hypers: ops.alpha_slope(log_ratio, 1.0)),
  "jensen_shannon": Divergence(
    jensen_shannon, lambda log_ratio, hypers: ops.jsd_slope(log_ratio, hypers.jsd_weight)
  ),
  "chi_squared": _alpha_divergence(lambda hypers: -1.0),
  "alpha": _alpha_divergence(lambda hypers: hypers.kl_alpha),
  "hellinger": _alpha_divergence(lambda hypers: 0.5),
}


# A larger weight is measured as exp(60), so that the effect of a cap stays finite.
MEASURED_LOG_WEIGHT = 60.0


def _log_prefix_weight(penalty: KLPenalty, terms: TokenTerms):
  """Returns [..., T] the log-ratio pi / old of the tokens before each; 0 if it is no weight."""
  log_ratio = ops.zero_padding(terms.log_probs - terms.old_log_probs, terms.mask)
  if penalty.correction != "prefix":
    return jnp.zeros_like(log_ratio)
  # It is shifted, since the gradients of the sum less the token's own could be inf - inf.
  shifted = jnp.concatenate([jnp.zeros_like(log_ratio[..., :1]), log_ratio[..., :-1]], axis=-1)
  before = jnp.cumsum(shifted, axis=-1)
  return jax.lax.stop_gradient(before) if penalty.credit == "token" else before


def _weighted_estimate(penalty: KLPenalty, terms: TokenTerms, log_cap):
  """Returns [..., T] the estimate times its weight, of which the cap bounds the value alone."""
  log_weight = _log_prefix_weight(penalty, terms)
  if penalty.estimator == "exact":
    assert terms.exact_kl is not None
    # The exact KL sums over the choice at t; a sampled estimate needs the ratio of that choice too.
    capped = jnp.minimum(log_weight, log_cap)
    log_weight += jax.lax.stop_gradient(capped - log_weight)
    return ops.weighted(log_weight, ops.zero_padding(terms.exact_kl, terms.mask))
  log_probs, old_log_probs, ref_log_probs = (ops.zero_padding(x, terms.mask) for x in terms[:3])
  if penalty.correction == "none":
    return ops.KL_ESTIMATORS[penalty.estimator](log_probs, ref_log_probs)
  return ops.weighted_estimate(
    penalty.estimator,
    log_probs,
    old_log_probs,
    ref_log_probs,
    log_prefix_weight=log_weight,
    log_cap=log_cap,
  )


def kl_loss(
  penalty: KLPenalty, terms: TokenTerms, *, prefix_cap: jax.Array | float = jnp.inf
) -> jax.Array:
  """Returns [..., T] the loss term of a penalty `in_loss`, per unit of beta; zero in the padding.

  With credit `sequence` and correction `prefix`, the gradient of the sum over a completion is an
  unbiased gradient of the sequence KL, whichever policy drew it: the differentiated weight of a
  prefix credits every earlier token with the KL that follows. `audit` states the expected gradient
  of every other choice.

  Args:
    penalty: the choice.
    terms: `log_probs` and `exact_kl` carry gradient.
    prefix_cap: scalar, may be traced; the largest weight of a prefix. Below inf it biases the
      gradient; `prefix_cap_effect` measures by how much.
  """
  is_prefix = penalty.correction == "prefix"
  loss = _weighted_estimate(penalty, terms, jnp.log(prefix_cap) if is_prefix else jnp.inf)
  return _with_weights(loss, terms.weights, terms.mask)


def _with_weights(x, weights, mask):
  return x if weights is None else x * jax.lax.stop_gradient(ops.zero_padding(weights, mask))


def token_weights(penalty: KLPenalty, certainty, mask, hypers) -> jax.Array | None:
  """Returns [..., T] the weight of each token's term, from 0 to 1; None where all are 1.

      certainty ** kl_weight_power,   (1 + n) ** -kl_weight_power  with n chosen tokens before

  Jean Vassoyan, Nathanael Beau and Roman Plaud, "Ignore the KL Penalty! Boosting Exploration on
  Critical Tokens to Enhance RL Fine-Tuning", 2025, weight by certainty, so that a policy may leave
  the reference where that does not know what to say.

  Args:
    penalty: the choice.
    certainty: [..., T] 1 - entropy / log(V) of the reference, before each token; None unless the
      weight is by certainty.
    mask: [..., T] bool.
    hypers: has `kl_weight_power`.
  """
  if penalty.weight == "certainty":
    return jnp.clip(certainty, 0.0, 1.0) ** hypers.kl_weight_power
  if penalty.weight == "position":
    return jnp.maximum(jnp.cumsum(mask, axis=-1), 1.0) ** -hypers.kl_weight_power
  return None


def prefix_cap_effect(penalty: KLPenalty, terms: TokenTerms, *, prefix_cap):
  """Returns ([..., T] 1 where the cap acts, [..., T] the KL that it takes away); no gradient.

  It is in nats. A weight is measured as at most exp(MEASURED_LOG_WEIGHT), and a KL as at most 1e30,
  so that a run whose training is finite never fails because of this figure.
  """
  terms, log_cap = jax.lax.stop_gradient(terms), jnp.log(prefix_cap)
  log_weight = _log_prefix_weight(penalty, terms)
  if penalty.estimator != "exact":
    log_weight += ops.zero_padding(terms.log_probs - terms.old_log_probs, terms.mask)
  bites = terms.mask & (log_weight > log_cap)
  uncapped = _weighted_estimate(penalty, terms, jnp.maximum(log_cap, MEASURED_LOG_WEIGHT))
  lost = uncapped - _weighted_estimate(penalty, terms, log_cap)
  lost = jnp.nan_to_num(jnp.clip(lost, -1e30, 1e30), nan=1e30)  # NaN where both are infinite
  return bites.astype(lost.dtype), jnp.where(bites, lost, 0.0)


def reward_kl(
  penalty: KLPenalty,
  log_probs,
  ref_log_probs,
  mask,
  exact_kl=None,
  slope: Callable | None = None,
  weights=None,
) -> jax.Array:
  """Returns [..., T] what the penalty subtracts from the reward; no gradient.

  It is an estimate of the KL, or f' of the ratio for another divergence, and zero unless the
  penalty is `in_reward`. It is zero in the padding.

  Args:
    penalty: the choice.
    log_probs: [..., T] of the old policy (--kl_refresh=iteration) or of pi (minibatch).
    ref_log_probs: [..., T].
    mask: [..., T] bool.
    exact_kl: [..., T] of the same policy, where the penalty reads it.
    slope: log_ratio -> f'(exp(log_ratio)) of another divergence, from `slope_of`.
    weights: [..., T] from `token_weights`.
  """
  if not penalty.in_reward:
    return jnp.zeros_like(log_probs)
  # A ratio of prefixes has no factor of a token that was given.
  log_probs, ref_log_probs = (ops.zero_padding(x, mask) for x in (log_probs, ref_log_probs))
  if penalty.estimator == "exact":
    assert exact_kl is not None
    kl = ops.zero_padding(exact_kl, mask)
  elif penalty.divergence != "reverse":
    assert slope is not None
    kl = _slopes(penalty, ops.k1(log_probs, ref_log_probs), slope)
  elif penalty.estimator == "centred":
    assert exact_kl is not None
    kl = ops.k1(log_probs, ref_log_probs) - ops.zero_padding(exact_kl, mask)
  elif penalty.placement == "both" and penalty.estimator == "k2":
    kl = ops.k1(log_probs, ref_log_probs)  # k2's own value is biased; its loss term is not
  else:
    kl = ops.KL_ESTIMATORS[penalty.estimator](log_probs, ref_log_probs)
  return jax.lax.stop_gradient(_with_weights(kl, weights, mask))


def slope_of(penalty: KLPenalty, hypers: Any = SHAPE) -> Callable:
  """Returns log_ratio -> f'(exp(log_ratio)) of the penalty's divergence, with its coefficients."""
  return functools.partial(DIVERGENCES[penalty.divergence].slope, hypers=hypers)


def _slopes(penalty: KLPenalty, log_ratio, slope: Callable):
  """Returns [..., T] f' of each token's ratio; with credit `sequence`, what it adds to f'.

  Added up over a completion these are f' of its own ratio, whose expected gradient is that of the
  divergence of whole completions. What stood before a token is no consequence of it, so that the
  rest, which follows it, has the same expected gradient.
  """
  if penalty.credit == "token":
    return slope(log_ratio)
  upto = slope(jnp.cumsum(log_ratio, axis=-1))
  return upto - jnp.concatenate([jnp.zeros_like(upto[..., :1]), upto[..., :-1]], axis=-1)


def credits_later_kl(penalty: KLPenalty) -> bool:
  """Returns whether the loss term has a token's own KL, and the reward only the later KL."""
  return penalty.placement == "both" and penalty.estimator != "k3"


def penalised_rewards(
  penalty: KLPenalty, scores, kl, mask, *, beta, gamma
) -> tuple[jax.Array, jax.Array]:
  """Returns (rewards, charges), [..., T] each, in units of the score.

  The rewards, from which advantages are made, have the score and the KL for which earlier tokens
  answer. The charges are the KL for which a token alone answers; subtract them from its advantage.

  Args:
    penalty: the choice.
    scores: [...] one per completion.
    kl: [..., T] what `reward_kl` returned.
    mask: [..., T] bool.
    beta: scalar, reward per nat; may be traced, as gamma.
    gamma: discount per token.
  """
  kl = ops.zero_padding(kl, mask)
  through_return, charges = kl, jnp.zeros_like(kl)
  if penalty.credit == "token":
    through_return, charges = charges, beta * kl
  elif credits_later_kl(penalty):
    # The loss term has a token's own KL, so the reward has the KL of the next token.
    through_return = gamma * ops.at_next(kl, mask)
  return ops.shaped_rewards(scores, through_return, mask, beta=beta), charges


def compared_totals(penalty: KLPenalty, scores, kl, mask, *, beta) -> tuple[jax.Array, jax.Array]:
  """Returns (totals [...] by which completions are compared, charges [..., T] of each token).

  A total is the score less beta times the KL of the completion, unless the KL is charged token by
  token. The arguments are those of `penalised_rewards`; nothing is discounted.
  """
  kl = ops.zero_padding(kl, mask)
  if penalty.credit == "sequence" and not credits_later_kl(penalty):
    return scores - beta * kl.sum(axis=-1), jnp.zeros_like(kl)
  return scores, -undiscounted_advantages(penalty, kl, mask, beta=beta)


def undiscounted_advantages(penalty: KLPenalty, kl, mask, *, beta) -> jax.Array:
  """Returns [..., T] the advantages of the KL alone, without score, baseline or discount.

  The arguments are those of `penalised_rewards`.
  """
  zeros = jnp.zeros_like(kl)
  rewards, charges = penalised_rewards(penalty, zeros[..., 0], kl, mask, beta=beta, gamma=1.0)
  return ops.gae(rewards, zeros, mask, gamma=1.0, gae_lambda=1.0)[0] - charges


def unclipped_policy_loss(terms: TokenTerms, advantages) -> jax.Array:
  """Returns [..., T] `ops.clipped_policy_loss` with bounds that no ratio reaches."""
  return ops.clipped_policy_loss(
    terms.log_probs,
    terms.old_log_probs,
    advantages,
    terms.mask,
    clip_eps_low=1.0,
    clip_eps_high=jnp.inf,
  )


def surrogate(
  penalty: KLPenalty,
  *,
  kl_refresh: str = "iteration",
  prefix_cap=jnp.inf,
  slope: Callable | None = None,
) -> Callable[[TokenTerms], jax.Array]:
  """Returns f(terms) -> [..., T], everything that the penalty adds to the loss, per unit of beta.

  `slope` is that of `reward_kl`, by default with the coefficients of `SHAPE`.

  Summed over a completion and averaged over completions of the old policy, it has the gradient that
  the learner descends without clip and baseline, and with gamma = gae_lambda = 1.
  """

  slope = slope or slope_of(penalty)

  def f(terms: TokenTerms):
    total = jnp.zeros_like(terms.log_probs)
    if penalty.in_loss:
      total = total + kl_loss(penalty, terms, prefix_cap=prefix_cap)
    if penalty.in_reward:
      kl = _reward_estimate(penalty, terms, kl_refresh, slope)
      advantages = undiscounted_advantages(penalty, kl, terms.mask, beta=1.0)
      total = total + unclipped_policy_loss(terms, advantages)
    return total

  return f


def estimate(
  penalty: KLPenalty,
  *,
  kl_refresh: str = "iteration",
  prefix_cap=jnp.inf,
  slope: Callable | None = None,
) -> Callable[[TokenTerms], jax.Array]:
  """Returns f(terms) -> [..., T]: the value of the divergence that the penalty computes with."""

  slope = slope or slope_of(penalty)

  def f(terms: TokenTerms):
    if penalty.placement == "loss":
      return kl_loss(penalty, terms, prefix_cap=prefix_cap)
    return _reward_estimate(penalty, terms, kl_refresh, slope)

  return f


def _reward_estimate(penalty, terms: TokenTerms, kl_refresh, slope):
  log_probs, exact_kl = terms.log_probs, terms.exact_kl
  if kl_refresh == "iteration":
    log_probs, exact_kl = terms.old_log_probs, terms.old_exact_kl
  return reward_kl(
    penalty, log_probs, terms.ref_log_probs, terms.mask, exact_kl, slope, terms.weights
  )
