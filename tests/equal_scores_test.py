"""Scores that are all equal have nothing to say: no parameter moves, whatever the optimizer.

Adam makes a whole step of any gradient above 1e-8, so what is left of the mean's rounding must be
exactly 0 and not small.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_decoders import BAG, bag_params

from experiments import grpo, reinforce
from klrl import ops
from klrl.algorithm import diagnostics, learner, memory, preparation
from klrl.sampling import Rollout

MAX_LEN, VOCAB = 5, 7
# In float32 none of the last five is the mean of itself for every number of them.
SCORES = (0.0, 1.0, 1 / 3, -0.1, 7.3, 1000.7)
PLAIN = {"kl_placement": "none", "kl_every": 0, "learning_rate": 1e-2}
DAPO = {"clip_eps_high": 0.28, "oversampling": 2, "overlong_buffer": 1}
RULES = {
  "grpo of 7": grpo.Config(**PLAIN, batch_size=14, group_size=7, num_epochs=2),
  "dapo": grpo.Config(**PLAIN, **DAPO, batch_size=12, group_size=6),
  "whitened": grpo.Config(
    **PLAIN, batch_size=11, num_minibatches=1, group_size=1, advantage="returns",
    whiten_advantages=True,
  ),
  "batch_mean, normalised": reinforce.Config(**PLAIN, batch_size=22, normalise_scores=True),
}  # fmt: skip


def make_params():
  return bag_params(VOCAB, seed=0)


def make_rollout(num_rows, max_length=MAX_LEN - 1):
  """Returns completions of several lengths, none of which reaches the limit by default."""
  rng = np.random.default_rng(1)
  mask = np.arange(MAX_LEN) < rng.integers(1, max_length + 1, (num_rows, 1))
  old = np.where(mask, rng.normal(-2, 0.1, mask.shape), 0.0).astype(np.float32)
  tokens = rng.integers(1, VOCAB, (num_rows, 2 + MAX_LEN))
  prompt_mask, finished = np.ones((num_rows, 2), bool), np.ones(num_rows, bool)
  return Rollout(*map(jnp.asarray, (tokens, prompt_mask, mask, finished, old, old)))


@functools.cache
def compiled(config):
  return jax.jit(learner.make_update_fn(config.algorithm(), BAG, None, BAG))


def after(config, scores, num_iterations=2):
  """Returns the state after iterations that all have these scores."""
  state = learner.init_state(
    config.algorithm(), config.hypers(), {"policy": make_params()}, jax.random.key(2)
  )
  frozen = {"reference": make_params(), "base": {}}
  for _ in range(num_iterations):
    state, _ = compiled(config)(state, frozen, make_rollout(len(scores)), jnp.float32(scores))
  return state


@pytest.mark.parametrize("name", RULES)
def test_equal_scores_move_no_parameter(name):
  config = RULES[name]
  num_rows = config.algorithm().samples
  for score in SCORES:
    state = after(config, np.full(num_rows, score))
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), state.params["policy"], make_params())
    assert max(jax.tree.leaves(moved)) == 0, score
    assert (
      max(jnp.abs(x).max() for x in jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))) == 0
    )
  others = after(config, np.arange(num_rows) % 2 * 1.0, 1)
  assert not np.array_equal(others.params["policy"]["unembedding"], make_params()["unembedding"])


def normalised(stats, scores):
  return memory.normalised(stats, scores, jnp.ones(scores.shape, bool))


def test_a_difference_of_a_thousandth_is_one_whatever_the_size_of_the_scores():
  @jax.jit
  def found(scores):
    first, *_, std = normalised(memory.no_scores(), scores)
    whitened = ops.whiten(scores, jnp.ones(4, bool))
    return ops.group_relative(scores), whitened, std, normalised(first, scores)[2]

  for score in SCORES:
    scores = score + np.array([0, 1e-3, 2e-3, 1e-3])
    # Near 1000.7 the difference itself is rounded to 6e-5.
    tolerance = 0.1 if score > 1000 else 0.01
    relative, whitened, *stds = found(jnp.float32(scores))
    expected = np.array([-1, 0, 1, 0]) / (np.sqrt(2 / 3) + 0.1)
    np.testing.assert_allclose(relative, expected, atol=tolerance, err_msg=str(score))
    assert jnp.abs(whitened).max() > 1, score
    np.testing.assert_allclose(stds, np.std(scores), rtol=tolerance, err_msg=str(score))


def test_numbers_that_a_program_rounds_in_two_ways_are_equal():
  @jax.jit
  def found(twice):
    varied = jnp.concatenate([twice, twice[0] + jnp.arange(3.0)])
    _, kept, share = preparation.informative_groups(
      make_rollout(6), varied, jnp.ones(6, bool), group_size=3, batch_size=3
    )
    rules = ops.group_relative(twice), ops.leave_one_out(twice), ops.whiten(twice, twice == twice)
    return *rules, normalised(memory.no_scores(), twice)[1], kept - varied[3:], share - 0.5

  for score in SCORES:
    next_to_it = np.nextafter(np.float32(score), np.float32(1e9))
    for x in found(jnp.float32([score, next_to_it, score])):
      np.testing.assert_array_equal(x, np.zeros_like(x), err_msg=str(score))


def test_what_is_not_a_number_is_not_taken_for_an_equal_one():
  @jax.jit
  def found(scores):
    normal = normalised(memory.no_scores(), scores)[1]
    return ops.group_relative(scores), ops.deviation(scores), normal

  for bad in (np.nan, np.inf, -np.inf):
    for others in ([1.0, 2.0], [1.0, 1.0], [bad, bad]):
      assert not any(np.isfinite(x).all() for x in found(jnp.float32([bad, *others]))), others


def test_figures_of_equal_scores_have_no_spread():
  rollout = make_rollout(100)

  @jax.jit
  def found(score):
    returns = jnp.where(rollout.completion_mask, score, 0.0)
    explained = diagnostics.explained_variance(0 * returns, returns, rollout.completion_mask)
    return diagnostics.rollout_metrics(rollout, jnp.full(100, score))["score/std"][0], explained[1]

  for score in SCORES:
    assert found(jnp.float32(score)) == (0, 0), score
