"""The KL penalty as a typed choice: what each choice is, and what it does in expectation.

    J = E[r] - beta * KL(pi || pi_ref)

`KLPenalty(placement, estimator, correction, credit)` says how the second term is estimated.

    placement   reward: stopped, subtracted from the reward, credited through the policy loss;
                loss: a term of its own, differentiated; both: a loss term for a token's own KL and
                a reward for the KL that its choice brings about later; none
    estimator   k1, k2, k3 of the tokens taken, or the exact KL of the next-token distributions
    correction  of a loss term, for tokens that an older policy drew: none, the token's importance
                ratio, or the ratio of the whole prefix
    credit      sequence: a token answers for all later KL too, so that the target is the KL of
                whole completions; token: for its own only, so that prefixes count as given

Training and the ground truth of `oracle` call the same three functions here: `kl_loss`,
`reward_kl` and `penalised_advantages`; `surrogate` is their sum. `audit` states what the expected
gradient is. The claims are those that enumeration confirms on random trees (tests); derivations are
in docs/kl.md. All arrays are [..., T], nats per token, masks bool; real tokens come first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.errors import UserError


class KLPenalty(NamedTuple):
  """One choice; the fields are the flags --kl_placement, --kl_estimator, and so on."""

  placement: str = "reward"
  estimator: str = "k1"
  correction: str = "none"
  credit: str = "sequence"

  def __str__(self):
    return "/".join(self) if self.placement != "none" else "none"

  @property
  def in_loss(self) -> bool:
    return self.placement in ("loss", "both")

  @property
  def in_reward(self) -> bool:
    return self.placement in ("reward", "both")

  @property
  def reads_exact_kl(self) -> bool:
    return self.placement != "none" and self.estimator == "exact"


def penalty_of(config) -> KLPenalty:
  """Returns the penalty that the fields kl_placement, kl_estimator, ... of a config name."""
  return KLPenalty(*(getattr(config, f"kl_{name}") for name in KLPenalty._fields))


PLACEMENTS = ("reward", "loss", "both", "none")
ESTIMATORS = ("k1", "k2", "k3", "exact")
CORRECTIONS = ("none", "token", "prefix")
CREDITS = ("sequence", "token")
REFRESHES = ("iteration", "minibatch")


class TokenTerms(NamedTuple):
  """What a KL term may read of completions that the old policy drew."""

  log_probs: jax.Array  # of pi; carries gradient
  old_log_probs: jax.Array
  ref_log_probs: jax.Array
  mask: jax.Array
  exact_kl: jax.Array | None = None  # KL(pi || pi_ref) at each prefix; carries gradient
  old_exact_kl: jax.Array | None = None  # the old policy's


def _weights(penalty: KLPenalty, terms: TokenTerms, prefix_cap):
  """Returns (log weight of each token's loss term, its value before the cap)."""
  log_ratio = ops.zero_padding(terms.log_probs - terms.old_log_probs, terms.mask)
  if penalty.correction == "none":
    log_weight = jnp.zeros_like(log_ratio)
  elif penalty.correction == "token":
    log_weight = log_ratio
  else:
    before = jnp.cumsum(log_ratio, axis=-1) - log_ratio
    if penalty.credit == "token":
      before = jax.lax.stop_gradient(before)
    # The exact KL is summed over the choice at t already; a sampled one needs that ratio too.
    log_weight = before if penalty.estimator == "exact" else before + log_ratio
  if penalty.estimator == "k2":  # its derivative alone has the right mean; its value has not
    log_weight = jax.lax.stop_gradient(log_weight)
  if penalty.correction != "prefix":
    return log_weight, log_weight
  # The cap bounds the weight's value; the gradient of its logarithm, the credit, stays.
  capped = jnp.minimum(log_weight, jnp.log(prefix_cap))
  return log_weight + jax.lax.stop_gradient(capped - log_weight), log_weight


def _loss_estimate(penalty: KLPenalty, terms: TokenTerms):
  if penalty.estimator == "exact":
    return ops.zero_padding(terms.exact_kl, terms.mask)
  log_probs, ref_log_probs = (
    ops.zero_padding(x, terms.mask) for x in (terms.log_probs, terms.ref_log_probs)
  )
  return ops.KL_ESTIMATORS[penalty.estimator](log_probs, ref_log_probs)


def kl_loss(penalty: KLPenalty, terms: TokenTerms, *, prefix_cap=jnp.inf) -> jax.Array:
  """Returns [..., T] the loss term of a penalty `in_loss`, per unit of beta; zero in the padding.

  With credit `sequence` and correction `prefix`, differentiating the sum over a completion gives
  an unbiased gradient of the sequence KL whichever policy drew it: the weight of a prefix, when
  differentiated, credits every earlier token with the KL that follows. What gradient every other
  choice has in expectation, `audit` says.

  Args:
    penalty: the choice.
    terms: `log_probs` and `exact_kl` carry gradient.
    prefix_cap: scalar, may be traced: largest weight of a prefix. Below inf it biases the gradient;
      `prefix_cap_effect` says by how much.
  """
  log_weight, _ = _weights(penalty, terms, prefix_cap)
  return jnp.exp(log_weight) * _loss_estimate(penalty, terms)


def prefix_cap_effect(penalty: KLPenalty, terms: TokenTerms, *, prefix_cap):
  """Returns ([..., T] 1 where the cap bites, [..., T] the KL it takes away, nats); no gradient."""
  terms = jax.lax.stop_gradient(terms)
  log_weight, uncapped = _weights(penalty, terms, prefix_cap)
  lost = (jnp.exp(uncapped) - jnp.exp(log_weight)) * _loss_estimate(penalty, terms)
  return (uncapped > log_weight).astype(lost.dtype), lost


def reward_kl(penalty: KLPenalty, log_probs, ref_log_probs, exact_kl=None) -> jax.Array:
  """Returns [..., T] the estimate that the penalty takes off the reward; no gradient.

  Zero where it is not `in_reward`.

  Args:
    penalty: the choice.
    log_probs: [..., T] of the old policy (--kl_refresh=iteration) or of pi (minibatch).
    ref_log_probs: [..., T].
    exact_kl: [..., T] of the same policy, where the penalty reads it.
  """
  if not penalty.in_reward:
    return jnp.zeros_like(log_probs)
  if penalty.estimator == "exact":
    kl = exact_kl
  elif penalty.placement == "both" and penalty.estimator == "k2":
    kl = ops.k1(log_probs, ref_log_probs)  # k2's own value is biased; its loss term is not
  else:
    kl = ops.KL_ESTIMATORS[penalty.estimator](log_probs, ref_log_probs)
  return jax.lax.stop_gradient(kl)


def penalised_advantages(
  penalty: KLPenalty, scores, kl, values, mask, *, beta, gamma, gae_lambda
) -> tuple[jax.Array, jax.Array]:
  """Returns (advantages, returns), [..., T] each, of scores less the penalty's reward part.

  Args:
    penalty: the choice.
    scores: [...] one per completion.
    kl: [..., T] what `reward_kl` returned.
    values: [..., T] of the state before each token.
    mask: [..., T] bool.
    beta: scalar, reward per nat; may be traced, as gamma and gae_lambda.
    gamma: discount per token.
    gae_lambda: lambda of `ops.gae`.
  """
  kl = ops.zero_padding(kl, mask)
  through_return = kl if penalty.credit == "sequence" else jnp.zeros_like(kl)
  if penalty.placement == "both" and penalty.estimator != "k3":
    # The loss term has a token's own KL, the reward only what comes after it: shifted by one.
    through_return = gamma * jnp.concatenate([kl[..., 1:], jnp.zeros_like(kl[..., :1])], axis=-1)
  rewards = ops.shaped_rewards(scores, through_return, mask, beta=beta)
  advantages, returns = ops.gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
  if penalty.credit == "token":
    advantages = advantages - beta * kl
  return advantages, returns


def surrogate(
  penalty: KLPenalty, *, kl_refresh: str = "iteration", prefix_cap=jnp.inf
) -> Callable[[TokenTerms], jax.Array]:
  """Returns f(terms) -> [..., T]: all that the penalty adds to the loss, per unit of beta.

  Summed over a completion and averaged over completions of the old policy, its gradient is what
  the learner descends with no clip, no baseline, gamma = gae_lambda = 1.
  """

  def f(terms: TokenTerms):
    total = jnp.zeros_like(terms.log_probs)
    if penalty.in_loss:
      total = total + kl_loss(penalty, terms, prefix_cap=prefix_cap)
    if penalty.in_reward:
      advantages, _ = penalised_advantages(
        penalty,
        jnp.zeros(total.shape[:-1], total.dtype),
        _reward_estimate(penalty, terms, kl_refresh),
        jnp.zeros_like(total),
        terms.mask,
        beta=1.0,
        gamma=1.0,
        gae_lambda=1.0,
      )
      total = total + ops.clipped_policy_loss(
        terms.log_probs,
        terms.old_log_probs,
        advantages,
        terms.mask,
        clip_eps_low=1.0,
        clip_eps_high=jnp.inf,
      )
    return total

  return f


def estimate(
  penalty: KLPenalty, *, kl_refresh: str = "iteration", prefix_cap=jnp.inf
) -> Callable[[TokenTerms], jax.Array]:
  """Returns f(terms) -> [..., T]: the value of KL(pi || pi_ref) that the penalty computes with."""

  def f(terms: TokenTerms):
    if penalty.placement == "loss":
      return kl_loss(penalty, terms, prefix_cap=prefix_cap)
    return ops.zero_padding(_reward_estimate(penalty, terms, kl_refresh), terms.mask)

  return f


def _reward_estimate(penalty, terms: TokenTerms, kl_refresh):
  if kl_refresh == "iteration":
    return reward_kl(penalty, terms.old_log_probs, terms.ref_log_probs, terms.old_exact_kl)
  return reward_kl(penalty, terms.log_probs, terms.ref_log_probs, terms.exact_kl)


# Expected gradients by name. "token" sums the KLs of the next-token distributions at prefixes that
# count as given, pi's own ones where nothing else is said.
SEQUENCE = "KL(pi||ref)"
TOKEN = "token KL(pi||ref)"
TOKEN_AT_OLD = "token KL(pi||ref) at the old policy's prefixes"
TOKEN_FORWARD = "token KL(ref||pi)"
ZERO = "zero"
FUTURE = "KL(pi||ref) - token KL(pi||ref)"
SEQUENCE_LESS_FORWARD = "KL(pi||ref) - token KL(ref||pi)"
TOKEN_LESS_FORWARD = "token KL(pi||ref) - token KL(ref||pi)"
NO_DIVERGENCE = "no divergence's"
KL_GRADIENTS = (SEQUENCE, TOKEN, TOKEN_AT_OLD)


class Audit(NamedTuple):
  """What a penalty does in expectation.

  `gradient` is what `surrogate` has on-policy, `off_policy_gradient` what it has on completions of
  an older policy, that is after the first step on a rollout; both are names of this module.
  """

  verdict: str  # exact | other | refused, by `gradient`
  gradient: str
  off_policy_gradient: str
  unbiased_value: bool
  off_policy_unbiased_value: bool
  fixed_point: str  # the policy that maximises reward with this gradient, at horizon 1
  instead: KLPenalty | None  # for a refused one


_P = KLPenalty
# Per choice: (gradient on-policy, off-policy) at --kl_refresh=iteration; what is not here has no
# meaning of its own.
_ROWS = {
  _P("reward", "k1", "none", "sequence"): (SEQUENCE, NO_DIVERGENCE),
  _P("reward", "k1", "none", "token"): (TOKEN, NO_DIVERGENCE),
  _P("reward", "k2", "none", "sequence"): (NO_DIVERGENCE, NO_DIVERGENCE),
  _P("reward", "k2", "none", "token"): (NO_DIVERGENCE, NO_DIVERGENCE),
  _P("reward", "k3", "none", "sequence"): (SEQUENCE_LESS_FORWARD, NO_DIVERGENCE),
  _P("reward", "k3", "none", "token"): (TOKEN_LESS_FORWARD, NO_DIVERGENCE),
  _P("reward", "exact", "none", "sequence"): (FUTURE, NO_DIVERGENCE),
  _P("reward", "exact", "none", "token"): (ZERO, ZERO),
  _P("loss", "k1", "none", "token"): (ZERO, NO_DIVERGENCE),
  _P("loss", "k2", "none", "token"): (TOKEN, NO_DIVERGENCE),
  _P("loss", "k3", "none", "token"): (TOKEN_FORWARD, NO_DIVERGENCE),
  _P("loss", "exact", "none", "token"): (TOKEN, TOKEN_AT_OLD),
  **{_P("loss", k, "token", "token"): (TOKEN, TOKEN_AT_OLD) for k in ("k1", "k2", "k3")},
  **{_P("loss", k, "prefix", "token"): (TOKEN, TOKEN) for k in ESTIMATORS},
  **{_P("loss", k, "prefix", "sequence"): (SEQUENCE, SEQUENCE) for k in ("k1", "k3", "exact")},
  **{_P("both", k, "none", "sequence"): (SEQUENCE, NO_DIVERGENCE) for k in ("k2", "k3", "exact")},
}
DEFINED = tuple(_ROWS)

_FIXED_POINTS = {
  SEQUENCE: "ref * exp(r / beta) / Z",
  TOKEN: "ref * exp(r / beta) / Z; beyond horizon 1 less reward than that policy",
  TOKEN_FORWARD: "beta * ref / (lambda - r)",
  ZERO: "all mass on the best completion",
  FUTURE: "all mass on the best completion",
}


def audit(penalty: KLPenalty, *, kl_refresh: str = "iteration") -> Audit:
  """Returns what the penalty does in expectation: its value, its gradient and where that leads.

  Raises:
    UserError: the choice has no meaning of its own; the message names those that have.
  """
  if penalty not in _ROWS:
    raise UserError(_undefined(penalty))
  gradient, off_policy_gradient = _ROWS[penalty]
  if kl_refresh == "minibatch" and penalty == _P("reward", "k1", "none", "token"):
    off_policy_gradient = TOKEN_AT_OLD
  verdict, instead = "refused", None
  if gradient in KL_GRADIENTS:
    verdict = "exact"
  elif gradient == TOKEN_FORWARD:
    verdict = "other"
  elif penalty.placement == "loss":
    instead = _P("loss", "k3", "token", "token")
  elif penalty.credit == "sequence":
    both = penalty.estimator if penalty.estimator != "k1" else "k2"
    instead = _P("both", both, "none", "sequence")
  else:
    instead = _P("loss", penalty.estimator, "prefix", "token")
  return Audit(
    verdict=verdict,
    gradient=gradient,
    off_policy_gradient=off_policy_gradient,
    unbiased_value=penalty.estimator != "k2" or penalty.placement == "both",
    off_policy_unbiased_value=penalty.correction == "prefix" and penalty.estimator != "k2",
    fixed_point=_FIXED_POINTS.get(gradient, "not a tilt of the reference"),
    instead=instead,
  )


def warnings_of(config) -> list[str]:
  """Returns what a reader of the run must know of its KL penalty; reads the fields named below.

  Raises:
    UserError: the penalty (kl_placement, ...) is refused and not allowed by allow_biased_kl; the
      message says which gradient it has and what to use.
  """
  penalty = penalty_of(config)
  if penalty.placement == "none":
    return []
  warnings = []
  claim = audit(penalty)
  if claim.verdict == "refused":
    what = (
      f"The KL penalty {penalty} does not descend KL(pi||ref): its expected gradient is "
      f"{_named(claim.gradient)}. Use {claim.instead} instead"
    )
    if not config.allow_biased_kl:
      raise UserError(f"{what} ({flags_of(claim.instead)}), or pass --allow_biased_kl.")
    warnings.append(f"{what}.")
  if config.loss_aggregation == "sequence_mean_token_mean":
    warnings.append(
      "The aggregation sequence_mean_token_mean divides by each completion's length, so beta is no "
      "longer reward per nat of sequence KL: long completions are held less."
    )
  return warnings


def flags_of(penalty: KLPenalty) -> str:
  """Returns the command-line flags of a penalty."""
  return " ".join(f"--kl_{name}={value}" for name, value in penalty._asdict().items())


def _named(gradient: str) -> str:
  if gradient in (ZERO, NO_DIVERGENCE):
    return {ZERO: "zero", NO_DIVERGENCE: "no divergence's gradient"}[gradient]
  return f"that of {gradient}"


def _undefined(penalty: KLPenalty) -> str:
  rows = [
    str(row)
    for row in DEFINED
    if row.placement == penalty.placement and audit(row).verdict != "refused"
  ]
  if penalty.placement == "reward":
    why = "a reward is weighted by the policy loss's own ratio, not by a correction of the KL"
  elif penalty.placement == "both" and penalty.estimator == "k1":
    why = "a k1 loss term has no gradient, which leaves reward/k1/none/sequence"
  elif penalty.placement == "both":
    why = "its reward part is the credit for later KL, and has no correction"
  elif penalty.estimator == "exact" and penalty.correction == "token":
    why = "the exact KL sums over the token's choice itself, so there is no ratio to correct by"
  elif penalty.estimator == "k2" and penalty.correction == "prefix":
    why = "k2 needs its weight stopped, and a stopped weight gives no credit for later KL"
  else:
    why = "without the ratio of the prefix a loss term gives no credit for later KL"
  return f"The KL penalty {penalty} has no meaning of its own: {why}. Use one of {', '.join(rows)}."
