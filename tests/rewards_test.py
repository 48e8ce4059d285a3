import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from klrl import ops

# Rows: finished early, its EOS at index 1; truncated at the length limit; a masked token inside;
# empty.
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
SCORES = np.array([5.0, -3.0, 2.0, 7.0], np.float32)
KL = np.array([[0.5, 1, 0, 0], [1, 2, -1, 4], [3, 0, 1, 0], [0, 0, 0, 0]], np.float32)
# -0.1 * kl, plus the score on the last real token.
EXPECTED = [[-0.05, 4.9, 0, 0], [-0.1, -0.2, 0.1, -3.4], [-0.3, 0, 1.9, 0], [0, 0, 0, 0]]


def _rewards(scores, kl, beta=0.1):
  return ops.shaped_rewards(scores, kl, MASK, beta=beta)


class ShapedRewardsTest(chex.TestCase):
  def test_finished_truncated_interrupted_and_empty_completions(self):
    np.testing.assert_allclose(jax.jit(_rewards)(SCORES, KL), EXPECTED, rtol=1e-6, atol=1e-7)

  def test_padding_reaches_neither_value_nor_gradient(self):
    weights = jnp.arange(1.0, 17.0).reshape(4, 4)
    gradient = jax.value_and_grad(
      lambda scores, kl, beta: (weights * _rewards(scores, kl, beta)).sum(), argnums=(0, 1, 2)
    )
    dirty_kl = np.where(MASK, KL, np.array([np.nan, np.inf, -np.inf, np.nan], np.float32))
    dirty_scores = np.where(MASK.any(axis=1), SCORES, np.float32(np.nan))
    clean = gradient(SCORES, KL, 0.1)
    chex.assert_trees_all_close(jax.jit(gradient)(dirty_scores, dirty_kl, 0.1), clean, rtol=1e-6)
    np.testing.assert_allclose(clean[1][0], [2, 8, 11, 0])  # the weight at the last real token

  def test_equals_a_loop_over_real_tokens(self):
    keys = jax.random.split(jax.random.key(0), 3)
    scores, kl = jax.random.normal(keys[0], (6,)), jax.random.normal(keys[1], (6, 8))
    mask = np.array(jax.random.bernoulli(keys[2], 0.4, kl.shape))
    mask[0] = False
    truth = np.zeros(kl.shape)
    for row, real in enumerate(mask):
      for t in np.flatnonzero(real):
        truth[row, t] = -0.3 * kl[row, t]
      if real.any():
        truth[row, np.flatnonzero(real)[-1]] += scores[row]
    rewards = jax.jit(lambda s, k, m: ops.shaped_rewards(s, k, m, beta=0.3))(scores, kl, mask)
    np.testing.assert_allclose(rewards, truth, rtol=1e-6, atol=1e-7)

  def test_one_sequence_alone_and_beta_zero(self):
    rewards = ops.shaped_rewards(jnp.array(2), KL[0], MASK[0], beta=0.0)
    np.testing.assert_allclose(rewards, [0, 2, 0, 0])
    self.assertEqual(rewards.dtype, jnp.float32)

  def test_scores_of_another_batch_are_refused(self):
    with self.assertRaises(AssertionError):
      _rewards(SCORES[:1], KL)


if __name__ == "__main__":
  absltest.main()
