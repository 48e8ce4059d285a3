"""A completion that no reward scores teaches nothing and is in no mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_decoders import BAG, BAG_VALUE, bag_params, bag_value_params

from experiments import grpo, ppo, reinforce
from klrl import ops
from klrl.algorithm import learner
from klrl.run.metrics import finalise
from klrl.sampling import Rollout

VOCAB, MAX_LEN, GROUPS, SIZE = 7, 4, 3, 4
ONE_STEP = {"num_epochs": 1, "num_minibatches": 1, "max_grad_norm": np.inf}
EXACT = {"kl_every": 1, "beta": 0.3}
CONFIGS = {
  "reinforce": lambda rows: reinforce.Config(**EXACT, batch_size=rows),
  "normalised": lambda rows: reinforce.Config(**EXACT, batch_size=rows, normalise_scores=True),
  "grpo": lambda rows: grpo.Config(**EXACT, **ONE_STEP, batch_size=rows, group_size=rows // GROUPS),
  "ppo": lambda rows: ppo.Config(**EXACT, **ONE_STEP, batch_size=rows),
}
SCORES = np.float32([[1.0, np.nan, 0.5, -2.0], [np.nan, 3.0, 1.0, 1.5], [0.1, 0.2, 0.3, np.nan]])


def make_rollout():
  rng = np.random.default_rng(1)
  mask = np.arange(MAX_LEN) < rng.integers(1, MAX_LEN + 1, (GROUPS * SIZE, 1))
  old = np.where(mask, rng.normal(-2, 0.1, mask.shape), 0.0).astype(np.float32)
  tokens = rng.integers(1, VOCAB, (GROUPS * SIZE, 2 + MAX_LEN))
  tokens[:, :2] = tokens[::SIZE, :2].repeat(SIZE, axis=0)  # A group has one prompt.
  prompt_mask, finished = np.ones((GROUPS * SIZE, 2), bool), np.ones(GROUPS * SIZE, bool)
  return Rollout(*map(jnp.asarray, (tokens, prompt_mask, mask, finished, old, old)))


def updated(config, rollout, scores):
  """Returns (state, figures) after one iteration."""
  params, value_model = {"policy": bag_params(VOCAB, seed=0)}, None
  if isinstance(config, ppo.Config):
    params["value"], value_model = bag_value_params(VOCAB, seed=1), BAG_VALUE
  algorithm = config.algorithm()
  state = learner.init_state(algorithm, config.hypers(), params, jax.random.key(2))
  update = jax.jit(learner.make_update_fn(algorithm, BAG, value_model, BAG))
  frozen = {"reference": bag_params(VOCAB, seed=3), "base": {}}
  state, metrics = update(state, frozen, rollout, jnp.asarray(scores))
  return state, finalise(metrics)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_with_abstentions_teaches_what_the_others_teach_alone(name):
  scored = ~np.isnan(SCORES.ravel())
  rollout, scores = make_rollout(), SCORES.ravel()
  state, figures = updated(CONFIGS[name](len(scores)), rollout, scores)
  others = jax.tree.map(lambda x: x[scored], rollout)
  expected, alone = updated(CONFIGS[name](scored.sum()), others, scores[scored])
  first, expected_first = (optax.tree.get(x.opt_state, "mu") for x in (state, expected))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), first, expected_first)
  assert max(jnp.abs(x).max() for x in jax.tree.leaves(first)) > 1e-3
  # Length and KL to the reference are of all that was sampled, and so is the KL in the objective.
  sampled = ("rollout/", "kl/ref", "objective/", "controller/beta")
  names = [key for key in figures if not key.startswith(sampled)]
  assert "score/mean" in names and "kl/old_k3" in names
  for key in names:
    assert figures[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
  difference = figures["objective/mean"] - (figures["score/mean"] - 0.3 * figures["kl/ref_k1"])
  assert abs(difference) < 1e-6


def test_where_all_rewards_abstain_nothing_moves_and_there_is_no_mean():
  config = CONFIGS["reinforce"](GROUPS * SIZE)
  state, figures = updated(config, make_rollout(), np.full(GROUPS * SIZE, np.nan, np.float32))
  before = bag_params(VOCAB, seed=0)
  jax.tree.map(np.testing.assert_array_equal, state.params["policy"], before)
  assert figures["score/mean"] is None and figures["objective/mean"] is None


def test_the_baseline_and_deviation_of_a_group_are_of_those_with_a_score():
  scores, mask = jnp.array([[1.0, 99.0, 3.0], [5.0, 7.0, 7.0]]), jnp.array([[1, 0, 1], [1, 0, 0]])
  scored = mask == 1
  np.testing.assert_allclose(ops.leave_one_out(scores, scored), [[-2, 0, 2], [0, 0, 0]])
  np.testing.assert_allclose(ops.group_centred(scores, scored), [[-1, 0, 1], [0, 0, 0]])
  relative = ops.group_relative(scores, scored)
  np.testing.assert_allclose(relative, [[-(0.5**0.5), 0, 0.5**0.5], [0, 0, 0]], atol=1e-4)
