"""Tests of what a run remembers: running statistics, late rollouts and references."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl.algorithm import memory
from klrl.sampling import Rollout


def test_scores_are_normalised_by_all_so_far():
  rng = np.random.default_rng(0)
  parts = [3 + 2 * rng.normal(size=n).astype(np.float32) for n in (8, 5, 16)]
  stats = memory.no_scores()
  for i, part in enumerate(parts):
    stats, scores, std = jax.jit(memory.normalised)(stats, part, jnp.ones(part.shape, bool))
    so_far = np.concatenate(parts[: i + 1])
    np.testing.assert_allclose(std, so_far.std(), rtol=1e-5)
    np.testing.assert_allclose(scores, (part - so_far.mean()) / so_far.std(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", [7.0, 0.0, 0.1, -2.3])
def test_equal_scores_are_divided_by_one(score):
  stats = memory.no_scores()
  for _ in range(3):
    stats, scores, std = memory.normalised(stats, jnp.full(100, score), jnp.ones(100, bool))
    # 100 times 0.1 is not quite 10 in binary; what is left must not be blown up to the size of 1.
    np.testing.assert_allclose(scores, np.zeros(100), atol=1e-6)
    assert std == 1
  np.testing.assert_allclose(stats.mean, score, rtol=1e-6)


def rollout_of(number):
  tokens = jnp.full((2, 3), number)
  mask = jnp.ones((2, 2), bool)
  log_probs = jnp.full((2, 2), -1.0 * number)
  return Rollout(tokens, mask[:, :1], mask, mask[:, 0], log_probs, log_probs)


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_rollout_comes_back_after_as_many_iterations(staleness):
  replay = memory.empty_replay(jax.eval_shape(rollout_of, 0), staleness)
  exchanged = jax.jit(memory.exchanged)
  for i in range(8):
    new = rollout_of(i)
    waiting = memory.waiting(replay, i)
    replay, rollout = exchanged(replay, new, i)
    expected = i - staleness if i >= staleness else i
    assert memory.trained_on(i, staleness) == expected
    chex.assert_trees_all_equal(rollout, rollout_of(expected))
    if i >= staleness:
      chex.assert_trees_all_equal(waiting, rollout)


def test_a_reference_follows_by_average_or_by_reset():
  old, new = {"w": jnp.array([0.0, 1.0])}, {"w": jnp.array([1.0, 3.0])}
  hypers = types.SimpleNamespace(reference_decay=jnp.float32(0.75))
  moved = memory.REFERENCE_RULES["ema"](old, new, 0, None, hypers)
  np.testing.assert_allclose(moved["w"], [0.25, 1.5])
  every_third, reset = types.SimpleNamespace(reference_every=3), memory.REFERENCE_RULES["reset"]
  kept = [reset(old, new, i, every_third, hypers)["w"][0] for i in range(6)]
  assert kept == [0, 0, 1, 0, 0, 1]
