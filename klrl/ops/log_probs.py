"""Log-probabilities of the tokens taken, and entropies, in nats per token.

One definition, with scaled = logits / temperature:

    log_prob = scaled[token] - logsumexp(scaled)
    entropy  = logsumexp(scaled) - sum_v softmax(scaled)_v * scaled_v

and two back-ends. The first reads `logits [..., T, V]`. The second (`*_from_hidden`) reads
`hidden [..., T, D]` and `unembedding [D, V]`, an array or a `CappedUnembedding`, and holds the
logits of `chunk_size` rows at a time: the forward pass keeps the log-sum-exp of each row, and the
backward pass computes the logits of each chunk once more. Matrix products are taken in the dtype of
the inputs and accumulated in at least float32 (under `jax.default_matmul_precision`, as everywhere
in JAX).

There is no mask here: `tokens` must be valid ids in the padding too, and the caller masks.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp

from klrl.ops.masking import at_least_float32

# 64 MiB of float32. On 2 CPU cores, 4096 rows of 32000, value and gradient took 11% longer with a
# quarter of it and 7% less with twice as much, in one run on a noisy machine.
LOGITS_PER_CHUNK = 2**24


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


def vocab_log_probs(logits: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
  """Returns log softmax(logits / temperature) [..., V], nats.

  A logit of -inf stays -inf and sends no gradient anywhere, `temperature` included.

  >>> logits = jnp.log(jnp.array([0.8, 0.2]))
  >>> print(jnp.exp(ops.vocab_log_probs(logits)))
  [0.8 0.2]
  >>> print(jnp.exp(ops.vocab_log_probs(logits, temperature=0.5)))
  [0.941 0.059]
  """
  logits = at_least_float32(logits)
  excluded = jnp.isneginf(logits)
  # Not `logits / temperature`: its gradient to the temperature would be 0 * inf.
  scaled = jnp.where(excluded, -jnp.inf, jnp.where(excluded, 0.0, logits) / temperature)
  return scaled - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)


def token_log_probs(
  logits: jax.Array, tokens: jax.Array, *, temperature: jax.Array | float = 1.0
) -> jax.Array:
  """Returns [..., T], the log-probabilities of `tokens`, nats per token.

  >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.5, 0.5]]))
  >>> print(jnp.exp(ops.token_log_probs(logits, jnp.array([1, 0]))))
  [0.2 0.5]

  Args:
    logits: [..., T, V]; carries gradient.
    tokens: [..., T] integer ids in [0, V).
    temperature: scalar, may be traced; carries gradient.
  """
  chex.assert_shape(tokens, logits.shape[:-1])
  chex.assert_type(tokens, int)
  log_probs = vocab_log_probs(logits, temperature=temperature)
  return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def entropy(logits: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
  """Returns [..., T], the entropy of softmax(logits / temperature), nats per token.

  Gradient flows to `logits` [..., T, V] and `temperature`.

  >>> print(ops.entropy(jnp.zeros((1, 8))))  # log 8
  [2.079]
  """
  log_probs = vocab_log_probs(logits, temperature=temperature)
  finite = jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)
  return -(jnp.exp(log_probs) * finite).sum(axis=-1)


def token_log_probs_from_hidden(
  hidden: jax.Array,
  unembedding: Unembedding,
  tokens: jax.Array,
  *,
  temperature: jax.Array | float = 1.0,
  chunk_size: int | None = None,
) -> jax.Array:
  """Returns `token_log_probs` of the logits `hidden @ unembedding`, without holding them.

  The result is [..., T], in nats per token.

  >>> hidden, unembedding = jnp.ones((3, 4)), jnp.zeros((4, 8))
  >>> tokens = jnp.array([0, 3, 7])
  >>> print(ops.token_log_probs_from_hidden(hidden, unembedding, tokens, chunk_size=2))
  [-2.079 -2.079 -2.079]

  Args:
    hidden: [..., T, D]; carries gradient.
    unembedding: [D, V], or a `CappedUnembedding`; carries gradient, accumulated in at least
      float32.
    tokens: [..., T] integer ids in [0, V).
    temperature: scalar, may be traced; carries gradient.
    chunk_size: the most rows of logits that exist at a time; None takes 2**24 / V rows. Where rows
      are sharded over devices, the rows of all devices count.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  return _from_hidden(False, hidden, unembedding, tokens, temperature, chunk_size)[0]


def token_log_probs_and_entropy_from_hidden(
  hidden: jax.Array,
  unembedding: Unembedding,
  tokens: jax.Array,
  *,
  temperature: jax.Array | float = 1.0,
  chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (`token_log_probs`, `entropy`) of `hidden @ unembedding`, without holding the logits.

  Both are [..., T], in nats per token; arguments and errors are those of
  `token_log_probs_from_hidden`.

  >>> hidden, unembedding, tokens = jnp.ones((1, 4)), jnp.zeros((4, 8)), jnp.array([3])
  >>> log_probs, entropy = ops.token_log_probs_and_entropy_from_hidden(hidden, unembedding, tokens)
  >>> print(log_probs, entropy)
  [-2.079] [2.079]
  """
  log_probs, entropies = _from_hidden(True, hidden, unembedding, tokens, temperature, chunk_size)
  return log_probs, entropies


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


def num_chunks_of(num_rows: int, vocab_size: int, chunk_size: int | None) -> int:
  """Returns how many chunks of at most `chunk_size` rows (None: the default) hold `num_rows`."""
  if chunk_size is None:
    chunk_size = max(1, LOGITS_PER_CHUNK // vocab_size)
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size}: give a positive number of rows, or None.")
  return max(1, math.ceil(num_rows / chunk_size))


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


def soft_cap_slope(logits: jax.Array, cap: float) -> jax.Array | float:
  """Returns the derivative of `soft_cap`, given its result."""
  return 1 - (logits / cap) ** 2 if cap else 1.0


def logits_of(hidden: jax.Array, unembedding: Unembedding) -> jax.Array:
  """Returns logits [..., V] of hidden states [..., D], in at least float32; gradient flows to both.

  >>> print(ops.logits_of(jnp.ones((1, 1)), jnp.array([[1.0, 100.0]])))
  [[  1. 100.]]
  """
  table, cap = table_and_cap(unembedding)
  return soft_cap(matmul(hidden, table), cap)


def _from_hidden(with_entropy, hidden, unembedding, tokens, temperature, chunk_size):
  table, cap = table_and_cap(unembedding)
  chex.assert_shape(tokens, hidden.shape[:-1])
  chex.assert_shape(table, (hidden.shape[-1], None))
  chex.assert_type([hidden, table, tokens], [float, float, int])
  num_chunks = num_chunks_of(tokens.size, table.shape[1], chunk_size)
  accumulated = jnp.promote_types(jnp.result_type(hidden, table), jnp.float32)
  outputs = _chunked(
    with_entropy,
    cap,
    chunk_rows(hidden.reshape(-1, hidden.shape[-1]), num_chunks),
    table,
    chunk_rows(tokens.reshape(-1), num_chunks),
    jnp.asarray(temperature, accumulated),
  )
  return jax.tree.map(lambda x: unchunk_rows(x, tokens.size).reshape(tokens.shape), outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(with_entropy, cap, hidden, unembedding, tokens, temperature):
  """Returns (log_probs,) or (log_probs, entropy), each [K, C], from `hidden` [K, C, D]."""
  return _chunked_fwd(with_entropy, cap, hidden, unembedding, tokens, temperature)[0]


def _chunked_fwd(with_entropy, cap, hidden, unembedding, tokens, temperature):
  def chunk(args):
    hidden, tokens = args
    scaled = soft_cap(matmul(hidden, unembedding), cap) / temperature
    lse = jax.nn.logsumexp(scaled, axis=-1)
    log_probs = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - lse
    if not with_entropy:
      return lse, (log_probs,)
    probs = jnp.exp(scaled - lse[:, None])
    return lse, (log_probs, lse - (probs * scaled).sum(axis=-1))

  lse, outputs = jax.lax.map(chunk, (hidden, tokens))
  return outputs, (hidden, unembedding, tokens, temperature, lse, outputs[1:])


def _chunked_bwd(with_entropy, cap, residuals, cotangents):
  hidden, unembedding, tokens, temperature, lse, entropies = residuals

  def chunk(sums, args):
    hidden, tokens, lse, entropies, cotangents = args
    logits = soft_cap(matmul(hidden, unembedding), cap)
    scaled = logits / temperature
    log_probs = scaled - lse[:, None]
    probs = jnp.exp(log_probs)
    taken = jnp.arange(scaled.shape[1])[None, :] == tokens[:, None]
    d_scaled = cotangents[0][:, None] * (taken - probs)
    if with_entropy:
      d_scaled -= cotangents[1][:, None] * probs * (log_probs + entropies[0][:, None])
    d_logits = d_scaled / temperature * soft_cap_slope(logits, cap)
    d_logits = d_logits.astype(jnp.result_type(hidden, unembedding))
    sums = (
      sums[0] + matmul(hidden.T, d_logits),
      sums[1] - (d_scaled * scaled).sum() / temperature,
    )
    return sums, matmul(d_logits, unembedding.T).astype(hidden.dtype)

  zeros = (jnp.zeros(unembedding.shape, lse.dtype), jnp.zeros_like(temperature))
  (d_unembedding, d_temperature), d_hidden = jax.lax.scan(
    chunk, zeros, (hidden, tokens, lse, entropies, cotangents)
  )
  return d_hidden, d_unembedding.astype(unembedding.dtype), None, d_temperature


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
