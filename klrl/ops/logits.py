"""Logits of hidden states, a language model's last matrix product, with a soft bound or none."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CappedUnembedding:
  """A table [D, V] with a soft bound: `hidden @ it` is `cap * tanh(hidden @ table / cap)`.

  Every `*_from_hidden` takes it in place of an array, and nothing else does: it is no array, so
  whatever forgets the cap fails. Gradient flows to `table`. Source: Gemma Team, "Gemma 2" (2024),
  section 2, "Logit soft-capping".

  >>> unembedding = ops.CappedUnembedding(jnp.array([[1.0, 100.0]]), cap=30.0)
  >>> print(jnp.ones((1, 1)) @ unembedding)
  [[ 1.    29.924]]
  """

  table: jax.Array
  cap: float = dataclasses.field(metadata={"static": True})
  __array_ufunc__ = None  # NumPy's @ then asks for `__rmatmul__`.

  def __rmatmul__(self, hidden) -> jax.Array:
    """Returns logits [..., V] of hidden states [..., D]."""
    return logits_of(hidden, self)


# What a language model's hidden states are multiplied by.
Unembedding = jax.Array | CappedUnembedding


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns `x @ y`, multiplied in the inputs' dtype and accumulated in at least float32."""
  dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
  return jnp.matmul(x, y, preferred_element_type=dtype)


def table_and_cap(unembedding: Unembedding) -> tuple[jax.Array, float]:
  """Returns the table [D, V] of an unembedding and its cap; 0 is none."""
  if isinstance(unembedding, CappedUnembedding):
    return unembedding.table, unembedding.cap
  return unembedding, 0.0


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
  """Returns `cap * tanh(logits / cap)`, and `logits` where the cap is 0."""
  return cap * jnp.tanh(logits / cap) if cap else logits


def logits_of(hidden: jax.Array, unembedding: Unembedding) -> jax.Array:
  """Returns logits [..., V] of hidden states [..., D], in at least float32; gradient flows to both.

  >>> print(ops.logits_of(jnp.ones((1, 1)), jnp.array([[1.0, 100.0]])))
  [[  1. 100.]]
  """
  table, cap = table_and_cap(unembedding)
  return soft_cap(matmul(hidden, table), cap)
