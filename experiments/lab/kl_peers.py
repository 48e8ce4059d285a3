"""The KL penalties of other frameworks, as formulas of one completion's log-probabilities.

Written from what each project publishes, at the version that a row names: formulas, not their code,
and not run there. A `Peer` is a way to estimate the KL and a way to place it; clamps, absolute
values, straight-through gradients and means per sequence live here and nowhere in klrl.

Common to all rows, so that only the KL term differs: log-probabilities at temperature 1 of the
very distribution that was sampled, gamma = gae_lambda = 1, no clip of the policy ratio, no
baseline, no whitening. A mean over all tokens of a batch divides reward and KL term by the same
count and is left out; a mean per sequence weighs completions by their length and stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm.kl_terms import (
  TokenTerms,
  estimate,
  unclipped_policy_loss,
  undiscounted_advantages,
)
from klrl.algorithm.objective import KLPenalty

DEFAULT = "default"
IF_ON = "default if on"  # what is used once the KL, left out by default, is switched on
WAS = "default before"
OPTION = "option"
UNUSED = "commented out"


class Peer(NamedTuple):
  """One setting of one project."""

  project: str
  setting: str  # in the project's own words
  status: str  # one of the words above
  version: str
  source: str
  kl: Callable[[TokenTerms], jax.Array]  # -> [N, T], nats
  placing: Callable  # (kl, terms) -> ([N, T] value, [N, T] surrogate loss)

  def estimate(self, terms: TokenTerms) -> jax.Array:
    """Returns [N, T] the value of the KL that the project computes with, nats."""
    return self.placing(self.kl, terms)[0]

  def surrogate(self, terms: TokenTerms) -> jax.Array:
    """Returns [N, T] what the setting adds to the loss, per unit of its coefficient."""
    return self.placing(self.kl, terms)[1]


def _difference(left, right, terms):
  return ops.zero_padding(left - right, terms.mask)


k1, k2, k3, exact = (
  estimate(KLPenalty("loss", name, "none", "token")) for name in ("k1", "k2", "k3", "exact")
)


def absolute(terms):
  return jnp.abs(k1(terms))


def positive_part(terms):
  return jnp.maximum(k1(terms), 0.0)


def clamped_k3(terms):
  """k3 of a log-ratio held in [-20, 20], itself held in [-10, 10]; no gradient outside."""
  x = jnp.clip(-k1(terms), -20.0, 20.0)
  return jnp.clip(jnp.expm1(x) - x, -10.0, 10.0)


def clamped(kl):
  return lambda terms: jnp.clip(kl(terms), -10.0, 10.0)


def with_gradient_of_k2(kl, weight=lambda terms: 1.0):
  """The value of `kl`, the gradient of k2 times a stopped weight: a straight-through estimator."""

  def f(terms):
    carrier = jax.lax.stop_gradient(weight(terms)) * k2(terms)
    return jax.lax.stop_gradient(kl(terms) - carrier) + carrier

  return f


def token_ratio(terms):
  return jnp.exp(_difference(terms.log_probs, terms.old_log_probs, terms))


def score_ratio(terms):
  """1, with the gradient of log pi."""
  return jnp.exp(_difference(terms.log_probs, jax.lax.stop_gradient(terms.log_probs), terms))


def mean_ratio(terms):
  """exp of the mean log-ratio of a sequence, the same for all of its tokens."""
  log_ratio = _difference(terms.log_probs, terms.old_log_probs, terms)
  return jnp.exp(log_ratio.sum(-1, keepdims=True) / terms.mask.sum(-1, keepdims=True))


def weighted(weight, kl):
  return lambda terms: weight(terms) * kl(terms)


def weighted_inside_clamp(weight):
  """`clamped_k3` times a weight that carries no gradient either where the clamp bites."""

  def f(terms):
    kl, w = clamped_k3(terms), weight(terms)
    return jnp.where(kl < 10.0, w, jax.lax.stop_gradient(w)) * kl

  return f


def loss(kl, terms):
  """A term of the loss, summed over tokens."""
  return kl(terms), kl(terms)


def sequence_mean_loss(kl, terms):
  """A term of the loss, averaged over the tokens of a sequence; its value here is the sum."""
  return kl(terms), kl(terms) / terms.mask.sum(-1, keepdims=True)


def _stale(terms):
  return terms._replace(log_probs=terms.old_log_probs, exact_kl=terms.old_exact_kl)


def _advantages(kl, terms, credit):
  """What klrl's own path from a reward to advantages makes of `kl`, stopped."""
  penalty = KLPenalty("reward", "k1", "none", credit)
  return undiscounted_advantages(penalty, jax.lax.stop_gradient(kl), terms.mask, beta=1.0)


def reward(kl, terms):
  """Taken off each token's reward when the completion was drawn; what follows counts too."""
  value = kl(_stale(terms))
  return value, unclipped_policy_loss(terms, _advantages(value, terms, "sequence"))


def reward_of_the_token(kl, terms):
  """As `reward`, but a token answers for its own KL only."""
  value = kl(_stale(terms))
  return value, unclipped_policy_loss(terms, _advantages(value, terms, "token"))


def reward_of_the_sequence(kl, terms):
  """The sum taken off the completion's score; the policy loss has one ratio per sequence."""
  value = kl(_stale(terms))
  log_ratio = _difference(terms.log_probs, terms.old_log_probs, terms).sum(-1)
  whole = jnp.exp(log_ratio) * jax.lax.stop_gradient(value.sum(-1))
  return value, jnp.zeros_like(value).at[..., 0].set(whole)


def reward_of_the_sequence_with_truncated_weight(kl, terms):
  """`old` is the sampling engine; the trainer's own sum, stopped, times min(W, 2), stopped."""
  log_ratio = _difference(terms.log_probs, terms.old_log_probs, terms).sum(-1, keepdims=True)
  weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(log_ratio)), 2.0)
  on_policy = terms._replace(old_log_probs=jax.lax.stop_gradient(terms.log_probs))
  value = weight * kl(terms)
  whole = jax.lax.stop_gradient(value.sum(-1, keepdims=True))
  return value, unclipped_policy_loss(on_policy, jnp.where(terms.mask, -whole, 0.0))


_TRL = ("f2cd577, v1.9.0+, July 2026", "trl/trainer/grpo_trainer.py")
_TRL_6503 = ("PR #6503, July 2026", "github.com/huggingface/trl/pull/6503")
_TRL_PPO = ("f2cd577; removed by PR #7020", "trl/experimental/ppo/ppo_trainer.py")
_VERL = ("1dda039, v0.9.0+, August 2026", "verl/trainer/ppo/core_algos.py kl_penalty")
_OPENRLHF = ("3c3be62, August 2026", "openrlhf/models/utils.py compute_approx_kl")
_OPENRLHF_1309 = (
  "PR #1309, August 2026",
  "github.com/OpenRLHF/OpenRLHF/pull/1309 (its cap on the ratio is left out)",
)
_NEMO = (
  "7ea279a, v0.7.0+, August 2026",
  "nemo_rl/algorithms/utils.py calculate_kl; loss_functions.py, PRs #2506 and #2958",
)
_NEMO_ADVANTAGE = (_NEMO[0], "nemo_rl/algorithms/advantage_estimator.py")
_TUNIX = ("c7d8950f, August 2026", "tunix/rl/common.py, grpo/grpo_learner.py")
_TUNIX_PPO = (_TUNIX[0], "tunix/rl/common.py, ppo/ppo_learner.py")
_ALPACA = ("30717dd, February 2024", "src/alpaca_farm/rl/ppo_trainer.py")

PEERS = (
  Peer(
    "TRL", "GRPO, use_bias_correction_kl=True", IF_ON, *_TRL_6503, weighted(token_ratio, k3), loss
  ),
  Peer("TRL", "GRPO, use_bias_correction_kl=False", WAS, *_TRL, k3, loss),
  Peer(
    "TRL",
    "GRPO, use_bias_correction_kl=True, importance_sampling_level=sequence",
    OPTION,
    "issue #6586, July 2026",
    "github.com/huggingface/trl/issues/6586",
    weighted(mean_ratio, k3),
    loss,
  ),
  Peer("TRL", "RLOO", DEFAULT, _TRL[0], "trl/trainer/rloo_trainer.py", k1, reward_of_the_sequence),
  Peer("TRL", "PPO, kl_estimator=k1", DEFAULT, *_TRL_PPO, k1, reward),
  Peer("TRL", "PPO, kl_estimator=k3", OPTION, *_TRL_PPO, k3, reward),
  Peer("verl", "use_kl_loss, kl_loss_type=low_var_kl", IF_ON, *_VERL, clamped_k3, loss),
  Peer("verl", "use_kl_loss, kl_loss_type=kl", OPTION, *_VERL, k1, loss),
  Peer("verl", "use_kl_loss, kl_loss_type=abs", OPTION, *_VERL, absolute, loss),
  Peer("verl", "use_kl_loss, kl_loss_type=mse", OPTION, *_VERL, k2, loss),
  Peer(
    "verl", "use_kl_loss, kl_loss_type=k3+", OPTION, *_VERL, with_gradient_of_k2(clamped_k3), loss
  ),
  Peer("verl", "use_kl_in_reward, kl_penalty=kl", IF_ON, *_VERL, k1, reward),
  Peer("verl", "use_kl_in_reward, kl_penalty=low_var_kl", OPTION, *_VERL, clamped_k3, reward),
  Peer("verl", "use_kl_in_reward, kl_penalty=abs", OPTION, *_VERL, absolute, reward),
  Peer(
    "verl",
    "use_kl_in_reward, kl_penalty=kl, adv_estimator=rloo, rollout_is=sequence, threshold 2",
    OPTION,
    *_VERL,
    k1,
    reward_of_the_sequence_with_truncated_weight,
  ),
  Peer("OpenRLHF", "kl.estimator=k1 in the reward", DEFAULT, *_OPENRLHF, clamped(k1), reward),
  Peer("OpenRLHF", "kl.use_loss, kl.estimator=k1", OPTION, *_OPENRLHF, clamped(k1), loss),
  Peer("OpenRLHF", "kl.use_loss, kl.estimator=k2", OPTION, *_OPENRLHF, clamped(k2), loss),
  Peer("OpenRLHF", "kl.use_loss, kl.estimator=k3", OPTION, *_OPENRLHF, clamped(k3), loss),
  Peer(
    "OpenRLHF",
    "kl.use_loss, kl.estimator=k3, kl.unbiased_gradient",
    OPTION,
    *_OPENRLHF_1309,
    with_gradient_of_k2(clamped(k3), token_ratio),
    loss,
  ),
  Peer(
    "NeMo-RL",
    "GRPO, reference_policy_kl_type=k3",
    DEFAULT,
    *_NEMO,
    weighted_inside_clamp(score_ratio),
    loss,
  ),
  Peer(
    "NeMo-RL",
    "GRPO, k3, use_on_policy_kl_approximation",
    OPTION,
    *_NEMO,
    weighted_inside_clamp(token_ratio),
    loss,
  ),
  Peer(
    "NeMo-RL",
    "Reinforce++, use_kl_in_reward, k3",
    OPTION,
    *_NEMO_ADVANTAGE,
    clamped_k3,
    reward_of_the_token,
  ),
  Peer("Tunix", "GRPO, kl_loss_mode=kl", DEFAULT, *_TUNIX, k1, sequence_mean_loss),
  Peer("Tunix", "GRPO, kl_loss_mode=mse_kl", OPTION, *_TUNIX, k2, sequence_mean_loss),
  Peer("Tunix", "GRPO, kl_loss_mode=low_var_kl", OPTION, *_TUNIX, k3, sequence_mean_loss),
  Peer("Tunix", "PPO, kl_method=low_var_kl", DEFAULT, *_TUNIX_PPO, k3, reward),
  Peer("AlpacaFarm", "max(k1, 0) in the reward", DEFAULT, *_ALPACA, positive_part, reward),
  Peer("AlpacaFarm", "exact KL in the reward", UNUSED, *_ALPACA, exact, reward),
)
