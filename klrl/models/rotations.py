"""Rotary positions, and the published ways to stretch them to longer texts.

Sources: J. Su et al., "RoFormer" (2021), equation 34, in the pairing of Hugging Face (element i
with element i + R/2); S. Chen et al., "Extending Context Window of Large Language Models via
Positional Interpolation" (2023) for `linear`; B. Peng et al., "YaRN" (2023), sections 3.2 and 3.4;
Y. Ding et al., "LongRoPE" (2024); for `llama3`, "The Llama 3 Herd of Models" (2024) with its code.
The names of the settings are those of `rope_parameters` in a config.json.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotation:
  """How fast each pair of elements of a query or key turns with its position.

  The first R = int(share * head width) elements of a head turn, pair i by the angle
  `position * theta^(-2i/R) / divisors[i]`; () divides by nothing. All ways to stretch a rotation
  are such divisors. `amplitude` multiplies cosine and sine. Rows of more than `short_len` tokens
  are divided by `long_divisors`, if there are any.
  """

  theta: float = 10000.0
  share: float = 1.0
  divisors: tuple[float, ...] = ()
  amplitude: float = 1.0
  long_divisors: tuple[float, ...] = ()
  short_len: int = 0

  def rotated_dim(self, head_dim: int) -> int:
    """Returns R, how many elements of a head turn."""
    return int(head_dim * self.share)


def cos_sin(
  rotation: Rotation, positions: jax.Array, *, head_dim: int, dtype, row_len: int
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin) of positions [B, S], each [B, S, 1, R/2], at least float32.

  Angles reach thousands, so narrower numbers would not do. `row_len` is how many tokens the row can
  hold; it chooses between short and long divisors.
  """
  dtype, dim = jnp.promote_types(dtype, jnp.float32), rotation.rotated_dim(head_dim)
  exponents = jnp.arange(0, dim, 2, dtype=dtype) / dim
  frequencies = rotation.theta**-exponents
  divisors = rotation.divisors
  if rotation.long_divisors and row_len > rotation.short_len:
    divisors = rotation.long_divisors
  if divisors:
    frequencies /= jnp.array(divisors, dtype)
  angles = positions[..., None].astype(dtype) * frequencies[None, None]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  if rotation.amplitude == 1:
    return cos, sin
  return cos * rotation.amplitude, sin * rotation.amplitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Returns queries or keys [B, S, N, H], turned in their first R elements."""
  dim = 2 * cos.shape[-1]
  left, right = jnp.split(x[..., :dim], 2, axis=-1)
  turned = [left * cos - right * sin, right * cos + left * sin]
  rest = [x[..., dim:]] if dim < x.shape[-1] else []
  return jnp.concatenate([*turned, *rest], axis=-1).astype(x.dtype)


def llama3_divisors(
  theta: float,
  dim: int,
  *,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_max_position_embeddings: int,
) -> tuple[float, ...]:
  """Returns the divisors [dim/2] of Llama 3: slow pairs by `factor`, fast ones by 1."""
  turns = original_max_position_embeddings * _frequencies(theta, dim) / (2 * math.pi)
  kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
  kept = np.clip(kept, 0, 1)
  return tuple((1 / ((1 - kept) / factor + kept)).tolist())


def yarn_divisors(
  theta: float,
  dim: int,
  *,
  factor: float,
  original_max_position_embeddings: int,
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  truncate: bool = True,
) -> tuple[float, ...]:
  """Returns the divisors [dim/2] of YaRN: pairs that turn less than `beta_slow` times by `factor`.

  Those that turn more than `beta_fast` times are left alone; between them the weight is linear in
  the index of the pair.
  """

  def index_of(turns):
    return dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / 2 / log_theta

  log_theta = math.log(theta)
  low, high = index_of(beta_fast), index_of(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  stretched = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
  return tuple((1 / (stretched / factor + 1 - stretched)).tolist())


def yarn_amplitude(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
  """Returns YaRN's factor of cosine and sine, which sharpens the attention of long texts."""

  def of(scale):
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

  return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def longrope_amplitude(factor: float, original_max_position_embeddings: int) -> float:
  """Returns LongRoPE's factor of cosine and sine."""
  if factor <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))


def _frequencies(theta, dim):
  return theta ** (-np.arange(0, dim, 2) / dim)
