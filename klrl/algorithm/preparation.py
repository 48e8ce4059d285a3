"""Prepares a rollout and its scores before anything is learnt from them."""

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import completions
from klrl.devices import parallel
from klrl.sampling import Rollout


def shaped_scores(
  scores, rollout: Rollout, hypers, *, max_completion_len: int | None = None
) -> jax.Array:
  """Returns `scores` [B] less the penalties of length and of a missing end.

  Each token that the policy chose costs `length_penalty`. A completion that was cut off at the
  limit costs `missing_eos_penalty`. Over the last `overlong_buffer` tokens before the limit, given
  ones included, a penalty rises
  from 0 to 1 (Qiying Yu et al., "DAPO", 2025, eq. 13; a completion that does not end pays 1); with
  0 it is off. Without `max_completion_len` the limit is T of the rollout.
  """
  mask = rollout.completion_mask
  lengths = ops.until_last(mask).sum(axis=-1)
  max_completion_len = max_completion_len or rollout.completion_mask.shape[-1]
  buffer = jnp.maximum(hypers.overlong_buffer, 1.0)
  over = jnp.clip((lengths - (max_completion_len - buffer)) / buffer, 0.0, 1.0)
  over = jnp.where(hypers.overlong_buffer > 0, over, 0.0)
  unfinished = jnp.where(rollout.finished, 0.0, hypers.missing_eos_penalty)
  return scores - over - unfinished - hypers.length_penalty * mask.sum(axis=-1)


def without_unscored(rollout: Rollout, scores) -> tuple[Rollout, jax.Array]:
  """Returns (rollout, scores) in which completions whose score is NaN have no token.

  So they are in no mean and no loss. Their score becomes the mean of the others: a rule that does
  not ask which completions are scored meets an ordinary number.
  """
  scored = ~jnp.isnan(scores)
  mask = rollout.completion_mask & scored[:, None]
  mean = ops.masked_mean(scores, scored)
  return rollout._replace(completion_mask=mask), jnp.where(scored, scores, mean)


def informative_groups(rollout, scores, scored, *, group_size: int, batch_size: int):
  """Returns (rollout, scores, share): the first `batch_size` rows of groups whose scores differ.

  `rollout` is any tree of arrays [B, ...], such as a `Rollout` and what is known of it. `scored`
  [B] says which scores are compared.
  If these are too few, groups of equal scores fill the batch; their advantages are zero. `share` is
  the share of groups whose scores differ. Qiying Yu et al., "DAPO", 2025, section 3.2, with a fixed
  amount of oversampling instead of sampling until the batch is full.
  """
  groups, among = (x.reshape(-1, group_size) for x in (scores, scored))
  uniform = (ops.mean_and_deviations(groups, among, axis=-1)[1] == 0).all(axis=-1)
  kept = jnp.argsort(uniform, stable=True)[: batch_size // group_size]
  rows = (kept[:, None] * group_size + jnp.arange(group_size)[None]).reshape(-1)
  rollout, scores = parallel.split_rows(jax.tree.map(lambda x: x[rows], (rollout, scores)))
  return rollout, scores, 1.0 - uniform.mean()


def rescored(policy, params, rollout: Rollout, hypers, *, group_size: int = 1) -> Rollout:
  """Returns the rollout with old_log_probs by the trainer in place of those by the sampler.

  `params` must be those that sampled it, so a late rollout is rescored before it waits.
  """
  log_probs = completions.log_probs(
    policy, params, rollout, temperature=hypers.temperature, group_size=group_size
  )
  return rollout._replace(old_log_probs=jnp.where(rollout.completion_mask, log_probs, 0.0))


def corrected(rollout: Rollout, correction: str, hypers):
  """Returns (weights [B, T] of a `rescored` rollout, metrics); the weights are 1 for "none"."""
  if correction == "none":
    return jnp.ones_like(rollout.old_log_probs), {}
  mask = rollout.completion_mask
  weights, capped = ops.sampler_weights(
    rollout.old_log_probs,
    rollout.sampler_log_probs,
    mask,
    correction=correction,
    cap=hypers.sampler_cap,
    floor=hypers.sampler_floor,
  )
  num_tokens = mask.sum() * 1.0
  return weights, {
    "policy/sampler_weight": (jnp.where(mask, weights, 0.0).sum(), num_tokens),
    "policy/sampler_capped_fraction": (capped.sum(), num_tokens),
  }
