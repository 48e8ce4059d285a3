"""The uniform policy as a reference and as a sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from klrl import models, ops
from klrl.algorithm import completions
from klrl.sampling import Rollout, make_greedy_fn, make_sample_fn

VOCAB_SIZE = 7
UNIFORM = models.uniform_policy(VOCAB_SIZE, max_len=200)
CONFIG = models.DecoderConfig(
  vocab_size=VOCAB_SIZE,
  width=8,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  max_len=16,
)
PROMPTS = np.array([[0, 3, 4], [5, 6, 2]])
PROMPT_MASK = np.array([[0, 1, 1], [1, 1, 1]], bool)


@functools.cache
def policy_and_params():
  policy = models.policy_model(CONFIG)
  # Far from the small initial values: the policy is not uniform.
  return policy, jax.tree.map(lambda x: 4 * x, jax.jit(policy.init)(jax.random.key(0)))


def rollout():
  tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 8))
  mask = np.arange(5) < np.array([[5], [3]])
  zeros = jnp.zeros((2, 5))
  return Rollout(tokens, PROMPT_MASK, mask, mask[:, -1], zeros, zeros)


def test_params_and_config_are_those_of_a_policy():
  assert UNIFORM.init(jax.random.key(0)) == {}
  assert (UNIFORM.config.vocab_size, UNIFORM.config.max_len) == (VOCAB_SIZE, 200)
  hidden = UNIFORM.hidden({}, PROMPTS, PROMPT_MASK, np.zeros_like(PROMPTS))
  logits = hidden @ UNIFORM.unembedding({})
  assert logits.shape == (2, 3, VOCAB_SIZE)
  np.testing.assert_allclose(jax.nn.log_softmax(logits), -np.log(VOCAB_SIZE), rtol=1e-6)


def test_kl_to_it_is_log_v_minus_entropy_in_value_and_gradient():
  policy, params = policy_and_params()

  def kl(params):
    args = (policy, params, UNIFORM, {}, rollout())
    return completions.exact_kl(*args, temperature=0.8).sum()

  def entropy(params):
    return completions.log_probs_and_entropy(policy, params, rollout(), temperature=0.8)[1].sum()

  value, gradient = jax.jit(jax.value_and_grad(kl))(params)
  entropy, entropy_gradient = jax.jit(jax.value_and_grad(entropy))(params)
  assert 1 < entropy < 10 * np.log(VOCAB_SIZE) - 1
  np.testing.assert_allclose(value, 10 * np.log(VOCAB_SIZE) - entropy, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-4, atol=1e-5), gradient, entropy_gradient
  )


def test_kl_from_hidden_keeps_float64_and_gives_all_gradients():
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0))
    hidden, unembedding = (
      jax.random.normal(key, shape, jnp.float64)
      for key, shape in zip(keys, ((2, 3, 4), (4, VOCAB_SIZE)), strict=True)
    )
    ref = UNIFORM.hidden({}, PROMPTS, PROMPT_MASK), UNIFORM.unembedding({})

    def kl(*args):
      return ops.exact_kl_from_hidden(*args, temperature=1.3, chunk_size=2)

    value = kl(hidden, unembedding, *ref)
    assert value.dtype == jnp.float64
    entropy = ops.entropy(hidden @ unembedding, temperature=1.3)
    np.testing.assert_allclose(value, np.log(VOCAB_SIZE) - entropy, rtol=1e-12)
    gradients = jax.grad(lambda *args: kl(*args).sum(), argnums=range(4))(hidden, unembedding, *ref)
    # At zero hidden and unembedding neither moves the logits.
    assert not np.any(gradients[2])
    assert not np.any(gradients[3])
    assert np.any(gradients[0])


def test_it_is_sampled_and_scored_like_any_policy():
  prompts, mask = jnp.zeros((64, 2), jnp.int32), jnp.ones((64, 2), bool)
  # Longer than the first cache, which then has to grow.
  sample = jax.jit(
    functools.partial(
      make_sample_fn(UNIFORM, max_completion_len=150, eos_id=None, pad_id=0), temperature=0.5
    )
  )
  drawn = sample({}, prompts, mask, jax.random.key(0))
  counts = np.bincount(np.asarray(drawn.tokens[:, 2:]).ravel(), minlength=VOCAB_SIZE)
  expected = 64 * 150 / VOCAB_SIZE
  assert counts.shape == (VOCAB_SIZE,)
  assert np.abs(counts - expected).max() < 5 * expected**0.5
  np.testing.assert_allclose(drawn.old_log_probs, -np.log(VOCAB_SIZE), rtol=1e-6)
  scored = completions.log_probs(UNIFORM, {}, drawn, temperature=0.5)
  np.testing.assert_allclose(scored, drawn.old_log_probs, rtol=1e-6)


def test_a_uniform_row_ends_at_eos_and_greedy_takes_the_first_token():
  sample = make_sample_fn(UNIFORM, max_completion_len=20, eos_id=2, pad_id=0)
  drawn = jax.jit(sample)({}, PROMPTS, PROMPT_MASK, jax.random.key(1), temperature=1.0)
  lengths = np.asarray(drawn.completion_mask.sum(axis=1))
  completion = np.asarray(drawn.tokens[:, 3:])
  for row, length, finished in zip(completion, lengths, drawn.finished, strict=True):
    assert not finished or row[length - 1] == 2
    assert 2 not in row[: length - 1]
  greedy = make_greedy_fn(UNIFORM, max_completion_len=4, eos_id=2, pad_id=0)
  assert not np.any(jax.jit(greedy)({}, PROMPTS, PROMPT_MASK).tokens[:, 3:])
