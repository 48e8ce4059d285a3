"""Exact sums against loops over completions, published numbers of one tree, and a real decoder.

TREE-A is the tree that the numbers here belong to; its policies are far from symmetric.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import UserError, bandits, completions, objective, ops, oracle
from klrl.models import DecoderConfig, policy_model
from klrl.objective import KLPenalty
from klrl.sampling import Rollout

TREE = oracle.make_tree(3, 3, eos_id=2)
_S, _A = np.arange(1.0, 8.0)[:, None], np.arange(1.0, 4.0)[None]
THETA = 0.9 * np.sin(1.7 * _S + 2.3 * _A)
REF = 0.9 * np.cos(1.1 * _S - 0.7 * _A)
OLD = THETA + 0.6 * np.sin(3.1 * _S * _A)
SCORES = np.sin(np.arange(1.0, 16.0))
TREES = [(3, 3, 2), (3, 3, 0), (4, 4, 1), (2, 5, None), (4, 1, None), (3, 1, 1), (1, 3, None)]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def enumerated(vocab_size, horizon, eos_id, prefix=()):
  """Returns all completions that begin with `prefix`, as tuples, depth first."""
  if len(prefix) == horizon or (prefix and prefix[-1] == eos_id):
    return [prefix]
  return [
    y for a in range(vocab_size) for y in enumerated(vocab_size, horizon, eos_id, (*prefix, a))
  ]


def prefixes(vocab_size, horizon, eos_id):
  """Returns all prefixes that go on, shortest first."""
  found = {y[:t] for y in enumerated(vocab_size, horizon, eos_id) for t in range(len(y))}
  return sorted(found, key=lambda s: (len(s), s))


def random_policies(tree, count, seed=0):
  return 1.5 * np.random.default_rng(seed).normal(size=(count, len(tree.depths), tree.vocab_size))


def softmax(logits):
  return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def relative_error(gradient, truth):
  return np.linalg.norm(gradient - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("shape", TREES)
def test_a_tree_lists_completions_depth_first_and_prefixes_breadth_first(shape):
  tree = oracle.make_tree(*shape[:2], eos_id=shape[2])
  rows, states = enumerated(*shape), prefixes(*shape)
  assert len(tree.tokens) == len(rows) and tree.depths.tolist() == [len(s) for s in states]
  for n, y in enumerate(rows):
    padding = [0] * (shape[1] - len(y))
    assert tree.tokens[n].tolist() == [*y, *padding]
    assert tree.mask[n].tolist() == [True] * len(y) + [False] * len(padding)
    assert tree.states[n].tolist() == [states.index(y[:t]) for t in range(len(y))] + padding
  for s, a in np.ndindex(tree.children.shape):
    y = (*states[s], a)
    assert tree.children[s, a] == (states.index(y) if y in states else -1)
    assert tree.leaves[s, a] == (rows.index(y) if y in rows else -1)


def test_a_tree_of_a_million_completions():
  tree = oracle.make_tree(11, 6, eos_id=3)
  assert tree.tokens.shape == (1 + sum(10**t for t in range(1, 6)) + 10**6, 6)
  assert len(tree.depths) == 111_111
  leaves = tree.leaves[tree.leaves >= 0]
  np.testing.assert_array_equal(np.sort(leaves), np.arange(len(tree.tokens)))
  for row in (0, 654_321, len(tree.tokens) - 1):  # follows its own tokens to itself
    state = 0
    for t in range(tree.mask[row].sum()):
      assert tree.states[row, t] == state
      last, state = state, tree.children[state, tree.tokens[row, t]]
    assert tree.leaves[last, tree.tokens[row, t]] == row and state == -1


@pytest.mark.parametrize("arguments", [(0, 3, None), (3, 0, None), (3, 3, 3), (3, 3, -1)])
def test_an_impossible_tree_is_refused(arguments):
  with pytest.raises(UserError, match=f"vocab_size={arguments[0]}"):
    oracle.make_tree(*arguments[:2], eos_id=arguments[2])


@pytest.mark.parametrize("shape", TREES)
def test_every_exact_quantity_equals_a_loop_over_completions(shape):
  tree = oracle.make_tree(*shape[:2], eos_id=shape[2])
  pi, other = random_policies(tree, 2)
  rows, states = enumerated(*shape), prefixes(*shape)
  token = np.zeros(tree.tokens.shape)
  log_p, log_q = np.zeros(len(rows)), np.zeros(len(rows))
  visited = np.zeros(len(states))
  for n, y in enumerate(rows):
    for t, a in enumerate(y):
      s = states.index(y[:t])
      token[n, t] = np.log(softmax(pi)[s, a])
      log_q[n] += np.log(softmax(other)[s, a])
    log_p[n] = token[n].sum()
    for t in range(len(y)):
      visited[states.index(y[:t])] += np.exp(log_p[n])
  p = np.exp(log_p)
  scores = np.cos(np.arange(len(rows)))
  found = jax.jit(
    lambda pi, other: {
      "token_log_probs": oracle.token_log_probs(tree, pi),
      "log_probs": oracle.log_probs(tree, pi),
      "visits": oracle.visits(tree, pi),
      "sequence_kl": oracle.sequence_kl(tree, pi, other),
      "token_kl": oracle.token_kl(tree, pi, other),
      "entropy": oracle.entropy(tree, pi),
      "expected_length": oracle.expected_length(tree, pi),
      "expected_score": oracle.expected_score(tree, pi, scores),
    }
  )(pi, other)
  expected = {
    "token_log_probs": token,
    "log_probs": log_p,
    "visits": visited,
    "sequence_kl": (p * (log_p - log_q)).sum(),
    "token_kl": (p * (log_p - log_q)).sum(),
    "entropy": -(p * log_p).sum(),
    "expected_length": sum(q * len(y) for q, y in zip(p, rows, strict=True)),
    "expected_score": (p * scores).sum(),
  }
  np.testing.assert_allclose(p.sum(), 1.0)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-13, err_msg=name)


def test_numbers_of_tree_a():
  kl = jax.jit(lambda x, y: oracle.sequence_kl(TREE, x, y))
  found = [kl(THETA, REF), kl(REF, THETA), kl(THETA, OLD), kl(OLD, REF)]
  np.testing.assert_allclose(found, [0.496048225, 0.628468688, 0.009629624, 0.508729780], atol=1e-9)
  np.testing.assert_allclose(oracle.expected_length(TREE, THETA), 1.8095143378672651)
  optimum = oracle.optimal_policy(TREE, REF, SCORES, beta=0.5)
  np.testing.assert_allclose(
    optimum.values[:3], [0.6597246844, 0.4749414189, 0.7956723639], atol=1e-9
  )
  np.testing.assert_allclose(softmax(optimum.logits[0]), [0.252092, 0.493788, 0.25412], atol=1e-6)
  np.testing.assert_allclose(
    oracle.expected_score(TREE, optimum.logits, SCORES), 0.7889089308, atol=1e-9
  )
  np.testing.assert_allclose(kl(optimum.logits, REF), 0.2583684928, atol=1e-9)


@functools.cache
def sequence_gradient():
  return jax.jit(jax.grad(lambda x: oracle.sequence_kl(TREE, x, REF)))(THETA)


def test_gradient_of_the_sequence_kl_by_finite_differences():
  gradient = sequence_gradient()
  for direction in random_policies(TREE, 3, seed=1):
    up, down = (oracle.sequence_kl(TREE, THETA + h * direction, REF) for h in (1e-5, -1e-5))
    np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-8)
  np.testing.assert_allclose(np.linalg.norm(gradient), 0.279223574, atol=1e-9)


def test_the_token_kl_and_the_future_make_the_gradient_of_the_sequence_kl():
  def future(terms):
    to_go = jnp.cumsum(terms.exact_kl[:, ::-1], axis=1)[:, ::-1]
    return terms.log_probs * jax.lax.stop_gradient(to_go - terms.exact_kl)

  token = jax.grad(lambda x: oracle.token_kl(TREE, x, REF))(THETA)
  assert relative_error(token, sequence_gradient()) > 0.5
  both = token + oracle.expected_gradient(TREE, future, THETA, REF)
  np.testing.assert_allclose(both, sequence_gradient(), atol=1e-15)


def test_the_optimum_is_the_tilted_reference_and_what_others_lack_is_their_kl_to_it():
  tree, beta = oracle.make_tree(4, 4, eos_id=1), 0.7
  ref, pi = random_policies(tree, 2)
  scores = np.cos(np.arange(len(tree.tokens)))
  optimum = oracle.optimal_policy(tree, ref, scores, beta=beta)
  tilted = oracle.log_probs(tree, ref) + scores / beta
  log_z = jax.nn.logsumexp(tilted)
  np.testing.assert_allclose(optimum.log_z, log_z, rtol=1e-13)
  np.testing.assert_allclose(oracle.log_probs(tree, optimum.logits), tilted - log_z, rtol=1e-12)
  j = oracle.expected_score(tree, pi, scores) - beta * oracle.sequence_kl(tree, pi, ref)
  gap = beta * oracle.sequence_kl(tree, pi, optimum.logits)
  np.testing.assert_allclose(optimum.values[0] - j, gap, rtol=1e-12)


def test_the_frontier_of_a_bandit_and_its_slope():
  bandit, ref = oracle.make_tree(4, 1), np.log([[0.4, 0.3, 0.2, 0.1]])
  scores, kls = oracle.frontier(bandit, ref, np.arange(4.0), [4.0, 1.0, 0.25, 1.001, 0.999])
  np.testing.assert_allclose(scores[:3], [1.266192106, 2.083598836, 2.962687489], atol=1e-9)
  np.testing.assert_allclose(kls[:3], [0.033889641, 0.535642903, 2.116364709], atol=1e-9)
  np.testing.assert_allclose((scores[3] - scores[4]) / (kls[3] - kls[4]), 1.0, atol=1e-6)


SEQUENCE = bandits.sequence_surrogate
ON_POLICY = {  # surrogate: (relative error to the sequence gradient, trace covariance)
  "k1 reward": (KLPenalty("reward", "k1"), 0.0, 0.90807),
  "k3 reward": (KLPenalty("reward", "k3"), 1.541757, 0.52978),
  "exact reward": (KLPenalty("reward", "exact"), 1.499408, 0.35284),
  "k2 loss": (KLPenalty("loss", "k2", credit="token"), 0.692839, 0.35626),
  "k3 loss": (KLPenalty("loss", "k3", credit="token"), 0.665463, 0.90348),
  "exact both": (KLPenalty("both", "exact"), 0.0, 0.24809),
  "whole k2": (SEQUENCE("k2"), 0.0, 1.10696),
  "whole k3": (SEQUENCE("k3"), 0.813072, 4.79839),
  "whole k1 reward": (SEQUENCE("k1", "ratio", in_reward=True), 0.0, 1.10696),
}
OFF_POLICY = {
  "prefix k3": (KLPenalty("loss", "k3", "prefix"), 0.0, 0.47311),
  "prefix exact": (KLPenalty("loss", "exact", "prefix"), 0.0, 0.27220),
  "token k3": (KLPenalty("loss", "k3", "token", "token"), 0.695655, 0.33684),
  "whole k3": (SEQUENCE("k3", "ratio"), 0.0, 1.21485),
  "whole k2 stopped": (SEQUENCE("k2", "stopped_ratio"), 0.0, 1.21485),
  "whole k2 differentiated": (SEQUENCE("k2", "ratio"), 0.5358, 1.54859),
  "stale k1": (SEQUENCE("stale_k1", "ratio"), 0.169119, 1.34186),
  "truncated k1": (SEQUENCE("k1", "ratio", in_reward=True, cap=2.0), 0.009879, 1.18278),
}


@pytest.mark.parametrize(("rows", "old"), [(ON_POLICY, None), (OFF_POLICY, OLD)])
def test_expected_gradients_and_covariances_of_tree_a(rows, old):
  surrogates = [
    objective.surrogate(x) if isinstance(x, KLPenalty) else x for x, _, _ in rows.values()
  ]

  @jax.jit
  def found(pi, ref):
    moments = oracle.gradient_moments(TREE, surrogates, pi, ref, old_logits=old)
    few = [oracle.expected_gradient(TREE, f, pi, ref, old_logits=old) for f in surrogates[::4]]
    return *moments, jnp.stack(few)

  means, covariances, few = found(THETA, REF)
  np.testing.assert_allclose(few, means[::4], atol=1e-15)
  for row, mean, covariance in zip(rows, means, covariances, strict=True):
    _, error, expected = rows[row]
    np.testing.assert_allclose(
      relative_error(mean, sequence_gradient()), error, atol=1e-6, err_msg=row
    )
    np.testing.assert_allclose(covariance, expected, atol=1e-5, err_msg=row)


def test_only_the_current_policy_gets_gradient():
  def total(*logits):
    return sum(x.sum() for x in oracle.terms(TREE, *logits) if x.dtype != bool)

  on_pi, on_old, on_ref = jax.grad(total, argnums=(0, 1, 2))(THETA, OLD, REF)
  assert np.abs(on_pi).max() > 0.1
  np.testing.assert_array_equal(on_old, 0 * OLD)
  np.testing.assert_array_equal(on_ref, 0 * REF)


def test_the_token_target_at_the_prefixes_of_the_old_policy():
  surrogate = objective.surrogate(KLPenalty("loss", "exact", credit="token"))
  gradient = oracle.expected_gradient(TREE, surrogate, THETA, REF, old_logits=OLD)
  target = jax.grad(lambda x: oracle.token_kl(TREE, x, REF, prefix_logits=OLD))(THETA)
  np.testing.assert_allclose(gradient, target, atol=1e-15)


def test_frequencies_take_the_place_of_probabilities():
  surrogate = objective.surrogate(KLPenalty("loss", "exact", "prefix"))
  probs = jnp.exp(oracle.log_probs(TREE, OLD))

  def gradient(probs):
    return oracle.expected_gradient(TREE, surrogate, THETA, REF, old_logits=OLD, probs=probs)

  np.testing.assert_allclose(gradient(probs), sequence_gradient(), atol=1e-15)
  each = jax.vmap(gradient)(jnp.eye(15))
  covariance = (probs * (each**2).sum(axis=(1, 2))).sum() - (sequence_gradient() ** 2).sum()
  found = oracle.gradient_covariance(TREE, surrogate, THETA, REF, old_logits=OLD)
  np.testing.assert_allclose(covariance, found)


def test_expected_values():
  def error(old=None, **choice):
    estimate = objective.estimate(KLPenalty(**choice))
    value = oracle.expected_value(TREE, estimate, THETA, REF, old_logits=old)
    return float(value / oracle.sequence_kl(TREE, THETA, REF) - 1)

  np.testing.assert_allclose(error(estimator="k2"), 0.0578, atol=1e-4)
  np.testing.assert_allclose(error(estimator="k3"), 0.0, atol=1e-14)
  np.testing.assert_allclose(error(OLD, estimator="k1"), 0.0256, atol=1e-4)
  loss = {"placement": "loss", "estimator": "k3", "old": OLD}
  np.testing.assert_allclose(error(**loss, credit="token"), -0.0110, atol=1e-4)
  np.testing.assert_allclose(error(**loss, correction="prefix"), 0.0, atol=1e-14)


@pytest.mark.parametrize("penalty", [KLPenalty(), KLPenalty("both", "exact")], ids=str)
def test_what_is_excluded_weighs_nothing_and_sends_no_nan(penalty):
  pi, ref = THETA.copy(), REF.copy()
  pi[0, 1] = ref[2, 0] = -np.inf  # state 2 is the prefix '1', which pi never reaches
  ref[1, 2] = pi[1, 2] = -np.inf  # both exclude it
  almost = np.maximum(pi, -60.0), np.maximum(ref, -50.0)
  surrogate = objective.surrogate(penalty)
  for fn in (
    jax.value_and_grad(lambda x, y: oracle.sequence_kl(TREE, x, y)),
    jax.value_and_grad(lambda x, y: oracle.token_kl(TREE, x, y)),
    lambda x, y: oracle.expected_gradient(TREE, surrogate, x, y),
    lambda x, y: oracle.gradient_covariance(TREE, surrogate, x, y),
    lambda x, y: oracle.expected_gradient(TREE, SEQUENCE("k2"), x, y),
    jax.value_and_grad(lambda x, y: oracle.entropy(TREE, x)),
  ):
    for found, limit in zip(*(jax.tree.leaves(fn(*xs)) for xs in ((pi, ref), almost)), strict=True):
      np.testing.assert_allclose(found, limit, atol=1e-12)
  assert oracle.sequence_kl(TREE, THETA, ref) == np.inf


def test_fixed_points():
  penalties = [
    *(KLPenalty("reward", k) for k in ("k1", "exact")),
    *(KLPenalty("loss", k, credit="token") for k in ("k2", "k3")),
    KLPenalty("both", "exact"),
  ]

  @jax.jit
  def ascent():
    surrogates = [objective.surrogate(penalty) for penalty in penalties]
    logits = oracle.fixed_points(TREE, surrogates, REF, SCORES, beta=0.5)

    def j(x):
      return oracle.expected_score(TREE, x, SCORES) - 0.5 * oracle.sequence_kl(TREE, x, REF)

    return logits, jax.vmap(j)(logits)

  logits, j = ascent()
  np.testing.assert_allclose(j, [0.659725, 0.187989, 0.652137, 0.640936, 0.659725], atol=1e-6)
  optimum = oracle.optimal_policy(TREE, REF, SCORES, beta=0.5)
  for row in (0, 4):
    np.testing.assert_allclose(softmax(logits[row]), softmax(optimum.logits), atol=1e-9)
  one_hot = np.exp(oracle.log_probs(TREE, logits[1]))
  assert TREE.tokens[one_hot.argmax()].tolist() == [1, 2, 0] and one_hot.max() > 1 - 1e-6


def test_the_fixed_point_of_k3_as_a_loss_is_the_optimum_under_the_forward_kl():
  ref = np.array([0.4, 0.3, 0.2, 0.1])
  surrogate = objective.surrogate(KLPenalty("loss", "k3", credit="token"))
  logits = oracle.fixed_point(
    oracle.make_tree(4, 1), surrogate, np.log(ref)[None], np.arange(4.0), beta=1.0
  )
  probs, _ = bandits.optimal_under("forward", ref, np.arange(4.0), beta=1.0)
  np.testing.assert_allclose(softmax(logits[0]), probs, atol=1e-12)


def test_a_real_decoder_says_the_same_of_prefixes_as_of_completions():
  policy = policy_model(
    DecoderConfig(
      vocab_size=4,
      width=16,
      num_layers=1,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      mlp_dim=32,
      max_len=16,
    )
  )
  params = jax.tree.map(lambda x: 10 * x, jax.jit(policy.init)(jax.random.key(0)))
  tree, prompt = oracle.make_tree(4, 3, eos_id=1), np.array([2, 0], np.int32)
  num_rows = len(tree.tokens)
  rollout = Rollout(
    tokens=np.concatenate([np.tile(prompt, (num_rows, 1)), tree.tokens], axis=1),
    prompt_mask=np.ones((num_rows, 2), bool),
    completion_mask=tree.mask,
    finished=tree.mask[:, -1],
    old_log_probs=None,
    sampler_log_probs=None,
  )
  weights = np.cos(np.arange(num_rows * 3.0, dtype=np.float32)).reshape(num_rows, 3)

  def from_tree(params):
    logits = oracle.decoder_logits(policy, params, tree, prompt)
    log_probs = oracle.token_log_probs(tree, logits)
    return (weights * log_probs).sum(), (log_probs, oracle.log_probs(tree, logits))

  def from_completions(params):
    log_probs = completions.log_probs(policy, params, rollout, temperature=1.0)
    log_probs = ops.zero_padding(log_probs, tree.mask)
    return (weights * log_probs).sum(), (log_probs, log_probs.sum(axis=1))

  found, expected = (
    jax.jit(jax.value_and_grad(fn, has_aux=True))(params) for fn in (from_tree, from_completions)
  )
  for x, y in zip(jax.tree.leaves(found[0][1]), jax.tree.leaves(expected[0][1]), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
  for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  log_probs = found[0][1][1]
  np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, atol=1e-5)
  assert log_probs.max() - log_probs.min() > 1  # far from uniform
  other = dataclasses.replace(policy, config=dataclasses.replace(policy.config, vocab_size=5))
  with pytest.raises(UserError, match="5 tokens and the tree 4"):
    oracle.decoder_logits(other, params, tree, prompt)
