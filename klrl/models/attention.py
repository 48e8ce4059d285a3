"""Attention as a few large products, over rows that may share their beginning.

Shapes: B rows, S queries, C keys, N query heads, K key/value heads, R = N / K heads that share one,
H head width. Sources: A. Vaswani et al., "Attention Is All You Need" (2017), equation 1; J. Ainslie
et al., "GQA" (2023) for the shared heads; J. Juravsky et al., "Hydragen: High-Throughput LLM
Inference with Shared Prefixes" (2024), section 3, for rows with branches; M. Rabe and C. Staats,
"Self-attention Does Not Need O(n^2) Memory" (2021), section 3, for long rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# A row of 4096 tokens with 32 heads has 2 GiB of logits, and a block of it a quarter of one.
QUERIES_PER_BLOCK = 512


class Fork(NamedTuple):
  """Rows [B, P + g T] that hold P tokens and then g branches of T, each of which continues them."""

  prefix_len: int  # P
  num_branches: int  # g


class Packed(NamedTuple):
  """What the tokens of rows [B, S] with several texts are of; some texts continue another one.

  A token sees what is before it in its row and of the text that it is of or that this continues.
  """

  text: Array  # [B, S] int32
  prompt: Array | None = None  # [B, S] int32, the text that is continued; None: none is


class Forked(NamedTuple):
  """What is true of pairs of tokens of a row with branches; of masks, which tokens see which."""

  prefix: Array  # [B, P, P], both in the prefix
  to_prefix: Array  # [B, g, T, P], from a branch to the prefix
  own: Array  # [B, g, T, T], both in one branch


class Continued(NamedTuple):
  """What is true of a decoding step: G prompts, each with g branches that get a token."""

  to_prompt: Array  # [G, 1, P], from the tokens of a prompt's branches to the prompt
  own: Array  # [1, 1, C], from a token to the slots of its branch


def attend(query, key, value, seen, *, scale: float, cap: float) -> Array:
  """Returns what each query reads, [B, S, N H]; gradient flows to queries, keys and values.

  Logits are at least float32. A query that sees nothing reads a finite mean.

  Args:
    query: [B, S, N, H]; heads n R to n R + R - 1 share the key/value head n.
    key: [B, K, C, H]; of rows that share prompts a pair, [G, K, P, H] and [G, K, g, C, H], G g = B.
    value: as `key`.
    seen: [B, S, C] bool, which keys each query sees; of rows with branches a `Forked`, and C = S;
      of a decoding step of rows that share prompts a `Continued`, and S = 1.
    scale: multiplies the logits.
    cap: bounds them softly, by cap * tanh(logits / cap); 0 is no bound.
  """
  shape = query.shape
  if isinstance(seen, Continued):
    (of_prompt, keys), (read_of_prompt, values) = key, value
    before = of_prompt, read_of_prompt, seen.to_prompt[:, None, None, None]
    own = keys, values, seen.own[:, None, None, None]
    num_prompts, num_heads, num_branches = keys.shape[:3]
    # [G, K, g, R, 1, H].
    query = query.reshape(num_prompts, num_branches, 1, num_heads, -1, shape[3])
    y = _read(query.transpose(0, 3, 1, 4, 2, 5), [before, own], scale, cap)
    return y.transpose(0, 2, 4, 1, 3, 5).reshape(*shape[:2], -1)
  # [B, K, R, S, H]: the axes that queries and keys share come first.
  query = query.reshape(*shape[:2], key.shape[1], -1, shape[3]).transpose(0, 2, 3, 1, 4)
  if isinstance(seen, Forked):
    prefix_len, num_branches = seen.prefix.shape[-1], seen.own.shape[1]

    def parted(x):
      """Returns [..., P, H] and [..., g, T, H]."""
      branches = x[..., prefix_len:, :]
      branches = branches.reshape(*x.shape[:-2], num_branches, -1, x.shape[-1])
      return x[..., :prefix_len, :], branches

    (query, queries), (key, keys), (value, values) = map(parted, (query, key, value))
    before = key, value, seen.to_prefix[:, None, :, None]
    own = keys, values, seen.own[:, None, :, None]
    of_branches = _read(queries.swapaxes(2, 3), [before, own], scale, cap).swapaxes(2, 3)
    of_branches = of_branches.reshape(*of_branches.shape[:3], -1, shape[3])
    of_prefix = _read(query, [(key, value, seen.prefix[:, None, None])], scale, cap)
    y = jnp.concatenate([of_prefix, of_branches], axis=-2)
  else:
    y = _read(query, [(key, value, seen[:, None, None])], scale, cap)
  return y.transpose(0, 3, 1, 2, 4).reshape(*shape[:2], -1)


def _read(query, sources, scale, cap):
  """Returns the mean of all values of `sources`, by one softmax over all of their keys.

  `query` is [..., S, H]. A source is (keys, values, mask): the leading axes of its keys are the
  first of the query's, and all other queries are rows of one product with these keys. Long rows are
  read in blocks of queries, whose logits the backward pass computes once more.
  """
  if query.shape[-2] <= QUERIES_PER_BLOCK:
    return _read_block(query, sources, scale, cap)
  num_queries = query.shape[-2]
  num_blocks = -(-num_queries // QUERIES_PER_BLOCK)
  missing = num_blocks * QUERIES_PER_BLOCK - num_queries

  def blocks(x):
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, missing), (0, 0)])
    x = x.reshape(*x.shape[:-2], num_blocks, QUERIES_PER_BLOCK, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)

  @jax.checkpoint
  def block(arguments):
    query, masks = arguments
    masked = [(*of_keys, mask) for (*of_keys, _), mask in zip(sources, masks, strict=True)]
    return _read_block(query, masked, scale, cap)

  y = jax.lax.map(block, (blocks(query), [blocks(mask) for *_, mask in sources]))
  y = jnp.moveaxis(y, 0, -3)
  return y.reshape(*y.shape[:-3], -1, y.shape[-1])[..., :num_queries, :]


def _read_block(query, sources, scale, cap):
  """Returns `_read` of queries whose logits are held at once."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)

  def product(x, y):
    rows = x.reshape(*y.shape[:-2], -1, x.shape[-1])
    return jnp.matmul(rows, y, preferred_element_type=dtype).reshape(*x.shape[:-1], -1)

  def logits_of(keys, mask):
    logits = product(query, keys.swapaxes(-1, -2)) * scale
    if cap:
      logits = cap * jnp.tanh(logits / cap)
    return jnp.where(mask, logits, -0.7 * jnp.finfo(dtype).max)

  logits = [logits_of(keys, mask) for keys, _, mask in sources]
  tops = [jax.lax.stop_gradient(x).max(axis=-1, keepdims=True) for x in logits]
  top = jnp.maximum(*tops) if len(tops) > 1 else tops[0]
  weights = [jnp.exp(x - top) for x in logits]
  total = sum(x.sum(axis=-1, keepdims=True) for x in weights)
  pairs = zip(weights, sources, strict=True)
  y = sum(product(x.astype(values.dtype), values) for x, (_, values, _) in pairs)
  return (y / total).astype(query.dtype)
