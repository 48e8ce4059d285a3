import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from klrl import ops

B, T, V, D = 2, 5, 11, 8


def _inputs(dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
  unembedding = jax.random.normal(keys[1], (D, V)).astype(dtype)
  return hidden, unembedding, jax.random.randint(keys[2], (B, T), 0, V)


def _reference(logits, tokens, temperature):
  """Loops over rows in float64: log-probs of the tokens, entropies."""
  log_probs, entropies = np.zeros(tokens.shape), np.zeros(tokens.shape)
  for row in np.ndindex(tokens.shape):
    weights = [np.exp(float(x) / temperature) for x in np.asarray(logits)[row]]
    probs = [weight / sum(weights) for weight in weights]
    log_probs[row] = np.log(probs[tokens[row]])
    entropies[row] = -sum(p * np.log(p) for p in probs if p > 0)
  return log_probs, entropies


def _weighted(log_probs, entropies):
  """A scalar of both outputs in which no two entries weigh the same."""
  weights = jnp.sin(1.0 + jnp.arange(log_probs.size)).reshape(log_probs.shape)
  return (weights * log_probs).sum() + (weights**2 * entropies).sum()


def _dense(hidden, unembedding, tokens, temperature):
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  logits = jnp.matmul(hidden, unembedding, preferred_element_type=dtype)
  return (
    ops.token_log_probs(logits, tokens, temperature=temperature),
    ops.entropy(logits, temperature=temperature),
  )


def _chunked(hidden, unembedding, tokens, temperature, chunk_size=None):
  return ops.token_log_probs_and_entropy_from_hidden(
    hidden, unembedding, tokens, temperature=temperature, chunk_size=chunk_size
  )


def _sizes(jaxpr):
  """Yields the size of every array in a jaxpr and in those inside it."""
  for equation in jaxpr.eqns:
    yield from (var.aval.size for var in equation.outvars)
    for param in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
      if hasattr(param, "jaxpr") or hasattr(param, "eqns"):
        yield from _sizes(getattr(param, "jaxpr", param))


class LogitsTest(chex.TestCase):
  def test_golden(self):
    # softmax(log 6, log 3, log 3) = 1/2, 1/4, 1/4; at temperature 1/2 the squares: 2/3, 1/6, 1/6.
    logits = jnp.log(jnp.array([[6.0, 3.0, 3.0], [6.0, 3.0, 3.0]]))
    tokens = jnp.array([0, 2])
    log_probs = jax.jit(ops.token_log_probs)(logits, tokens)
    np.testing.assert_allclose(log_probs, np.log([1 / 2, 1 / 4]), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(ops.entropy)(logits), [1.5 * np.log(2)] * 2, rtol=1e-6)
    cold = jax.jit(lambda x, y: ops.token_log_probs(x, y, temperature=0.5))(logits, tokens)
    np.testing.assert_allclose(cold, np.log([2 / 3, 1 / 6]), rtol=1e-6)

  @parameterized.parameters(0.7, 3.0)
  def test_equals_a_loop(self, temperature):
    hidden, unembedding, tokens = _inputs()
    logits = hidden @ unembedding
    truth = _reference(logits, np.asarray(tokens), temperature)
    output = jax.jit(
      lambda logits, tokens, temperature: (
        ops.token_log_probs(logits, tokens, temperature=temperature),
        ops.entropy(logits, temperature=temperature),
      )
    )(logits, tokens, jnp.float32(temperature))
    np.testing.assert_allclose(output, truth, rtol=1e-5, atol=1e-6)

  def test_excluded_logits_give_no_nan(self):
    logits = jnp.array([[1.0, -jnp.inf, 0.5, -jnp.inf]])
    kept = jnp.array([[1.0, 0.5]])

    def outputs(logits, token, temperature):
      return (
        ops.token_log_probs(logits, token, temperature=temperature)
        + 2 * ops.entropy(logits, temperature=temperature)
      ).sum()

    gradients = jax.jit(jax.value_and_grad(outputs, argnums=(0, 2)))
    value, (d_logits, d_temperature) = gradients(logits, jnp.array([2]), jnp.float32(0.8))
    truth, (d_kept, d_truth) = gradients(kept, jnp.array([1]), jnp.float32(0.8))
    np.testing.assert_allclose(value, truth, rtol=1e-6)
    np.testing.assert_allclose(d_logits, [[d_kept[0, 0], 0, d_kept[0, 1], 0]], rtol=1e-6)
    np.testing.assert_allclose(d_temperature, d_truth, rtol=1e-6)

  def test_the_log_prob_of_an_excluded_token_is_minus_infinity(self):
    self.assertEqual(ops.token_log_probs(jnp.array([0.0, -jnp.inf]), jnp.array(1)), -jnp.inf)

  def test_large_logits_do_not_overflow(self):
    logits = jnp.array([1e4, 0.0, -1e4])
    np.testing.assert_allclose(ops.token_log_probs(logits, jnp.array(1)), -1e4)
    np.testing.assert_allclose(ops.entropy(logits), 0.0, atol=1e-6)

  def test_wrong_shapes_and_types_are_refused(self):
    logits = jnp.zeros((2, 3, 4))
    with self.assertRaises(AssertionError):
      ops.token_log_probs(logits, jnp.zeros((1, 3), int))
    with self.assertRaises(AssertionError):
      ops.token_log_probs(logits, jnp.zeros((2, 3)))

  def test_gradients_are_numerically_right(self):
    _, _, tokens = _inputs()
    logits = jax.random.normal(jax.random.key(7), (B, T, 4))
    chex.assert_numerical_grads(
      jax.jit(
        lambda logits, temperature: _weighted(
          ops.token_log_probs(logits, tokens % 4, temperature=temperature),
          ops.entropy(logits, temperature=temperature),
        )
      ),
      (logits, jnp.float32(0.9)),
      order=1,
      atol=2e-2,
      rtol=2e-2,
    )


class HiddenTest(chex.TestCase):
  @parameterized.parameters(3, None)
  def test_back_ends_agree_in_value_and_gradient(self, chunk_size):
    hidden, unembedding, tokens = _inputs()
    arguments = (hidden, unembedding, jnp.float32(0.7))

    def outputs(back_end):
      def scalar(hidden, unembedding, temperature):
        return _weighted(*back_end(hidden, unembedding, tokens, temperature))

      return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2)))(*arguments)

    chunked = outputs(lambda *args: _chunked(*args, chunk_size))
    chex.assert_trees_all_close(chunked, outputs(_dense), rtol=1e-5, atol=1e-5)

  def test_without_entropy_the_log_probs_and_their_gradient_are_the_same(self):
    hidden, unembedding, tokens = _inputs()

    def scalar(hidden, unembedding, temperature, from_hidden):
      log_probs = from_hidden(hidden, unembedding, tokens, temperature)
      return _weighted(log_probs, jnp.zeros_like(log_probs)), log_probs

    def outputs(from_hidden):
      gradient = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)
      return jax.jit(lambda *args: gradient(*args, from_hidden))(hidden, unembedding, 0.7)

    alone = outputs(
      lambda hidden, unembedding, tokens, temperature: ops.token_log_probs_from_hidden(
        hidden, unembedding, tokens, temperature=temperature, chunk_size=3
      )
    )
    chex.assert_trees_all_close(
      alone, outputs(lambda *args: _chunked(*args)[0]), rtol=1e-5, atol=1e-5
    )

  def test_equals_a_loop(self):
    hidden, unembedding, tokens = _inputs()
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    truth = _reference(logits, np.asarray(tokens), 1.3)
    chunked = _chunked(hidden, unembedding, tokens, 1.3, 4)
    np.testing.assert_allclose(chunked, truth, rtol=1e-5, atol=1e-6)

  def test_float64_stays_and_is_exact(self):
    with jax.enable_x64(True):
      hidden, unembedding, tokens = _inputs(jnp.float64)
      chunked = _chunked(hidden, unembedding, tokens, 0.7, 3)
      self.assertEqual(chunked[0].dtype, jnp.float64)
      truth = _reference(hidden @ unembedding, np.asarray(tokens), 0.7)
      np.testing.assert_allclose(chunked, truth, rtol=1e-12)
      chex.assert_numerical_grads(
        jax.jit(lambda *args: _weighted(*_chunked(args[0], args[1], tokens, args[2], 3))),
        (hidden, unembedding, jnp.float64(0.7)),
        order=1,
        modes=["rev"],
        atol=1e-6,
        rtol=1e-6,
      )

  def test_bfloat16_is_accumulated_in_float32(self):
    hidden, unembedding, tokens = _inputs(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (hidden, unembedding)]  # products are then exact

    def outputs(hidden, unembedding):
      def scalar(hidden, unembedding):
        log_probs, entropies = _chunked(hidden, unembedding, tokens, 0.7, 3)
        return _weighted(log_probs, entropies), (log_probs, entropies)

      return jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(hidden, unembedding)

    gradients, values = outputs(hidden, unembedding)
    true_gradients, true_values = outputs(*wide)
    chex.assert_trees_all_close(values, true_values, rtol=1e-5, atol=1e-5)
    for gradient, truth in zip(gradients, true_gradients, strict=True):
      self.assertEqual(gradient.dtype, jnp.bfloat16)
      error = jnp.linalg.norm(gradient.astype(jnp.float32) - truth) / jnp.linalg.norm(truth)
      self.assertLess(error, 2**-7)

  @parameterized.parameters(True, False)
  def test_logits_are_never_held(self, with_entropy):
    rows, vocab_size, width = 512, 64, 4
    hidden, unembedding = jnp.ones((4, rows // 4, width)), jnp.ones((width, vocab_size))
    tokens = jnp.zeros(hidden.shape[:2], jnp.int32)

    def scalar(hidden, unembedding):
      if with_entropy:
        return _weighted(*_chunked(hidden, unembedding, tokens, 1.0, 16))
      return ops.token_log_probs_from_hidden(hidden, unembedding, tokens, chunk_size=16).sum()

    gradient = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1)))
    jaxpr = jax.make_jaxpr(gradient)(hidden, unembedding)
    self.assertLess(max(_sizes(jaxpr.jaxpr)), rows * vocab_size // 4)
    memory = gradient.lower(hidden, unembedding).compile().memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, 4 * rows * vocab_size)
    # The same measure does see the logits of the other back-end.
    dense = jax.make_jaxpr(lambda *args: _dense(*args, tokens, 1.0))(hidden, unembedding)
    self.assertGreaterEqual(max(_sizes(dense.jaxpr)), rows * vocab_size)

  def test_it_maps_over_members_with_their_own_temperature(self):
    hidden, unembedding, tokens = _inputs()
    temperatures = jnp.array([0.5, 1.0, 2.0])

    def gradient(temperature):
      return jax.value_and_grad(
        lambda x: _weighted(*_chunked(x, unembedding, tokens, temperature))
      )(hidden)

    mapped = jax.vmap(gradient)(temperatures)
    for index, temperature in enumerate(temperatures):
      one = jax.tree.map(lambda x, index=index: x[index], mapped)
      chex.assert_trees_all_close(one, gradient(temperature), rtol=1e-5, atol=1e-5)

  def test_rows_sharded_over_devices_stay_there_and_give_the_same_numbers(self):
    hidden, unembedding, tokens = _inputs()
    hidden, tokens = hidden.repeat(4, axis=0), tokens.repeat(4, axis=0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def gradient(hidden, unembedding, tokens):
      scalar = lambda *args: _weighted(*_chunked(*args, tokens, 1.0, 8))  # noqa: E731
      return jax.value_and_grad(scalar, argnums=(0, 1))(hidden, unembedding)

    arguments = (hidden, unembedding, tokens)
    sharded = jax.jit(gradient, in_shardings=(by_row, everywhere, by_row))
    self.assertNotIn("all-gather", sharded.lower(*arguments).compile().as_text())
    chex.assert_trees_all_close(
      jax.device_get(sharded(*arguments)),
      jax.device_get(jax.jit(gradient)(*arguments)),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_a_chunk_size_that_is_not_positive_is_refused(self):
    with self.assertRaisesRegex(ValueError, "chunk_size=0"):
      _chunked(*_inputs(), 1.0, 0)


class CappedTest(chex.TestCase):
  """Every function of hidden states against the same one of logits that are capped by hand."""

  @parameterized.parameters("log_probs", "exact_kl", "exact_jsd")
  def test_capped_logits_give_the_dense_value_and_gradients(self, name):
    def capped(x, table, cap):
      return cap * jnp.tanh(x @ table / cap)

    def dense(hidden, table, ref_hidden, ref_table, temperature):
      logits, ref_logits = capped(hidden, table, 1.5), capped(ref_hidden, ref_table, 0.7)
      if name == "log_probs":
        return _weighted(
          ops.token_log_probs(logits, tokens, temperature=temperature),
          ops.entropy(logits, temperature=temperature),
        )
      if name == "exact_kl":
        return jnp.sum(weights * ops.exact_kl(logits, ref_logits, temperature=temperature))
      jsd = ops.exact_jsd(logits, ref_logits, weight=0.3, temperature=temperature)
      return jnp.sum(weights * jsd)

    def from_hidden(hidden, table, ref_hidden, ref_table, temperature):
      ours = hidden, ops.CappedUnembedding(table, 1.5)
      both = *ours, ref_hidden, ops.CappedUnembedding(ref_table, 0.7)
      options = {"temperature": temperature, "chunk_size": 3}
      if name == "log_probs":
        return _weighted(*ops.token_log_probs_and_entropy_from_hidden(*ours, tokens, **options))
      if name == "exact_kl":
        return jnp.sum(weights * ops.exact_kl_from_hidden(*both, **options))
      return jnp.sum(weights * ops.exact_jsd_from_hidden(*both, weight=0.3, **options))

    with jax.enable_x64(True):
      hidden, table, tokens = _inputs(jnp.float64)
      ref_hidden, ref_table, _ = _inputs(jnp.float64, seed=1)
      weights = jnp.sin(1.0 + jnp.arange(B * T)).reshape(B, T)
      arguments = (hidden, table, ref_hidden, ref_table, jnp.float64(0.7))
      expected, found = (
        jax.jit(jax.value_and_grad(f, argnums=range(5)))(*arguments) for f in (dense, from_hidden)
      )
      chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)
      self.assertGreater(float(jnp.abs(found[1][1]).max()), 1e-3)

  def test_whoever_takes_it_for_an_array_fails(self):
    hidden, table, _ = _inputs()
    unembedding = ops.CappedUnembedding(table, 1.5)
    expected = 1.5 * np.tanh(np.asarray(hidden) @ np.asarray(table) / 1.5)
    for x in (hidden, np.asarray(hidden)):
      np.testing.assert_allclose(x @ unembedding, expected, rtol=1e-5)
    for wrong in (
      lambda: jnp.matmul(hidden, unembedding),
      lambda: jnp.einsum("btd,dv->btv", hidden, unembedding),
      lambda: np.matmul(np.asarray(hidden), unembedding),
      lambda: unembedding[:, :3],
      lambda: unembedding.T,
      lambda: jnp.asarray(unembedding),
    ):
      with self.assertRaises((TypeError, AttributeError, ValueError)):
        wrong()


if __name__ == "__main__":
  absltest.main()
