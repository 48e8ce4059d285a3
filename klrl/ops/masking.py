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


# One number may be computed in two ways in a compiled program, whose results are some roundings
# apart. In float32 it is 4.8e-7 of the size: 1000.7 and 1000.701 are two numbers.
_ROUNDINGS = 4


def within_rounding(spread: jax.Array, size: jax.Array) -> jax.Array:
  """Returns whether numbers of magnitude `size` that lie `spread` apart are equal but for rounding.

  Never so where `spread` is NaN or infinite: what is not a number is not made one.
  """
  eps = jnp.finfo(jnp.result_type(spread, size)).eps
  return jnp.isfinite(spread) & (spread <= _ROUNDINGS * eps * size)


def mean_and_deviations(
  x: jax.Array, mask: jax.Array | None = None, *, axis=None
) -> tuple[jax.Array, jax.Array]:
  """Returns (mean of `x` over real tokens along `axis`, which stays, and `x - mean` [...]).

  The deviations are zero in the padding, and exactly 0 where all numbers are equal up to rounding.
  The mean of equal numbers is rounded, so that `x - mean` is not: divided by its own size, or
  behind an optimizer that rescales gradients, that rounding would count as much as any difference.
  Nothing but the deviations may be divided by a deviation. Without a mask every number is real.
  """
  mask = jnp.ones(x.shape, bool) if mask is None else mask
  x = zero_padding(x, mask)
  stopped = jax.lax.stop_gradient(x)
  highest = stopped.max(axis, keepdims=True, where=mask, initial=-jnp.inf)
  lowest = stopped.min(axis, keepdims=True, where=mask, initial=jnp.inf)
  equal = within_rounding(highest - lowest, jnp.abs(stopped).max(axis, keepdims=True, initial=0.0))
  # A zero that is chosen, and not `x - x`: the compiler may round the two differently.
  shifted = jnp.where(mask & ~equal, x - highest, 0.0)
  count = mask.sum(axis, keepdims=True, dtype=x.dtype)
  mean = divide(shifted.sum(axis, keepdims=True), count)
  return jnp.where(count > 0, highest + mean, 0.0), zero_padding(shifted - mean, mask)


def deviation(x: jax.Array, *, axis=None, ddof: int = 0, keepdims: bool = False) -> jax.Array:
  """Returns the standard deviation of `x` along `axis`, divisor n - `ddof`.

  It is exactly 0, and its gradient too, where all numbers are equal up to rounding.
  """
  _, deviations = mean_and_deviations(x, axis=axis)
  count = x.size if axis is None else x.shape[axis]
  var = (deviations**2).sum(axis, keepdims=keepdims) / max(1, count - ddof)
  return jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1.0)), var)


def masked_var(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the population variance (divisor n) of `x` over all real tokens; 0 if none."""
  return masked_mean(mean_and_deviations(x, mask)[1] ** 2, mask)


def first_true_index(mask: jax.Array) -> jax.Array:
  """Returns [...] int32, the index of the first True of `mask` [..., T]; T where there is none."""
  chex.assert_type(mask, bool)
  found = jnp.argmax(mask, axis=-1).astype(jnp.int32)
  return jnp.where(mask.any(axis=-1), found, mask.shape[-1])
