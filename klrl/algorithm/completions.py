"""Evaluates models at the completion tokens of a rollout.

A rollout holds `tokens [B, P + T]`: prompts, left-padded to P, then completions, right-padded to T.
Completion token t is predicted at position P - 1 + t, so the functions read the T positions from
P - 1 on and return `[B, T]`. Values in the padding are finite but have no meaning: mask them.
"""

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.sampling import Rollout


def attention_mask(rollout: Rollout) -> jax.Array:
  """Returns [B, P + T] bool, True at real tokens."""
  return jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)


def _predicting(rollout: Rollout, x: jax.Array) -> jax.Array:
  return x[:, rollout.prompt_mask.shape[1] - 1 : -1]


def completion_tokens(rollout: Rollout) -> jax.Array:
  """Returns [B, T] int32, the tokens that were sampled."""
  return rollout.tokens[:, rollout.prompt_mask.shape[1] :]


def completion_hidden(policy, params, rollout: Rollout) -> jax.Array:
  """Returns [B, T, D], the hidden state that predicts each completion token."""
  return _predicting(rollout, policy.hidden(params, rollout.tokens, attention_mask(rollout)))


def log_probs_and_entropy(policy, params, rollout: Rollout, *, temperature):
  """Returns log-probs of the completion tokens and the policy's entropy there, [B, T] each, nats.

  Gradient flows to `params`; [B, T, V] logits are never held.
  """
  return ops.token_log_probs_and_entropy_from_hidden(
    completion_hidden(policy, params, rollout),
    policy.unembedding(params),
    completion_tokens(rollout),
    temperature=temperature,
  )


def log_probs(policy, params, rollout: Rollout, *, temperature) -> jax.Array:
  """Returns the log-probs of the completion tokens, [B, T], nats per token."""
  return ops.token_log_probs_from_hidden(
    completion_hidden(policy, params, rollout),
    policy.unembedding(params),
    completion_tokens(rollout),
    temperature=temperature,
  )


def exact_kl(policy, params, reference, reference_params, rollout: Rollout, *, temperature):
  """Returns KL(pi || pi_ref) of the next-token distribution at each completion position.

  [B, T], nats per token, summed over the whole vocabulary. Its masked sum over t is an unbiased
  estimate of the sequence KL when `rollout` was drawn from pi (Amini, Vieira and Cotterell, "Better
  Estimation of the KL Divergence Between Language Models", 2025).
  """
  return ops.exact_kl_from_hidden(
    completion_hidden(policy, params, rollout),
    policy.unembedding(params),
    completion_hidden(reference, reference_params, rollout),
    reference.unembedding(reference_params),
    temperature=temperature,
  )


def values(value_model, params, rollout: Rollout) -> jax.Array:
  """Returns [B, T], the value of the state before each completion token (reward units)."""
  return _predicting(rollout, value_model.values(params, rollout.tokens, attention_mask(rollout)))


def reward_model_scores(reward_model, params, rollout: Rollout) -> jax.Array:
  """Returns [B], the reward model's output at the last real token of each row."""
  return reward_model.scores(params, rollout.tokens, attention_mask(rollout))
