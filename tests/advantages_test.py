import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from klrl import ops

GAMMA, GAE_LAMBDA = 0.9, 0.8


def _random_batch(rows=6, steps=9, seed=0):
  keys = jax.random.split(jax.random.key(seed), 6)
  rewards, values, log_probs, old_log_probs = (
    np.asarray(jax.random.normal(key, (rows, steps))) for key in keys[:4]
  )
  mask = np.array(jax.random.bernoulli(keys[4], 0.6, (rows, steps)))
  mask[0], mask[1] = False, True
  bootstrap_values = np.asarray(jax.random.normal(keys[5], (rows,)))
  return rewards, values, log_probs, old_log_probs, mask, bootstrap_values


def _loop(rewards, values, mask, bootstrap_values, weights, gamma, gae_lambda):
  """Removes the masked tokens, then sums (gamma lambda)^k delta_{t+k} forwards, in float64."""
  advantages = np.zeros(mask.shape)
  for row in range(mask.shape[0]):
    real = np.flatnonzero(mask[row])
    r, v, w = (np.float64(x[row][real]) for x in (rewards, values, weights))
    next_v = np.append(v, bootstrap_values[row])[1:]
    for start in range(len(real)):
      discount = 1.0
      for t in range(start, len(real)):
        discount *= w[t]
        advantages[row, real[start]] += discount * (r[t] + gamma * next_v[t] - v[t])
        discount *= gamma * gae_lambda
  return advantages, np.where(mask, advantages + values, 0.0)


def _gae(rewards, values, mask, bootstrap_values, gamma=GAMMA, gae_lambda=GAE_LAMBDA):
  return ops.gae(
    rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, bootstrap_values=bootstrap_values
  )


class GAETest(chex.TestCase):
  def test_golden(self):
    # delta = (1 + .5 * 4 - 2, 3 - 4) = (1, -1); gamma * lambda = 1/4.
    rewards, values = jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[2.0, 4.0, 9.0]])
    mask = jnp.array([[True, True, False]])
    fn = jax.jit(lambda *args: ops.gae(*args, gamma=0.5, gae_lambda=0.5))
    advantages, returns = fn(rewards, values, mask)
    np.testing.assert_allclose(advantages, [[0.75, -1.0, 0.0]])
    np.testing.assert_allclose(returns, [[2.75, 3.0, 0.0]])

  def test_equals_a_loop_that_removes_masked_tokens(self):
    rewards, values, _, _, mask, bootstrap_values = _random_batch()
    truth = _loop(rewards, values, mask, bootstrap_values, np.ones(mask.shape), GAMMA, GAE_LAMBDA)
    output = jax.jit(_gae)(rewards, values, mask, bootstrap_values)
    np.testing.assert_allclose(output, truth, rtol=1e-4, atol=1e-5)

  def test_padding_reaches_neither_value_nor_gradient(self):
    rewards, values, _, _, mask, bootstrap_values = _random_batch()
    weights = jnp.sin(jnp.arange(1.0, mask.size + 1)).reshape(mask.shape)

    def total(rewards, values, bootstrap_values):
      advantages, returns = _gae(rewards, values, mask, bootstrap_values)
      return (weights * advantages + weights**2 * returns).sum()

    gradient = jax.value_and_grad(total, argnums=(0, 1, 2))
    clean = gradient(rewards, values, bootstrap_values)
    dirty = [np.where(mask, x, np.float32(bad)) for x, bad in ((rewards, np.nan), (values, np.inf))]
    output = jax.jit(gradient)(*dirty, bootstrap_values)
    chex.assert_trees_all_close(output, clean, rtol=1e-5, atol=1e-6)

  def test_it_ends_after_the_last_real_token_unless_bootstrapped(self):
    rewards, values = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25])
    advantages, _ = ops.gae(rewards, values, jnp.ones(2, bool), gamma=0.9, gae_lambda=1.0)
    np.testing.assert_allclose(advantages[-1], 2.0 - 0.25)
    bootstrapped, _ = _gae(rewards, values, jnp.ones(2, bool), jnp.array(10.0))
    np.testing.assert_allclose(bootstrapped[-1], 2.0 + 9.0 - 0.25)

  def test_a_discount_of_zero_ends_an_episode(self):
    rewards, values, _, _, _, bootstrap_values = _random_batch()
    mask = np.ones(rewards.shape, bool)
    discounts = np.full(rewards.shape, GAMMA, np.float32)
    discounts[:, 3] = 0.0
    whole = _gae(rewards, values, mask, bootstrap_values, gamma=discounts)[0]
    first = _gae(rewards[:, :4], values[:, :4], mask[:, :4], None)[0]
    second = _gae(rewards[:, 4:], values[:, 4:], mask[:, 4:], bootstrap_values)[0]
    np.testing.assert_allclose(whole, np.concatenate([first, second], axis=1), rtol=1e-5)

  def test_coefficients_can_be_mapped_over(self):
    rewards, values, _, _, mask, bootstrap_values = _random_batch()
    gammas, gae_lambdas = jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 0.0, 0.95])
    mapped = jax.vmap(lambda gamma, lam: _gae(rewards, values, mask, bootstrap_values, gamma, lam))
    for index, output in enumerate(zip(*mapped(gammas, gae_lambdas), strict=True)):
      args = (float(gammas[index]), float(gae_lambdas[index]))
      one = _gae(rewards, values, mask, bootstrap_values, *args)
      np.testing.assert_allclose(output, one, rtol=1e-5, atol=1e-6)

  def test_gradients_are_numerically_right(self):
    rewards, values, _, _, mask, bootstrap_values = _random_batch(2, 4)
    chex.assert_numerical_grads(
      lambda *args: sum(x.sum() for x in _gae(args[0], args[1], mask, args[2])),
      (rewards, values, bootstrap_values),
      order=1,
      atol=1e-2,
      rtol=1e-2,
    )

  def test_shapes_that_would_broadcast_are_refused(self):
    rewards, values, _, _, mask, bootstrap_values = _random_batch()
    for args in (
      (rewards[:1], values, mask, None),
      (rewards, values[:, :1], mask, None),
      (rewards, values, mask, bootstrap_values[:1]),
    ):
      with self.assertRaises(AssertionError):
        _gae(*args)


class VTraceTest(chex.TestCase):
  @parameterized.parameters(1.0, 2.0)
  def test_equals_a_loop_with_nan_in_the_padding(self, max_ratio):
    rewards, values, log_probs, old_log_probs, mask, bootstrap_values = _random_batch()
    weights = np.minimum(np.exp(log_probs - old_log_probs), max_ratio)
    truth = _loop(rewards, values, mask, bootstrap_values, weights, GAMMA, GAE_LAMBDA)
    dirty = [np.where(mask, x, np.float32(np.nan)) for x in (log_probs, old_log_probs, rewards)]
    output = jax.jit(
      lambda *args: ops.vtrace(
        *args[:-1],
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        max_ratio=max_ratio,
        bootstrap_values=args[-1],
      )
    )(*dirty, values, mask, bootstrap_values)
    np.testing.assert_allclose(output, truth, rtol=1e-4, atol=1e-5)


class DiscountedReturnsTest(chex.TestCase):
  def test_golden_with_a_masked_token_inside(self):
    # 4 + 10/2 = 9 at the end; 2 + 9/2 = 6.5 where the token between is skipped.
    rewards, mask = jnp.array([[2.0, jnp.nan, 4.0, jnp.inf]]), jnp.array([[1, 0, 1, 0]], bool)
    fn = jax.jit(
      lambda rewards, bootstrap: ops.discounted_returns(
        rewards, mask, gamma=0.5, bootstrap_values=bootstrap
      )
    )
    np.testing.assert_allclose(fn(rewards, jnp.array([10.0])), [[6.5, 0, 9, 0]])
    terminal = ops.discounted_returns(rewards, mask, gamma=0.5)
    np.testing.assert_allclose(terminal, [[4, 0, 4, 0]])


class GroupTest(chex.TestCase):
  @parameterized.named_parameters(
    # Mean 3, squared deviations 4, 1, 9: sample variance 14 / 2.
    ("relative", ops.group_relative, np.array([-2, -1, 3]) / (np.sqrt(7) + 1e-4)),
    ("centred", ops.group_centred, [-2, -1, 3]),
    ("leave_one_out", ops.leave_one_out, [1 - 4, 2 - 3.5, 6 - 1.5]),
  )
  def test_golden(self, fn, expected):
    scores = jnp.array([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])
    np.testing.assert_allclose(jax.jit(fn)(scores), [expected] * 2, rtol=1e-6)

  @parameterized.named_parameters(
    ("relative", ops.group_relative),
    ("centred", ops.group_centred),
    ("leave_one_out", ops.leave_one_out),
  )
  def test_groups_of_one_and_of_equals_give_zero(self, fn):
    np.testing.assert_array_equal(jax.jit(fn)(jnp.array([[3.0], [4.0]])), np.zeros((2, 1)))
    np.testing.assert_array_equal(fn(jnp.full((2, 4), 0.5)), np.zeros((2, 4)))
    self.assertEqual(fn(jnp.array([1, 0, 0])).dtype, jnp.float32)


class WhitenTest(chex.TestCase):
  @parameterized.parameters(True, False)
  def test_golden_with_nan_and_inf_in_the_padding(self, shift_mean):
    # 1, 3, 5: mean 3, population variance 8/3.
    x = jnp.array([[1.0, jnp.nan, 3.0], [5.0, jnp.inf, -jnp.inf]])
    mask = jnp.array([[1, 0, 1], [1, 0, 0]], bool)
    step, mean = 2 / np.sqrt(8 / 3), 0.0 if shift_mean else 3.0
    expected = [[mean - step, 0, mean], [mean + step, 0, 0]]
    fn = jax.jit(lambda x, mask: ops.whiten(x, mask, shift_mean=shift_mean))
    np.testing.assert_allclose(fn(x, mask), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: ops.whiten(x, mask)[0, 0]))(x)
    clean = jax.grad(lambda x: ops.whiten(x, mask)[0, 0])(jnp.where(mask, x, 7.0))
    np.testing.assert_allclose(gradient, clean, rtol=1e-5, atol=1e-6)

  def test_one_or_no_token_is_safe(self):
    x, one = jnp.array([4.0, 5.0]), jnp.array([True, False])
    np.testing.assert_array_equal(ops.whiten(x, one), [0, 0])
    np.testing.assert_array_equal(ops.whiten(x, one, shift_mean=False), [4, 0])
    np.testing.assert_array_equal(ops.whiten(x, ~one & one), [0, 0])
    gradient = jax.grad(lambda x: ops.whiten(x, ~one & one).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 0])


if __name__ == "__main__":
  absltest.main()
