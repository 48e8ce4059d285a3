"""The optimizer where parameters are bfloat16: what is rounded, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np

from klrl.algorithm.gradients import gradients_of
from klrl.algorithm.optimizer import apply_gradients, init_optimizer


def stepped(params, gradients):
  state = init_optimizer(params)
  return apply_gradients(params, state, gradients, learning_rate=0.01, max_grad_norm=1e9)


def test_moments_and_norms_are_float32_and_a_step_is_rounded_once():
  gradients = {"w": jnp.float32([0.3, -1e-3, 2.0])}
  half = {"w": jnp.array([1.0, 2.0, 300.0], jnp.bfloat16)}
  params, state, norm = stepped(half, gradients)
  assert params["w"].dtype == jnp.bfloat16 and norm.dtype == jnp.float32
  moments = [x for x in jax.tree.leaves(state) if x.ndim]
  assert len(moments) == 2 and all(x.dtype == jnp.float32 for x in moments)
  full, expected, _ = stepped({"w": half["w"].astype(jnp.float32)}, gradients)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  # 0.99 lies between two of the numbers near 1, and 0.01 is below the distance of those near 300.
  np.testing.assert_allclose(params["w"], full["w"], rtol=2**-8)
  assert params["w"][0] < 1 and params["w"][2] == 300 > full["w"][2]


def test_gradients_of_half_parameters_are_summed_over_parts_in_float32():
  def loss(params, batch):
    return {"loss": 1.0}, {"loss": (jnp.sum(params["w"][None] * batch), batch.size)}

  batch = np.float32([[1.0], [2**-9], [2**-9], [2**-9]])
  for num_parts in (1, 4):
    gradients, _ = gradients_of(loss, {"w": jnp.ones(1, jnp.bfloat16)}, batch, num_parts=num_parts)
    assert gradients["w"].dtype == jnp.float32
  np.testing.assert_allclose(gradients["w"], batch.mean(axis=0), rtol=1e-6)
