"""Masked reductions.

`mask` is bool and shaped like what it masks; True marks a real token. What stands in the padding,
NaN included, reaches neither value nor gradient: it is replaced before anything is computed from
it. Reductions that end up in a loss or a metric are kept as (sum, count) until `divide`.
"""

import chex
import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
  """Returns `x` in the wider of its own dtype and float32; float64 stays."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zero_padding(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns `x` [...] in at least float32, zero where `mask` [...] is False.

  Gradient flows to real tokens only.
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type(mask, bool)
  return jnp.where(mask, at_least_float32(x), 0.0)


def divide(total: jax.Array, count: jax.Array) -> jax.Array:
  """Returns `total / count`, and 0 where `count` is 0, in value and gradient."""
  empty = count == 0
  return jnp.where(empty, 0.0, total) / jnp.where(empty, 1, count)


def masked_sum_count(x: jax.Array, mask: jax.Array, axis=None) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of `x` over real tokens, their number), both floating, over `axis`."""
  x = zero_padding(x, mask)
  return x.sum(axis), mask.sum(axis, dtype=x.dtype)


def masked_mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Returns the mean of `x` over real tokens along `axis`; 0 where there are none."""
  return divide(*masked_sum_count(x, mask, axis))


def masked_var(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the population variance (divisor n) of `x` over all real tokens; 0 if none."""
  x = zero_padding(x, mask)
  return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def first_true_index(mask: jax.Array) -> jax.Array:
  """Returns [...] int32, the index of the first True of `mask` [..., T]; T where there is none."""
  chex.assert_type(mask, bool)
  found = jnp.argmax(mask, axis=-1).astype(jnp.int32)
  return jnp.where(mask.any(axis=-1), found, mask.shape[-1])
