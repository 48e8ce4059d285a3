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

  The reward is `ops.best_of_n_reward`, with n = `hypers.best_of`. The reference's chances are those
  in the group, whose completions are weighted by reference over policy; the log-ratio is read from
  the KL in the reward. At beta 1 the total is then log(best-of-n / policy), and the rule mixes the
  gradients of -KL(policy || best-of-n), to which each total less the mean belongs, and with the
  share `hypers.forward_share` of -KL(best-of-n || policy), to which the completion's part of
  exp(total) belongs, relative to an equal part. Pier Giuseppe Sessa et al., "BOND: Aligning LLMs
  with Best-of-N Distillation", 2024, eq. 9 and 11, there with draws of the reference.
  """

  def groups(y):
    return y.reshape(-1, algorithm.group_size)

  scores, scored = groups(x.scores), groups(x.scored)
  log_ratios = groups(ops.zero_padding(x.kl, x.mask).sum(axis=-1))

  def parts(logits):
    lowest = jnp.finfo(logits.dtype).min
    return jnp.where(scored, jax.nn.softmax(jnp.where(scored, logits, lowest)), 0.0)

  reward = ops.best_of_n_reward(scores, parts(-log_ratios), hypers.best_of)
  totals = jnp.where(scored, reward - x.beta * log_ratios, 0.0)
  count = scored.sum(axis=-1, keepdims=True)
  covering = x.beta * (count * parts(ops.divide(totals, x.beta)) - 1)
  share = hypers.forward_share
  advantages = (1 - share) * ops.group_centred(totals, scored) + share * covering
  advantages = jnp.broadcast_to(advantages.reshape(-1, 1), x.mask.shape)
  return Advantages(advantages, jnp.zeros_like(advantages))


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
