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

from klrl.ops.logits import Unembedding, soft_cap, table_and_cap

# 32 MiB of float32. On 2 CPU cores the gradient of 4096 rows of 32000 took as many CPU-seconds with
# twice as much, and 7% more with half of it.
LOGITS_PER_CHUNK = 2**23

# The gradient of a table is added to in at most so many tiles, each of so many tokens or more, so
# that what a chunk adds is never held for the whole table.
_MOST_TILES, _FEWEST_TOKENS = 16, 2100


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
    chunk_size: the most rows of logits of a model that exist at a time; None takes 2**23 / V rows
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
    # Of three axes the compiler for TPUs sometimes copied all chunks for each of them.
    tuple(chunks(x).reshape(-1, num_chunks * x.shape[-1]) for x in hidden),
    # A tied table is the transpose of one that is stored by tokens: both transposes cancel out.
    tuple(table.T for table in tables),
    tuple(map(chunks, rows)),
    (jnp.asarray(temperature, accumulated), *coefficients),
  )
  return jax.tree.map(lambda x: unchunk_rows(x, num_rows).reshape(shape), outputs)


def chunk_rows(x: jax.Array, num_chunks: int) -> jax.Array:
  """Returns the rows of `x` [N, ...] as [rows, num_chunks, ...], zero-padded to a multiple.

  The rows of a chunk are `num_chunks` apart, so that each chunk takes an equal share of every
  device over which the rows are sharded, and no row moves to another place of the memory.
  """
  rows = math.ceil(x.shape[0] / num_chunks)
  x = jnp.pad(x, [(0, rows * num_chunks - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
  return x.reshape(rows, num_chunks, *x.shape[1:])


def unchunk_rows(x: jax.Array, num_rows: int) -> jax.Array:
  """Returns the first `num_rows` rows of `chunk_rows`' inverse."""
  return x.reshape(-1, *x.shape[2:])[:num_rows]


def num_chunks_of(num_rows: int, row_size: int, chunk_size: int | None) -> int:
  """Returns how many chunks of at most `chunk_size` rows hold `num_rows` rows of logits.

  `row_size` is the number of logits of a row; None makes chunks of `LOGITS_PER_CHUNK` of them.
  """
  if chunk_size is None:
    chunk_size = max(1, LOGITS_PER_CHUNK // row_size)
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size}: give a positive number of rows, or None.")
  return max(1, math.ceil(num_rows / chunk_size))


def _chunk(x, index):
  return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def _chunk_of_hidden(x, table, index):
  width = table.shape[1]
  return jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=1)


def _einsum(subscripts, x, y):
  """Returns a product in the inputs' dtype, accumulated in at least float32."""
  dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
  return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)


def _logits(hidden, table):
  return _einsum("cd,vd->cv", hidden, table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(fn, caps, hidden, tables, rows, coefficients):
  """Returns what `fn` does, a pytree of [C, K], from `hidden` [C, K D] of each model.

  The `tables` are [V, D], by tokens.
  """
  return _chunked_fwd(fn, caps, hidden, tables, rows, coefficients)[0]


def _chunked_fwd(fn, caps, hidden, tables, rows, coefficients):
  def chunk(index):
    own = tuple(_chunk_of_hidden(x, table, index) for x, table in zip(hidden, tables, strict=True))
    own_rows = jax.tree.map(lambda x: _chunk(x, index), rows)
    return _of_products(fn, caps, own_rows)(tuple(map(_logits, own, tables)), coefficients)

  num_chunks = hidden[0].shape[1] // tables[0].shape[1]
  outputs = jax.lax.map(chunk, jnp.arange(num_chunks))
  return jax.tree.map(jnp.transpose, outputs), (hidden, tables, rows, coefficients)


def _chunked_bwd(fn, caps, residuals, cotangents):
  hidden, tables, rows, coefficients = residuals

  def chunk(sums, index):
    d_hidden, d_tables, d_coefficients = sums
    own = tuple(_chunk_of_hidden(x, table, index) for x, table in zip(hidden, tables, strict=True))
    own_rows, own_cotangents = jax.tree.map(lambda x: _chunk(x, index), (rows, cotangents))
    products = tuple(map(_logits, own, tables))
    _, vjp = jax.vjp(_of_products(fn, caps, own_rows), products, coefficients)
    d_products, d_own = vjp(own_cotangents)
    dtypes = map(jnp.result_type, own, tables)
    d_products = [d.astype(dtype) for d, dtype in zip(d_products, dtypes, strict=True)]
    # Each gradient is a sum of its own, so that the compiler can leave out of the loop those that
    # nobody asks for, products included.
    d_hidden = tuple(
      jax.lax.dynamic_update_slice_in_dim(
        x, _einsum("cv,vd->cd", d, table).astype(x.dtype), index * table.shape[1], axis=1
      )
      for x, d, table in zip(d_hidden, d_products, tables, strict=True)
    )
    d_tables = tuple(map(_with_product, d_tables, d_products, own))
    return (d_hidden, d_tables, jax.tree.map(jnp.add, d_coefficients, d_own)), None

  zeros = (
    tuple(map(jnp.zeros_like, hidden)),
    tuple(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in tables),
    jax.tree.map(jnp.zeros_like, coefficients),
  )
  num_chunks = hidden[0].shape[1] // tables[0].shape[1]
  sums, _ = jax.lax.scan(chunk, zeros, jnp.arange(num_chunks))
  d_hidden, d_tables, d_coefficients = sums
  d_tables = tuple(d.astype(x.dtype) for d, x in zip(d_tables, tables, strict=True))
  return d_hidden, d_tables, None, d_coefficients


def _with_product(sums, d_products, hidden):
  """Returns `sums` [V, D] plus `d_products.T @ hidden`, tile after tile, each in its place."""

  def add(sums, start, width):
    of_tile = jax.lax.dynamic_slice_in_dim(d_products, start, width, axis=1)
    added = _einsum("cv,cd->vd", of_tile, hidden)
    added += jax.lax.dynamic_slice_in_dim(sums, start, width)
    return jax.lax.dynamic_update_slice_in_dim(sums, added, start, axis=0)

  vocab_size, num_tiles = len(sums), min(_MOST_TILES, len(sums) // _FEWEST_TOKENS)
  # Where devices have parts of the table, a tile would not be a part of each.
  if num_tiles < 2 or math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1:
    return add(sums, 0, vocab_size)
  # Tiles that are no loop would be multiplied all at once, and held until they are added.
  width = vocab_size // num_tiles
  sums = jax.lax.fori_loop(0, num_tiles, lambda i, sums: add(sums, i * width, width), sums)
  done = num_tiles * width
  return add(sums, done, vocab_size - done) if done < vocab_size else sums


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
