"""Exact sums against loops over completions, published numbers of one tree, and a real decoder.

TREE-A is the tree that the numbers here belong to; its policies are far from symmetric.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.algorithm import completions, kl_terms
from klrl.algorithm.objective import KLPenalty
from klrl.errors import UserError
from klrl.exact import bandits, oracle
from klrl.models import DecoderConfig, policy_model
from klrl.sampling import Rollout

TREE = oracle.make_tree(3, 3, eos_id=2)
_S, _A = np.arange(1.0, 8.0)[:, None], np.arange(1.0, 4.0)[None]
THETA = 0.9 * np.sin(1.7 * _S + 2.3 * _A)
REF = 0.9 * np.cos(1.1 * _S - 0.7 * _A)
OLD = THETA + 0.6 * np.sin(3.1 * _S * _A)
SCORES = np.sin(np.arange(1.0, 16.0))
TREES = [(3, 3, 2), (3, 4, 0), (2, 5, None), (4, 1, None), (3, 1, 1), (1, 3, None)]


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


@functools.cache
def sequence_gradient():
  return np.asarray(jax.jit(jax.grad(lambda x: oracle.sequence_kl(TREE, x, REF)))(THETA))


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
  last = np.arange(len(tree.tokens)), tree.mask.sum(axis=1) - 1
  ends = tree.leaves[tree.states[last], tree.tokens[last]]
  np.testing.assert_array_equal(ends, np.arange(len(tree.tokens)))


@pytest.mark.parametrize("arguments", [(0, 3, None), (3, 0, None), (3, 3, 3), (3, 3, -1)])
def test_an_impossible_tree_is_refused(arguments):
  with pytest.raises(UserError, match=f"vocab_size={arguments[0]}"):
    oracle.make_tree(*arguments[:2], eos_id=arguments[2])


@pytest.mark.parametrize("shape", TREES)
def test_every_exact_quantity_equals_a_loop_over_completions(shape):
  tree = oracle.make_tree(*shape[:2], eos_id=shape[2])
  pi, other = random_policies(tree, 2)
  rows, states = enumerated(*shape), prefixes(*shape)
  scores, beta = np.cos(np.arange(len(rows))), 0.7

  @jax.jit
  def exact(pi, other):
    optimum = oracle.optimal_policy(tree, other, scores, beta=beta)
    return {
      "token_log_probs": oracle.token_log_probs(tree, pi),
      "log_probs": oracle.log_probs(tree, pi),
      "visits": oracle.visits(tree, pi),
      "sequence_kl": oracle.sequence_kl(tree, pi, other),
      "token_kl": oracle.token_kl(tree, pi, other),
      "entropy": oracle.entropy(tree, pi),
      "expected_length": oracle.expected_length(tree, pi),
      "expected_score": oracle.expected_score(tree, pi, scores),
      "log_z": optimum.log_z,
      "log_optimum": oracle.log_probs(tree, optimum.logits),
      # What a policy lacks to the optimum is beta times its KL to it.
      "lack": optimum.values[0] - beta * oracle.sequence_kl(tree, pi, optimum.logits),
    }

  token, visited = np.zeros(tree.tokens.shape), np.zeros(len(states))
  log_q = np.zeros(len(rows))
  for n, y in enumerate(rows):
    for t, a in enumerate(y):
      s = states.index(y[:t])
      token[n, t] = np.log(softmax(pi)[s, a])
      log_q[n] += np.log(softmax(other)[s, a])
    for t in range(len(y)):
      visited[states.index(y[:t])] += np.exp(token[n].sum())
  log_p = token.sum(axis=1)
  p, kl = np.exp(log_p), (np.exp(log_p) * (log_p - log_q)).sum()
  log_z = np.log((np.exp(log_q + scores / beta)).sum())
  expected = {
    "token_log_probs": token,
    "log_probs": log_p,
    "visits": visited,
    "sequence_kl": kl,
    "token_kl": kl,
    "entropy": -(p * log_p).sum(),
    "expected_length": (p * [len(y) for y in rows]).sum(),
    "expected_score": (p * scores).sum(),
    "log_z": log_z,
    "log_optimum": log_q + scores / beta - log_z,
    "lack": (p * scores).sum() - beta * kl,
  }
  np.testing.assert_allclose(p.sum(), 1.0)
  for name, found in exact(pi, other).items():
    np.testing.assert_allclose(found, expected[name], rtol=1e-11, atol=1e-13, err_msg=name)


def test_numbers_of_tree_a():
  kl = jax.jit(lambda x, y: oracle.sequence_kl(TREE, x, y))
  found = [kl(THETA, REF), kl(REF, THETA), kl(THETA, OLD), kl(OLD, REF)]
  np.testing.assert_allclose(found, [0.496048225, 0.628468688, 0.009629624, 0.50872978], atol=1e-9)
  optimum = jax.jit(lambda ref: oracle.optimal_policy(TREE, ref, SCORES, beta=0.5))(REF)
  np.testing.assert_allclose(
    optimum.values[:3], [0.6597246844, 0.4749414189, 0.7956723639], atol=1e-9
  )
  np.testing.assert_allclose(softmax(optimum.logits[0]), [0.252092, 0.493788, 0.25412], atol=1e-6)
  np.testing.assert_allclose(kl(optimum.logits, REF), 0.2583684928, atol=1e-9)


def test_gradient_of_the_sequence_kl_by_finite_differences():
  kl = jax.jit(lambda x: oracle.sequence_kl(TREE, x, REF))
  for direction in random_policies(TREE, 3, seed=1):
    slope = (kl(THETA + 1e-5 * direction) - kl(THETA - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose((sequence_gradient() * direction).sum(), slope, rtol=1e-8)


def test_the_token_kl_and_the_future_make_the_gradient_of_the_sequence_kl():
  def future(terms):
    to_go = jnp.cumsum(terms.exact_kl[:, ::-1], axis=1)[:, ::-1]
    return terms.log_probs * jax.lax.stop_gradient(to_go - terms.exact_kl)

  token = jax.jit(jax.grad(lambda x: oracle.token_kl(TREE, x, REF)))(THETA)
  rest = jax.jit(lambda x: oracle.expected_gradient(TREE, future, x, REF))(THETA)
  assert np.abs(rest).max() > 0.1
  np.testing.assert_allclose(token + rest, sequence_gradient(), atol=1e-15)


def test_the_token_target_at_the_old_policys_prefixes():
  loss = kl_terms.surrogate(KLPenalty("loss", "exact", credit="token"))
  found = jax.jit(lambda x: oracle.expected_gradient(TREE, loss, x, REF, old_logits=OLD))(THETA)
  target = jax.jit(jax.grad(lambda x: oracle.token_kl(TREE, x, REF, prefix_logits=OLD)))(THETA)
  np.testing.assert_allclose(found, target, atol=1e-15)


def test_the_frontier_of_a_bandit_and_its_slope():
  bandit, ref = oracle.make_tree(4, 1), np.log([[0.4, 0.3, 0.2, 0.1]])
  scores, kls = oracle.frontier(bandit, ref, np.arange(4.0), [4.0, 1.0, 0.25, 1.001, 0.999])
  np.testing.assert_allclose(scores[:3], [1.266192106, 2.083598836, 2.962687489], atol=1e-9)
  np.testing.assert_allclose(kls[:3], [0.033889641, 0.535642903, 2.116364709], atol=1e-9)
  np.testing.assert_allclose((scores[3] - scores[4]) / (kls[3] - kls[4]), 1.0, atol=1e-6)


penalty, whole = KLPenalty, bandits.sequence_surrogate
ON_POLICY = {  # relative error to the gradient of the sequence KL, trace of the covariance
  penalty("reward", "k1"): (0.0, 0.90807),
  penalty("reward", "exact"): (1.499408, 0.35284),
  # Both descend the token KL; a mean of 0 at each prefix need not be less variance.
  penalty("reward", "k1", credit="token"): (0.692839, 0.35626),
  penalty("reward", "centred", credit="token"): (0.692839, 0.53275),
  penalty("loss", "k3", credit="token"): (0.665463, 0.90348),
  penalty("both", "exact"): (0.0, 0.24809),
  whole("k3"): (0.813072, 4.79839),
  whole("k1", "ratio", in_reward=True): (0.0, 1.10696),
}
OFF_POLICY = {
  penalty("loss", "k3", "token", "token"): (0.695655, 0.33684),
  penalty("loss", "exact", "prefix"): (0.0, 0.27220),
  whole("k3", "ratio"): (0.0, 1.21485),
  whole("k2", "stopped_ratio"): (0.0, 1.21485),
  whole("k2", "ratio"): (0.5358, 1.54859),
  whole("stale_k1", "ratio"): (0.169119, 1.34186),
  whole("k1", "ratio", in_reward=True, cap=2.0): (0.009879, 1.18278),
}


@pytest.mark.parametrize(("table", "old"), [(ON_POLICY, None), (OFF_POLICY, OLD)])
def test_expected_gradients_and_covariances_of_tree_a(table, old):
  surrogates = [kl_terms.surrogate(x) if isinstance(x, KLPenalty) else x for x in table]

  @jax.jit
  def found(pi):
    few = [oracle.expected_gradient(TREE, f, pi, REF, old_logits=old) for f in surrogates[1:4]]
    return *oracle.gradient_moments(TREE, surrogates, pi, REF, old_logits=old), jnp.stack(few)

  means, covariances, few = found(THETA)
  np.testing.assert_allclose(few, means[1:4], atol=1e-15)
  truth = sequence_gradient()
  errors = [np.linalg.norm(mean - truth) / np.linalg.norm(truth) for mean in means]
  expected = np.array(list(table.values()))
  np.testing.assert_allclose(errors, expected[:, 0], atol=1e-6)
  np.testing.assert_allclose(covariances, expected[:, 1], atol=1e-5)


def careless(terms):
  """Returns a surrogate that reads the padding and writes into it."""
  return terms.log_probs.sum(axis=-1, keepdims=True) * (2.0 + terms.exact_kl)


@pytest.mark.parametrize("surrogate", [careless, whole("k3", "ratio")])
def test_moments_are_those_of_one_completion_at_a_time(surrogate):
  @jax.jit
  def ways(pi, old):
    def gradient(probs):
      return oracle.expected_gradient(TREE, surrogate, pi, REF, old_logits=old, probs=probs)

    probs = jnp.exp(oracle.log_probs(TREE, old))
    each = jax.vmap(gradient)(jnp.eye(15))
    mean = (probs[:, None, None] * each).sum(axis=0)
    covariance = (probs * (each**2).sum(axis=(1, 2))).sum() - (mean**2).sum()
    moments = oracle.gradient_moments(TREE, [surrogate], pi, REF, old_logits=old)
    return (mean, gradient(None), moments[0][0]), (covariance, moments[1][0])

  for same in ways(THETA, OLD):
    for way in same[1:]:
      np.testing.assert_allclose(way, same[0], atol=1e-14)


def test_expected_values():
  choices = {  # value over KL(pi || ref) - 1
    (KLPenalty(estimator="k2"), None): 0.0578,
    (KLPenalty(estimator="k3"), None): 0.0,
    (KLPenalty(estimator="k1"), "old"): 0.0256,
    (KLPenalty("loss", "k3", credit="token"), "old"): -0.0110,
    (KLPenalty("loss", "k3", "prefix"), "old"): 0.0,
  }

  @jax.jit
  def values(pi):
    return [
      oracle.expected_value(TREE, kl_terms.estimate(x), pi, REF, old_logits=old and OLD)
      for x, old in choices
    ]

  found = np.array(values(THETA)) / 0.49604822498838763 - 1
  np.testing.assert_allclose(found, list(choices.values()), atol=6e-5)


def test_terms_tell_the_policies_apart_and_only_the_current_one_gets_gradient():
  @jax.jit
  def found(*logits):
    def totals(*logits):
      of_tokens = [x for x in oracle.terms(TREE, *logits) if x is not None]
      return [x.sum() for x in of_tokens if x.dtype != bool]

    return oracle.terms(TREE, *logits), jax.jacobian(totals, argnums=(0, 1, 2))(*logits)

  drawn, gradients = found(THETA, OLD, REF)
  of_old, _ = found(OLD, OLD, REF)
  np.testing.assert_allclose(drawn.old_log_probs, of_old.log_probs, rtol=1e-12)
  np.testing.assert_allclose(drawn.old_exact_kl, of_old.exact_kl, rtol=1e-12)
  reached = np.array([[np.abs(x).max() > 0.01 for x in by_policy] for by_policy in gradients])
  # In the order of TokenTerms: log_probs, old, ref, exact_kl, old.
  np.testing.assert_array_equal(reached, np.array([[1, 0, 0, 1, 0], [0] * 5, [0] * 5]).T > 0)


def test_what_is_excluded_weighs_nothing_and_sends_no_nan():
  pi, ref = THETA.copy(), REF.copy()
  pi[0, 1] = ref[2, 0] = -np.inf  # state 2 is the prefix '1', which pi never reaches
  ref[1, 2] = pi[1, 2] = -np.inf  # both exclude it
  surrogates = [*map(kl_terms.surrogate, [KLPenalty(), KLPenalty("both", "exact")]), whole("k2")]

  @jax.jit
  def everything(pi, ref):
    return [
      jax.value_and_grad(fn)(pi)
      for fn in (
        lambda x: oracle.sequence_kl(TREE, x, ref),
        lambda x: oracle.token_kl(TREE, x, ref),
        lambda x: oracle.entropy(TREE, x),
      )
    ] + [
      oracle.expected_gradient(TREE, surrogates[1], pi, ref),
      oracle.gradient_moments(TREE, surrogates, pi, ref),
    ]

  found = everything(pi, ref)
  limit = everything(np.maximum(pi, -60.0), np.maximum(ref, -50.0))
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(limit), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-12)
  assert everything(THETA, ref)[0][0] == np.inf


def test_fixed_points():
  penalties = [
    *(KLPenalty("reward", k) for k in ("k1", "exact", "k3")),
    *(KLPenalty("loss", k, credit="token") for k in ("k2", "k3")),
  ]

  @jax.jit
  def ascent(ref):
    surrogates = [kl_terms.surrogate(penalty) for penalty in penalties]
    logits = oracle.fixed_points(TREE, surrogates, ref, SCORES, beta=0.5)

    def j(x):
      return oracle.expected_score(TREE, x, SCORES) - 0.5 * oracle.sequence_kl(TREE, x, ref)

    log_probs = jax.vmap(lambda x: oracle.log_probs(TREE, x))(logits)
    return jax.vmap(j)(logits), log_probs, oracle.optimal_policy(TREE, ref, SCORES, beta=0.5).logits

  j, log_probs, optimum = map(np.asarray, ascent(REF))
  np.testing.assert_allclose(j[[0, 1, 3, 4]], [0.659725, 0.187989, 0.652137, 0.640936], atol=1e-6)
  np.testing.assert_allclose(log_probs[0], oracle.log_probs(TREE, optimum), atol=1e-9)
  # The exact KL in the reward runs into a vertex; k3 in the reward loses support as far as it may.
  assert TREE.tokens[log_probs[1].argmax()].tolist() == [1, 2, 0]
  assert log_probs[1].max() > -1e-6
  assert -3 * 61 < log_probs[2].min() < -60


def test_plain_and_natural_ascent_of_k3_in_the_reward_end_apart():
  bandit, ref = oracle.make_tree(4, 1), np.log([[0.4, 0.3, 0.2, 0.1]])
  surrogate = kl_terms.surrogate(KLPenalty("reward", "k3"))

  def ascent(beta=1.0, **options):
    fn = lambda ref: oracle.fixed_point(  # noqa: E731
      bandit, surrogate, ref, np.arange(4.0), beta=beta, **options
    )
    return np.asarray(jax.jit(fn)(ref))

  np.testing.assert_allclose(softmax(ascent(natural=False)), [[0, 0, 0, 1]], atol=1e-9)
  np.testing.assert_allclose(softmax(ascent()), [[0, 0, 0.307069, 0.692931]], atol=1e-6)
  step = ascent(beta=1e-3, num_steps=1) - ref  # no logit moves by more than 1
  np.testing.assert_allclose(step.max() - step.min(), 2.0)


def test_a_real_decoder_says_the_same_of_prefixes_as_of_completions():
  sizes = {"width": 16, "mlp_dim": 32, "head_dim": 8, "num_heads": 2, "num_kv_heads": 2}
  policy = policy_model(DecoderConfig(vocab_size=4, num_layers=1, max_len=16, **sizes))
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
    return (weights * log_probs).sum(), log_probs

  def from_completions(params):
    log_probs = completions.log_probs(policy, params, rollout, temperature=1.0)
    log_probs = ops.zero_padding(log_probs, tree.mask)
    return (weights * log_probs).sum(), log_probs

  (_, found), gradient = jax.jit(jax.value_and_grad(from_tree, has_aux=True))(params)
  (_, expected), truth = jax.jit(jax.value_and_grad(from_completions, has_aux=True))(params)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
    # Sums over thousands of rows, of up to 32 in size, in another order.
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)
  log_probs = found.sum(axis=1)
  np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, atol=1e-5)
  assert log_probs.max() - log_probs.min() > 1  # far from uniform
  other = dataclasses.replace(policy, config=dataclasses.replace(policy.config, vocab_size=5))
  with pytest.raises(UserError, match="5 tokens and the tree 4"):
    oracle.decoder_logits(other, params, tree, prompt)


def test_the_exact_kl_of_prefixes_may_vary_more_than_k1_over_completions():
  tree = oracle.make_tree(2, 2)
  with jax.enable_x64(True):
    # '' is certain of nothing; after 0 pi is certain, which the reference finds 1/e likely.
    logits = jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]))
    likely = jnp.exp(-1.0)
    ref_logits = jnp.log(jnp.array([[0.8, 0.2], [likely, 1 - likely], [0.5, 0.5]]))
    found = oracle.terms(tree, logits, logits, ref_logits)
    probs = np.exp(oracle.log_probs(tree, logits))
    drawn = probs > 0  # what pi excludes has no k1

  def moments(per_token):
    sums = np.where(tree.mask, per_token, 0.0).sum(axis=1)[drawn]
    mean = probs[drawn] @ sums
    return mean, probs[drawn] @ (sums - mean) ** 2

  means, variances = zip(
    moments(np.asarray(found.exact_kl)),
    moments(np.asarray(found.log_probs) - np.asarray(found.ref_log_probs)),
    strict=True,
  )
  np.testing.assert_allclose(means, 0.7231, atol=1e-4)
  np.testing.assert_allclose(variances, [0.25, 0.0373], atol=1e-4)
