"""What each estimator's value and gradient are in expectation is summed exactly, never sampled."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from klrl import ops

# KL(pi || ref) = 0.373386 and KL(ref || pi) = 0.421968 differ, so a swapped direction shows.
PI = np.array([0.7, 0.2, 0.1])
REF = np.array([0.3, 0.3, 0.4])
KL_PI_REF = (PI * np.log(PI / REF)).sum()
KL_REF_PI = (REF * np.log(REF / PI)).sum()
# Gradients with respect to the logits of pi.
GRADIENT_PI_REF = PI * (np.log(PI / REF) - KL_PI_REF)
GRADIENT_REF_PI = PI - REF


def _expectation(estimator, logits, other, sampler, placement):
  """Returns the expected value whose gradient is the estimator's as a loss or in the reward."""
  log_probs = jax.nn.log_softmax(logits)
  terms = estimator(log_probs, jnp.log(other))
  if placement == "loss":
    return (jax.lax.stop_gradient(sampler) * terms).sum()
  return (jnp.exp(log_probs) * jax.lax.stop_gradient(terms)).sum()


def _value_and_gradient(estimator, other, sampler, placement="loss"):
  with jax.enable_x64(True):
    value, gradient = jax.value_and_grad(
      lambda logits: _expectation(estimator, logits, jnp.array(other), sampler, placement)
    )(jnp.log(jnp.array(PI)))
    return np.asarray(value), np.asarray(gradient)


def _assert_accumulated_in_float32(outputs, narrow):
  """Checks (value, gradients) of bfloat16 inputs against those of the same numbers in float32."""
  value, gradients = outputs(narrow)
  assert value.dtype == jnp.float32
  truth, true_gradients = outputs([x.astype(jnp.float32) for x in narrow])
  np.testing.assert_allclose(value, truth, rtol=1e-5)
  for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
    assert gradient.dtype == jnp.bfloat16
    error = jnp.linalg.norm(gradient.astype(jnp.float32) - true_gradient)
    assert error / jnp.linalg.norm(true_gradient) < 2**-7


class EstimatorsTest(chex.TestCase):
  @parameterized.named_parameters(
    # log_ratio = log 2, -log 2; exp(-log_ratio) = 1/2, 2.
    ("k1", ops.k1, [np.log(2), -np.log(2)]),
    ("k2", ops.k2, [np.log(2) ** 2 / 2] * 2),
    ("k3", ops.k3, [np.log(2) - 0.5, 1 - np.log(2)]),
    # ratio = 2, 1/2: ratio - 1 - log(ratio), then ratio * log(ratio) - (ratio - 1).
    ("kl_old_new", ops.kl_old_new, [1 - np.log(2), np.log(2) - 0.5]),
    ("kl_new_old", ops.kl_new_old, [2 * np.log(2) - 1, 0.5 - np.log(2) / 2]),
  )
  def test_golden(self, estimator, expected):
    log_probs, other = jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([[0.25, 0.5]]))
    np.testing.assert_allclose(jax.jit(estimator)(log_probs, other), [expected], rtol=1e-5)

  @parameterized.named_parameters(
    ("k1", ops.k1, KL_PI_REF),
    ("k3", ops.k3, KL_PI_REF),
    ("k2", ops.k2, (PI * np.log(PI / REF) ** 2).sum() / 2),
  )
  def test_value_on_samples_of_pi(self, estimator, expected):
    value, _ = _value_and_gradient(estimator, REF, PI)
    np.testing.assert_allclose(value, expected, rtol=1e-12)

  @parameterized.named_parameters(
    ("k1_loss", ops.k1, "loss", 0 * PI),
    ("k2_loss", ops.k2, "loss", GRADIENT_PI_REF),
    ("k3_loss", ops.k3, "loss", GRADIENT_REF_PI),
    ("k1_reward", ops.k1, "reward", GRADIENT_PI_REF),
    ("k3_reward", ops.k3, "reward", GRADIENT_PI_REF - GRADIENT_REF_PI),
  )
  def test_gradient_on_samples_of_pi(self, estimator, placement, expected):
    _, gradient = _value_and_gradient(estimator, REF, PI, placement)
    np.testing.assert_allclose(gradient, expected, atol=1e-14)

  def test_k2_in_the_reward_is_no_divergence_gradient(self):
    _, gradient = _value_and_gradient(ops.k2, REF, PI, "reward")
    self.assertGreater(np.abs(gradient - GRADIENT_PI_REF).max(), 0.05)
    self.assertGreater(np.abs(gradient - GRADIENT_REF_PI).max(), 0.05)

  @parameterized.named_parameters(
    ("kl_old_new", ops.kl_old_new, KL_REF_PI, GRADIENT_REF_PI),
    ("kl_new_old", ops.kl_new_old, KL_PI_REF, GRADIENT_PI_REF),
  )
  def test_value_and_gradient_on_samples_of_old(self, estimator, value, gradient):
    output = _value_and_gradient(estimator, REF, REF)
    np.testing.assert_allclose(output[0], value, rtol=1e-12)
    np.testing.assert_allclose(output[1], gradient, atol=1e-14)

  @parameterized.named_parameters(*ops.KL_ESTIMATORS.items())
  def test_every_estimator_in_the_table(self, estimator):
    log_probs = -jnp.arange(1.0, 7.0).reshape(2, 3)
    fn = jax.jit(estimator)
    np.testing.assert_array_equal(fn(log_probs, log_probs), np.zeros((2, 3)))
    chex.assert_numerical_grads(
      lambda x, y: fn(x, y).sum(), (log_probs, 0.9 * log_probs), order=1, atol=1e-2, rtol=1e-2
    )
    self.assertEqual(fn(*[log_probs.astype(jnp.bfloat16)] * 2).dtype, jnp.float32)
    with self.assertRaises(AssertionError):
      fn(log_probs, log_probs[:1])

  @parameterized.named_parameters(
    ("k3", ops.k3), ("kl_old_new", ops.kl_old_new), ("kl_new_old", ops.kl_new_old)
  )
  def test_close_policies_give_no_negative_value(self, estimator):
    log_ratio = np.concatenate([s * np.geomspace(1e-8, 1, 200) for s in (-1.0, 1.0)])
    values = estimator(jnp.float32(log_ratio), jnp.zeros(400, jnp.float32))
    self.assertGreaterEqual(values.min(), 0.0)
    large = np.abs(log_ratio) > 1e-4
    np.testing.assert_allclose(values[large] / (log_ratio[large] ** 2 / 2), 1.0, atol=1.0)

  @parameterized.named_parameters(
    ("k2", ops.k2), ("k3", ops.k3), ("kl_old_new", ops.kl_old_new), ("kl_new_old", ops.kl_new_old)
  )
  def test_padding_made_equal_first_reaches_neither_value_nor_gradient(self, estimator):
    mask = np.array([True, False, True, False])
    log_probs = np.array([-1.0, -np.inf, -2.0, np.nan], np.float32)
    other = np.array([-1.5, -3.0, -1.0, -1e4], np.float32)

    def total(log_probs):
      return estimator(ops.zero_padding(log_probs, mask), ops.zero_padding(other, mask)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(log_probs)
    kept = jax.value_and_grad(lambda x: estimator(x, jnp.array(other[mask])).sum())(log_probs[mask])
    np.testing.assert_allclose(value, kept[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, [kept[1][0], 0, kept[1][1], 0], rtol=1e-6)


class ExactKLTest(chex.TestCase):
  def test_golden_value_and_gradient(self):
    kl = jax.jit(jax.value_and_grad(lambda x, y: ops.exact_kl(x, y).sum(), argnums=(0, 1)))
    value, (d_logits, d_ref_logits) = kl(jnp.log(PI)[None] + 3.0, jnp.log(REF)[None] - 1.0)
    np.testing.assert_allclose(value, KL_PI_REF, rtol=1e-5)
    np.testing.assert_allclose(d_logits[0], GRADIENT_PI_REF, atol=1e-6)
    np.testing.assert_allclose(d_ref_logits[0], REF - PI, atol=1e-6)

  def test_equals_a_loop_at_a_temperature(self):
    logits, ref_logits = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    truth = np.zeros((3, 4))
    for row in np.ndindex(3, 4):
      p, q = (np.exp(np.asarray(x[row], np.float64) / 0.6) for x in (logits, ref_logits))
      p, q = p / p.sum(), q / q.sum()
      truth[row] = sum(p[v] * np.log(p[v] / q[v]) for v in range(6))
    kl = ops.exact_kl(logits, ref_logits, temperature=0.6)
    np.testing.assert_allclose(kl, truth, rtol=1e-5, atol=1e-6)

  def test_it_is_zero_where_the_policies_agree(self):
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    np.testing.assert_array_equal(ops.exact_kl(logits, logits), np.zeros(5))

  def test_tokens_that_the_policy_excludes_add_nothing(self):
    def total(logits, ref_logits, temperature):
      return ops.exact_kl(logits, ref_logits, temperature=temperature).sum()

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    logits = jnp.array([[1.0, -jnp.inf, 0.3]])
    both = gradient(logits, jnp.array([[0.2, -jnp.inf, 0.1]]), jnp.float32(0.9))
    kept = gradient(logits[:, ::2], jnp.array([[0.2, 0.1]]), jnp.float32(0.9))
    np.testing.assert_allclose(both[0], kept[0], rtol=1e-6)
    for one, other in zip(both[1][:2], kept[1][:2], strict=True):
      np.testing.assert_allclose(one, [[other[0, 0], 0, other[0, 1]]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(both[1][2], kept[1][2], rtol=1e-5)
    # Here ref gives that token 1/3: the two kept tokens lose log(2/3) of ref's mass each.
    one_sided = ops.exact_kl(jnp.array([0.0, -jnp.inf, 0.0]), jnp.zeros(3))
    np.testing.assert_allclose(one_sided, -np.log(2 / 3), rtol=1e-6)

  def test_a_token_that_only_the_reference_excludes_costs_infinity(self):
    self.assertEqual(ops.exact_kl(jnp.zeros(2), jnp.array([0.0, -jnp.inf])), jnp.inf)


class ExactKLFromHiddenTest(chex.TestCase):
  def _inputs(self, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = ((2, 5, 6), (6, 9), (2, 5, 3), (3, 9))  # widths differ
    return [
      jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]

  def _total(self, *args, chunk_size=None):
    """A scalar in which no two rows weigh the same."""
    kl = ops.exact_kl_from_hidden(*args[:4], temperature=args[4], chunk_size=chunk_size)
    return (jnp.sin(jnp.arange(1.0, 11.0)).reshape(2, 5) * kl).sum()

  @parameterized.parameters(1, 3, None)  # 10 rows: 10 chunks, 4 of which the last is short, one
  def test_it_equals_the_dense_form_in_value_and_gradient(self, chunk_size):
    def dense(hidden, unembedding, ref_hidden, ref_unembedding, temperature):
      logits, ref_logits = hidden @ unembedding, ref_hidden @ ref_unembedding
      kl = ops.exact_kl(logits, ref_logits, temperature=temperature)
      return (jnp.sin(jnp.arange(1.0, 11.0)).reshape(2, 5) * kl).sum()

    def chunked(*args):
      return self._total(*args, chunk_size=chunk_size)

    with jax.enable_x64(True):
      outputs = [
        jax.jit(jax.value_and_grad(fn, argnums=range(5)))(
          *self._inputs(jnp.float64), jnp.float64(0.8)
        )
        for fn in (dense, chunked)
      ]
      chex.assert_trees_all_equal_dtypes(*outputs)
      chex.assert_trees_all_close(*outputs, rtol=1e-10, atol=1e-10)

  def test_a_gradient_that_nobody_asks_for_costs_no_products(self):
    def products(argnums, frozen):
      def total(*args):
        ref = jax.lax.stop_gradient(args[2:4]) if frozen else args[2:4]
        return self._total(*args[:2], *ref, args[4], chunk_size=3)

      gradient = jax.jit(jax.grad(total, argnums=argnums))
      return gradient.lower(*self._inputs(), jnp.float32(0.8)).compile().as_text().count(" dot(")

    # Nobody asks for the value. Two products are logits, and two gradients each of policy and
    # reference.
    self.assertEqual(products((0, 1, 2, 3, 4), frozen=False), 6)
    self.assertEqual(products((0, 1, 2, 3, 4), frozen=True), 4)
    self.assertEqual(products((0, 1), frozen=False), 4)
    self.assertEqual(products((2, 3), frozen=False), 4)

  def test_it_maps_over_members_with_their_own_temperature(self):
    gradient = jax.value_and_grad(
      lambda temperature, hidden: self._total(
        hidden, *self._inputs()[1:], temperature, chunk_size=4
      ),
      argnums=(0, 1),
    )
    hidden, temperatures = self._inputs()[0], jnp.array([0.5, 1.0, 2.0])
    mapped = jax.vmap(gradient, in_axes=(0, None))(temperatures, hidden)
    for index, temperature in enumerate(temperatures):
      one = jax.tree.map(lambda x, index=index: x[index], mapped)
      chex.assert_trees_all_close(one, gradient(temperature, hidden), rtol=1e-5, atol=1e-5)

  def test_rows_sharded_over_devices_stay_there_and_give_the_same_numbers(self):
    hidden, unembedding, ref_hidden, ref_unembedding = self._inputs()
    arguments = (hidden.repeat(4, 0), unembedding, ref_hidden.repeat(4, 0), ref_unembedding)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row, everywhere = (
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["data"], [])
    )

    def gradient(*args):
      total = lambda *args: (ops.exact_kl_from_hidden(*args, chunk_size=8) ** 2).sum()  # noqa: E731
      return jax.value_and_grad(total, argnums=range(4))(*args)

    sharded = jax.jit(gradient, in_shardings=(by_row, everywhere) * 2)
    self.assertNotIn("all-gather", sharded.lower(*arguments).compile().as_text())
    chex.assert_trees_all_close(
      jax.device_get(sharded(*arguments)),
      jax.device_get(jax.jit(gradient)(*arguments)),
      rtol=1e-4,
      atol=1e-4,
    )

  def test_bfloat16_is_accumulated_in_float32(self):
    def outputs(inputs):
      total = lambda *args: ops.exact_kl_from_hidden(*args, chunk_size=2).sum()  # noqa: E731
      return jax.jit(jax.value_and_grad(total, argnums=range(4)))(*inputs)

    # A hundred equal rows: a sum in bfloat16 would stop growing.
    narrow = [x[:1, :1].repeat(100, 1) if x.ndim == 3 else x for x in self._inputs(jnp.bfloat16)]
    _assert_accumulated_in_float32(outputs, narrow)

  def test_logits_are_never_held(self):
    rows, vocab_size = 512, 64
    hidden, unembedding = jnp.ones((rows, 4)), jnp.ones((4, vocab_size))

    def total(hidden, unembedding):
      args = (hidden, unembedding, 2 * hidden, unembedding)
      return ops.exact_kl_from_hidden(*args, chunk_size=16).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    memory = gradient.lower(hidden, unembedding).compile().memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, 4 * rows * vocab_size // 2)


def _jsd_by_loop(logits, ref_logits, weight, temperature=1.0):
  """Returns JSD [...] in float64, one token at a time; `ref_logits` are the teacher's."""
  truth = np.zeros(logits.shape[:-1])
  for row in np.ndindex(truth.shape):
    q, p = (np.exp(np.asarray(x[row], np.float64) / temperature) for x in (logits, ref_logits))
    p, q = p / p.sum(), q / q.sum()
    m = weight * p + (1 - weight) * q
    for v in range(logits.shape[-1]):
      truth[row] += weight * p[v] * np.log(p[v] / m[v])
      truth[row] += (1 - weight) * q[v] * np.log(q[v] / m[v])
  return truth


class ExactJSDTest(chex.TestCase):
  def _logits(self, dtype=jnp.float32):
    return 2 * jax.random.normal(jax.random.key(0), (2, 3, 4, 6)).astype(dtype)

  @parameterized.parameters(0.1, 0.5, 0.8)
  def test_equals_the_definition_in_float64(self, weight):
    with jax.enable_x64(True):
      logits, ref_logits = self._logits(jnp.float64)
      jsd = jax.jit(lambda *args: ops.exact_jsd(*args, weight=weight, temperature=0.7))
      value = jsd(logits, ref_logits)
      self.assertEqual(value.dtype, jnp.float64)
      np.testing.assert_allclose(value, _jsd_by_loop(logits, ref_logits, weight, 0.7), rtol=1e-12)

  def test_divided_by_its_small_weight_it_is_the_kl_from_the_other_side(self):
    with jax.enable_x64(True):
      student, teacher = jnp.log(jnp.array(PI)), jnp.log(jnp.array(REF))
      low, high = (ops.exact_jsd(student, teacher, weight=w) for w in (1e-6, 1 - 1e-6))
      np.testing.assert_allclose(low / 1e-6, KL_REF_PI, rtol=1e-5)  # teacher to student
      np.testing.assert_allclose(high / 1e-6, KL_PI_REF, rtol=1e-5)  # student to teacher

  def test_it_is_symmetric_at_one_half_only(self):
    one, other = self._logits()
    np.testing.assert_allclose(
      ops.exact_jsd(one, other, weight=0.5), ops.exact_jsd(other, one, weight=0.5), rtol=1e-5
    )
    np.testing.assert_allclose(
      ops.exact_jsd(one, other, weight=0.2), ops.exact_jsd(other, one, weight=0.8), rtol=1e-5
    )
    gap = ops.exact_jsd(one, other, weight=0.2) - ops.exact_jsd(other, one, weight=0.2)
    self.assertGreater(np.abs(gap).max(), 0.02)

  def test_it_is_zero_with_zero_gradient_where_they_agree_and_at_the_ends_of_the_weight(self):
    logits, other = self._logits()
    gradient = jax.value_and_grad(
      lambda *args: ops.exact_jsd(*args, weight=0.3).sum(), argnums=(0, 1)
    )
    value, gradients = gradient(logits, logits)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    for one in gradients:
      np.testing.assert_allclose(one, np.zeros_like(one), atol=1e-6)
    for weight in (0.0, 1.0):
      np.testing.assert_allclose(ops.exact_jsd(logits, other, weight=weight), 0, atol=1e-6)

  def test_it_stays_below_the_entropy_of_the_weights(self):
    apart = jnp.array([100.0, -100.0]), jnp.array([-100.0, 100.0])
    bound = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    np.testing.assert_allclose(ops.exact_jsd(*apart, weight=0.3), bound, rtol=1e-6)
    self.assertLess(ops.exact_jsd(*self._logits(), weight=0.3).max(), bound)

  def test_excluded_tokens_cost_what_the_definition_says(self):
    def total(logits, ref_logits, temperature):
      return ops.exact_jsd(logits, ref_logits, weight=0.3, temperature=temperature).sum()

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    infinity = jnp.inf
    both = gradient(jnp.array([1.0, -infinity, 0.3]), jnp.array([0.2, -infinity, 0.1]), 0.9)
    kept = gradient(jnp.array([1.0, 0.3]), jnp.array([0.2, 0.1]), 0.9)
    chex.assert_trees_all_close(
      (both[0], [x[::2] for x in both[1][:2]], both[1][2]),
      (kept[0], list(kept[1][:2]), kept[1][2]),
      rtol=1e-5,
      atol=1e-7,
    )
    self.assertEqual((both[1][0][1], both[1][1][1]), (0, 0))
    # Q = (1/2, 1/2, 0), P = (0, 1/2, 1/2): the middle token costs nothing.
    value, gradients = gradient(jnp.array([0, 0, -infinity]), jnp.array([-infinity, 0, 0]), 0.9)
    expected = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7)) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_tree_all_finite(gradients)

  def test_shapes_that_would_broadcast_are_refused(self):
    logits, ref_logits = self._logits()
    with self.assertRaises(AssertionError):
      ops.exact_jsd(logits, ref_logits[:1], weight=0.5)


class ExactJSDFromHiddenTest(chex.TestCase):
  def _inputs(self, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = ((2, 5, 6), (6, 9), (2, 5, 3), (3, 9))  # widths differ
    return [
      jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]

  def _total(self, jsd):
    """A scalar in which no two rows weigh the same."""
    return (jnp.sin(jnp.arange(1.0, 11.0)).reshape(2, 5) * jsd).sum()

  @parameterized.parameters(1, 3, None)
  def test_it_equals_the_definition_in_value_and_gradient(self, chunk_size):
    def dense(hidden, unembedding, ref_hidden, ref_unembedding, weight, temperature):
      q, p = (
        jax.nn.softmax(x / temperature)
        for x in (hidden @ unembedding, ref_hidden @ ref_unembedding)
      )
      m = weight * p + (1 - weight) * q
      terms = weight * p * jnp.log(p / m) + (1 - weight) * q * jnp.log(q / m)
      return self._total(terms.sum(axis=-1))

    def chunked(*args):
      coefficients = {"weight": args[4], "temperature": args[5], "chunk_size": chunk_size}
      return self._total(ops.exact_jsd_from_hidden(*args[:4], **coefficients))

    with jax.enable_x64(True):
      args = (*self._inputs(jnp.float64), jnp.float64(0.3), jnp.float64(0.8))
      outputs = [
        jax.jit(jax.value_and_grad(fn, argnums=range(6)))(*args) for fn in (dense, chunked)
      ]
      chex.assert_trees_all_equal_dtypes(*outputs)
      chex.assert_trees_all_close(*outputs, rtol=1e-10, atol=1e-10)

  def test_a_frozen_teacher_costs_no_products(self):
    def products(argnums):
      total = lambda *args: ops.exact_jsd_from_hidden(*args, weight=0.5, chunk_size=3).sum()  # noqa: E731
      gradient = jax.jit(jax.grad(total, argnums=argnums))
      return gradient.lower(*self._inputs()).compile().as_text().count(" dot(")

    self.assertEqual(products((0, 1, 2, 3)) - products((0, 1)), 2)

  def test_bfloat16_is_accumulated_in_float32(self):
    def outputs(inputs):
      total = lambda *args: ops.exact_jsd_from_hidden(*args, weight=0.5, chunk_size=2).sum()  # noqa: E731
      return jax.jit(jax.value_and_grad(total, argnums=range(4)))(*inputs)

    # A thousand equal rows: a sum in bfloat16 would stop growing.
    narrow = [x[:1, :1].repeat(1000, 1) if x.ndim == 3 else x for x in self._inputs(jnp.bfloat16)]
    _assert_accumulated_in_float32(outputs, narrow)

  def test_logits_are_never_held(self):
    rows, vocab_size = 2048, 64
    hidden, unembedding = jnp.ones((rows, 4)), jnp.ones((4, vocab_size))

    def total(hidden, unembedding):
      args = (hidden, unembedding, 2 * hidden, unembedding)
      return ops.exact_jsd_from_hidden(*args, weight=0.5, chunk_size=16).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    memory = gradient.lower(hidden, unembedding).compile().memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, 4 * rows * vocab_size // 2)

  def test_it_maps_over_members_with_their_own_weight(self):
    def jsd(weight):
      return ops.exact_jsd_from_hidden(*self._inputs(), weight=weight, chunk_size=4)

    weights = jnp.array([0.1, 0.5, 0.9])
    mapped = jax.vmap(jsd)(weights)
    for index, weight in enumerate(weights):
      np.testing.assert_allclose(mapped[index], jsd(weight), rtol=1e-5, atol=1e-6)

  def test_an_estimator_whose_derivative_is_not_known_has_no_weighted_estimate(self):
    zeros = jnp.zeros(2)
    with self.assertRaisesRegex(ValueError, "derivatives of k1, k2 and k3, not of k4"):
      ops.weighted_estimate("k4", zeros, zeros, zeros)


if __name__ == "__main__":
  absltest.main()
