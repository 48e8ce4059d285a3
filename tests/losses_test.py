import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from klrl import ops

# Each takes (what carries gradient, what is stopped ..., mask), all [..., T].
POLICY_LOSSES = {
  "clipped": lambda *args: ops.clipped_policy_loss(*args, clip_eps_low=0.2, clip_eps_high=0.3),
  "dual_clipped": lambda *args: ops.clipped_policy_loss(
    *args, clip_eps_low=0.2, clip_eps_high=0.3, dual_clip=1.5
  ),
  "gspo": lambda *args: ops.gspo_loss(*args, clip_eps_low=0.2, clip_eps_high=0.3),
  "cispo": lambda *args: ops.cispo_loss(*args, max_ratio=1.5),
  "kl_old_new": lambda log_probs, old_log_probs, advantages, mask: ops.kl_penalised_policy_loss(
    log_probs,
    old_log_probs,
    advantages,
    ops.kl_old_new(ops.zero_padding(log_probs, mask), ops.zero_padding(old_log_probs, mask)),
    mask,
    trust_region_beta=0.5,
  ),
  "reinforce": lambda log_probs, _, advantages, mask: ops.reinforce_loss(
    log_probs, advantages, mask
  ),
}
VALUE_LOSSES = {
  "plain": lambda values, _, returns, mask: ops.value_loss(values, returns, mask),
  "clipped": lambda *args: ops.clipped_value_loss(*args, value_clip_eps=0.4),
}
LOSSES = [
  *((f"{name}_policy", loss) for name, loss in POLICY_LOSSES.items()),
  *((f"{name}_value", loss) for name, loss in VALUE_LOSSES.items()),
]


def _reference(name, x, old, target, real):
  """One token of each loss above, in Python floats."""
  if not real:
    return 0.0
  ratio = np.exp(x - old)
  near = min(max(x, old - 0.4), old + 0.4)
  surrogate = min(ratio * target, min(max(ratio, 0.8), 1.3) * target)
  return {
    "clipped_policy": -surrogate,
    "dual_clipped_policy": -(max(surrogate, 1.5 * target) if target < 0 else surrogate),
    "kl_old_new_policy": -ratio * target + 0.5 * (ratio - 1 - np.log(ratio)),
    "cispo_policy": -min(ratio, 1.5) * x * target,
    "reinforce_policy": -x * target,
    "plain_value": (x - target) ** 2 / 2,
    "clipped_value": max((x - target) ** 2, (near - target) ** 2) / 2,
  }[name]


def _sequence_mean(x, mask):
  """The mean of each row's real tokens, at every token."""
  means = [row[real].mean() if real.any() else 0.0 for row, real in zip(x, mask, strict=True)]
  return np.broadcast_to(np.array(means)[:, None], x.shape)


def _batch(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  x, old, target = (np.asarray(jax.random.normal(key, (3, 7))) for key in keys[:3])
  mask = np.array(jax.random.bernoulli(keys[3], 0.6, (3, 7)))
  mask[0] = False
  return x, old, target, mask


class LossesTest(chex.TestCase):
  @parameterized.named_parameters(
    # Ratios 2, 1/2, 2, 1/2 with advantages 1, 1, -1, -1.
    ("clipped", POLICY_LOSSES["clipped"], [-1.3, -0.5, 2.0, 0.8]),
    ("dual_clipped", POLICY_LOSSES["dual_clipped"], [-1.3, -0.5, 1.5, 0.8]),
  )
  def test_golden_clip(self, loss, expected):
    log_ratio = jnp.log(jnp.array([2.0, 0.5, 2.0, 0.5]))
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0])
    output = jax.jit(loss)(log_ratio - 1, -jnp.ones(4), advantages, jnp.ones(4, bool))
    np.testing.assert_allclose(output, expected, rtol=1e-6)

  def test_a_centred_score_has_the_gradient_of_both_and_reads_no_padding(self):
    x, mean, advantages, mask = _batch()
    args = jnp.where(mask, advantages, jnp.nan), mask
    gradients = jax.grad(lambda *x: ops.centred_policy_loss(*x, *args).sum(), argnums=(0, 1))(
      jnp.where(mask, x, jnp.nan), jnp.where(mask, mean, -jnp.inf)
    )
    expected = np.where(mask, advantages, 0.0)
    np.testing.assert_allclose(gradients, [-expected, expected], rtol=1e-6)

  def test_golden_values(self):
    values, old_values = jnp.array([3.0, 3.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
    returns, mask = jnp.array([1.0, 5.0, 2.0]), jnp.ones(3, bool)
    fn = jax.jit(lambda *args: ops.clipped_value_loss(*args, value_clip_eps=0.5))
    # Values near the old ones: 1.5, 1.5, 0. Errors 2 or .5; -2 or -3.5; -2 or -2.
    np.testing.assert_allclose(fn(values, old_values, returns, mask), [2.0, 6.125, 2.0])
    np.testing.assert_allclose(jax.jit(ops.value_loss)(values, returns, mask), [2, 2, 2])

  @parameterized.named_parameters((name, name, loss) for name, loss in LOSSES)
  def test_equals_a_loop_with_nan_and_inf_in_the_padding(self, name, loss):
    x, old, target, mask = _batch()
    # GSPO clips one ratio for the whole sequence, the mean on the scale of logarithms.
    of_sequence = name == "gspo_policy"
    truth = np.vectorize(lambda *args: _reference(name.replace("gspo", "clipped"), *args))(
      _sequence_mean(x, mask) if of_sequence else x,
      _sequence_mean(old, mask) if of_sequence else old,
      target,
      mask,
    )
    weights = jnp.sin(jnp.arange(1.0, x.size + 1)).reshape(x.shape)

    def total(x, old, target):
      per_token = loss(x, old, target, mask)
      return (weights * per_token).sum(), per_token

    gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
    clean, _ = gradient(x, old, target)
    dirty = [
      np.where(mask, array, np.float32(bad))
      for array, bad in ((x, -np.inf), (old, np.nan), (target, np.inf))
    ]
    gradients, per_token = jax.jit(gradient)(*dirty)
    np.testing.assert_allclose(per_token, truth, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[0], clean[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradients[0])[~mask], 0.0)

  @parameterized.named_parameters(case for case in LOSSES if case[0] != "kl_old_new_policy")
  def test_only_the_first_argument_carries_gradient(self, loss):
    *arrays, mask = _batch()
    gradients = jax.grad(lambda *args: loss(*args, mask).sum(), argnums=(0, 1, 2))(*arrays)
    self.assertGreater(np.abs(gradients[0]).max(), 0.1)
    for gradient in gradients[1:]:
      np.testing.assert_array_equal(gradient, np.zeros(mask.shape))

  def test_the_kl_penalty_carries_gradient_through_log_probs_and_kl(self):
    log_probs, old_log_probs, advantages, mask = _batch()
    kl = np.ones(mask.shape, np.float32)
    gradients = jax.grad(
      lambda *args: ops.kl_penalised_policy_loss(*args, mask, trust_region_beta=0.5).sum(),
      argnums=(0, 1, 2, 3),
    )(log_probs, old_log_probs, advantages, kl)
    ratio = np.exp(log_probs - old_log_probs)
    np.testing.assert_allclose(gradients[0], np.where(mask, -ratio * advantages, 0), rtol=1e-5)
    np.testing.assert_array_equal(gradients[1:3], np.zeros((2, *mask.shape)))
    np.testing.assert_array_equal(gradients[3], np.where(mask, 0.5, 0))

  # The weight of CISPO depends on the ratio and is stopped: no derivative of its value.
  @parameterized.named_parameters(case for case in LOSSES if case[0] != "cispo_policy")
  def test_gradients_are_numerically_right(self, loss):
    *arrays, mask = _batch(seed=3)
    fn = lambda x: loss(x, *arrays[1:], mask).sum()  # noqa: E731
    chex.assert_numerical_grads(fn, (arrays[0],), order=1, atol=2e-2, rtol=2e-2)

  def test_cispo_has_gradient_beyond_its_bound(self):
    old_log_probs, advantages = jnp.zeros(3), jnp.array([1.0, -1.0, 1.0])
    log_probs = jnp.log(jnp.array([8.0, 1e30, 0.5]))
    loss = lambda x: POLICY_LOSSES["cispo"](  # noqa: E731
      x, old_log_probs, advantages, jnp.ones(3, bool)
    ).sum()
    np.testing.assert_allclose(jax.grad(loss)(log_probs), [-1.5, 1.5, -0.5], rtol=1e-6)

  def test_gspo_spreads_one_gradient_over_the_sequence(self):
    mask = jnp.array([[True, True, False], [True, True, True]])
    log_probs = jnp.log(jnp.array([[1.2, 1.2 * 0.9**2, 5.0], [2.0, 2.0, 2.0]]))  # ratios: 1.08, 2
    advantages = jnp.ones((2, 3))

    def loss(x):
      per_token = POLICY_LOSSES["gspo"](x, jnp.zeros((2, 3)), advantages, mask)
      return ops.sequence_mean_token_mean(per_token, mask)[0], per_token

    gradient, per_token = jax.grad(loss, has_aux=True)(log_probs)
    np.testing.assert_allclose(per_token, [[-1.08, -1.08, 0], [-1.3] * 3], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.54, -0.54, 0], [0] * 3], rtol=1e-6)

  def test_a_clipped_token_has_no_gradient_however_large_its_ratio(self):
    log_probs = jnp.array([200.0, -200.0])
    loss = lambda x: POLICY_LOSSES["clipped"](  # noqa: E731
      x, jnp.zeros(2), jnp.array([1.0, -1.0]), jnp.ones(2, bool)
    )
    np.testing.assert_allclose(loss(log_probs), [-1.3, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: loss(x).sum())(log_probs), [0, 0])

  def test_infinite_bounds_turn_the_clips_off(self):
    log_probs, old_log_probs, advantages, mask = _batch()
    loss = ops.clipped_policy_loss(
      log_probs, old_log_probs, advantages, mask, clip_eps_low=1.0, clip_eps_high=jnp.inf
    )
    ratio = np.exp(log_probs - old_log_probs)
    np.testing.assert_allclose(loss, np.where(mask, -ratio * advantages, 0), rtol=1e-5)
    value_loss = ops.clipped_value_loss(
      log_probs, old_log_probs, advantages, mask, value_clip_eps=jnp.inf
    )
    np.testing.assert_allclose(value_loss, ops.value_loss(log_probs, advantages, mask))

  def test_clip_fraction_marks_real_tokens_without_gradient(self):
    log_probs, old_log_probs, advantages, mask = _batch()
    args = (old_log_probs, advantages, mask)
    clipped = jax.jit(lambda *args: ops.clip_fraction(*args, clip_eps_low=0.2, clip_eps_high=0.3))(
      log_probs, *args
    )
    gradient = jax.grad(lambda x: POLICY_LOSSES["clipped"](x, *args).sum())(log_probs)
    np.testing.assert_array_equal(clipped, mask & (gradient == 0))
    self.assertBetween(clipped.sum(), 1, mask.sum() - 1)

  def test_a_token_that_no_advantage_pushes_is_not_clipped(self):
    log_ratio, mask = jnp.array([1.0, -1.0, 1.0, -1.0]), jnp.ones(4, bool)
    clipped = ops.clip_fraction(
      log_ratio,
      0 * log_ratio,
      jnp.array([0.0, 0.0, -1.0, 1.0]),
      mask,
      clip_eps_low=0.2,
      clip_eps_high=0.2,
    )
    np.testing.assert_array_equal(clipped, np.zeros(4))

  @parameterized.named_parameters(*LOSSES)
  def test_shapes_that_would_broadcast_are_refused(self, loss):
    x, old, target, mask = _batch()
    with self.assertRaises(AssertionError):
      loss(x, old, target[:1], mask)
    with self.assertRaises(AssertionError):
      loss(x, old, target, mask[:1])


class PreferenceLossTest(chex.TestCase):
  def test_golden(self):
    """Margins 0 and log(3) / 2 at beta 2: -log sigmoid is log(2) and log(4 / 3)."""
    log_probs = jnp.array([[-3.0, -4.0], [-5.0, -4.0], [-2.0, -4.0], [-4.0, -4.0 + jnp.log(3) / 2]])
    loss = lambda *args: ops.dpo_loss(*args, beta=2.0)  # noqa: E731
    np.testing.assert_allclose(jax.jit(loss)(*log_probs), jnp.log(jnp.array([2, 4 / 3])), rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda *args: loss(*args).sum(), argnums=(0, 1, 2, 3)))(*log_probs)
    np.testing.assert_allclose(gradients[0], [-1.0, -0.5], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [1.0, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(gradients[2:], np.zeros((2, 2)))

  def test_ipo_golden(self):
    """Margins 0, 1 / 4 and 1 at beta 2, which wants 1 / 4: squares 1 / 16, 0 and 9 / 16."""
    log_probs = jnp.array(
      [[-3.0, -2.0, -1.0], [-5.0, -4.0, -2.0], [-2.0, 0.0, 0.0], [-4.0, -1.75, 0.0]]
    )
    loss = lambda *args: ops.ipo_loss(*args, beta=2.0)  # noqa: E731
    np.testing.assert_allclose(jax.jit(loss)(*log_probs), [1 / 16, 0, 9 / 16], rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda *args: loss(*args).sum(), argnums=(0, 1, 2, 3)))(*log_probs)
    np.testing.assert_allclose(gradients[0], [-0.5, 0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [0.5, 0, -1.5], rtol=1e-6)
    np.testing.assert_array_equal(gradients[2:], np.zeros((2, 3)))

  def test_a_pair_far_on_the_wrong_side_stays_finite(self):
    zero = jnp.zeros(())
    value, gradient = jax.value_and_grad(ops.dpo_loss)(zero - 1e4, zero, zero, zero, beta=1.0)
    np.testing.assert_allclose([value, gradient], [1e4, -1.0])

  @parameterized.parameters(ops.dpo_loss, ops.ipo_loss)
  def test_shapes_that_would_broadcast_are_refused(self, loss):
    with self.assertRaises(AssertionError):
      loss(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), jnp.zeros(1), beta=1.0)


class AggregationTest(chex.TestCase):
  LOSS = np.array([[1, 2, np.nan], [6, np.inf, np.nan], [np.nan] * 3], np.float32)
  MASK = np.array([[True, True, False], [True, False, False], [False] * 3])

  @parameterized.named_parameters(
    # The last row has no token, so there are two sequences. Last: a token's weight in row one.
    ("token_mean", ops.token_mean, (9.0, 3.0), 1.0),
    ("sequence_mean_token_mean", ops.sequence_mean_token_mean, (1.5 + 6.0, 2.0), 0.5),
    ("sequence_mean_token_sum", ops.sequence_mean_token_sum, (9.0, 2.0), 1.0),
    ("constant", ops.constant, (9.0, 2.0 * 3), 1.0),
  )
  def test_golden_with_nan_and_inf_in_the_padding(self, aggregate, expected, weight):
    output = jax.jit(aggregate)(self.LOSS, self.MASK)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    derivative = jax.jit(jax.grad(lambda x, mask: aggregate(x, mask)[0]))
    gradient = [[weight, weight, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(derivative(self.LOSS, self.MASK), gradient, rtol=1e-6)

  @parameterized.named_parameters(*ops.AGGREGATIONS.items())
  def test_micro_batches_add_up(self, aggregate):
    loss, _, _, mask = _batch()
    whole = aggregate(loss, mask)
    parts = [aggregate(loss[i : i + 1], mask[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-5)

  @parameterized.named_parameters(*ops.AGGREGATIONS.items())
  def test_no_token_at_all_divides_to_zero(self, aggregate):
    loss = lambda x: ops.divide(*aggregate(x, np.zeros((3, 3), bool)))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(self.LOSS)
    self.assertEqual(value, 0.0)
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))


if __name__ == "__main__":
  absltest.main()
