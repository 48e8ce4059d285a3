"""Sums over the vocabulary at hidden states, without holding logits of [..., T, V].

Log-probs of tokens, entropies and divergences are functions of whole next-token distributions, so
each has one definition for distributions at hand, which `over_vocabulary` applies to those of
hidden states. It holds the logits of a chunk of rows at a time, and its backward pass computes them
once more. What is asked for together shares these products.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from klrl.ops.logits import Unembedding, matmul, soft_cap, table_and_cap

# 64 MiB of float32. On 2 CPU cores, 4096 rows of 32000, value and gradient took 11% longer with a
# quarter of it and 7% less with twice as much, in one run on a noisy machine.
LOGITS_PER_CHUNK = 2**24


def over_vocabulary(
  fn: Callable,
  models: Sequence[tuple[jax.Array, Unembedding]],
  rows: Sequence[jax.Array] = (),
  coefficients: Sequence[Any] = (),
  *,
  temperature: jax.Array | float = 1.0,
  chunk_size: int | None = None,
) -> Any:
  """Returns `fn(*log_probs, *rows, *coefficients)`, a pytree of [..., T], for all rows.

  `fn` sees the rows of a chunk: log_probs [C, V] of each model in at least float32, nats, and
  `rows` [C]. It returns arrays [C], of which each row depends on the same row of its arguments. It
  may take no array from around it that is traced; that is what `coefficients` are for.

  Matrix products are taken in the dtype of the inputs and accumulated in at least float32 (under
  `jax.default_matmul_precision`, as everywhere in JAX). Under `jax.jit` a gradient that is not
  used, such as that of a frozen reference, costs no product.

  >>> hidden, unembedding = jnp.ones((3, 4)), jnp.zeros((4, 8))
  >>> print(ops.over_vocabulary(lambda log_probs: log_probs.max(-1), [(hidden, unembedding)]))
  [-2.079 -2.079 -2.079]

  Args:
    fn: a function of whole distributions.
    models: (hidden states [..., T, D], unembedding [D, V] or a `CappedUnembedding`) of each; D may
      differ, and both carry gradient, accumulated in at least float32.
    rows: arrays [..., T] without gradient, such as tokens.
    coefficients: pytrees of scalars, may be traced; they carry gradient.
    temperature: scalar of all models, may be traced; carries gradient.
    chunk_size: the most rows of logits of a model that exist at a time; None takes 2**24 / V rows
      divided by the number of models. Where rows are sharded over devices, the rows of all devices
      count.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  hidden, unembeddings = zip(*models, strict=True)
  tables, caps = zip(*map(table_and_cap, unembeddings), strict=True)
  shape, vocab_size = hidden[0].shape[:-1], tables[0].shape[1]
  for x, table in zip(hidden, tables, strict=True):
    chex.assert_shape(x, (*shape, None))
    chex.assert_shape(table, (x.shape[-1], vocab_size))
  for row in rows:
    chex.assert_shape(row, shape)
  chex.assert_type([*hidden, *tables], float)
  num_rows = math.prod(shape)
  num_chunks = num_chunks_of(num_rows, len(hidden) * vocab_size, chunk_size)

  def chunks(x):
    return chunk_rows(x.reshape(num_rows, *x.shape[len(shape) :]), num_chunks)

  accumulated = jnp.promote_types(jnp.result_type(*hidden, *tables), jnp.float32)
  outputs = _chunked(
    fn,
    caps,
    tuple(map(chunks, hidden)),
    tables,
    tuple(map(chunks, rows)),
    (jnp.asarray(temperature, accumulated), *coefficients),
  )
  return jax.tree.map(lambda x: unchunk_rows(x, num_rows).reshape(shape), outputs)


def chunk_rows(x: jax.Array, num_chunks: int) -> jax.Array:
  """Returns the rows of `x` [N, ...] as [num_chunks, rows, ...], zero-padded to a multiple.

  The rows of a chunk are `num_chunks` apart, so that each chunk takes an equal share of every
  device over which the rows are sharded.
  """
  rows = math.ceil(x.shape[0] / num_chunks)
  x = jnp.pad(x, [(0, rows * num_chunks - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
  return x.reshape(rows, num_chunks, *x.shape[1:]).swapaxes(0, 1)


def unchunk_rows(x: jax.Array, num_rows: int) -> jax.Array:
  """Returns the first `num_rows` rows of `chunk_rows`' inverse."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:num_rows]


def num_chunks_of(num_rows: int, row_size: int, chunk_size: int | None) -> int:
  """Returns how many chunks of at most `chunk_size` rows hold `num_rows` rows of logits.

  `row_size` is the number of logits of a row; None makes chunks of `LOGITS_PER_CHUNK` of them.
  """
  if chunk_size is None:
    chunk_size = max(1, LOGITS_PER_CHUNK // row_size)
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size}: give a positive number of rows, or None.")
  return max(1, math.ceil(num_rows / chunk_size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(fn, caps, hidden, tables, rows, coefficients):
  """Returns what `fn` does, a pytree of [K, C], from `hidden` [K, C, D] of each model."""
  return _chunked_fwd(fn, caps, hidden, tables, rows, coefficients)[0]


def _chunked_fwd(fn, caps, hidden, tables, rows, coefficients):
  def chunk(arguments):
    hidden, rows = arguments
    return _of_products(fn, caps, rows)(tuple(map(matmul, hidden, tables)), coefficients)

  return jax.lax.map(chunk, (hidden, rows)), (hidden, tables, rows, coefficients)


def _chunked_bwd(fn, caps, residuals, cotangents):
  hidden, tables, rows, coefficients = residuals

  def chunk(sums, arguments):
    hidden, rows, cotangents = arguments
    products = tuple(map(matmul, hidden, tables))
    _, vjp = jax.vjp(_of_products(fn, caps, rows), products, coefficients)
    d_products, d_coefficients = vjp(cotangents)
    dtypes = map(jnp.result_type, hidden, tables)
    d_products = [d.astype(dtype) for d, dtype in zip(d_products, dtypes, strict=True)]
    d_tables = tuple(matmul(x.T, d) for x, d in zip(hidden, d_products, strict=True))
    # Each gradient is a sum of its own, so that the compiler can leave out of the loop those that
    # nobody asks for, products included.
    sums = jax.tree.map(jnp.add, sums, (d_tables, d_coefficients))
    triples = zip(d_products, tables, hidden, strict=True)
    return sums, tuple(matmul(d, table.T).astype(x.dtype) for d, table, x in triples)

  zeros = (
    tuple(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in tables),
    jax.tree.map(jnp.zeros_like, coefficients),
  )
  (d_tables, d_coefficients), d_hidden = jax.lax.scan(chunk, zeros, (hidden, rows, cotangents))
  d_tables = tuple(d.astype(x.dtype) for d, x in zip(d_tables, tables, strict=True))
  return d_hidden, d_tables, None, d_coefficients


def _of_products(fn, caps, rows):
  """Returns f(products [C, V] of each model, coefficients) that is `fn` of their distributions."""

  def f(products, coefficients):
    temperature, *others = coefficients
    scaled = [soft_cap(x, cap) / temperature for x, cap in zip(products, caps, strict=True)]
    # `jax.nn.log_softmax` took a fifth longer on a CPU, where it is fused with the product.
    log_probs = [x - jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in scaled]
    return fn(*log_probs, *rows, *others)

  return f


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
