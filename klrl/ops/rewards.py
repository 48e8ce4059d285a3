"""Rewards per token, from a score per completion and a KL penalty per token.

One rule: the score lands on the last real token, which is the EOS where there is one, since the
mask includes it.

    finished     the last real token is the EOS
    truncated    the length limit is terminal: the last real token is the last one sampled
    empty        no token, no reward: the row is zero, and its score has nowhere to land
"""

import chex
import jax
import jax.numpy as jnp

from klrl.ops.masking import at_least_float32, zero_padding


def shaped_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, beta) -> jax.Array:
  """Returns [..., T] `score at the last real token - beta * kl`, zero in the padding.

  In units of the score. Nothing is stopped; the policy losses stop their advantages. Daniel
  Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, eq. 2, with the KL
  spread over the tokens.

  Args:
    scores: [...] one per completion, before any KL.
    kl: [..., T] a KL estimate per token, nats, of KL(pi || pi_ref).
    mask: [..., T] bool, True at the completion's tokens, EOS included.
    beta: scalar, may be traced; reward per nat.
  """
  chex.assert_shape(scores, kl.shape[:-1])
  kl = zero_padding(kl, mask)
  num_left = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
  is_last = mask & (num_left == 1)
  return jnp.where(is_last, at_least_float32(scores)[..., None], 0.0) - beta * kl
