"""Exact ground truth: all completions of a small language, their probabilities, exact expectations.

A `Tree` lists all completions up to a horizon. A policy is `logits [S, V]`, with one free row for
each prefix; `decoder_logits` returns those of a real decoder. Nothing is sampled: the values and
gradients here are the expectations of the estimates in training. The estimates are passed in as
functions of `kl_terms.TokenTerms`, the very functions that training calls.

N completions, S prefixes, T horizon, V vocabulary. Values are in nats and are sums over a
completion, unless a name says otherwise. The functions are pure, keep float64, and close over the
tree, which is static numpy.

Sums are taken in two ways. Functions of prefixes walk the levels of the tree: the prefixes of one
length are one slice, and their children, in order, are the next slice, so no index is read, and a
million completions cost a few passes over [S, V]. Functions of completions, such as surrogates,
gather [N, T].
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from klrl import ops
from klrl.algorithm.kl_terms import TokenTerms
from klrl.errors import UserError
from klrl.ops.logits import logits_of


class Tree(NamedTuple):
  """All completions of at most T tokens. A prefix is a state, and the empty one is state 0."""

  vocab_size: int
  horizon: int
  eos_id: int | None
  tokens: np.ndarray  # [N, T] int32, depth-first in the order of token ids; 0 in the padding
  mask: np.ndarray  # [N, T] bool, EOS included
  states: np.ndarray  # [N, T] int32, the state before each token; 0 in the padding
  children: np.ndarray  # [S, V] int32, the state after each token; -1 where the completion ends
  leaves: np.ndarray  # [S, V] int32, the row of `tokens` that ends there; -1 where it goes on
  depths: np.ndarray  # [S] int32, the prefix's length; states are in breadth-first order

  @property
  def levels(self) -> list[slice]:
    """The states of each length, 0 to T - 1."""
    bounds = np.searchsorted(self.depths, np.arange(self.horizon + 1))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]

  @property
  def continuing(self) -> np.ndarray:
    """The tokens that do not end a completion."""
    return np.flatnonzero(np.arange(self.vocab_size) != self.eos_id)


def make_tree(vocab_size: int, horizon: int, *, eos_id: int | None = None) -> Tree:
  """Returns all completions of `horizon` tokens, or of fewer if `eos_id` ends one.

  A bandit has horizon 1 and no EOS. Raises UserError if there is no such tree.
  """
  if vocab_size < 1 or horizon < 1 or not (eos_id is None or 0 <= eos_id < vocab_size):
    raise UserError(
      f"No tree has vocab_size={vocab_size}, horizon={horizon}, eos_id={eos_id}: the first two must"
      " be at least 1, and eos_id None or one of the tokens."
    )
  ends = np.arange(vocab_size) == eos_id
  branching = vocab_size - ends.sum()
  num_rows = [1]  # completions below a prefix, by the number of tokens left
  for _ in range(horizon):
    num_rows.append(branching * num_rows[-1] + ends.sum())
  first_states = np.cumsum([0] + [branching**depth for depth in range(horizon)])

  shape = (num_rows[horizon], horizon)
  tokens, states = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  mask = np.zeros(shape, bool)
  children = np.full((first_states[-1], vocab_size), -1, np.int32)
  leaves = children.copy()
  alive = np.ones(num_rows[horizon], bool)
  rows = np.zeros(1, np.int64)  # the first row below each state of the level
  for depth, (first, last) in enumerate(itertools.pairwise(first_states)):
    sizes = np.where(ends, 1, num_rows[horizon - depth - 1])
    child_rows = rows[:, None] + np.cumsum(sizes) - sizes
    ended = ends | (depth == horizon - 1)
    leaves[first:last, ended] = child_rows[:, ended]
    next_states = np.arange(last, last + (last - first) * (~ended).sum())
    children[first:last, ~ended] = next_states.reshape(last - first, -1)
    mask[:, depth] = alive
    states[alive, depth] = np.repeat(np.arange(first, last), sizes.sum())
    tokens[alive, depth] = np.tile(np.repeat(np.arange(vocab_size), sizes), last - first)
    alive &= tokens[:, depth] != (-1 if eos_id is None else eos_id)
    rows = child_rows[:, ~ended].reshape(-1)
  depths = np.repeat(np.arange(horizon, dtype=np.int32), np.diff(first_states))
  return Tree(vocab_size, horizon, eos_id, tokens, mask, states, children, leaves, depths)


def _log_visits(tree: Tree, log_probs):
  """Returns [S], the log-probability of reaching each prefix."""
  level = jnp.zeros(1, log_probs.dtype)
  levels = [level]
  for here in tree.levels[:-1]:
    level = (level[:, None] + log_probs[here][:, tree.continuing]).reshape(-1)
    levels.append(level)
  return jnp.concatenate(levels)


def visits(tree: Tree, logits) -> jax.Array:
  """Returns [S], the probability that a completion begins with each prefix."""
  return jnp.exp(_log_visits(tree, ops.vocab_log_probs(logits)))


def token_log_probs(tree: Tree, logits) -> jax.Array:
  """Returns [N, T], nats per token, 0 in the padding; carries gradient."""
  flat = ops.vocab_log_probs(logits).reshape(-1)
  return jnp.where(tree.mask, flat[tree.states * tree.vocab_size + tree.tokens], 0.0)


def log_probs(tree: Tree, logits) -> jax.Array:
  """Returns [N], the log-probability of each completion; carries gradient."""
  token = ops.vocab_log_probs(logits)
  upto = _log_visits(tree, token)[:, None] + token
  ends = np.flatnonzero(tree.leaves >= 0)
  return upto.reshape(-1)[ends[np.argsort(tree.leaves.reshape(-1)[ends])]]


def _where_reached(reached, other_logits, logits):
  # A prefix that is never reached may have an infinite KL, and 0 * inf is NaN. Equal logits have 0.
  return jnp.where(reached[:, None], other_logits, jax.lax.stop_gradient(logits))


Divergence = Callable[[jax.Array, jax.Array], jax.Array]  # of log-probs [S, V] of two -> [S]


def _at_prefixes(divergence: Divergence, weights, logits, other_logits) -> jax.Array:
  other_logits = _where_reached(weights > 0, other_logits, logits)
  return divergence(ops.vocab_log_probs(logits), ops.vocab_log_probs(other_logits))


def token_divergence(
  tree: Tree, divergence: Divergence, logits, other_logits, *, prefix_logits=None
) -> jax.Array:
  """Returns the divergence of next-token distributions, summed over the prefixes of a policy.

  The gradient takes the visits to prefixes as given, as losses that do not credit later KL do
  ("token" in `audit`); `summed_divergence` has the same value at pi's own prefixes.

  Args:
    tree: the completions.
    divergence: of two distributions over V, given by their log-probs; `ops.kl_of` is one.
    logits: [S, V] of pi; carries gradient.
    other_logits: [S, V]; carries gradient.
    prefix_logits: [S, V] of the policy that draws the prefixes; None is pi. No gradient.
  """
  weights = jax.lax.stop_gradient(visits(tree, logits if prefix_logits is None else prefix_logits))
  return (weights * _at_prefixes(divergence, weights, logits, other_logits)).sum()


def summed_divergence(tree: Tree, divergence: Divergence, logits, other_logits) -> jax.Array:
  """Returns `token_divergence` at pi's own prefixes, the visits to which carry gradient too."""
  weights = visits(tree, logits)
  return (weights * _at_prefixes(divergence, weights, logits, other_logits)).sum()


def completion_divergence(tree: Tree, divergence: Divergence, logits, other_logits) -> jax.Array:
  """Returns the divergence of the two distributions over whole completions; carries gradient."""
  return divergence(log_probs(tree, logits), log_probs(tree, other_logits))


def token_kl(tree: Tree, logits, other_logits, *, prefix_logits=None) -> jax.Array:
  """Returns `token_divergence` of the KL(pi || other)."""
  return token_divergence(tree, ops.kl_of, logits, other_logits, prefix_logits=prefix_logits)


def sequence_kl(tree: Tree, logits, other_logits) -> jax.Array:
  """Returns KL(pi || other) of whole completions, nats per sequence; both carry gradient.

  By the chain rule of the KL it is a `summed_divergence`. It is infinite if `other_logits` excludes
  a completion that pi does not.
  """
  return summed_divergence(tree, ops.kl_of, logits, other_logits)


def entropy(tree: Tree, logits) -> jax.Array:
  """Returns the entropy of the completion, nats per sequence; carries gradient."""
  return (visits(tree, logits) * ops.entropy(logits)).sum()


def expected_length(tree: Tree, logits) -> jax.Array:
  """Returns the mean number of tokens, EOS included; carries gradient."""
  return visits(tree, logits).sum()


def expected_score(tree: Tree, logits, scores) -> jax.Array:
  """Returns the mean of `scores` [N]; carries gradient."""
  return (jnp.exp(log_probs(tree, logits)) * scores).sum()


class Optimum(NamedTuple):
  """The policy that maximises E[score] - beta * KL(pi || ref)."""

  logits: jax.Array  # [S, V]
  values: jax.Array  # [S], E[score] - beta * KL of this policy from each prefix on
  log_z: jax.Array  # log E_ref[exp(score / beta)] = values[0] / beta


def optimal_policy(tree: Tree, ref_logits, scores, *, beta) -> Optimum:
  """Returns the optimum `ref * exp(score / beta) / Z`, token by token.

      V(s) = beta * log sum_a ref(a|s) exp(Q(s, a) / beta),   pi(a|s) = ref(a|s) exp((Q - V) / beta)

  where Q(s, a) is the score if a ends the completion, and V of the child otherwise. It is computed
  from the longest prefixes up. Emanuel Todorov, "Linearly-solvable Markov decision problems", 2006,
  with the reference in place of its passive dynamics.

  Args:
    tree: the completions.
    ref_logits: [S, V].
    scores: [N], finite.
    beta: positive scalar, may be traced.
  """
  ref_log_probs = ops.vocab_log_probs(ref_logits)
  next_values = jnp.zeros(1, ref_log_probs.dtype)  # never read: the longest prefixes have no child
  logits, values = [], []
  for here in reversed(tree.levels):
    of_children = next_values[np.maximum(tree.children[here] - here.stop, 0)]
    q = jnp.where(tree.leaves[here] >= 0, scores[tree.leaves[here]], of_children)
    logits.append(ref_log_probs[here] + q / beta)
    next_values = beta * jax.nn.logsumexp(logits[-1], axis=-1)
    values.append(next_values)
  logits, values = (jnp.concatenate(x[::-1]) for x in (logits, values))
  return Optimum(logits, values, values[0] / beta)


def frontier(tree: Tree, ref_logits, scores, betas) -> tuple[jax.Array, jax.Array]:
  """Returns (expected scores [K], KLs to ref [K]) of the optima at `betas`; the slope is beta."""

  def point(beta):
    logits = optimal_policy(tree, ref_logits, scores, beta=beta).logits
    return expected_score(tree, logits, scores), sequence_kl(tree, logits, ref_logits)

  return jax.lax.map(point, jnp.asarray(betas))  # one after the other: a tree may be large


def terms(
  tree: Tree, logits, old_logits, ref_logits, *, divergence: Divergence = ops.kl_of
) -> TokenTerms:
  """Returns the terms that training reads of each completion from the old policy, [N, T] each.

  The exact KL of the terms is the `divergence`.

  Gradient flows to `logits` alone. The terms are zero in the padding, and in completions that the
  old policy never draws: the weight of these is zero, and their logarithms may not be finite.
  """
  old_logits, ref_logits = jax.lax.stop_gradient((old_logits, ref_logits))
  reached = visits(tree, old_logits)
  drawn = tree.mask & jnp.isfinite(log_probs(tree, old_logits))[:, None]

  def kl(logits):
    return _at_prefixes(divergence, reached, logits, ref_logits)[tree.states]

  log_probs_, old, ref = (token_log_probs(tree, x) for x in (logits, old_logits, ref_logits))
  log_probs_, old, ref, exact_kl, old_exact_kl = (
    ops.zero_padding(x, drawn) for x in (log_probs_, old, ref, kl(logits), kl(old_logits))
  )
  return TokenTerms(log_probs_, old, ref, jnp.asarray(tree.mask), exact_kl, old_exact_kl)


Surrogate = Callable[[TokenTerms], jax.Array]


def _expectation(tree, f, logits, ref_logits, old_logits, probs, divergence):
  old_logits = jax.lax.stop_gradient(logits if old_logits is None else old_logits)
  if probs is None:
    probs = jnp.exp(log_probs(tree, old_logits))
  per_token = f(terms(tree, logits, old_logits, ref_logits, divergence=divergence))
  return (probs * ops.zero_padding(per_token, tree.mask).sum(axis=-1)).sum()


def expected_value(
  tree: Tree,
  estimate: Surrogate,
  logits,
  ref_logits,
  *,
  old_logits=None,
  probs=None,
  divergence: Divergence = ops.kl_of,
) -> jax.Array:
  """Returns the mean sum of `estimate(terms)` over a completion; see `expected_gradient`."""
  return _expectation(tree, estimate, logits, ref_logits, old_logits, probs, divergence)


def expected_gradient(
  tree: Tree,
  surrogate: Surrogate,
  logits,
  ref_logits,
  *,
  old_logits=None,
  probs=None,
  divergence: Divergence = ops.kl_of,
) -> jax.Array:
  """Returns [S, V], the mean gradient of the sum of `surrogate(terms)` over a drawn completion.

  Args:
    tree: the completions.
    surrogate: a loss of TokenTerms, [N, T] -> [N, T], such as `kl_terms.surrogate(penalty)`.
    logits: [S, V] of pi, to which the gradient belongs.
    ref_logits: [S, V]; it must allow every token that pi allows.
    old_logits: [S, V] of the policy that draws; None is pi itself. Pi must allow all its tokens.
    probs: [N] in place of the drawing policy's probabilities, such as sampled frequencies.
    divergence: what `exact_kl` of the terms is.
  """

  def loss(x):
    return _expectation(tree, surrogate, x, ref_logits, old_logits, probs, divergence)

  return jax.grad(loss)(logits)


def gradient_moments(
  tree: Tree, surrogates: Sequence[Surrogate], logits, ref_logits, *, old_logits=None
) -> tuple[jax.Array, jax.Array]:
  """Returns (expected gradients [K, S, V], traces of their covariances over completions [K]).

  One call for K surrogates compiles several times faster than K calls. The value of a surrogate at
  a completion must not depend on other completions. `expected_gradient` is a simpler way to the
  same mean.
  """
  old_logits = jax.lax.stop_gradient(logits if old_logits is None else old_logits)
  drawn = terms(tree, logits, old_logits, ref_logits)

  def derivatives(surrogate):
    def total(log_probs, exact_kl):
      per_token = surrogate(drawn._replace(log_probs=log_probs, exact_kl=exact_kl))
      return ops.zero_padding(per_token, tree.mask).sum()

    by_both = jax.grad(total, argnums=(0, 1))(drawn.log_probs, drawn.exact_kl)
    return [ops.zero_padding(x, tree.mask)[..., None] for x in by_both]

  # The gradient of a completion has one row for each of its tokens, so [N, T, V] holds them all.
  by_log_prob, by_kl = map(jnp.stack, zip(*map(derivatives, surrogates), strict=True))
  reached = visits(tree, old_logits)
  kl_gradients = jax.grad(lambda x: _at_prefixes(ops.kl_of, reached, x, ref_logits).sum())(logits)
  taken = jax.nn.one_hot(tree.tokens, tree.vocab_size)
  score_function = taken - jax.nn.softmax(logits)[tree.states]
  gradients = by_log_prob * score_function[None] + by_kl * kl_gradients[tree.states][None]
  probs = jnp.exp(log_probs(tree, old_logits))[None, :, None, None]
  means = jnp.zeros((len(surrogates), *logits.shape), gradients.dtype)
  means = means.at[:, tree.states].add(probs * gradients)
  return means, (probs * gradients**2).sum(axis=(1, 2, 3)) - (means**2).sum(axis=(1, 2))


def gradient_covariance(
  tree: Tree, surrogate: Surrogate, logits, ref_logits, *, old_logits=None
) -> jax.Array:
  """Returns the trace of `gradient_moments` for one surrogate."""
  return gradient_moments(tree, [surrogate], logits, ref_logits, old_logits=old_logits)[1][0]


def fixed_points(
  tree: Tree,
  surrogates: Sequence[Surrogate],
  ref_logits,
  scores,
  *,
  beta,
  start: jax.Array | None = None,
  natural: bool = True,
  num_steps: int = 3000,
  step_size: float = 0.2,
  max_gap: float = 60.0,
  divergence: Divergence = ops.kl_of,
) -> jax.Array:
  """Returns [K, S, V], the end of exact on-policy ascent of E[score] - beta * penalty from ref.

      logits += step_size / beta * (grad E[score] - beta * expected_gradient) / (visits * pi)

  is the natural gradient of a table: rare prefixes and tokens learn as fast as common ones (Sham
  Kakade, "A Natural Policy Gradient", 2001). The plain gradient lacks the denominator and needs ten
  times the steps. The two may end at different policies if the expected gradient does not vanish as
  a token dies out: with k3 in the reward the plain one goes on into a vertex, and the natural one
  may stop at a mixture.

  A step moves no logit by more than 1, and no logit falls further than `max_gap` below the largest
  of its row. All surrogates step as one batch, so the tree is compiled once, which takes longer
  than the loop (40 surrogates of 15 completions on 2 cores: 5 s and 0.4 s).

  Args:
    tree: the completions.
    surrogates: K of them.
    ref_logits: [S, V], finite.
    scores: [N].
    beta: positive scalar, may be traced.
    start: [K, S, V], where to go on from, such as an earlier end; None is ref.
    natural: False is the plain gradient.
    num_steps: the number of steps.
    step_size: 1 is the natural step that solves a bandit with the gradient of KL(pi || ref) at
      once. With the gradient of KL(ref || pi) it must stay below 2 / max(ref / pi).
    max_gap: nats.
    divergence: what `exact_kl` of the terms is.
  """

  def losses(logits):
    drawn = jax.vmap(lambda x: terms(tree, x, x, ref_logits, divergence=divergence))(logits)
    penalties = jnp.stack(
      [f(jax.tree.map(lambda x, k=k: x[k], drawn)) for k, f in enumerate(surrogates)]
    )
    probs = jnp.exp(jax.vmap(lambda x: log_probs(tree, x))(logits))
    rewards = (probs * jnp.asarray(scores)[None]).sum()
    penalties = jnp.where(tree.mask[None], penalties, 0.0).sum(axis=-1)
    return (jax.lax.stop_gradient(probs) * penalties).sum() * beta - rewards

  def step(_, logits):
    direction = -jax.grad(losses)(logits)
    if natural:
      reached = jax.vmap(lambda x: visits(tree, x))(logits)[..., None] * jax.nn.softmax(logits)
      direction /= jnp.maximum(reached, jnp.finfo(reached.dtype).tiny)
    logits += jnp.clip(step_size / beta * direction, -1.0, 1.0)
    return jnp.maximum(logits - logits.max(axis=-1, keepdims=True), -max_gap)

  if start is None:
    start = jnp.stack([ops.vocab_log_probs(ref_logits)] * len(surrogates))
  return jax.lax.fori_loop(0, num_steps, step, start)


def fixed_point(tree: Tree, surrogate: Surrogate, ref_logits, scores, **options) -> jax.Array:
  """Returns [S, V], the policy of `fixed_points` for one surrogate."""
  return fixed_points(tree, [surrogate], ref_logits, scores, **options)[0]


def decoder_logits(policy, params, tree: Tree, prompt) -> jax.Array:
  """Returns [S, V], the logits of a decoder at every prefix after `prompt`; carries gradient.

  It takes one pass over the longest prefixes: a shorter prefix is read from the first of these that
  begins with it.

  Args:
    policy: a `models.Policy` whose vocabulary is the tree's.
    params: its parameters.
    tree: the completions.
    prompt: [P] int, at least one token, no padding.
  """
  prompt = jnp.asarray(prompt, jnp.int32)
  chex.assert_rank(prompt, 1)
  num_tokens = policy.config.num_tokens or policy.config.vocab_size
  if num_tokens != tree.vocab_size:
    raise UserError(
      f"The decoder has {num_tokens} tokens and the tree {tree.vocab_size}: a policy"
      " of the tree gives every token of the decoder a probability."
    )
  longest = tree.tokens[tree.leaves[tree.levels[-1], 0], :-1]
  tokens = jnp.concatenate([jnp.tile(prompt, (len(longest), 1)), longest], axis=1)
  hidden = policy.hidden(params, tokens, jnp.ones(tokens.shape, bool))[:, len(prompt) - 1 :]
  rows = [np.arange(x.stop - x.start) * (len(longest) // (x.stop - x.start)) for x in tree.levels]
  return logits_of(hidden[np.concatenate(rows), tree.depths], policy.unembedding(params))
