"""The modules of the decoder (Llama layout), described in Flax NNX.

Shapes: B rows, S tokens, D width, K key/value heads, H head width.

Sources: H. Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), section
2.2 for the block; J. Su et al., "RoFormer" (2021), equation 34 for the rotation, in the pairing of
Hugging Face (element i with element i + H/2); N. Shazeer, "GLU Variants Improve Transformer" (2020)
for the gated MLP; J. Ainslie et al., "GQA" (2023) for the shared key/value heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The static shape of a decoder.

  Activations are computed in `dtype`, and fresh parameters are stored in `param_dtype`.
  `attention_bias` adds a bias to queries, keys and values (Qwen2). `max_len` bounds the tokens of
  prompt and completion together. If `num_tokens` > 0, only the first `num_tokens` of the
  `vocab_size` rows are tokens: the others fill the matrix up and are never predicted.
  `lora_rank` > 0 gives every linear map of the layers an adapter (see `AdaptedLinear`). A model
  that was read from files remembers their `model_type`, a row of `families.py`, and the text of
  their config.json, `hf_config`; both are "" for a fresh model, and no computation reads them.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  max_len: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  attention_bias: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False
  lora_rank: int = 0
  num_tokens: int = 0
  model_type: str = dataclasses.field(default="", compare=False)
  hf_config: str = dataclasses.field(default="", compare=False, repr=False)

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: the rotation works on pairs.")
    if self.num_tokens > self.vocab_size:
      raise ValueError(f"num_tokens={self.num_tokens} exceeds vocab_size={self.vocab_size}.")
    if self.lora_rank < 0:
      raise ValueError(f"lora_rank={self.lora_rank} must not be negative; 0 is no adapters.")


INIT = nnx.initializers.normal(0.02)

# This is no setting: changing alpha is about the same as changing the learning rate (Hu et al.,
# 2021, section 4.1).
LORA_ALPHA = 16.0


class AdaptedLinear(nnx.LoRALinear):
  """`x W + (LORA_ALPHA / rank) * (x A) B`: a linear map and its low-rank adapter.

  A is normal, so that x A is about as large as x; B starts at zero, so a fresh adapter adds nothing
  (Edward Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3).
  """

  def __init__(self, fan_in, fan_out, rngs, *, rank, **options):
    super().__init__(
      fan_in,
      fan_out,
      lora_rank=rank,
      lora_dtype=options["dtype"],
      lora_param_dtype=options["param_dtype"],
      a_initializer=nnx.initializers.normal(fan_in**-0.5),
      rngs=rngs,
      **options,
    )
    self.scale = LORA_ALPHA / rank

  def __call__(self, x):
    # Flax's own sum has no factor.
    return nnx.Linear.__call__(self, x) + self.scale * self.lora(x)


def _linear(config, fan_in, fan_out, rngs, *, use_bias=False, residual=False):
  # Each layer adds two outputs to the residual stream; the scale keeps the sum's size independent
  # of depth (A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, 2.3).
  std = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
  options = {
    "use_bias": use_bias,
    "dtype": config.dtype,
    "param_dtype": config.param_dtype,
    "kernel_init": nnx.initializers.normal(std),
  }
  if config.lora_rank:
    return AdaptedLinear(fan_in, fan_out, rngs, rank=config.lora_rank, **options)
  return nnx.Linear(fan_in, fan_out, rngs=rngs, **options)


def _norm(config, rngs):
  return nnx.RMSNorm(
    config.width,
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Rotary grouped-query attention."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    query_dim = config.num_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim
    bias = config.attention_bias
    self.query = _linear(config, config.width, query_dim, rngs, use_bias=bias)
    self.key = _linear(config, config.width, kv_dim, rngs, use_bias=bias)
    self.value = _linear(config, config.width, kv_dim, rngs, use_bias=bias)
    self.output = _linear(config, query_dim, config.width, rngs, residual=True)
    self.head_dim = config.head_dim

  def __call__(self, x, rotation, mask, store):
    def heads(y):
      return y.reshape(*y.shape[:2], -1, self.head_dim)

    query = _rotate(heads(self.query(x)), rotation)
    key = _rotate(heads(self.key(x)), rotation).swapaxes(1, 2)
    value = heads(self.value(x)).swapaxes(1, 2)
    key, value = store((key, value))
    y = jax.nn.dot_product_attention(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask=mask)
    return self.output(y.reshape(*y.shape[:2], -1)), (key, value)


class MLP(nnx.Module):
  """Gated MLP with SiLU."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.gate = _linear(config, config.width, config.mlp_dim, rngs)
    self.up = _linear(config, config.width, config.mlp_dim, rngs)
    self.down = _linear(config, config.mlp_dim, config.width, rngs, residual=True)

  def __call__(self, x):
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """One pre-norm residual layer.

  `store` receives the new (keys, values) [B, K, S, H] and returns those to attend over; the block
  returns them beside its output.
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, rngs)
    self.attention = Attention(config, rngs)
    self.mlp_norm = _norm(config, rngs)
    self.mlp = MLP(config, rngs)

  def __call__(self, x, rotation, mask, store=lambda keys_values: keys_values):
    y, keys_values = self.attention(self.attention_norm(x), rotation, mask, store)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), keys_values


class Ends(nnx.Module):
  """What surrounds the layers: embedding and final norm."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.embed = nnx.Embed(
      config.vocab_size,
      config.width,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      embedding_init=INIT,
      rngs=rngs,
    )
    self.final_norm = _norm(config, rngs)


def rotation_of(positions, config):
  """Returns (cos, sin), each [B, S, 1, H/2], at least float32: angles reach thousands."""
  dtype = jnp.promote_types(config.dtype, jnp.float32)
  exponents = jnp.arange(0, config.head_dim, 2, dtype=dtype) / config.head_dim
  angles = positions[..., None].astype(dtype) * (config.rope_theta**-exponents)[None, None]
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _rotate(x, rotation):
  cos, sin = rotation
  left, right = jnp.split(x, 2, axis=-1)
  rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
  return rotated.astype(x.dtype)
