"""The policy losses by name, and the whole loss of an algorithm without a critic.

A policy loss is f(terms, hypers) -> ([B, T] loss of each token, metrics as (sum, count) pairs). A
new one is a function and a row of `POLICY_LOSSES`. Gradient flows through `terms.log_probs` alone.
"""

from collections.abc import Callable

import jax.numpy as jnp

from klrl import ops
from klrl.algorithm.terms import Losses, Terms


def clip(terms: Terms, hypers):
  """PPO's clipped surrogate, with a dual clip; `ops.clipped_policy_loss`."""
  arguments = terms.log_probs, terms.old_log_probs, terms.advantages, terms.mask
  eps = {"clip_eps_low": hypers.clip_eps_low, "clip_eps_high": hypers.clip_eps_high}
  clipped = ops.clip_fraction(*arguments, **eps)
  loss = ops.clipped_policy_loss(*arguments, **eps, dual_clip=hypers.dual_clip)
  return loss, {"policy/clip_fraction": (clipped.sum(), terms.mask.sum() * 1.0)}


def sequence_clip(terms: Terms, hypers):
  """GSPO's clip of the completion's ratio; `ops.gspo_loss`."""
  loss = ops.gspo_loss(
    terms.log_probs,
    terms.old_log_probs,
    terms.advantages,
    terms.mask,
    clip_eps_low=hypers.clip_eps_low,
    clip_eps_high=hypers.clip_eps_high,
  )
  return loss, {}


def truncated(terms: Terms, hypers):
  """CISPO's truncated weight; `ops.cispo_loss`."""
  loss = ops.cispo_loss(
    terms.log_probs,
    terms.old_log_probs,
    terms.advantages,
    terms.mask,
    max_ratio=1 + hypers.clip_eps_high,
  )
  return loss, {}


def kl_penalised(kl: Callable) -> Callable:
  """PPO's KL penalty, where `kl` is `ops.kl_old_new`, as published, `ops.kl_new_old` or `ops.k2`.

  `ops.k2` is half the squared log-ratio, the local KL to second order in either direction.
  """

  def loss(terms: Terms, hypers):
    measured = kl(terms.log_probs, terms.old_log_probs)
    metrics = {"controller/trust_region_beta": (terms.trust_region_beta, 1.0)}
    return _surrogate(terms, measured, terms.trust_region_beta), metrics

  return loss


def divergence_masked(distance: str) -> Callable:
  """DPPO's mask, by `ops.binary_tv` ("tv") or `ops.binary_kl` ("kl")."""

  def loss(terms: Terms, hypers):
    arguments = terms.log_probs, terms.old_log_probs, terms.advantages, terms.mask
    options = {"distance": distance, "size": hypers.trust_region_size}
    leaving = ops.is_leaving(*arguments, **options)
    metrics = {"policy/clip_fraction": (leaving.sum() * 1.0, terms.mask.sum() * 1.0)}
    return ops.divergence_masked_policy_loss(*arguments, **options), metrics

  return loss


def smooth(terms: Terms, hypers):
  """DRPO's quadratic in the shift of probability; `ops.smooth_policy_loss`."""
  arguments = terms.log_probs, terms.old_log_probs, terms.advantages, terms.mask
  return ops.smooth_policy_loss(*arguments, size=hypers.trust_region_size), {}


def regression(terms: Terms, hypers):
  """Likelihood weighted by exp(A / trust_region_beta), without a ratio: DAR's regression.

  It leads to old * exp(A / trust_region_beta) / Z, see `ops.exponential_weights`, and is multiplied
  by trust_region_beta, so that it is in units of the score, as the other terms of the loss are.
  """
  del hypers
  scale = terms.trust_region_beta
  weights = ops.exponential_weights(terms.advantages, temperature=scale)
  metrics = {"controller/trust_region_beta": (terms.trust_region_beta, 1.0)}
  return scale * ops.reinforce_loss(terms.log_probs, weights, terms.mask), metrics


def centred(terms: Terms, hypers):
  """The score less what the sampler expects of it, without a ratio; `ops.centred_policy_loss`."""
  assert terms.sampler_mean is not None  # `epochs` measures it where this is the policy loss.
  arguments = terms.log_probs, terms.sampler_mean, terms.advantages, terms.mask
  return ops.centred_policy_loss(*arguments), {}


def unbounded(terms: Terms, hypers):
  """The importance-weighted surrogate, without a bound on the ratio."""
  return _surrogate(terms, jnp.zeros_like(terms.log_probs), 0.0), {}


def _surrogate(terms: Terms, kl, trust_region_beta):
  return ops.kl_penalised_policy_loss(
    terms.log_probs,
    terms.old_log_probs,
    terms.advantages,
    kl,
    terms.mask,
    trust_region_beta=trust_region_beta,
  )


# By the trust region, which keeps the policy near the one that sampled.
POLICY_LOSSES = {
  "clip": clip,
  "sequence_clip": sequence_clip,
  "truncated": truncated,
  "kl_old_new": kl_penalised(ops.kl_old_new),
  "kl_new_old": kl_penalised(ops.kl_new_old),
  "k2": kl_penalised(ops.k2),
  "tv_mask": divergence_masked("tv"),
  "kl_mask": divergence_masked("kl"),
  "smooth": smooth,
  "regression": regression,
  "centred": centred,
  "none": unbounded,
}


def without_critic(policy_loss: Callable) -> Callable:
  """Returns loss(terms, hypers) -> (losses, metrics) of policy, entropy bonus and KL term."""

  def loss(terms: Terms, hypers) -> tuple[Losses, dict]:
    policy, metrics = policy_loss(terms, hypers)
    return {
      "policy/loss": (1.0, policy * terms.sampler_weights),
      "policy/entropy_bonus": (-hypers.entropy_coef, terms.entropy),
      "policy/kl_loss": (terms.beta, terms.kl_loss),
    }, metrics

  return loss


importance_weighted = without_critic(unbounded)
