"""Log-probabilities of the tokens taken, and entropies, in nats per token.

One definition, with scaled = logits / temperature:

    log_prob = scaled[token] - logsumexp(scaled)
    entropy  = logsumexp(scaled) - sum_v softmax(scaled)_v * scaled_v

and two back-ends. The first reads `logits [..., T, V]`. The second (`*_from_hidden`) reads
`hidden [..., T, D]` and `unembedding [D, V]`, an array or a `CappedUnembedding`, and holds as many
logits at a time as `chunk_size` rows have: the forward pass keeps the log-sum-exp of each row, and
the backward pass computes all logits once more. Matrix products are taken in the dtype of the
inputs and accumulated in at least float32 (under `jax.default_matmul_precision`, as everywhere in
JAX).

There is no mask here: `tokens` must be valid ids in the padding too, and the caller masks.
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp

from klrl.ops.masking import at_least_float32

# 32 MiB of float32.
LOGITS_PER_CHUNK = 2**23

# A product with fewer columns is slow.
_NARROWEST_BLOCK = 512


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
    chunk_size: as many logits as this number of rows has exist at a time, at most; None takes
      2**23 / V rows. Where rows are sharded over devices, the rows of all devices count.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  policy, size = (hidden, unembedding), chunk_size
  return from_hidden(("log_probs",), policy, None, tokens, temperature, size)["log_probs"]


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
  names, policy = ("log_probs", "entropy"), (hidden, unembedding)
  found = from_hidden(names, policy, None, tokens, temperature, chunk_size)
  return found["log_probs"], found["entropy"]


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


def from_hidden(names, policy, reference, tokens, temperature, chunk_size) -> dict:
  """Returns the figures `names` of next-token distributions, [..., T] each, in nats per token.

  They are "log_probs" of `tokens` and the "entropy" of the policy, and its "kl" to the reference.

  Args:
    names: which of them; a tuple.
    policy: (hidden [..., T, D], unembedding).
    reference: the same of the reference, or None without "kl".
    tokens: [..., T] integer ids, or None without "log_probs".
    temperature: scalar of both.
    chunk_size: as in `token_log_probs_from_hidden`.
  """
  shape = policy[0].shape[:-1]
  models = (policy,) if reference is None else (policy, reference)
  tables, caps = zip(*(table_and_cap(unembedding) for _, unembedding in models), strict=True)
  hiddens = [hidden for hidden, _ in models]
  for hidden, table in zip(hiddens, tables, strict=True):
    chex.assert_shape(hidden, (*shape, None))
    chex.assert_shape(table, (hidden.shape[-1], tables[0].shape[1]))
  chex.assert_type([*hiddens, *tables], float)
  if tokens is None:
    tokens = jnp.zeros(shape, jnp.int32)
  chex.assert_shape(tokens, shape)
  chex.assert_type(tokens, int)
  accumulated = jnp.promote_types(jnp.result_type(*hiddens, *tables), jnp.float32)
  found = _figures(
    names,
    caps,
    chunk_size,
    tuple(hidden.reshape(-1, hidden.shape[-1]) for hidden in hiddens),
    tables,
    tokens.reshape(-1),
    jnp.asarray(temperature, accumulated),
  )
  return {name: x.reshape(shape) for name, x in found.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _figures(names, caps, chunk_size, hiddens, tables, tokens, temperature):
  """Returns {name: [N]} of rows `hiddens` [N, D], of the policy and, for a KL, of the reference."""
  return _figures_fwd(names, caps, chunk_size, hiddens, tables, tokens, temperature)[0]


def _figures_fwd(names, caps, chunk_size, hiddens, tables, tokens, temperature):
  # A tied table is the transpose of the embeddings. To go back to these here, and to transpose them
  # in the loop, as a part of the product, saves a copy of the table.
  embeddings = [table.T for table in tables]

  def chunk(rows):
    hiddens, tokens = rows
    scaled, *of_reference = (
      soft_cap(matmul(hidden, embedding.T), cap) / temperature
      for hidden, embedding, cap in zip(hiddens, embeddings, caps, strict=True)
    )
    lses = [jax.nn.logsumexp(x, axis=-1) for x in (scaled, *of_reference)]
    found = {}
    if "log_probs" in names:
      found["log_probs"] = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - lses[0]
    probs = jnp.exp(scaled - lses[0][:, None])
    if "entropy" in names:
      found["entropy"] = lses[0] - (probs * scaled).sum(axis=-1)
    if "kl" in names:
      log_ratio = (scaled - lses[0][:, None]) - (of_reference[0] - lses[1][:, None])
      found["kl"] = (probs * log_ratio).sum(axis=-1)
    return found, lses

  num_rows = tokens.size
  num_chunks = num_chunks_of(num_rows, tables[0].shape[1], chunk_size)
  rows = jax.tree.map(lambda x: chunk_rows(x, num_chunks), (hiddens, tokens))
  found, lses = jax.tree.map(lambda x: unchunk_rows(x, num_rows), jax.lax.map(chunk, rows))
  return found, (hiddens, tables, tokens, temperature, found, lses)


def _figures_bwd(names, caps, chunk_size, residuals, cotangents):
  """Goes through tiles of some rows and some of the vocabulary.

  A step adds to the gradient of a block of the table and of a chunk of the rows. Were all of the
  vocabulary read in a step, each step would add a gradient as large as the table.
  """
  hiddens, tables, tokens, temperature, found, lses = residuals
  num_rows, vocab_size = tokens.size, tables[0].shape[1]
  num_chunks, num_blocks = _tiles(num_rows, vocab_size, chunk_size)
  rows = (hiddens, tokens, found, lses, cotangents)
  rows = jax.tree.map(lambda x: chunk_rows(x, num_chunks), rows)
  # Token v is in block v % num_blocks, so that each block has an equal share of every device over
  # which the vocabulary is sharded.
  blocks = [table.T.reshape(-1, num_blocks, table.shape[0]) for table in tables]
  ids = jnp.arange(vocab_size // num_blocks) * num_blocks

  def tile(sums, index):
    row, column = index // num_blocks, index % num_blocks
    hiddens, tokens, found, lses, cotangents = jax.tree.map(lambda x: _at(x, row, 0), rows)
    own = [_at(block, column, 1) for block in blocks]
    logits = [
      soft_cap(matmul(hidden, block.T), cap)
      for hidden, block, cap in zip(hiddens, own, caps, strict=True)
    ]
    log_probs = [x / temperature - lse[:, None] for x, lse in zip(logits, lses, strict=True)]
    probs = jnp.exp(log_probs[0])
    d_scaled = [jnp.zeros_like(x) for x in log_probs]
    if "log_probs" in names:
      taken = (ids + column)[None] == tokens[:, None]
      d_scaled[0] += cotangents["log_probs"][:, None] * (taken - probs)
    if "entropy" in names:
      slope = probs * (log_probs[0] + found["entropy"][:, None])
      d_scaled[0] -= cotangents["entropy"][:, None] * slope
    if "kl" in names:
      d_kl = cotangents["kl"][:, None]
      d_scaled[0] += d_kl * probs * (log_probs[0] - log_probs[1] - found["kl"][:, None])
      d_scaled[1] += d_kl * (jnp.exp(log_probs[1]) - probs)
    d_hiddens, d_blocks, d_temperature = sums
    # Each gradient is a sum of its own, so that the compiler can leave out of the loop those that
    # nobody asks for, products included.
    d_hiddens, d_blocks = list(d_hiddens), list(d_blocks)
    for i, (d, x) in enumerate(zip(d_scaled, logits, strict=True)):
      d_temperature -= (d * x).sum() / temperature**2
      d_logits = d / temperature * soft_cap_slope(x, caps[i])
      d_logits = d_logits.astype(jnp.result_type(hiddens[i], own[i]))
      d_hiddens[i] = _add_at(d_hiddens[i], matmul(d_logits, own[i]), row, 0)
      d_blocks[i] = _add_at(d_blocks[i], matmul(d_logits.T, hiddens[i]), column, 1)
    return (d_hiddens, d_blocks, d_temperature), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, temperature.dtype), (list(rows[0]), blocks))
  sums, _ = jax.lax.scan(
    tile, (*zeros, jnp.zeros_like(temperature)), jnp.arange(num_chunks * num_blocks)
  )
  d_hiddens = tuple(
    unchunk_rows(d, num_rows).astype(x.dtype) for d, x in zip(sums[0], hiddens, strict=True)
  )
  d_tables = tuple(
    d.reshape(vocab_size, -1).T.astype(x.dtype) for d, x in zip(sums[1], tables, strict=True)
  )
  return d_hiddens, d_tables, None, sums[2]


_figures.defvjp(_figures_fwd, _figures_bwd)


def _tiles(num_rows: int, vocab_size: int, chunk_size: int | None) -> tuple[int, int]:
  """Returns (chunks of rows, blocks of the vocabulary) whose tiles have few enough logits.

  A chunk has as many rows as it can, and blocks divide the vocabulary.
  """
  limit = LOGITS_PER_CHUNK if chunk_size is None else chunk_size * vocab_size
  narrowest = max(1, vocab_size // _NARROWEST_BLOCK)
  divisors = [num for num in range(1, narrowest + 1) if vocab_size % num == 0]
  enough = (num for num in divisors if num_rows * (vocab_size // num) <= limit)
  num_blocks = next(enough, divisors[-1])
  rows = max(1, limit // (vocab_size // num_blocks))
  return max(1, math.ceil(num_rows / rows)), num_blocks


def _at(x, index, axis):
  return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)


def _add_at(x, added, index, axis):
  return jax.lax.dynamic_update_index_in_dim(x, _at(x, index, axis) + added, index, axis)
