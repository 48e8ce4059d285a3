"""The advantage that each token of a rollout gets: the rules by name.

    gae             from a value model, with lambda
    returns         what follows the token, without a baseline; to be whitened over the batch
    batch_mean      the completion's total less the mean total of the rest of the batch
    leave_one_out   the total less the mean total of the other completions of its prompt (RLOO)
    group_centred   the total less the mean of its prompt's completions (Dr. GRPO)
    group_relative  that, divided by their standard deviation (GRPO)

A total is the score less beta times the KL that the penalty puts in the reward. The last four give
one number to all tokens of a completion; the completions of one prompt stand side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import kl_terms, objective

GROUP_RULES = {
  "batch_mean": ops.leave_one_out,  # of the batch as one group
  "leave_one_out": ops.leave_one_out,
  "group_centred": ops.group_centred,
  "group_relative": ops.group_relative,
}
RULES = ("gae", "returns", *GROUP_RULES)


class Advantages(NamedTuple):
  """What the policy loss and the value loss read."""

  advantages: jax.Array  # [B, T]; anything in the padding
  returns: jax.Array  # [B, T], targets of the value model; zeros where there is none
  mean: jax.Array  # what whitening took off
  std: jax.Array  # what whitening divided by: beta in the loss is divided by it; else 1


def advantages_of(
  config, penalty: objective.KLPenalty, scores, kl, old_values, mask, *, hypers, beta
) -> Advantages:
  """Returns the advantages by the rule `config.advantage`.

  Args:
    config: frozen; read are advantage, group_size, whiten_advantages.
    penalty: the KL penalty; its reward part is subtracted.
    scores: [B].
    kl: [B, T], what `kl_terms.reward_kl` returned.
    old_values: [B, T] of the value model, zeros without one.
    mask: [B, T] bool.
    hypers: `learner.Hypers`; read are gamma and gae_lambda.
    beta: scalar, reward per nat.
  """
  mean, std = jnp.float32(0.0), jnp.float32(1.0)
  if config.advantage in GROUP_RULES:
    advantages = _grouped(config, penalty, scores, kl, mask, beta=beta)
    return Advantages(advantages, jnp.zeros_like(advantages), mean, std)
  advantages, returns = kl_terms.penalised_advantages(
    penalty,
    scores,
    kl,
    old_values,
    mask,
    beta=beta,
    gamma=hypers.gamma,
    gae_lambda=hypers.gae_lambda,
  )
  if config.whiten_advantages:
    mean, std = ops.mean_and_std(advantages, mask)
    advantages = ops.whiten(advantages, mask)
  return Advantages(advantages, returns, mean, std)


def _grouped(config, penalty, scores, kl, mask, *, beta):
  kl = ops.zero_padding(kl, mask)
  # A KL that is charged token by token has no part in the total that completions are compared by.
  per_token = penalty.credit == "token" or kl_terms.credits_later_kl(penalty)
  totals = scores if per_token else scores - beta * kl.sum(axis=-1)
  group_size = len(scores) if config.advantage == "batch_mean" else config.group_size
  relative = GROUP_RULES[config.advantage](totals.reshape(-1, group_size)).reshape(-1, 1)
  zeros = jnp.zeros_like(kl)
  if not per_token:
    return relative + zeros
  charges, _ = kl_terms.penalised_advantages(
    penalty, zeros[..., 0], kl, zeros, mask, beta=beta, gamma=1.0, gae_lambda=1.0
  )
  return relative + charges


def group_deviation(config, scores) -> jax.Array:
  """Returns the standard deviation that `group_relative` divides scores by, on average.

  Beta times it is what a KL term in the loss weighs against the score itself, reward per nat.
  """
  groups = scores.reshape(-1, config.group_size)
  return ops.deviation(groups, axis=-1, ddof=1).mean()
