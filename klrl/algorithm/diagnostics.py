"""Figures of a rollout, as (sum, count) pairs.

Whatever is divided by a number of sequences is a mean of sequence sums; only names that end in
`_per_token` are divided by a number of tokens.
"""

import jax.numpy as jnp

from klrl import ops
from klrl.sampling import Rollout


def per_sequence(x, mask):
  """Returns (sum over all tokens, number of sequences): the mean of sequence sums."""
  return jnp.where(mask, x, 0.0).sum(), jnp.float32(mask.shape[0])


def sequence_stats(name: str, per_token, mask):
  """Returns the mean over sequences, its standard error, and the mean per token."""
  sums = jnp.where(mask, per_token, 0.0).sum(axis=1)
  num_sequences = jnp.float32(sums.shape[0])
  # One sequence says nothing about spread: not measured.
  stderr = (
    (ops.deviation(sums, ddof=1) / jnp.sqrt(num_sequences), 1.0) if len(sums) > 1 else (0.0, 0.0)
  )
  return {
    name: (sums.sum(), num_sequences),
    f"{name}_stderr": stderr,
    f"{name}_per_token": (sums.sum(), mask.sum().astype(jnp.float32)),
  }


def rollout_metrics(rollout: Rollout, scores):
  """Returns score, length, share that ended by itself, and tokens of a rollout."""
  num_rows = jnp.float32(scores.shape[0])
  num_tokens = rollout.completion_mask.sum().astype(jnp.float32)
  return {
    "score/mean": (scores.sum(), num_rows),
    "score/std": (ops.deviation(scores), 1.0),
    "rollout/length": (num_tokens, num_rows),
    "rollout/finished_fraction": (rollout.finished.sum().astype(jnp.float32), num_rows),
    "rollout/tokens": (num_tokens, 1.0),
  }


def explained_variance(values, returns, mask):
  """Returns 1 - Var(returns - values) / Var(returns) over real tokens; none at variance 0."""
  residual = ops.masked_var(returns - values, mask)
  total = ops.masked_var(returns, mask)
  return jnp.where(total > 0, total - residual, 0.0), jnp.where(total > 0, total, 0.0)
