"""The rules for the advantage of each token, by name.

    returns         the rewards that follow the token, without a baseline; to be whitened
    batch_mean      the completion's total less the mean total of the rest of the batch
    leave_one_out   the total less the mean total of the other completions of its prompt (RLOO)
    group_centred   the total less the mean total of its prompt's completions (Dr. GRPO)
    group_relative  group_centred divided by the deviation of these totals (GRPO)
    best_of_n       group_centred, of the reward whose best policy is best-of-n (BOND)

A rule is f(experience, algorithm, hypers) -> `Advantages`. A total is the score less beta times the
KL that the penalty puts in the reward. The last five rules give all tokens of a completion the same
number. The rule of PPO, with a value model, is in experiments/ppo.py.
"""

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import kl_terms
from klrl.algorithm.terms import Advantages, Experience


def returns(x: Experience, algorithm, hypers) -> Advantages:
  """Returns the discounted rewards from each token on."""
  rewards, charges = kl_terms.penalised_rewards(
    algorithm.penalty, x.scores, x.kl, x.mask, beta=x.beta, gamma=hypers.gamma
  )
  advantages, found = ops.gae(
    rewards, jnp.zeros_like(rewards), x.mask, gamma=hypers.gamma, gae_lambda=1.0
  )
  return Advantages(advantages - charges, found)


def batch_mean(x: Experience, algorithm, hypers) -> Advantages:
  """Returns the total less the mean of all others."""
  return _compared(ops.leave_one_out, x, algorithm, len(x.scores))


def _within_group(relative):
  def rule(x: Experience, algorithm, hypers) -> Advantages:
    return _compared(relative, x, algorithm, algorithm.group_size)

  return rule


def _compared(relative, x: Experience, algorithm, group_size: int) -> Advantages:
  totals, charges = kl_terms.compared_totals(algorithm.penalty, x.scores, x.kl, x.mask, beta=x.beta)
  groups, scored = (y.reshape(-1, group_size) for y in (totals, x.scored))
  advantages = relative(groups, scored).reshape(-1, 1) - charges
  return Advantages(advantages, jnp.zeros_like(advantages))


def best_of_n(x: Experience, algorithm, hypers) -> Advantages:
  """Returns how much nearer a completion brings the policy to best-of-n of the reference.

  The reward is `ops.best_of_n_reward`, with n = `hypers.best_of` and the chances that
  `reference_chances` finds. At beta 1 the total is then log(best-of-n / policy), and the rule mixes
  the gradients of -KL(policy || best-of-n), to which each total less the mean belongs, and with the
  share `hypers.forward_share` of -KL(best-of-n || policy), to which the completion's part of
  exp(total) belongs, relative to an equal part. Pier Giuseppe Sessa et al., "BOND: Aligning LLMs
  with Best-of-N Distillation", 2024, eq. 9 and 11, there with draws of the reference.
  """

  def groups(y):
    return y.reshape(-1, algorithm.group_size)

  scores, scored = groups(x.scores), groups(x.scored)
  log_ratios = groups(ops.zero_padding(x.kl, x.mask).sum(axis=-1))
  above, tied = reference_chances(scores, log_ratios, scored)
  # No completion is lower than one in the group, however large the weights of those above it.
  upto = jnp.maximum(1 - above, 1 / algorithm.group_size)
  reward = ops.best_of_n_reward(upto, tied, hypers.best_of)
  totals = jnp.where(scored, reward - x.beta * log_ratios, 0.0)
  count = scored.sum(axis=-1, keepdims=True)
  logits = jnp.where(scored, ops.divide(totals, x.beta), jnp.finfo(totals.dtype).min)
  covering = x.beta * jnp.where(scored, count * jax.nn.softmax(logits) - 1, 0.0)
  share = hypers.forward_share
  advantages = (1 - share) * ops.group_centred(totals, scored) + share * covering
  advantages = jnp.broadcast_to(advantages.reshape(-1, 1), x.mask.shape)
  return Advantages(advantages, jnp.zeros_like(advantages))


def reference_chances(scores, log_ratios, scored) -> tuple[jax.Array, jax.Array]:
  """Returns the reference's chances [K, G] of a higher score than each, and of an equal one.

  They are means over the group's other completions, weighted by reference over policy, so their
  expectations are right. Why not the lower scores, weights that sum to 1, or all of the group? A
  policy near best-of-n seldom draws a low score, whose weight is then large, and the logarithm of
  so uncertain a number is biased; so is any mean that the completion itself is part of.

  Args:
    scores: [K, G].
    log_ratios: [K, G] log(policy / reference) of whole completions, nats.
    scored: [K, G] bool, which completions count.
  """
  others = scored[:, None] & ~jnp.eye(scores.shape[-1], dtype=bool)[None]
  weights, theirs, own = jnp.exp(-log_ratios)[:, None], scores[:, None], scores[..., None]
  above, tied = (
    ops.masked_mean(jnp.where(which, weights, 0.0), others, axis=-1)
    for which in (theirs > own, theirs == own)
  )
  return above, tied


# These compare the completions of a prompt, so there must be several of each.
GROUP_RULES = {
  "leave_one_out": _within_group(ops.leave_one_out),
  "group_centred": _within_group(ops.group_centred),
  "group_relative": _within_group(ops.group_relative),
  "best_of_n": best_of_n,
}
RULES = {"returns": returns, "batch_mean": batch_mean, **GROUP_RULES}


def group_deviation(scores, scored, group_size: int) -> jax.Array:
  """Returns the mean standard deviation by which `group_relative` divides scores.

  Beta times this is the weight of a KL term in the loss against the score itself, reward per nat.
  """
  groups, scored = (x.reshape(-1, group_size) for x in (scores, scored))
  return ops.deviation(groups, scored, axis=-1, ddof=1).mean()
