"""Evaluates models at the completion tokens of a rollout.

A rollout holds `tokens [B, P + T]`: prompts, left-padded to P, then completions, right-padded to T.
Completion token t is predicted at position P - 1 + t, so the functions read the T positions from
P - 1 on and return `[B, T]`. Values in the padding are finite but have no meaning: mask them.

`completion_mask` has the tokens that the policy chose. Where others stand between them, such as the
output of a tool, the models read these too.

`group_size` says that so many neighbouring rows have the same prompt. It is then computed once for
as many of them as lie on one device. This changes neither values nor gradients.
"""

import functools
import math

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm.distributions import log_probs_and_entropy_of, over_vocabulary
from klrl.algorithm.gradients import enough_parts
from klrl.algorithm.terms import Texts
from klrl.devices import parallel
from klrl.models.attention import Fork
from klrl.sampling import Rollout


def attention_mask(rollout: Rollout | Texts) -> jax.Array:
  """Returns [B, P + T] bool, True at what is read: whatever stands before a token that was chosen.

  What was given behind the last one conditions nothing, and is padding.
  """
  read = ops.until_last(rollout.completion_mask)
  return jnp.concatenate([rollout.prompt_mask, read], axis=1)


def _predicting(fn, rollout: Rollout | Texts, group_size: int) -> jax.Array:
  """Returns [B, T, ...], `fn(tokens, mask, fork=...)` at the positions that predict completions."""
  tokens, mask = rollout.tokens, attention_mask(rollout)
  num_rows, prompt_len = rollout.prompt_mask.shape
  shared = math.gcd(group_size, parallel.rows_per_device(num_rows))
  if shared == 1:
    return _in_parts(fn, (tokens, mask))[:, prompt_len - 1 : -1]
  shape = num_rows // shared, shared, -1

  def forked(x):
    prompts, branches = x[:, :prompt_len].reshape(shape), x[:, prompt_len:].reshape(shape)
    return jnp.concatenate([prompts[:, 0], branches.reshape(shape[0], -1)], axis=1)

  rows = parallel.split_rows((forked(tokens), forked(mask)))
  x = _in_parts(functools.partial(fn, fork=Fork(prompt_len, shared)), rows)
  branches = x[:, prompt_len:].reshape(*shape, *x.shape[2:])
  last = x[:, None, None, prompt_len - 1]
  last = jnp.broadcast_to(last, (*shape[:2], 1, *x.shape[2:]))
  return jnp.concatenate([last, branches[:, :, :-1]], axis=2).reshape(num_rows, -1, *x.shape[2:])


def _in_parts(fn, rows) -> jax.Array:
  """Returns `fn(*rows)`, arrays with as many rows, computed in parts where these are faster."""
  num_parts = enough_parts(rows, 1)
  if num_parts == 1:
    return fn(*rows)
  # A part has every num_parts-th row, so that the rows of each device are spread over all parts.
  parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), rows)
  y = jax.lax.map(lambda part: fn(*parallel.split_rows(part)), parts).swapaxes(0, 1)
  return y.reshape(-1, *y.shape[2:])


def completion_tokens(rollout: Rollout | Texts) -> jax.Array:
  """Returns [B, T] int32, the tokens of the completions."""
  return rollout.tokens[:, rollout.prompt_mask.shape[1] :]


def shortened(rollout: Rollout, completion_len: int) -> Rollout:
  """Returns the rollout with its first `completion_len` columns of completions alone."""
  total_len = rollout.prompt_mask.shape[-1] + completion_len
  return rollout._replace(
    tokens=rollout.tokens[..., :total_len],
    completion_mask=rollout.completion_mask[..., :completion_len],
    old_log_probs=rollout.old_log_probs[..., :completion_len],
    sampler_log_probs=rollout.sampler_log_probs[..., :completion_len],
  )


def completion_hidden(
  policy, params, rollout: Rollout | Texts, *, group_size: int = 1
) -> jax.Array:
  """Returns [B, T, D], the hidden state that predicts each completion token."""
  return _predicting(functools.partial(policy.hidden, params), rollout, group_size)


def log_probs_and_entropy(policy, params, rollout: Rollout, *, temperature):
  """Returns log-probs of the completion tokens and the policy's entropy there, [B, T] each, nats.

  Gradient flows to `params`; [B, T, V] logits are never held.
  """
  return over_vocabulary(
    log_probs_and_entropy_of,
    [(completion_hidden(policy, params, rollout), policy.unembedding(params))],
    [completion_tokens(rollout)],
    temperature=temperature,
  )


def log_probs(policy, params, rollout: Rollout, *, temperature, group_size: int = 1) -> jax.Array:
  """Returns the log-probs of the completion tokens, [B, T], nats per token."""
  hidden = completion_hidden(policy, params, rollout, group_size=group_size)
  return over_vocabulary(
    ops.taken,
    [(hidden, policy.unembedding(params))],
    [completion_tokens(rollout)],
    temperature=temperature,
  )


def exact_kl(policy, params, reference, reference_params, rollout: Rollout, *, temperature):
  """Returns KL(pi || pi_ref) of the next-token distribution at each completion position.

  [B, T], nats per token, summed over the whole vocabulary. Its masked sum over t is an unbiased
  estimate of the sequence KL when `rollout` was drawn from pi (Amini, Vieira and Cotterell, "Better
  Estimation of the KL Divergence Between Language Models", 2025).
  """
  models = (policy, params), (reference, reference_params)
  return over_vocabulary(
    ops.kl_of,
    [(completion_hidden(*model, rollout), model[0].unembedding(model[1])) for model in models],
    temperature=temperature,
  )


def values(value_model, params, rollout: Rollout, *, group_size: int = 1) -> jax.Array:
  """Returns [B, T], the value of the state before each completion token (reward units)."""
  return _predicting(functools.partial(value_model.values, params), rollout, group_size)


def reward_model_scores(reward_model, params, rollout: Rollout) -> jax.Array:
  """Returns [B], the reward model's output at the last token that was chosen in each row."""
  return reward_model.scores(params, rollout.tokens, attention_mask(rollout))
