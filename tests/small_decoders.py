"""Decoders for tests, whose programs compile fast."""

from klrl.models import DecoderConfig
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
