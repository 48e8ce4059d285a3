"""Figures of a rollout and of a minibatch, as (sum, count) pairs.

A figure over sequences is a mean of sums over sequences. The names of KLs that are divided by a
number of tokens end in `_per_token`.
"""

import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import kl_terms
from klrl.algorithm.terms import Terms
from klrl.sampling import Rollout


def per_sequence(x, mask):
  """Returns (sum over all tokens, number of sequences with a token): the mean of sequence sums."""
  return jnp.where(mask, x, 0.0).sum(), mask.any(axis=1).sum().astype(jnp.float32)


def sequence_stats(name: str, per_token, mask):
  """Returns the mean over sequences, its standard error, and the mean per token."""
  sums = jnp.where(mask, per_token, 0.0).sum(axis=1)
  num_sequences = jnp.float32(sums.shape[0])
  # A single sequence has no measured spread.
  stderr = (
    (ops.deviation(sums, ddof=1) / jnp.sqrt(num_sequences), 1.0) if len(sums) > 1 else (0.0, 0.0)
  )
  return {
    name: (sums.sum(), num_sequences),
    f"{name}_stderr": stderr,
    f"{name}_per_token": (sums.sum(), mask.sum().astype(jnp.float32)),
  }


def rollout_metrics(rollout: Rollout, scores):
  """Returns the scores, lengths, the share that ended by itself, and the tokens of a rollout.

  A score is NaN where no reward scored.
  """
  num_rows, scored = jnp.float32(scores.shape[0]), ~jnp.isnan(scores)
  num_tokens = rollout.completion_mask.sum().astype(jnp.float32)
  return {
    "score/mean": ops.masked_sum_count(scores, scored),
    "score/std": (ops.deviation(scores, scored), 1.0),
    "rollout/length": (num_tokens, num_rows),
    "rollout/finished_fraction": (rollout.finished.sum().astype(jnp.float32), num_rows),
    "rollout/tokens": (num_tokens, 1.0),
  }


def explained_variance(values, returns, mask):
  """Returns 1 - Var(returns - values) / Var(returns) over real tokens; count 0 at variance 0."""
  residual = ops.masked_var(returns - values, mask)
  total = ops.masked_var(returns, mask)
  return jnp.where(total > 0, total - residual, 0.0), jnp.where(total > 0, total, 0.0)


def of_minibatch(algorithm, terms: Terms, kl: kl_terms.TokenTerms, sampler_log_probs, hypers):
  """Returns figures of a minibatch that do not depend on its loss.

  They are ratios, entropy, KLs between the sampler, the old and the present policy, and the shares
  of values that clips and caps bound.
  """
  mask, log_ratio = terms.mask, terms.log_probs - terms.old_log_probs
  num_tokens = mask.sum() * 1.0

  def per_token(x):
    return jnp.where(mask, x, 0.0).sum(), num_tokens

  # Over draws of the old policy the mean ratio is 1.
  ratio = jnp.exp(log_ratio)
  metrics = {
    "policy/ratio": per_token(ratio),
    "policy/ratio_deviation": per_token(abs(ratio - 1)),
    "policy/entropy": per_token(terms.entropy),
    "kl/old_k3": per_sequence(ops.k3(terms.old_log_probs, terms.log_probs), mask),
    "kl/sampler_k1": per_sequence(ops.k1(sampler_log_probs, terms.log_probs), mask),
    "kl/sampler_k3": per_sequence(ops.k3(sampler_log_probs, terms.log_probs), mask),
  }
  if terms.values is not None and terms.old_values is not None:
    clipped = abs(terms.values - terms.old_values) > hypers.value_clip_eps
    metrics["value/clip_fraction"] = per_token(clipped)
  if algorithm.penalty.in_loss and algorithm.penalty.correction == "prefix":
    bites, lost = kl_terms.prefix_cap_effect(algorithm.penalty, kl, prefix_cap=hypers.prefix_cap)
    metrics["kl/prefix_cap_fraction"] = (bites.sum(), num_tokens)
    metrics["kl/prefix_cap_lost"] = per_sequence(lost, mask)
  return metrics
