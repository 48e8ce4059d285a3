"""The uniform policy, which as a reference turns KL-regularised RL into maximum-entropy RL."""

import jax.numpy as jnp

from klrl.models.blocks import DecoderConfig
from klrl.models.decoder import Policy


def uniform_policy(vocab_size: int, max_len: int) -> Policy:
  """Returns a policy whose next token is uniform over the vocabulary, whatever came before.

  The params are {}; the hidden state is a single zero, the unembedding [1, V] is zeros, and the
  cache is empty. KL(pi || uniform) = log V - entropy(pi) at each token, so E[score] - beta *
  KL(pi || uniform) is E[score] + beta * entropy(pi) minus beta * log V for each token. This is the
  objective of maximum-entropy RL up to the constant, which is a cost of length if lengths differ.
  """
  config = DecoderConfig(
    vocab_size=vocab_size,
    width=1,
    num_layers=0,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=1,
    max_len=max_len,
  )

  def zero(shape):
    return jnp.zeros((*shape, 1), config.dtype)

  def prefill(params, tokens, mask, row_len):
    return zero(tokens.shape[:1]), ()

  def decode(params, tokens, t, prompts, cache):
    return zero(tokens.shape), cache

  return Policy(
    config,
    init=lambda key: {},
    hidden=lambda params, tokens, mask, segment_ids=None, fork=None: zero(tokens.shape),
    unembedding=lambda params: jnp.zeros((1, vocab_size), config.dtype),
    prefill=prefill,
    unstack=lambda params: params,
    empty_cache=lambda prompts, num_branches: (),
    grow=lambda cache, num_slots: cache,
    decode=decode,
  )
