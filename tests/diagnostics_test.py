"""Tests of what an iteration's figures are of: everything that was sampled, by one definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BAG, bag_params

from experiments import grpo
from klrl import ops
from klrl.algorithm import learner, memory
from klrl.algorithm.completions import log_probs
from klrl.sampling import Rollout

MAX_LEN, BATCH, BETA = 5, 12, 0.3
PARAMS, REFERENCE = bag_params(7, seed=0), bag_params(7, seed=1)
SETTINGS = {
  "shaped": {
    "length_penalty": 0.1,
    "overlong_buffer": 2,
    "missing_eos_penalty": 0.5,
    "normalise_scores": True,
  },
  "oversampled": {
    "oversampling": 2,
    "num_minibatches": 1,
    "controller": "dual_ascent",
    "kl_target": 0.1,
  },
}


def make_config(**changes):
  penalty = {"beta": BETA, "kl_every": 0}
  return grpo.Config(**{"batch_size": BATCH, "group_size": 6, **penalty, **changes})


def make_rollout(num_rows, seed=1):
  rng = np.random.default_rng(seed)
  mask = np.arange(MAX_LEN) < rng.integers(1, MAX_LEN + 1, (num_rows, 1))
  tokens, finished = rng.integers(1, 7, (num_rows, 2 + MAX_LEN)), rng.random(num_rows) < 0.5
  tokens[:, :2] = tokens[::6, :2].repeat(6, axis=0)  # A group has one prompt.
  rollout = Rollout(*map(jnp.asarray, (tokens, np.ones((num_rows, 2), bool), mask, finished, 0, 0)))
  old = jnp.where(mask, log_probs(BAG, PARAMS, rollout, temperature=1.0), 0.0)
  return rollout._replace(old_log_probs=old, sampler_log_probs=old)


def scores_of(num_rows, seed=0):
  scores = np.random.default_rng(seed).normal(size=num_rows).round(1)
  return scores if num_rows == BATCH else np.where(np.arange(num_rows) // 6 % 2, 0.7, scores)


def start(config):
  return learner.init_state(
    config.algorithm(), config.hypers(), {"policy": PARAMS}, jax.random.key(2)
  )


@functools.cache
def compiled(config):
  return jax.jit(learner.make_update_after_sampling_fn(config.algorithm(), BAG, None, BAG))


def update(config, rollout, scores, state=None):
  # Traced coefficients do not need a program of their own.
  fields = {field.name for field in dataclasses.fields(config)} & {*learner.Hypers._fields}
  traced = {name: getattr(make_config(), name) for name in fields}
  state, pairs = compiled(dataclasses.replace(config, **traced))(
    state or start(config), {"reference": REFERENCE, "base": {}}, rollout, jnp.float32(scores)
  )
  return state, {name: float(ops.divide(*pair)) for name, pair in pairs.items()}


def k1_of(rollout):
  """Returns [B], the log-ratio to the reference of each completion."""
  ref = log_probs(BAG, REFERENCE, rollout, temperature=1.0)
  return np.where(rollout.completion_mask, rollout.old_log_probs - ref, 0.0).sum(axis=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_objective_is_the_mean_score_less_beta_times_k1_of_all_that_was_sampled(name):
  config = make_config(**SETTINGS[name])
  rollout = make_rollout(BATCH * config.algorithm().oversampling)
  scores, k1 = scores_of(BATCH * config.algorithm().oversampling), k1_of(rollout)
  _, figures = update(config, rollout, scores)
  assert figures["score/mean"] == pytest.approx(scores.mean(), abs=1e-5)
  assert figures["kl/ref_k1"] == pytest.approx(k1.mean(), rel=1e-4)
  assert figures["objective/mean"] == pytest.approx((scores - BETA * k1).mean(), abs=1e-4)
  if config.algorithm().oversampling > 1:
    # The groups that are dropped are another half than the one that is kept.
    kept = (np.arange(len(scores)) // 6) % 2 == 0
    assert abs(k1[kept].mean() - k1.mean()) > 0.05
    assert figures["rollout/informative_groups"] == 0.5


def test_the_objective_of_a_late_rollout_is_of_its_own_scores():
  config = make_config(staleness=1, length_penalty=0.1)
  state = start(config)._replace(replay=memory.empty_replay(make_rollout(BATCH), 1))
  late, scores = make_rollout(BATCH, seed=1), scores_of(BATCH, seed=1)
  state, _ = update(config, late, scores, state)
  _, figures = update(config, make_rollout(BATCH, seed=2), scores, state)
  expected = (scores - BETA * k1_of(late)).mean()
  assert figures["objective/mean"] == pytest.approx(expected, abs=1e-4)
  assert figures["score/mean"] == pytest.approx(scores.mean(), abs=1e-5)


def test_oversampling_trains_on_what_it_keeps_as_if_nothing_else_had_been_sampled():
  config = make_config(**SETTINGS["oversampled"])
  rollout, scores = make_rollout(2 * BATCH), scores_of(2 * BATCH)
  kept = (np.arange(len(scores)) // 6) % 2 == 0
  of_all, _ = update(config, rollout, scores)
  alone = make_config(num_minibatches=1)
  of_kept, _ = update(alone, jax.tree.map(lambda x: x[kept], rollout), scores[kept])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    of_all.params,
    of_kept.params,
  )
  # The controller is told of everything.
  step = config.kl_step_size * (k1_of(rollout).mean() - 0.1)
  assert of_all.controller.beta == pytest.approx(BETA + step, abs=1e-5)


REWARD_K1 = {"kl_placement": "reward", "kl_estimator": "k1", "kl_correction": "none"}


@pytest.mark.parametrize(
  ("penalty", "divides_the_scores_alone"),
  [
    (REWARD_K1 | {"kl_credit": "sequence"}, False),
    (REWARD_K1 | {"kl_credit": "token"}, True),
    ({"kl_placement": "loss", "kl_credit": "token"}, True),
  ],
)
def test_a_groups_deviation_raises_what_a_nat_costs_where_the_kl_is_not_divided_by_it(
  penalty, divides_the_scores_alone
):
  scores = 3 * scores_of(BATCH)
  _, figures = update(make_config(**penalty), make_rollout(BATCH), scores)
  groups = scores.reshape(-1, 6)
  deviation = groups.std(axis=1, ddof=1).mean() if divides_the_scores_alone else 1.0
  assert abs(groups.std() - 1) > 0.3
  assert figures["controller/effective_beta"] == pytest.approx(BETA * deviation, rel=1e-3)


@pytest.mark.parametrize(
  ("settings", "beta", "held"),
  [
    ({"controller": "doubling", "kl_target": 1e3, "beta_min": 0.2}, 0.2, 1),
    ({"controller": "doubling", "kl_target": 1e3, "beta_min": 0.1}, 0.15, 0),
    ({"controller": "doubling", "kl_target": 1e-6, "beta_max": 0.5}, 0.5, 1),
    ({"kl_target": 1e3, "kl_step_size": 1.0}, 0.0, 1),
    ({"kl_target": 1e-6, "kl_step_size": 1e-3}, None, 0),
  ],
)
def test_a_run_says_when_a_bound_of_beta_holds(settings, beta, held):
  if "controller" not in settings:
    settings = SETTINGS["oversampled"] | settings
  config = make_config(**settings)
  num_rows = BATCH * config.algorithm().oversampling
  rollout = make_rollout(num_rows, seed=33)  # Its k1 is above 0, which is no matter of course.
  state, figures = update(config, rollout, scores_of(num_rows))
  assert figures["controller/at_bound"] == held
  if beta is not None:
    assert state.controller.beta == pytest.approx(beta)


def test_the_trust_region_is_steered_by_the_kl_after_the_epochs():
  region = {"trust_region": "kl_old_new", "trust_region_adaptive": True, "learning_rate": 0.05}
  rollout, scores = make_rollout(BATCH), scores_of(BATCH)
  _, figures = update(make_config(**region), rollout, scores)
  # Just below it: the KL within the epochs, which begins at 0, would not double the coefficient.
  target = figures["kl/old_k3"] / 1.6
  state, figures = update(make_config(**region, trust_region_target=target), rollout, scores)
  assert state.trust_region.beta == 2 * figures["controller/trust_region_beta"]
  assert figures["controller/trust_region_at_bound"] == 0
