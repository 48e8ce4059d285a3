"""Masked reductions.

`mask` is bool and has the shape of what it masks; True marks a real token. Of a completion that is
one which the policy chose, so that False is the padding, or a token that was given to it. What
stands there, NaN included, reaches neither value nor gradient, since it is replaced before anything
is computed from it. Reductions for a loss or a metric are kept as (sum, count) until `divide`.
"""

import chex
import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
  """Returns `x` in the wider of its own dtype and float32; float64 stays.

  >>> print(ops.at_least_float32(jnp.ones(1, jnp.bfloat16)).dtype)
  float32
  """
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zero_padding(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns `x` [...] in at least float32, zero where `mask` [...] is False.

  Gradient flows to real tokens only.

  >>> print(ops.zero_padding(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
  [1. 0.]
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type(mask, bool)
  return jnp.where(mask, at_least_float32(x), 0.0)


def divide(total: jax.Array, count: jax.Array) -> jax.Array:
  """Returns `total / count`, and 0 where `count` is 0, in value and gradient.

  >>> print(ops.divide(jnp.array([6.0, 0.0]), jnp.array([4.0, 0.0])))
  [1.5 0. ]
  """
  empty = count == 0
  return jnp.where(empty, 0.0, total) / jnp.where(empty, 1, count)


def masked_sum_count(
  x: jax.Array, mask: jax.Array, axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (sum of `x` over real tokens along `axis`, their number), both floating.

  >>> x, mask = jnp.array([1.0, 2.0, 99.0]), jnp.array([True, True, False])
  >>> total, count = ops.masked_sum_count(x, mask)
  >>> print(total, count)
  3.0 2.0
  """
  x = zero_padding(x, mask)
  return x.sum(axis), mask.sum(axis, dtype=x.dtype)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
  """Returns the mean of `x` over real tokens along `axis`; 0 where there are none.

  >>> x, mask = jnp.array([[1.0, 2.0], [4.0, 99.0]]), jnp.array([[True, True], [True, False]])
  >>> print(ops.masked_mean(x, mask, axis=-1))
  [1.5 4. ]
  """
  return divide(*masked_sum_count(x, mask, axis))


# A compiled program may compute one number in two ways, whose results are some roundings apart. In
# float32 four roundings are 4.8e-7 of the size, so 1000.7 and 1000.701 are two numbers.
_ROUNDINGS = 4


def within_rounding(spread: jax.Array, size: jax.Array) -> jax.Array:
  """Returns bool, whether numbers of magnitude `size` and `spread` apart are equal up to rounding.

  Where `spread` is NaN or infinite they are not equal, so that NaN is not taken for a number.

  >>> print(ops.within_rounding(jnp.array([1e-4, 1e-3]), jnp.float32(1000.7)))
  [ True False]
  """
  eps = jnp.finfo(jnp.result_type(spread, size)).eps
  return jnp.isfinite(spread) & (spread <= _ROUNDINGS * eps * size)


def mean_and_deviations(
  x: jax.Array, mask: jax.Array | None = None, *, axis: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (mean of `x` over real tokens along `axis`, `x - mean` [...]).

  The axis of the mean stays, with size 1. The deviations are zero in the padding, and exactly 0
  where all numbers are equal up to rounding: the mean of equal numbers is rounded, and `x - mean`
  would be a rounding that counts as much as any difference once it is divided by its own size, or
  rescaled by an optimizer. So divide no other difference by a standard deviation. Without a mask
  every number is real.

  >>> x = jnp.array([0.1, 0.1, 0.1])
  >>> print((x - x.mean() == 0).all(), (ops.mean_and_deviations(x)[1] == 0).all())
  False True
  """
  mask = jnp.ones(x.shape, bool) if mask is None else mask
  x = zero_padding(x, mask)
  stopped = jax.lax.stop_gradient(x)
  highest = stopped.max(axis, keepdims=True, where=mask, initial=-jnp.inf)
  lowest = stopped.min(axis, keepdims=True, where=mask, initial=jnp.inf)
  equal = within_rounding(highest - lowest, jnp.abs(stopped).max(axis, keepdims=True, initial=0.0))
  # The zero is selected. The compiler may round the two sides of `x - x` differently.
  shifted = jnp.where(mask & ~equal, x - highest, 0.0)
  count = mask.sum(axis, keepdims=True, dtype=x.dtype)
  mean = divide(shifted.sum(axis, keepdims=True), count)
  return jnp.where(count > 0, highest + mean, 0.0), zero_padding(shifted - mean, mask)


def deviation(
  x: jax.Array,
  mask: jax.Array | None = None,
  *,
  axis: int | None = None,
  ddof: int = 0,
  keepdims: bool = False,
) -> jax.Array:
  """Returns the standard deviation of `x` over real tokens along `axis`, with divisor n - `ddof`.

  Value and gradient are exactly 0 where all numbers are equal up to rounding. Without a mask every
  number is real.

  >>> print(ops.deviation(jnp.array([1.0, 3.0])), ops.deviation(jnp.array([0.1, 0.1, 0.1])))
  1.0 0.0
  """
  _, deviations = mean_and_deviations(x, mask, axis=axis)
  if mask is None:
    count = x.size if axis is None else x.shape[axis]
  else:
    count = mask.sum(axis, keepdims=keepdims)
  var = (deviations**2).sum(axis, keepdims=keepdims) / jnp.maximum(1, count - ddof)
  return jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1.0)), var)


def masked_var(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the population variance (divisor n) of `x` over all real tokens; 0 if there are none.

  >>> print(ops.masked_var(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False])))
  1.0
  """
  return masked_mean(mean_and_deviations(x, mask)[1] ** 2, mask)


def first_true_index(mask: jax.Array) -> jax.Array:
  """Returns [...] int32, the index of the first True of `mask` [..., T]; T where there is none.

  >>> print(ops.first_true_index(jnp.array([[False, True, True], [False, False, False]])))
  [1 3]
  """
  chex.assert_type(mask, bool)
  found = jnp.argmax(mask, axis=-1).astype(jnp.int32)
  return jnp.where(mask.any(axis=-1), found, mask.shape[-1])


def until_last(mask: jax.Array) -> jax.Array:
  """Returns [..., T] bool, True from the start to the last True of `mask` [..., T].

  >>> print(ops.until_last(jnp.array([[False, True, False, True, False], [False] * 5])))
  [[ True  True  True  True False]
   [False False False False False]]
  """
  chex.assert_type(mask, bool)
  return jax.lax.cummax(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True) > 0


def at_next(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns [..., T] `x` at the next real token after each place; 0 where none follows.

  >>> x, mask = jnp.array([1.0, 2.0, 99.0, 4.0]), jnp.array([True, True, False, True])
  >>> print(ops.at_next(x, mask))
  [2. 4. 4. 0.]
  """
  length = mask.shape[-1]
  here = jnp.where(mask, jnp.arange(length), length)
  later = jax.lax.cummin(here, axis=mask.ndim - 1, reverse=True)[..., 1:]
  later = jnp.concatenate([later, jnp.full_like(here[..., :1], length)], axis=-1)
  ended = jnp.concatenate([zero_padding(x, mask), jnp.zeros_like(x[..., :1])], axis=-1)
  return jnp.take_along_axis(ended, later, axis=-1)
