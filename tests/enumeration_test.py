"""The real learner, decoder and sampler against exact sums over all completions of a small tree.

Some tokens are given: the models read them, no policy chooses them, and masks have holes there. To
the exact sums they are tokens of probability 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import ppo
from klrl import ops
from klrl.algorithm import Hypers, completions, kl_terms, learner
from klrl.algorithm.objective import KLPenalty
from klrl.algorithm.terms import Experience
from klrl.exact import oracle
from klrl.models import DecoderConfig, Policy, ScalarModel, policy_model, scalar_model
from klrl.sampling import Rollout, make_sample_fn

TREE = oracle.make_tree(3, 3, eos_id=2)
PROMPT = np.array([1])
# After 0 a 1 is given, in the middle of a completion, and after 10 a 0, at its end.
GIVEN = np.array([-1, 1, -1, -1, -1, 0, -1])
CHOSEN = TREE.mask & (GIVEN[TREE.states] < 0)
POSSIBLE = (CHOSEN | (TREE.tokens == GIVEN[TREE.states]) | ~TREE.mask).all(axis=1)
# How often a rollout holds each completion; no policy draws in these proportions.
COUNTS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]) * POSSIBLE
ROWS = np.repeat(np.arange(len(COUNTS)), COUNTS)
# Longer completions pay, so that a step makes long prefixes likelier and a cap on weights bites.
SCORES = np.sin(1.0 + np.arange(len(COUNTS))) + 3.0 * TREE.mask.sum(axis=1)
BETA = 0.7


class Models(NamedTuple):
  policy: Policy
  value_model: ScalarModel
  params: Any  # of the policy that samples
  ref_params: Any


@functools.cache
def models(dtype) -> Models:
  """Returns a tiny decoder far from uniform; to be called in the precision that it is used in."""
  config = DecoderConfig(
    vocab_size=3,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=16,
    max_len=8,
    dtype=dtype,
    param_dtype=dtype,
  )
  policy = policy_model(config)

  @jax.jit
  def init(key):
    return jax.tree.map(lambda x: x if x.ndim == 1 else 20 * x, policy.init(key))

  params, ref_params = init(jax.random.key(0)), init(jax.random.key(3))
  return Models(policy, scalar_model(config), params, ref_params)


def decoder_logits(params, dtype="float64"):
  """Returns the logits of the decoder where it chooses, and of what is given elsewhere."""
  logits = oracle.decoder_logits(models(dtype).policy, params, TREE, PROMPT)
  certain = jnp.where(np.arange(3) == GIVEN[:, None], 0.0, -jnp.inf)
  return jnp.where(GIVEN[:, None] < 0, logits, certain)


def make_rollout() -> Rollout:
  """Returns completion n of the tree COUNTS[n] times, with garbage where nothing is chosen."""
  mask = CHOSEN[ROWS]
  log_probs = oracle.token_log_probs(TREE, decoder_logits(models("float64").params))[ROWS]
  log_probs = jnp.where(mask, log_probs, jnp.nan)
  return Rollout(
    tokens=jnp.asarray(np.concatenate([np.tile(PROMPT, (len(ROWS), 1)), TREE.tokens[ROWS]], 1)),
    prompt_mask=jnp.ones((len(ROWS), 1), bool),
    completion_mask=jnp.asarray(mask),
    finished=jnp.asarray((TREE.mask & (TREE.tokens == TREE.eos_id)).any(axis=1)[ROWS]),
    old_log_probs=log_probs,
    sampler_log_probs=log_probs,
  )


def two_steps(config):
  """Returns [(params, gradient of the loss there)] of the two steps of one update of the learner.

  The first is on-policy, the second is not. Adam's first moment is a running mean of gradients, and
  the same program, told to stop at any KL to the old policy, makes the first step only.
  """
  policy, value_model, params, ref_params = models("float64")
  params = {"policy": params, "value": jax.jit(value_model.init)(jax.random.key(1))}
  rollout = jax.jit(make_rollout)()
  update = learner.make_update_fn(config.algorithm(), policy, value_model, policy)
  state = learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(2))
  state = state._replace(controller=ops.ControllerState(jnp.float32(BETA), jnp.int32(0)))
  frozen = {"reference": ref_params, "base": {}}

  @jax.jit
  def run(max_kl_old):
    hypers = state.hypers._replace(max_kl_old=jnp.float32(max_kl_old))
    new, _ = update(state._replace(hypers=hypers), frozen, rollout, jnp.asarray(SCORES)[ROWS])
    return new.params["policy"], optax.tree.get(new.opt_state, "mu")["policy"]

  (middle, first), (_, both) = run(1e-12), run(np.inf)
  return [
    (params["policy"], jax.tree.map(lambda x: x / 0.1, first)),
    (middle, jax.tree.map(lambda x, y: (y - 0.9 * x) / 0.1, first, both)),
  ]


def make_config(penalty, refresh="iteration", **settings):
  reads_refresh = {"kl_refresh": refresh} if penalty.in_reward else {}
  return ppo.Config(
    **{f"kl_{name}": x for name, x in penalty._asdict().items()},
    **reads_refresh,
    **{
      "beta": 0.2,  # where a schedule would start: no loss may read it
      "batch_size": len(ROWS),
      "num_epochs": 2,
      "num_minibatches": 1,
      "trust_region": "none",
      "gae_lambda": 1.0,
      "whiten_advantages": False,
      "loss_aggregation": "sequence_mean_token_sum",
      "vf_coef": 0.0,
      "value_clip_eps": np.inf,
      "max_grad_norm": np.inf,
      "learning_rate": 0.05,
      "kl_every": 0,
    }
    | settings,
  )


def assert_gradients_are_expected(config, surrogate, *, rtol=1e-6):
  """Asserts that both steps descend the exact mean of `surrogate` under the rollout's frequencies.

  And that the two gradients of the logits differ enough to tell one from the other.
  """
  _, _, old_params, ref_params = models("float64")

  @jax.jit
  def exact(params):
    logits, pull_back = jax.vjp(decoder_logits, params)
    gradient = oracle.expected_gradient(
      TREE,
      surrogate,
      logits,
      decoder_logits(ref_params),
      old_logits=decoder_logits(old_params),
      probs=COUNTS / COUNTS.sum(),
    )
    return gradient, *pull_back(gradient)

  of_logits = []
  for params, gradient in two_steps(config):
    of_logit, expected = exact(params)
    size = optax.tree.norm(expected)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected)) / size
    assert size > 1e-2 and error < rtol, error
    of_logits.append(of_logit)
  on_policy, off_policy = of_logits
  assert np.linalg.norm(off_policy - on_policy) > 0.05 * np.linalg.norm(on_policy)


@pytest.mark.parametrize(
  ("penalty", "refresh"),
  [
    (KLPenalty("reward", "k1", "none", "sequence"), "iteration"),
    (KLPenalty("reward", "k1", "none", "token"), "minibatch"),
    (KLPenalty("loss", "k2", "none", "token"), "iteration"),
    (KLPenalty("loss", "k3", "prefix", "sequence"), "iteration"),
    (KLPenalty("loss", "exact", "prefix", "sequence"), "iteration"),
    (KLPenalty("both", "exact", "none", "sequence"), "iteration"),
  ],
  ids=str,
)
def test_the_learner_descends_score_and_penalty_on_and_off_policy(penalty, refresh):
  prefix_cap = 1.0 if penalty.correction == "prefix" else np.inf
  settings = {"prefix_cap": prefix_cap} if penalty.correction == "prefix" else {}
  of_penalty = kl_terms.surrogate(penalty, kl_refresh=refresh, prefix_cap=prefix_cap)

  def surrogate(terms):
    scores = jnp.tile(SCORES[:, None], TREE.horizon)
    ratio = jnp.exp(terms.log_probs - terms.old_log_probs)
    return BETA * of_penalty(terms) + ops.reinforce_loss(ratio, scores, terms.mask)

  with jax.enable_x64(True):
    assert_gradients_are_expected(make_config(penalty, refresh, **settings), surrogate)


def whitened(penalty, refresh):
  """Returns the surrogate of score and penalty, both divided by the advantages' deviation."""

  def advantages(terms):
    arguments = terms.log_probs, terms.ref_log_probs, terms.mask, terms.exact_kl
    kl = kl_terms.reward_kl(penalty, *arguments)
    values = jnp.zeros_like(terms.log_probs)
    x = Experience(SCORES, kl, values, terms.mask, BETA)
    return ppo.advantages(x, make_config(penalty, refresh).algorithm(), Hypers()).advantages

  def f(terms):
    old = terms._replace(log_probs=terms.old_log_probs, exact_kl=terms.old_exact_kl)
    mean, std = ops.mean_and_std(advantages(old)[ROWS], CHOSEN[ROWS])
    credited = advantages(terms if refresh == "minibatch" else old)
    loss = ops.reinforce_loss(
      jnp.exp(terms.log_probs - terms.old_log_probs), (credited - mean) / std, terms.mask
    )
    if penalty.in_loss:
      loss += BETA / std * kl_terms.kl_loss(penalty, terms)
    return loss

  return f


@pytest.mark.parametrize(
  ("penalty", "refresh"),
  [
    (KLPenalty("reward", "k1", "none", "sequence"), "iteration"),
    (KLPenalty("both", "exact", "none", "sequence"), "minibatch"),
  ],
  ids=str,
)
def test_whitening_divides_score_and_penalty_alike(penalty, refresh):
  with jax.enable_x64(True):
    config = make_config(penalty, refresh, whiten_advantages=True)
    assert_gradients_are_expected(config, whitened(penalty, refresh))


def test_the_sampler_draws_what_the_decoder_says():
  num_samples = 2**16
  policy, _, params, _ = models("float32")

  def given(completions, t):
    after_0 = (t == 1) & (completions[:, 0] == 0)
    after_10 = (t == 2) & (completions[:, 0] == 1) & (completions[:, 1] == 0)
    return jnp.where(after_0, 1, 0), after_0 | after_10

  sample = make_sample_fn(
    policy, max_completion_len=TREE.horizon, eos_id=TREE.eos_id, pad_id=0, given=given
  )
  prompts = jnp.tile(PROMPT, (num_samples, 1))
  rollout = jax.jit(sample)(
    params, prompts, jnp.ones(prompts.shape, bool), jax.random.key(7), temperature=1.0
  )
  # Digits to the base 4, 0 for the padding, tell completions apart.
  digits = 4 ** np.arange(TREE.horizon)
  known = np.where(CHOSEN, TREE.tokens + 1, 0) @ digits
  known[~POSSIBLE] = -1 - np.flatnonzero(~POSSIBLE)
  drawn = np.where(rollout.completion_mask, completions.completion_tokens(rollout) + 1, 0) @ digits
  order = np.argsort(known)
  rows = order[np.searchsorted(known[order], drawn)]
  np.testing.assert_array_equal(known[rows], drawn)

  logits = decoder_logits(params, "float32")
  probs = np.exp(oracle.log_probs(TREE, logits))
  counts = np.bincount(rows, minlength=len(known))
  stderr = np.sqrt(num_samples * probs * (1 - probs))
  assert np.all(np.abs(counts - num_samples * probs) <= 5 * stderr), counts / num_samples - probs
  assert probs.max() > 5 * probs[POSSIBLE].min()
  # What is given is there to be read.
  read = np.asarray(completions.attention_mask(rollout))[:, 1:]
  tokens = np.asarray(completions.completion_tokens(rollout))
  np.testing.assert_array_equal(tokens[read], TREE.tokens[rows][read])
  expected = np.asarray(oracle.token_log_probs(TREE, logits))[rows]
  np.testing.assert_allclose(rollout.old_log_probs, expected, atol=2e-5)
