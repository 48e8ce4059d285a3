"""Tests of the weights for a sampler that is not quite the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klrl import ops

TRAINER = jnp.log(jnp.array([[0.5, 0.4, 0.1], [0.2, 0.9, 0.3]]))
SAMPLER = jnp.log(jnp.array([[0.25, 0.5, 0.1], [0.4, 0.3, 0.3]]))
MASK = jnp.array([[True, True, False], [True, True, True]])


def weights_of(correction, cap=np.inf, trainer=TRAINER, floor=0.0):
  bounds = {"cap": jnp.float32(cap), "floor": jnp.float32(floor)}
  return ops.sampler_weights(trainer, SAMPLER, MASK, correction=correction, **bounds)


def test_weights_are_ratios():
  weights, capped = weights_of("token")
  np.testing.assert_allclose(weights, [[2, 0.8, 1], [0.5, 3, 1]], rtol=1e-6)
  assert not capped.any()
  weights, _ = weights_of("sequence")
  np.testing.assert_allclose(weights, [[1.6, 1.6, 1], [1.5, 1.5, 1.5]], rtol=1e-6)


def test_a_cap_bounds_them_and_is_counted():
  weights, capped = weights_of("token", 2.5)
  np.testing.assert_allclose(weights, [[2, 0.8, 1], [0.5, 2.5, 1]], rtol=1e-6)
  np.testing.assert_array_equal(capped, [[0, 0, 0], [0, 1, 0]])


def test_masks_leave_out_what_is_out_of_bounds_on_either_side():
  weights, left_out = weights_of("token_mask", 2.5, floor=0.6)
  np.testing.assert_allclose(weights, [[2, 0.8, 1], [0, 0, 1]], rtol=1e-6)
  np.testing.assert_array_equal(left_out, [[0, 0, 0], [1, 1, 0]])
  weights, left_out = weights_of("sequence_mask", 1.55, floor=0.5)  # ratios 1.6 and 1.5
  np.testing.assert_allclose(weights, [[0, 0, 1], [1.5, 1.5, 1.5]], rtol=1e-6)
  np.testing.assert_array_equal(left_out, [[1, 1, 0], [0, 0, 0]])
  # sqrt(1.6) is 1.26 and the third root of 1.5 is 1.14.
  weights, _ = weights_of("geometric_mask", 1.2, floor=0.5)
  np.testing.assert_array_equal(weights, [[0, 0, 1], [1, 1, 1]])
  weights, _ = weights_of("geometric_mask", 2.0, floor=1.2)
  np.testing.assert_array_equal(weights, [[1, 1, 1], [0, 0, 0]])


def test_a_mask_without_bounds_is_the_plain_weight():
  for plain, mask in (("token", "token_mask"), ("sequence", "sequence_mask")):
    np.testing.assert_array_equal(weights_of(mask)[0], weights_of(plain)[0])


def test_a_ratio_beyond_float_is_the_cap():
  weights, _ = weights_of("sequence", 2.0, TRAINER + 1000.0)
  np.testing.assert_allclose(weights, [[2, 2, 1], [2, 2, 2]], rtol=1e-6)


@pytest.mark.parametrize("correction", ops.SAMPLER_CORRECTIONS[1:])
def test_no_gradient_and_no_garbage(correction):
  gradient = jax.grad(lambda x: weights_of(correction, trainer=x)[0].sum())(TRAINER)
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
  dirty = jnp.where(MASK, TRAINER, jnp.nan)
  np.testing.assert_array_equal(weights_of(correction, trainer=dirty)[0], weights_of(correction)[0])


def test_sequence_weights_make_a_samplers_mean_the_trainers():
  """Over all completions of two binary tokens, drawn from another distribution."""
  rng = np.random.default_rng(0)
  tables = {name: rng.dirichlet(np.ones(2), size=(1 + 2,)) for name in ("trainer", "sampler")}
  tokens = np.array([[a, b] for a in range(2) for b in range(2)])

  def log_probs(table):
    first, second = table[0][tokens[:, 0]], table[1 + tokens[:, 0], tokens[:, 1]]
    return jnp.log(jnp.stack([first, second], axis=1))

  trainer, sampler = (log_probs(tables[name]) for name in ("trainer", "sampler"))
  mask = jnp.ones((4, 2), bool)
  weights, _ = ops.sampler_weights(trainer, sampler, mask, correction="sequence", cap=jnp.inf)
  values = jnp.array([1.0, -2.0, 0.5, 3.0])
  np.testing.assert_allclose(
    (jnp.exp(sampler.sum(axis=1)) * weights[:, 0] * values).sum(),
    (jnp.exp(trainer.sum(axis=1)) * values).sum(),
    rtol=1e-5,
  )
