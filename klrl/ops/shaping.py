"""Rewards per token, from a score per completion and a KL penalty per token.

There is one rule: the score is given at the last real token, which is the last that the policy
chose. The mask includes the EOS, so

    finished     the last real token is the EOS;
    truncated    it is the last token that was sampled, since the length limit is terminal;
    empty        there is no token, so the row is zero and its score is given nowhere;
    given tokens behind the last one that the policy chose get nothing.
"""

import chex
import jax
import jax.numpy as jnp

from klrl.ops.masking import at_least_float32, zero_padding


def shaped_rewards(
  scores: jax.Array, kl: jax.Array, mask: jax.Array, *, beta: jax.Array | float
) -> jax.Array:
  """Returns [..., T] `score at the last real token - beta * kl`, zero in the padding.

  The result is in units of the score. No gradient is stopped; the policy losses stop their
  advantages. Daniel Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019,
  eq. 2, with the KL spread over the tokens.

  >>> kl, mask = jnp.array([[0.5, 0.25, 0.0]]), jnp.array([[True, True, False]])
  >>> print(ops.shaped_rewards(jnp.array([1.0]), kl, mask, beta=0.5))
  [[-0.25   0.875  0.   ]]

  Args:
    scores: [...], one per completion, before any KL.
    kl: [..., T], an estimate of KL(pi || pi_ref) per token, nats.
    mask: [..., T] bool, True at the tokens of the completion, its EOS included.
    beta: scalar, may be traced; reward per nat.
  """
  chex.assert_shape(scores, kl.shape[:-1])
  kl = zero_padding(kl, mask)
  num_left = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
  is_last = mask & (num_left == 1)
  return jnp.where(is_last, at_least_float32(scores)[..., None], 0.0) - beta * kl
