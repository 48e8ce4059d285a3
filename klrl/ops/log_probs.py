"""Log-probabilities of the tokens taken, and entropies, in nats per token.

One definition, with scaled = logits / temperature:

    log_prob = scaled[token] - logsumexp(scaled)
    entropy  = logsumexp(scaled) - sum_v softmax(scaled)_v * scaled_v

and two back-ends. The first reads `logits [..., T, V]`. The second (`*_from_hidden`) reads
`hidden [..., T, D]` and `unembedding [D, V]`, an array or a `CappedUnembedding`, and holds the
logits of `chunk_size` rows at a time (`ops.over_vocabulary`).

There is no mask here: `tokens` must be valid ids in the padding too, and the caller masks.
"""

import chex
import jax
import jax.numpy as jnp

from klrl.ops.logits import Unembedding
from klrl.ops.masking import at_least_float32
from klrl.ops.vocabulary import over_vocabulary


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
  return taken(vocab_log_probs(logits, temperature=temperature), tokens)


@jax.custom_jvp
def taken(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns [...], the entry of `log_probs` [..., V] at each of `tokens` [...]; carries gradient.

  >>> print(ops.taken(jnp.array([[-0.1, -2.4]]), jnp.array([1])))
  [-2.4]
  """
  return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


@taken.defjvp
def _taken_jvp(primals, tangents):
  log_probs, tokens = primals
  # The gradient of an index is a scatter, which would hold one more [..., V].
  index = jax.lax.broadcasted_iota(tokens.dtype, log_probs.shape, log_probs.ndim - 1)
  is_taken = index == tokens[..., None]
  return taken(*primals), jnp.where(is_taken, tangents[0], 0).sum(axis=-1)


def entropy(logits: jax.Array, *, temperature: jax.Array | float = 1.0) -> jax.Array:
  """Returns [..., T], the entropy of softmax(logits / temperature), nats per token.

  Gradient flows to `logits` [..., T, V] and `temperature`.

  >>> print(ops.entropy(jnp.zeros((1, 8))))  # log 8
  [2.079]
  """
  return entropy_of(vocab_log_probs(logits, temperature=temperature))


def entropy_of(log_probs: jax.Array) -> jax.Array:
  """Returns [...], the entropy of distributions given by `log_probs` [..., V], nats.

  >>> print(ops.entropy_of(jnp.log(jnp.array([0.5, 0.5]))))
  0.693
  """
  finite = jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)
  return -(jnp.exp(log_probs) * finite).sum(axis=-1)


def certainty_of(log_probs: jax.Array) -> jax.Array:
  """Returns [...], 1 - entropy / log(V) of distributions given by `log_probs` [..., V].

  It is 0 for the uniform distribution, 1 for a single choice, and up to rounding in between.

  >>> print(ops.certainty_of(jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]]))))
  [0. 1.]
  """
  return 1 - entropy_of(log_probs) / jnp.log(log_probs.shape[-1])


def mean_under(log_probs: jax.Array, sampler_log_probs: jax.Array) -> jax.Array:
  """Returns [...] the mean of `log_probs` [..., V] over draws of a sampler with its [..., V].

  It is minus the cross-entropy, nats. Gradient flows to `log_probs`, and a token that the sampler
  never draws has none.

  >>> print(ops.mean_under(*jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))))
  [-0.693]
  """
  probs = jax.lax.stop_gradient(jnp.exp(sampler_log_probs))
  return (probs * jnp.where(probs > 0, log_probs, 0.0)).sum(axis=-1)


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
    chunk_size: the most rows of logits that exist at a time; None takes 2**23 / V rows. Where rows
      are sharded over devices, the rows of all devices count.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  options = {"temperature": temperature, "chunk_size": chunk_size}
  return over_vocabulary(taken, [(hidden, unembedding)], [tokens], **options)


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

  def both(log_probs, tokens):
    return taken(log_probs, tokens), entropy_of(log_probs)

  options = {"temperature": temperature, "chunk_size": chunk_size}
  return over_vocabulary(both, [(hidden, unembedding)], [tokens], **options)
