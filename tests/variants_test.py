"""An op of each kind is the same with and without `jit`, on host and device, and on each device.

The tests of each op compile it; that it does not matter who does is a property of how ops are
written: they import JAX and chex alone (`layering_test`), so nothing of them runs on the host.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from klrl import ops

MASK = np.arange(4) < np.array([[4], [2], [0]])
X, Y, Z = np.random.default_rng(0).normal(size=(3, 3, 4)).astype(np.float32)
HIDDEN, UNEMBEDDING = np.random.default_rng(1).normal(size=(2, 3, 3)).astype(np.float32)
STATE = ops.ControllerState(np.float32(0.1), np.int32(0))
KINDS = {
  "masking": (ops.masked_var, X, MASK),
  "estimator": (ops.k3, X, Y),
  "over the vocabulary": (ops.exact_kl, X, Y),
  "in chunks": (
    lambda *args: jax.value_and_grad(
      lambda *args: ops.exact_kl_from_hidden(*args, chunk_size=2).sum(), argnums=(0, 1)
    )(*args),
    *(HIDDEN, UNEMBEDDING, 2 * HIDDEN, UNEMBEDDING),
  ),
  "reward": (lambda *args: ops.shaped_rewards(*args, beta=0.1), X[:, 0], Y, MASK),
  "advantage": (lambda *args: ops.gae(*args, gamma=0.9, gae_lambda=0.8), X, Y, MASK),
  "group": (ops.group_relative, X),
  "loss": (
    lambda *args: ops.clipped_policy_loss(*args, clip_eps_low=0.2, clip_eps_high=0.3),
    *(X, Y, Z, MASK),
  ),
  "aggregation": (ops.sequence_mean_token_mean, X, MASK),
  "controller": (lambda *args: ops.doubling(*args, target_kl=1.0), STATE, np.float32(2.0)),
}


class VariantsTest(chex.TestCase):
  @chex.all_variants
  @parameterized.named_parameters((name, *case) for name, case in KINDS.items())
  def test_every_variant_gives_the_same(self, fn, *arguments):
    expected = jax.jit(fn)(*jax.tree.map(jnp.asarray, arguments))
    chex.assert_trees_all_close(self.variant(fn)(*arguments), expected, rtol=1e-5, atol=1e-6)
