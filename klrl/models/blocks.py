"""The modules of the decoder, described in Flax NNX.

Shapes: B rows, S tokens, D width, K key/value heads, H head width.

Sources: H. Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), section
2.2 for the block; N. Shazeer, "GLU Variants Improve Transformer" (2020) for the gated MLP; J.
Ainslie et al., "GQA" (2023) for the shared key/value heads; A. Radford et al., "Language Models are
Unsupervised Multitask Learners" (2019) for learned positions and the plain MLP; S. Black et al.,
"GPT-NeoX-20B" (2022) for the parallel residual; I. Beltagy et al., "Longformer" (2020) for windows;
Gemma Team, "Gemma 2" (2024) for soft caps and for norms on both sides, "Gemma 3" (2025) for norms
of queries and keys. `rotations.py` has those of the rotation.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from klrl.devices import parallel
from klrl.models import attention, kernel
from klrl.models.heads import Head
from klrl.models.rotations import Rotation, rotate


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What can differ from layer to layer.

  rotation: that of queries and keys; None leaves them as they are.
  window: a token attends to itself and the `window - 1` real tokens before it; 0 is no limit.
  """

  rotation: Rotation | None = dataclasses.field(default_factory=Rotation)
  window: int = 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The static shape of a decoder, and which of a list of independent features it has.

  Activations are computed in `dtype`, and fresh parameters are stored in `param_dtype`. `max_len`
  bounds the tokens of prompt and completion together. If `num_tokens` > 0, only the first
  `num_tokens` of the `vocab_size` rows are tokens: the others fill the matrix up and are never
  predicted. `lora_rank` > 0 gives every linear map of the layers an adapter (see `AdaptedLinear`).

  * `kinds` says which kinds of layers there are, and `kind_of_layer` which each layer is, by its
    place in `kinds`; () is the first for all. What rotations turn is equally wide in all kinds.
  * `norm`: "rms" divides by the root mean square, "rms_plus_1" does so and multiplies by 1 + its
    parameter, "layer" subtracts the mean too and has a bias. It stands before attention and MLP
    (`norm_place` "pre"), behind them ("post"), or on both sides ("both").
  * `qk_norm`: queries and keys are normed, each head by itself ("head") or the whole projection
    ("all").
  * `attention_bias` is one of queries, keys and values, `output_bias` one behind attention, and
    `mlp_bias` those of the MLP.
  * `attention_scale` multiplies the attention's logits (None: 1 / sqrt(`head_dim`)), and
    `attention_cap` bounds them softly, by cap * tanh(logits / cap); 0 is no bound. `logits_cap`
    bounds those of the next token, which `logits_divisor` divides before.
  * `activation` is that of the MLP; a `gated_mlp` multiplies it by a second linear map.
  * `embedding_scale` multiplies the embeddings, and `residual_scale` what attention and MLP add.
  * `parallel_residual`: the MLP reads what attention reads, not what attention has changed.
  * `learned_positions` adds one of `max_len` vectors to each embedding.
  * `head` is that of a reward model that was read, see `heads.py`; None is the plain one.

  A model that was read from files remembers their `model_type`, a row of `families.py`, and the
  text of their config.json, `hf_config`; both are "" for a fresh model, and no computation reads
  them.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  max_len: int
  kinds: tuple[LayerKind, ...] = (LayerKind(),)
  kind_of_layer: tuple[int, ...] = ()
  norm: Literal["rms", "rms_plus_1", "layer"] = "rms"
  norm_place: Literal["pre", "post", "both"] = "pre"
  norm_eps: float = 1e-5
  qk_norm: Literal["none", "head", "all"] = "none"
  attention_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  attention_scale: float | None = None
  attention_cap: float = 0.0
  logits_cap: float = 0.0
  logits_divisor: float = 1.0
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  gated_mlp: bool = True
  embedding_scale: float = 1.0
  residual_scale: float = 1.0
  parallel_residual: bool = False
  learned_positions: bool = False
  tie_embeddings: bool = True
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  lora_rank: int = 0
  num_tokens: int = 0
  head: Head | None = None
  model_type: str = dataclasses.field(default="", compare=False)
  hf_config: str = dataclasses.field(default="", compare=False, repr=False)

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}."
      )
    rotated = {kind.rotation.rotated_dim(self.head_dim) for kind in self.kinds if kind.rotation}
    if any(dim % 2 or not dim for dim in rotated):
      raise ValueError(
        f"head_dim={self.head_dim} must be even: the rotation works on pairs, here of"
        f" {sorted(rotated)} elements."
      )
    if len(rotated) > 1:
      raise ValueError(f"The layers' rotations turn {sorted(rotated)} elements; it must be one.")
    if self.kind_of_layer and len(self.kind_of_layer) != self.num_layers:
      raise ValueError(
        f"kind_of_layer has {len(self.kind_of_layer)} entries, not num_layers={self.num_layers}."
      )
    if self.num_tokens > self.vocab_size:
      raise ValueError(f"num_tokens={self.num_tokens} exceeds vocab_size={self.vocab_size}.")
    if self.lora_rank < 0:
      raise ValueError(f"lora_rank={self.lora_rank} must not be negative; 0 is no adapters.")

  def index_of_kind(self, layer: int) -> int:
    """Returns the place in `kinds` of a layer's kind."""
    return self.kind_of_layer[layer] if self.kind_of_layer else 0

  @property
  def short_len(self) -> int:
    """The longest row for which a rotation with long divisors uses the short ones; 0: no such."""
    return max((k.rotation.short_len for k in self.kinds if k.rotation), default=0)


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
    def product(rows):
      return nnx.Linear.__call__(self, rows) + self.scale * self.lora(rows)

    return _of_rows(product, x)


class PlainLinear(nnx.Linear):
  """`x W + b` for all tokens of all rows at once.

  The gradient of W is then the product of two matrices. With more axes JAX's own rule transposes
  what flows back, and the gradient of a body took half as long again on 2 CPU cores.
  """

  def __call__(self, x):
    return _of_rows(super().__call__, x)


def _of_rows(product, x):
  rows = parallel.rows_at_weights(x.reshape(-1, x.shape[-1]))
  return parallel.rows_at_weights(product(rows)).reshape(*x.shape[:-1], -1)


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
  return PlainLinear(fan_in, fan_out, rngs=rngs, **options)


class PlusOneRMSNorm(nnx.RMSNorm):
  """RMS norm whose factor is 1 + its parameter, in at least float32 (Gemma)."""

  def __call__(self, x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
    factor = 1 + self.scale[...].astype(wide.dtype)
    return (normed * factor.reshape((1,) * (x.ndim - 1) + factor.shape)).astype(self.dtype)


def _norm(config, rngs, width=None):
  options = {
    "epsilon": config.norm_eps,
    "dtype": config.dtype,
    "param_dtype": config.param_dtype,
    "rngs": rngs,
  }
  if config.norm == "layer":
    # The faster variance, a difference of two large numbers, loses digits where the mean is large.
    return nnx.LayerNorm(width or config.width, use_fast_variance=False, **options)
  if config.norm == "rms_plus_1":
    options["scale_init"] = nnx.initializers.zeros_init()
    return PlusOneRMSNorm(width or config.width, **options)
  return nnx.RMSNorm(width or config.width, **options)


class Attention(nnx.Module):
  """Grouped-query attention."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    query_dim = config.num_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim
    bias = config.attention_bias
    self.query = _linear(config, config.width, query_dim, rngs, use_bias=bias)
    self.key = _linear(config, config.width, kv_dim, rngs, use_bias=bias)
    self.value = _linear(config, config.width, kv_dim, rngs, use_bias=bias)
    self.output = _linear(
      config, query_dim, config.width, rngs, use_bias=config.output_bias, residual=True
    )
    if config.qk_norm != "none":
      by_head = config.qk_norm == "head"
      self.query_norm = _norm(config, rngs, config.head_dim if by_head else query_dim)
      self.key_norm = _norm(config, rngs, config.head_dim if by_head else kv_dim)
    self.qk_norm, self.head_dim = config.qk_norm, config.head_dim
    scale = config.attention_scale
    self.scale = config.head_dim**-0.5 if scale is None else scale
    self.cap = config.attention_cap

  def __call__(self, x, rotation, seen, store):
    def heads(y, norm=None):
      y = parallel.rows_apart(y)
      y = norm(y) if norm and self.qk_norm == "all" else y
      y = y.reshape(*y.shape[:2], -1, self.head_dim)
      return norm(y) if norm and self.qk_norm == "head" else y

    normed = self.qk_norm != "none"
    query = heads(self.query(x), self.query_norm if normed else None)
    key = heads(self.key(x), self.key_norm if normed else None)
    if rotation is not None:
      query, key = rotate(query, *rotation), rotate(key, *rotation)
    key, value = key.swapaxes(1, 2), heads(self.value(x)).swapaxes(1, 2)
    key, value = store((key, value))
    attend = kernel.attend if isinstance(seen, kernel.Places) else attention.attend
    y = attend(query, key, value, seen, scale=self.scale, cap=self.cap)
    return self.output(y), (key, value)


_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nnx.Module):
  """Two linear maps with an activation between them, which a third can gate."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    bias = config.mlp_bias
    if config.gated_mlp:
      self.gate = _linear(config, config.width, config.mlp_dim, rngs, use_bias=bias)
    self.up = _linear(config, config.width, config.mlp_dim, rngs, use_bias=bias)
    self.down = _linear(config, config.mlp_dim, config.width, rngs, use_bias=bias, residual=True)
    self.gated, self.activation = config.gated_mlp, config.activation

  def __call__(self, x):
    activation = _ACTIVATIONS[self.activation]
    if self.gated:
      return self.down(activation(self.gate(x)) * self.up(x))
    return self.down(activation(self.up(x)))


class Block(nnx.Module):
  """One residual layer.

  `seen` says which keys each token sees, see `attention.attend` and `kernel.Places`. `store`
  receives the new (keys, values) [B, K, S, H] and returns those to attend over; the block returns
  them beside its output.
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    self.is_pre, self.is_post = config.norm_place != "post", config.norm_place != "pre"
    self.residual_scale, self.is_parallel = config.residual_scale, config.parallel_residual
    if self.is_pre:
      self.attention_norm = _norm(config, rngs)
    self.attention = Attention(config, rngs)
    if self.is_pre:
      self.mlp_norm = _norm(config, rngs)
    self.mlp = MLP(config, rngs)
    if self.is_post:
      self.attention_post_norm = _norm(config, rngs)
      self.mlp_post_norm = _norm(config, rngs)

  def __call__(self, x, rotation, seen, store=lambda keys_values: keys_values):
    y = self.attention_norm(x) if self.is_pre else x
    y, keys_values = self.attention(y, rotation, seen, store)
    y = self._added(self.attention_post_norm(y) if self.is_post else y)
    read = x if self.is_parallel else x + y
    z = self.mlp(self.mlp_norm(read) if self.is_pre else read)
    z = self._added(self.mlp_post_norm(z) if self.is_post else z)
    return (x + y if self.is_parallel else read) + z, keys_values

  def _added(self, y):
    return y if self.residual_scale == 1 else y * self.residual_scale


class Ends(nnx.Module):
  """What surrounds the layers: embeddings of tokens and positions, and final norm."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    options = {
      "dtype": config.dtype,
      "param_dtype": config.param_dtype,
      "embedding_init": INIT,
      "rngs": rngs,
    }
    self.embed = nnx.Embed(config.vocab_size, config.width, **options)
    self.final_norm = _norm(config, rngs)
    if config.learned_positions:
      self.positions = nnx.Embed(config.max_len, config.width, **options)
    self.scale, self.has_positions = config.embedding_scale, config.learned_positions

  def embedded(self, tokens, positions):
    """Returns what the first layer reads [B, S, D]; `positions` [B, S] of no token are -1."""
    x = self.embed(tokens)
    if self.scale != 1:
      # Rounded to the dtype of the activations, in which Gemma was trained: 55.5, not 55.4.
      x *= jnp.asarray(self.scale, x.dtype)
    return x + self.positions(jnp.maximum(positions, 0)) if self.has_positions else x
