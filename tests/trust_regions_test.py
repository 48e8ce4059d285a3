"""Trust regions by the probability of the token taken, against sums over whole distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops
from klrl.ops.trust_regions import DISTANCES

RNG = np.random.default_rng(0)
NEW, OLD = (jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(40, 5)), jnp.float32)) for _ in "ab")
TOKENS = jnp.asarray(RNG.integers(5, size=40))
LOG_PROBS, OLD_LOG_PROBS = ops.taken(NEW, TOKENS), ops.taken(OLD, TOKENS)
ADVANTAGES = jnp.asarray(RNG.normal(size=40), jnp.float32)
MASK = jnp.arange(40) < 36


def two_outcomes(log_probs):
  p = np.exp(np.asarray(log_probs, np.float64))
  return np.stack([p, 1 - p], axis=-1)


def gradient_of(loss, log_probs=LOG_PROBS, **options):
  def total(x):
    return loss(x, OLD_LOG_PROBS, ADVANTAGES, MASK, **options).sum()

  return np.asarray(jax.grad(total)(log_probs))


def test_distances_are_those_of_two_outcomes_and_below_those_of_the_whole_distributions():
  new, old = two_outcomes(LOG_PROBS), two_outcomes(OLD_LOG_PROBS)
  tv, kl = np.abs(new - old).sum(axis=-1) / 2, (old * np.log(old / new)).sum(axis=-1)
  np.testing.assert_allclose(ops.binary_tv(LOG_PROBS, OLD_LOG_PROBS), tv, rtol=1e-4)
  np.testing.assert_allclose(ops.binary_kl(LOG_PROBS, OLD_LOG_PROBS), kl, rtol=1e-4, atol=1e-6)
  assert np.all(kl <= np.asarray(ops.kl_of(OLD, NEW)) + 1e-6)
  assert np.all(tv <= np.abs(np.exp(NEW) - np.exp(OLD)).sum(axis=-1) / 2 + 1e-6)


def test_the_kl_is_right_where_a_policy_is_certain():
  certain, half, never = jnp.float32(0.0), jnp.log(jnp.float32(0.5)), jnp.float32(-200.0)
  assert ops.binary_kl(certain, certain) == 0
  np.testing.assert_allclose(ops.binary_kl(half, certain), np.log(2), rtol=1e-6)
  assert ops.binary_kl(certain, half) == np.inf
  np.testing.assert_allclose(ops.binary_kl(half, never), np.log(2), rtol=1e-6)


@pytest.mark.parametrize(("distance", "size"), [("tv", 0.1), ("kl", 0.02)])
def test_a_token_has_the_policy_gradient_unless_it_leaves(distance, size):
  options = {"distance": distance, "size": size}
  far = np.asarray(DISTANCES[distance](LOG_PROBS, OLD_LOG_PROBS)) > size
  outwards = np.asarray(ADVANTAGES) * np.asarray(LOG_PROBS - OLD_LOG_PROBS) > 0
  leaving, mask = far & outwards, np.asarray(MASK)
  assert 5 < leaving[mask].sum() < 30 and (far & ~outwards)[mask].any()
  found = ops.is_leaving(LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES, MASK, **options)
  np.testing.assert_array_equal(found, leaving & mask)
  expected = -np.exp(LOG_PROBS - OLD_LOG_PROBS) * ADVANTAGES
  gradient = gradient_of(ops.divergence_masked_policy_loss, **options)
  np.testing.assert_allclose(gradient, np.where(mask & ~leaving, expected, 0.0), rtol=1e-5)


def test_the_smooth_gradient_turns_at_the_edge_of_the_region():
  shift = np.exp(LOG_PROBS) - np.exp(OLD_LOG_PROBS)
  policy_gradient = -np.exp(LOG_PROBS - OLD_LOG_PROBS) * ADVANTAGES
  expected = policy_gradient * (1 - np.sign(ADVANTAGES) * shift / 0.1)
  gradient = gradient_of(ops.smooth_policy_loss, size=0.1)
  np.testing.assert_allclose(gradient, np.where(MASK, expected, 0.0), rtol=1e-4, atol=1e-6)
  beyond = (np.sign(ADVANTAGES) * shift > 0.1) & np.asarray(MASK)
  assert beyond.any() and np.all(gradient[beyond] * policy_gradient[beyond] < 0)


@pytest.mark.parametrize(
  ("loss", "options"),
  [
    (ops.divergence_masked_policy_loss, {"distance": "tv", "size": 0.1}),
    (ops.divergence_masked_policy_loss, {"distance": "kl", "size": 0.1}),
    (ops.smooth_policy_loss, {"size": 0.1}),
  ],
)
def test_on_policy_they_are_the_policy_gradient_and_padding_is_nothing(loss, options):
  gradient = gradient_of(loss, log_probs=OLD_LOG_PROBS, **options)
  np.testing.assert_allclose(gradient, np.where(MASK, -ADVANTAGES, 0.0), rtol=1e-6)
  dirty = [jnp.where(MASK, x, jnp.nan) for x in (LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES)]
  value = loss(*dirty, MASK, **options)
  np.testing.assert_array_equal(value, loss(LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES, MASK, **options))
  assert not np.asarray(value)[36:].any()
