"""Evaluates models at the completion tokens of a rollout.

A rollout holds `tokens [B, P + T]`: prompts, left-padded to P, then completions, right-padded to T.
Completion token t is predicted at position P - 1 + t, so the functions read the T positions from
P - 1 on and return `[B, T]`. Values in the padding are finite but have no meaning: mask them.

`completion_mask` has the tokens that the policy chose. Where others stand between them, such as the
output of a tool, the models read these too.

`group_size` says that so many neighbouring rows have the same prompt. It is then computed once for
as many of them as lie on one device. A rollout with a `packing` is read in fewer rows. Neither
changes values or gradients.
"""

import functools
import math

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import shared_rows
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
  if isinstance(rollout, Rollout) and rollout.packing is not None:
    return _packed(fn, rollout, mask[:, prompt_len:], slice(prompt_len - 1, -1))
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


def _packed(fn, rollout: Rollout, is_read, columns) -> jax.Array:
  """Returns [B, C, ...], `fn(tokens, mask, fork=...)` at some columns, computed in packed rows.

  Args:
    fn: a function of rows of tokens.
    rollout: with a packing.
    is_read: [B, C] bool, what is read of the result.
    columns: an index of the P + T columns, of C of them.
  """
  assert rollout.packing is not None
  rows = rollout.tokens, rollout.prompt_mask, ops.until_last(rollout.completion_mask)
  rows = jax.tree.map(shared_rows.by_device, rows)
  *inputs, places = jax.vmap(functools.partial(shared_rows.packed, packing=rollout.packing))(*rows)
  inputs = parallel.split_rows(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), inputs))
  y = _in_parts(lambda tokens, mask, ids: fn(tokens, mask, fork=ids), inputs)
  index = jnp.where(shared_rows.by_device(is_read), places[..., columns], 0)
  y = shared_rows.taken(y.reshape(len(places), -1, *y.shape[2:]), index.reshape(len(places), -1))
  return parallel.split_rows(y.reshape(*is_read.shape, *y.shape[2:]))


def of_tokens(
  fn, models, rollout: Rollout, rows=(), coefficients=(), *, temperature: jax.Array | float
):
  """Returns `over_vocabulary` of these arguments, [B, T] each, for the tokens that were chosen.

  With a packing no others are multiplied with the vocabulary, and theirs are zeros.
  """
  if rollout.packing is None:
    return over_vocabulary(fn, models, rows, coefficients, temperature=temperature)
  mask = shared_rows.by_device(rollout.completion_mask)
  mask = mask.reshape(len(mask), -1)
  size = rollout.packing.of(mask.shape[1])
  index = jax.vmap(functools.partial(jnp.flatnonzero, size=size, fill_value=0))(mask)

  def chosen(x):
    x = shared_rows.by_device(x)
    return parallel.split_rows(shared_rows.taken(x.reshape(len(mask), -1, *x.shape[3:]), index))

  found = over_vocabulary(
    fn,
    [(chosen(hidden), table) for hidden, table in models],
    [chosen(x) for x in rows],
    coefficients,
    temperature=temperature,
  )
  ranks = jnp.cumsum(mask, axis=1) - 1

  def whole(x):
    x = jnp.where(mask, shared_rows.taken(x, ranks), 0.0)
    return parallel.split_rows(x.reshape(rollout.completion_mask.shape))

  return jax.tree.map(whole, found)


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
  return of_tokens(
    log_probs_and_entropy_of,
    [(completion_hidden(policy, params, rollout), policy.unembedding(params))],
    rollout,
    [completion_tokens(rollout)],
    temperature=temperature,
  )


def log_probs(policy, params, rollout: Rollout, *, temperature, group_size: int = 1) -> jax.Array:
  """Returns the log-probs of the completion tokens, [B, T], nats per token."""
  hidden = completion_hidden(policy, params, rollout, group_size=group_size)
  return of_tokens(
    ops.taken,
    [(hidden, policy.unembedding(params))],
    rollout,
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
  return of_tokens(
    ops.kl_of,
    [(completion_hidden(*model, rollout), model[0].unembedding(model[1])) for model in models],
    rollout,
    temperature=temperature,
  )


def values(value_model, params, rollout: Rollout, *, group_size: int = 1) -> jax.Array:
  """Returns [B, T], the value of the state before each completion token (reward units)."""
  return _predicting(functools.partial(value_model.values, params), rollout, group_size)


def reward_model_scores(reward_model, params, rollout: Rollout) -> jax.Array:
  """Returns [B], the reward model's output at the last token that was chosen in each row."""
  mask = attention_mask(rollout)
  if rollout.packing is None:
    return reward_model.scores(params, rollout.tokens, mask)
  fn = functools.partial(reward_model.values, params)
  last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
  return _packed(fn, rollout, mask, slice(None))[jnp.arange(len(last)), last]
