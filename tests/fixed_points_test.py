"""Where training ends: the learner, with a table as the policy, against the predicted policy.

The recipe is stochastic: completions are sampled from the table, Adam's learning rate decays, and
the policy is the mean of the last logits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import with_branches

from experiments import ppo
from klrl import ops
from klrl.algorithm import learner
from klrl.algorithm.objective import KLPenalty
from klrl.exact import oracle
from klrl.models import Policy, ScalarModel
from klrl.sampling import Rollout

BATCH, NUM_ITERATIONS, NUM_AVERAGED = 128, 1000, 300
MAX_TOTAL_VARIATION = 0.005


class Problem(NamedTuple):
  tree: oracle.Tree
  ref_logits: np.ndarray  # [S, V]
  scores: np.ndarray  # [N]
  beta: float


def make_problem(name) -> Problem:
  """Returns CAT-B, a single choice of four, or TREE-A, three tokens of three with an EOS."""
  if name == "cat_b":
    ref_logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    return Problem(oracle.make_tree(4, 1), ref_logits, np.arange(4.0), 1.0)
  s, a = np.arange(1.0, 8.0)[:, None], np.arange(1.0, 4.0)[None]
  ref_logits = 0.9 * np.cos(1.1 * s - 0.7 * a)
  return Problem(oracle.make_tree(3, 3, eos_id=2), ref_logits, np.sin(1.0 + np.arange(15)), 0.5)


def tables(tree) -> tuple[Policy, ScalarModel]:
  """Returns a policy with params [S, V], its logits, and a value model with params [S].

  The prompt is one BOS token; what it is does not matter.
  """
  children = jnp.maximum(tree.children, 0)

  def states(tokens):
    """Returns [B, 1 + T], the prefix that ends with each token."""
    each = [jnp.zeros_like(tokens[:, 0])]
    for t in range(1, tokens.shape[1]):
      each.append(children[each[-1], tokens[:, t]])
    return jnp.stack(each, axis=1)

  @with_branches
  def look_up(params, tokens, mask):
    return params[states(tokens)]

  def unembedding(params):
    return jnp.eye(tree.vocab_size)

  nothing = dict.fromkeys(("config", "init"))
  unused = dict.fromkeys(("prefill", "unstack", "empty_cache", "grow", "decode"))
  policy = Policy(**nothing, **unused, hidden=look_up, unembedding=unembedding)
  return policy, ScalarModel(**nothing, head=None, values=look_up, scores=None)


def draw(tree, logits, key) -> tuple[jax.Array, Rollout]:
  """Returns (rows of the tree, the rollout of these completions), drawn exactly.

  The draw is systematic: each completion comes as often as it is likely, up to one, which an eighth
  of the rows and a third of the iterations make up for.
  """
  places = (jnp.arange(BATCH) + jax.random.uniform(key)) / BATCH
  upto = jnp.cumsum(jnp.exp(oracle.log_probs(tree, logits)))
  rows = jnp.minimum(jnp.searchsorted(upto, places), len(upto) - 1)
  mask = jnp.asarray(tree.mask)[rows]
  log_probs = oracle.token_log_probs(tree, logits)[rows]
  bos = jnp.zeros((BATCH, 1), jnp.int32)
  return rows, Rollout(
    tokens=jnp.concatenate([bos, jnp.asarray(tree.tokens)[rows]], axis=1),
    prompt_mask=bos == 0,
    completion_mask=mask,
    finished=mask[:, 0],
    old_log_probs=log_probs,
    sampler_log_probs=log_probs,
  )


def train(problem, penalty, *, num_iterations=NUM_ITERATIONS, **settings):
  """Returns [N], the probabilities of the completions after training."""
  tree, ref_logits, scores, beta = problem
  ref_logits, scores = jnp.float32(ref_logits), jnp.float32(scores)
  config = ppo.Config(
    **{f"kl_{name}": x for name, x in penalty._asdict().items()},
    **{
      "beta": beta,
      "batch_size": BATCH,
      "num_epochs": 1,
      "num_minibatches": 1,
      "trust_region": "none",
      "gae_lambda": 1.0,
      "whiten_advantages": False,
      "loss_aggregation": "sequence_mean_token_sum",
      "max_grad_norm": np.inf,
      "value_clip_eps": np.inf,
      "kl_every": 0,
      **settings,
    },
  )
  policy, value_model = tables(tree)
  update = learner.make_update_fn(config.algorithm(), policy, value_model, policy)
  params = {"policy": ref_logits, "value": jnp.zeros(len(ref_logits))}
  state = learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(0))
  state = state._replace(controller=ops.ControllerState(jnp.float32(beta), jnp.int32(0)))
  frozen = {"reference": ref_logits, "base": {}}

  def iteration(state, key):
    learning_rate = 0.05 / (1 + 8 * state.iteration / num_iterations)
    rows, rollout = draw(tree, state.params["policy"], key)
    state = state._replace(hypers=state.hypers._replace(learning_rate=learning_rate))
    state, _ = update(state, frozen, rollout, scores[rows])
    return state, state.params["policy"]

  keys = jax.random.split(jax.random.key(1), num_iterations)
  _, logits = jax.jit(functools.partial(jax.lax.scan, iteration))(state, keys)
  return np.exp(oracle.log_probs(tree, logits[-NUM_AVERAGED:].mean(axis=0)))


def total_variation(probs, other):
  return 0.5 * np.abs(probs - other).sum()


def optimum(problem):
  tree, ref_logits, scores, beta = problem
  logits = oracle.optimal_policy(tree, ref_logits, scores, beta=beta).logits
  return np.exp(oracle.log_probs(tree, logits))


K1 = KLPenalty("reward", "k1", "none", "sequence")
WEIGHTED_EXACT = KLPenalty("loss", "exact", "prefix", "sequence")
BOTH_EXACT = KLPenalty("both", "exact", "none", "sequence")
# ref * exp(r / beta) / Z and beta * ref / (lambda - r), lambda = 3.176595.
CAT_B_OPTIMUM = [0.085073, 0.173439, 0.314304, 0.427184]
CAT_B_FORWARD = [0.125921, 0.137830, 0.169982, 0.566267]


@pytest.mark.parametrize(
  ("penalty", "expected"),
  [
    (K1, CAT_B_OPTIMUM),
    (KLPenalty("loss", "k2", "none", "token"), CAT_B_OPTIMUM),
    (KLPenalty("loss", "k3", "prefix", "sequence"), CAT_B_OPTIMUM),
    (BOTH_EXACT, CAT_B_OPTIMUM),
    (KLPenalty("loss", "k3", "none", "token"), CAT_B_FORWARD),
  ],
  ids=lambda x: str(x) if isinstance(x, KLPenalty) else "",
)
def test_a_single_choice_ends_where_the_penalty_leads(penalty, expected):
  probs = train(make_problem("cat_b"), penalty)
  assert total_variation(probs, expected) < MAX_TOTAL_VARIATION, probs


@pytest.mark.parametrize("penalty", [K1, BOTH_EXACT, WEIGHTED_EXACT], ids=str)
def test_completions_of_several_tokens_end_at_the_optimum(penalty):
  problem = make_problem("tree_a")
  probs = train(problem, penalty)
  assert total_variation(probs, optimum(problem)) < MAX_TOTAL_VARIATION, probs


@pytest.mark.parametrize("penalty", [K1, WEIGHTED_EXACT], ids=str)
def test_eight_steps_per_rollout_end_at_the_optimum_too(penalty):
  # For K1 as well: at the optimum score less KL is the same for all completions, so that its
  # advantages vanish one by one, and with them what is wrong about its later steps.
  problem = make_problem("tree_a")
  probs = train(problem, penalty, num_epochs=2, num_minibatches=4)
  assert total_variation(probs, optimum(problem)) < MAX_TOTAL_VARIATION, probs


def test_a_thousand_steps_on_one_rollout_collapse_under_a_stale_kl_and_not_under_one_of_its_own():
  problem, settings = make_problem("cat_b"), {"num_iterations": 1, "num_epochs": 1000}
  # The reference sampled, so that the KL in the reward is zero and stays so: nothing holds.
  assert train(problem, K1, **settings)[3] > 0.99
  probs = train(problem, WEIGHTED_EXACT, **settings)
  assert total_variation(probs, optimum(problem)) < 0.05, probs  # 1024 samples' own optimum
