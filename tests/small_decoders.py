"""Models for tests, whose programs compile fast."""

import types

import jax.numpy as jnp
import numpy as np

from klrl.models import DecoderConfig
from klrl.models.attention import Packed
from klrl.models.decoder import Policy, ScalarModel
from klrl.tasks import arithmetic


def arithmetic_decoder(*, num_heads: int, mlp_dim: int, max_len: int) -> DecoderConfig:
  """Returns a decoder of width 8 and one layer, over the vocabulary of the embedded task."""
  return DecoderConfig(
    vocab_size=arithmetic.make_tokenizer().tokenizer.get_vocab_size(),
    width=8,
    num_layers=1,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=8 // num_heads,
    mlp_dim=mlp_dim,
    max_len=max_len,
  )


def _embedded(params, tokens, mask):
  return jnp.where(mask[..., None], params["decoder"]["embedding"][tokens], 0.0)


def with_branches(fn):
  """Returns `fn(params, tokens, mask)` for rows with branches too, each computed by itself."""

  def of_rows(params, tokens, mask, segment_ids=None, fork=None):
    if fork is None:
      return fn(params, tokens, mask)
    num, start = fork.num_branches, fork.prefix_len

    def apart(x):
      before, branches = x[:, :start].repeat(num, axis=0), x[:, start:]
      return jnp.concatenate([before, branches.reshape(len(before), -1)], axis=1)

    y = fn(params, apart(tokens), apart(mask))
    branches = y[:, start:].reshape(len(tokens), -1, *y.shape[2:])
    return jnp.concatenate([y[::num, :start], branches], axis=1)

  return of_rows


@with_branches
def _hidden_of_texts(params, tokens, mask):
  return jnp.tanh(jnp.cumsum(_embedded(params, tokens, mask), axis=1))


def _hidden(params, tokens, mask, segment_ids=None, fork=None):
  if not isinstance(fork, Packed):
    return _hidden_of_texts(params, tokens, mask, segment_ids, fork)
  texts = fork.text[:, None]
  seen = fork.text[..., None] == texts
  if fork.prompt is not None:
    seen |= fork.prompt[..., None] == texts
  return jnp.tanh(jnp.tril(seen) @ _embedded(params, tokens, mask))


def _prefill(params, tokens, mask, row_len):
  del row_len
  total = _embedded(params, tokens, mask).sum(axis=1)
  return jnp.tanh(total), total


def _decode(params, tokens, t, prompts, cache):
  del t, prompts
  total = cache + params["decoder"]["embedding"][tokens]
  return jnp.tanh(total), total


# A policy that sees how often each token was there; its cache is the sum of the embeddings.
BAG = Policy(
  config=types.SimpleNamespace(max_len=64, short_len=0),
  init=None,
  hidden=_hidden,
  unembedding=lambda params: params["unembedding"],
  prefill=_prefill,
  unstack=lambda params: params,
  empty_cache=lambda totals, num_branches: jnp.repeat(totals, num_branches, axis=0),
  grow=lambda cache, num_slots: cache,
  decode=_decode,
)


def _head(params, hidden):
  return hidden @ params["head"]


def _values(params, tokens, mask, fork=None):
  return _head(params, _hidden(params, tokens, mask, fork=fork))


# What is not there adds nothing, so the last position has seen what the last real token has.
BAG_VALUE = ScalarModel(
  config=BAG.config,
  init=None,
  head=_head,
  values=_values,
  scores=lambda params, tokens, mask: _values(params, tokens, mask)[:, -1],
)


def bag_params(vocab_size: int, *, seed: int) -> dict:
  """Returns parameters of `BAG` with four numbers per token."""
  rng = np.random.default_rng(seed)
  embedding, unembedding = (rng.normal(size=shape) for shape in ((vocab_size, 4), (4, vocab_size)))
  return {"decoder": {"embedding": jnp.asarray(embedding)}, "unembedding": jnp.asarray(unembedding)}


def bag_value_params(vocab_size: int, *, seed: int) -> dict:
  """Returns parameters of `BAG_VALUE`, of the same size."""
  decoder = bag_params(vocab_size, seed=seed)["decoder"]
  return {"decoder": decoder, "head": jnp.asarray(np.random.default_rng(seed).normal(size=4))}
