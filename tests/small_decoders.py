"""Decoders for tests, whose programs compile fast."""

import jax.numpy as jnp
import numpy as np

from klrl.models import DecoderConfig
from klrl.models.decoder import Policy
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


def _bag_of_tokens(params, tokens, mask):
  embedded = jnp.where(mask[..., None], params["embedding"][tokens], 0.0)
  return jnp.tanh(jnp.cumsum(embedded, axis=1))


_UNUSED = dict.fromkeys(("config", "init", "prefill", "unstack", "decode", "grow"))
# A policy that sees how often each token was there, to be trained and not sampled from.
BAG = Policy(**_UNUSED, hidden=_bag_of_tokens, unembedding=lambda params: params["unembedding"])


def bag_params(vocab_size: int, *, seed: int) -> dict:
  """Returns parameters of `BAG` with four numbers per token."""
  rng = np.random.default_rng(seed)
  shapes = {"embedding": (vocab_size, 4), "unembedding": (4, vocab_size)}
  return {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
