import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from klrl import ops

X = np.array([[1.0, np.nan, 3.0], [np.inf, 5.0, -np.inf], [np.nan, np.nan, np.nan]], np.float32)
MASK = np.array([[True, False, True], [False, True, False], [False, False, False]])


class MaskingTest(chex.TestCase):
  @parameterized.named_parameters(
    ("zero_padding", ops.zero_padding, [[1, 0, 3], [0, 5, 0], [0, 0, 0]]),
    ("sum_count", ops.masked_sum_count, (9.0, 3.0)),
    ("mean", ops.masked_mean, 3.0),
    ("row_means", lambda x, mask: ops.masked_mean(x, mask, axis=-1), [2.0, 5.0, 0.0]),
    ("var", ops.masked_var, 8 / 3),  # of 1, 3, 5
  )
  def test_golden_with_nan_and_inf_in_the_padding(self, fn, expected):
    output = jax.jit(fn)(X, MASK)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), output, expected)

  @parameterized.named_parameters(
    ("mean", ops.masked_mean, [[1 / 3, 0, 1 / 3], [0, 1 / 3, 0], [0, 0, 0]]),
    # 2 (x - mean) / n
    ("var", ops.masked_var, [[-4 / 3, 0, 0], [0, 4 / 3, 0], [0, 0, 0]]),
  )
  def test_gradient_reaches_real_tokens_only(self, fn, expected):
    np.testing.assert_allclose(jax.jit(jax.grad(fn))(X, MASK), expected, rtol=1e-6, atol=1e-7)

  @parameterized.named_parameters(("mean", ops.masked_mean), ("var", ops.masked_var))
  def test_without_real_tokens_value_and_gradient_are_zero(self, fn):
    value, gradient = jax.value_and_grad(fn)(X, np.zeros_like(MASK))
    self.assertEqual(value, 0.0)
    np.testing.assert_array_equal(gradient, np.zeros_like(X))

  def test_division_by_a_zero_count_is_zero(self):
    total, count = jnp.array([3.0, 2.0]), jnp.array([2.0, 0.0])
    value, pullback = jax.vjp(jax.jit(ops.divide), total, count)
    np.testing.assert_allclose(value, [1.5, 0.0])
    np.testing.assert_allclose(pullback(jnp.ones(2))[0], [0.5, 0.0])

  def test_first_true_index_is_the_row_length_where_there_is_none(self):
    np.testing.assert_array_equal(jax.jit(ops.first_true_index)(MASK), [0, 1, 3])

  def test_a_hole_is_before_the_last_token_and_the_next_one_is_behind_it(self):
    np.testing.assert_array_equal(ops.until_last(MASK), [[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    found = jax.jit(ops.at_next)(X, MASK)
    np.testing.assert_array_equal(found, [[3, 3, 0], [5, 0, 0], [0, 0, 0]])
    gradient = jax.grad(lambda x: ops.at_next(x, MASK).sum())(X)
    np.testing.assert_array_equal(gradient, [[0, 0, 2], [0, 1, 0], [0, 0, 0]])

  def test_variance_matches_numpy_on_the_removed_tokens(self):
    x = jax.random.normal(jax.random.key(0), (4, 9)) + 1000.0
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, x.shape)
    truth = np.var(np.asarray(x, np.float64)[np.asarray(mask)])
    np.testing.assert_allclose(ops.masked_var(x, mask), truth, rtol=1e-4)

  def test_numbers_are_at_least_float32(self):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32):
      self.assertEqual(ops.masked_mean(jnp.ones(3, dtype), jnp.ones(3, bool)).dtype, jnp.float32)
    with jax.enable_x64(True):
      self.assertEqual(ops.zero_padding(np.ones(3), np.ones(3, bool)).dtype, jnp.float64)

  def test_a_mask_that_is_not_bool_or_would_broadcast_is_refused(self):
    with self.assertRaises(AssertionError):
      ops.masked_mean(X, MASK.astype(np.float32))
    with self.assertRaises(AssertionError):
      ops.masked_mean(X, MASK[:1])


if __name__ == "__main__":
  absltest.main()
