"""Tests of what any algorithm can do on the learner: adapters, a shared trunk, late rollouts."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_decoders import BAG as POLICY
from small_decoders import BAG_VALUE as VALUE
from small_decoders import bag_params, bag_value_params

from experiments import ppo
from klrl import ops
from klrl.algorithm import completions, epochs, learner, memory
from klrl.models import DecoderConfig, add_lora, join, policy_model, scalar_model
from klrl.sampling import make_sample_fn

BATCH, PROMPT_LEN, MAX_LEN = 8, 2, 3
DECODER = DecoderConfig(
  vocab_size=7,
  width=8,
  num_layers=1,
  num_heads=1,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=8,
  max_len=8,
)
MODELS = {"policy": policy_model(DECODER), "value": scalar_model(DECODER)}
# One step, on-policy, of which Adam's first moment tells the gradient.
PLAIN = {
  "batch_size": BATCH,
  "num_epochs": 1,
  "num_minibatches": 1,
  "max_grad_norm": np.inf,
  "value_clip_eps": np.inf,
  "whiten_advantages": False,
  "kl_every": 0,
}


def make_config(**changes):
  return ppo.Config(**{**PLAIN, **changes})


@functools.cache
def make_params(seed=0):
  value = bag_value_params(7, seed=2 * seed + 1)
  return {"policy": bag_params(7, seed=2 * seed), "value": value}


@functools.cache
def decoder_params():
  keys = jax.random.split(jax.random.key(0))
  policy = jax.tree.map(lambda x: 10 * x, MODELS["policy"].init(keys[0]))
  return {"policy": policy, "value": MODELS["value"].init(keys[1])}


@functools.cache
def make_rollout(seed=0):
  sample = jax.jit(make_sample_fn(POLICY, max_completion_len=MAX_LEN, eos_id=4, pad_id=0))
  key = jax.random.key(seed)
  tokens = jax.random.randint(key, (BATCH, PROMPT_LEN), 3, 7)
  mask = jnp.ones(tokens.shape, bool)
  return sample(make_params()["policy"], tokens, mask, key, temperature=jnp.float32(1.0))


@functools.cache
def decoder_rollout():
  """Returns a rollout as if the decoder had drawn it."""
  policy, rollout = decoder_params()["policy"], make_rollout()
  old = completions.log_probs(MODELS["policy"], policy, rollout, temperature=1.0)
  old = jnp.where(rollout.completion_mask, old, 0)
  return rollout._replace(old_log_probs=old, sampler_log_probs=old)


def scores_of(rollout):
  return jnp.cos(rollout.tokens.sum(axis=1) * 1.0)


@functools.cache
def compiled(config, policy=POLICY, value=VALUE, reference=POLICY):
  return jax.jit(
    learner.make_update_after_sampling_fn(config.algorithm(), policy, value, reference)
  )


def update(config, rollout=None, *, scores=None, state=None, frozen=None, **models):
  """Returns (state, figures) after one iteration."""
  rollout = make_rollout() if rollout is None else rollout
  state = start(config) if state is None else state
  frozen = frozen or {"reference": make_params(1)["policy"], "base": {}}
  scores = scores_of(rollout) if scores is None else scores
  state, metrics = compiled(config, **models)(state, frozen, rollout, scores)
  return state, {name: float(ops.divide(*pair)) for name, pair in metrics.items()}


def start(config, params=None):
  return learner.init_state(
    config.algorithm(), config.hypers(), params or make_params(), jax.random.key(2)
  )


def gradient(state, name="policy"):
  return jax.tree.map(lambda x: x / 0.1, optax.tree.get(state.opt_state, "mu")[name])


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_a_sampler_like_the_trainer_needs_no_weights(correction):
  plain, _ = update(make_config())
  state, figures = update(make_config(sampler_correction=correction))
  assert figures["policy/sampler_weight"] == pytest.approx(1, abs=1e-5)
  assert figures["policy/sampler_capped_fraction"] == 0
  chex.assert_trees_all_close(gradient(state), gradient(plain), rtol=1e-4, atol=1e-6)


def test_policy_loss_and_kl_loss_are_weighed_where_the_sampler_differs():
  rollout = make_rollout()
  off = rollout._replace(sampler_log_probs=rollout.sampler_log_probs + jnp.log(2.0))
  kl = {"kl_placement": "loss", "kl_estimator": "exact", "kl_credit": "token", "vf_coef": 0.0}
  plain, _ = update(make_config(**kl))
  state, figures = update(make_config(**kl, sampler_correction="token"), off)
  assert figures["policy/sampler_weight"] == pytest.approx(0.5, rel=1e-4)
  halved = jax.tree.map(lambda x: x / 2, gradient(plain))
  chex.assert_trees_all_close(gradient(state), halved, rtol=1e-3, atol=1e-6)
  capped = make_config(**kl, sampler_correction="token", sampler_cap=1.0)
  low = rollout._replace(sampler_log_probs=rollout.sampler_log_probs - jnp.log(2.0))
  state, figures = update(capped, low)
  assert figures["policy/sampler_capped_fraction"] == 1
  chex.assert_trees_all_close(gradient(state), gradient(plain), rtol=1e-3, atol=1e-6)


def shared_config(**changes):
  return make_config(value_trunk="shared", **changes)


def shared_params():
  return {"policy": make_params()["policy"], "value": {"head": make_params()["value"]["head"]}}


def test_a_shared_trunk_has_the_gradient_of_both_losses():
  """The same as that of a separate value model with the policy's trunk, added to the policy's."""
  config = shared_config(beta=0.0)
  state, figures = update(config, state=start(config, shared_params()))
  own = make_config(beta=0.0)
  trunk = make_params()["policy"]["decoder"]
  params = make_params() | {"value": {"decoder": trunk, **shared_params()["value"]}}
  separate, separate_figures = update(own, state=start(own, params))
  for name in ("policy/loss", "value/loss", "value/explained_variance"):
    assert figures[name] == pytest.approx(separate_figures[name], rel=1e-3), name
  both = jax.tree.map(
    jnp.add, gradient(separate)["decoder"], gradient(separate, "value")["decoder"]
  )
  chex.assert_trees_all_close(gradient(state)["decoder"], both, rtol=1e-3, atol=1e-5)
  norms = [optax.tree.norm(gradient(separate, name)["decoder"]) for name in separate.params]
  assert 0.1 < float(norms[0] / norms[1]) < 10
  assert set(state.params["value"]) == {"head"}
  full = epochs.value_params(shared_params(), shared_trunk=True)
  chex.assert_trees_all_equal(full["decoder"], trunk)


def test_normalised_scores_log_what_a_nat_costs_in_their_own_unit():
  _, figures = update(make_config(beta=0.3, normalise_scores=True))
  std = float(np.std(scores_of(make_rollout())))
  assert std != pytest.approx(1, abs=0.1)
  assert figures["controller/effective_beta"] == pytest.approx(0.3 * std, rel=1e-4)
  assert figures["score/mean"] == pytest.approx(float(scores_of(make_rollout()).mean()), rel=1e-4)
  _, plain = update(make_config(beta=0.3))
  assert plain["controller/effective_beta"] == pytest.approx(0.3)


def test_a_moving_reference_is_in_the_state_and_follows():
  config = make_config(reference_update="ema", reference_decay=0.5)
  params = make_params()
  state = start(config)._replace(reference=jax.tree.map(jnp.array, params["policy"]))
  state, figures = update(config, state=state)
  assert figures["kl/ref_k1"] == pytest.approx(0, abs=1e-5)  # Not the frozen one, which differs.
  half = jax.tree.map(lambda x, y: (x + y) / 2, params["policy"], state.params["policy"])
  chex.assert_trees_all_close(state.reference, half, rtol=1e-6)
  _, figures = update(config, state=state, rollout=make_rollout())
  assert figures["kl/ref_k3"] > 0


def test_a_reset_of_the_reference_may_reset_the_optimizer_too():
  config = make_config(reference_update="reset", reference_every=2, reset_optimizer=True)
  state = start(config)._replace(reference=jax.tree.map(jnp.array, make_params()["policy"]))
  for iteration, forgets in enumerate((False, True, False)):
    state, _ = update(config, state=state)
    moments = optax.tree.norm(optax.tree.get(state.opt_state, "mu"))
    assert (moments == 0) == forgets, iteration
    same = jax.tree.map(lambda x, y: (x == y).all(), state.reference, state.params["policy"])
    assert all(jax.tree.leaves(same)) == forgets, iteration


def test_late_rollouts_are_trained_on_when_their_time_has_come():
  config = make_config(staleness=1)
  state = start(config)._replace(replay=memory.empty_replay(make_rollout(), 1))
  state, _ = update(config, make_rollout(0), state=state)
  state, figures = update(config, make_rollout(1), scores=scores_of(make_rollout(0)), state=state)
  plain, _ = update(make_config(), make_rollout(0))
  plain, _ = update(make_config(), make_rollout(0), state=plain)
  chex.assert_trees_all_close(state.params, plain.params, rtol=1e-4, atol=1e-6)
  # What is shown is of it too.
  assert figures["score/mean"] == pytest.approx(float(scores_of(make_rollout(0)).mean()), rel=1e-4)


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_weights_of_a_late_rollout_are_the_samplers_and_not_its_age(correction):
  late, corrected = (
    make_config(staleness=1, learning_rate=0.2, sampler_correction=name, kl_every=1)
    for name in ("none", correction)
  )
  figures = []
  for config in (late, corrected):
    state = start(config)._replace(replay=memory.empty_replay(make_rollout(), 1))
    for seed in (0, 1):
      state, found = update(config, make_rollout(seed), state=state)
    figures.append(found)
  without, found = figures
  # The policy has moved since the rollout was drawn, and the sampler is the trainer.
  assert abs(without["policy/ratio"] - 1) > 0.01
  assert found["policy/sampler_weight"] == pytest.approx(1, abs=1e-5)
  for name in ("policy/ratio", "kl/ref_k1", "kl/old_k3"):
    assert found[name] == pytest.approx(without[name], rel=1e-3), name


def test_adapters_learn_and_their_base_is_the_reference():
  config = make_config(lora_rank=2, beta=0.1)
  keys = jax.random.split(jax.random.key(7))
  params, rollout = decoder_params(), decoder_rollout()
  decoder, policy, base_policy = add_lora(DECODER, params["policy"], keys[0], rank=2)
  _, value, base_value = add_lora(DECODER, params["value"], keys[1], rank=2)
  trained = {"policy": policy, "value": value}
  frozen = {"reference": params["policy"], "base": {"policy": base_policy, "value": base_value}}
  models = {"policy": policy_model(decoder), "value": scalar_model(decoder)}
  models["reference"] = MODELS["policy"]
  state, figures = update(config, rollout, state=start(config, trained), frozen=frozen, **models)
  assert figures["kl/ref_k1"] == pytest.approx(0, abs=1e-5)
  assert jax.tree.structure(state.params) == jax.tree.structure(trained)
  assert optax.tree.norm(gradient(state)) > 1e-3
  before, after = (
    completions.log_probs(
      models["policy"], join(base_policy, p["policy"]), rollout, temperature=1.0
    )
    for p in (trained, state.params)
  )
  np.testing.assert_allclose(
    np.where(rollout.completion_mask, before, 0), rollout.old_log_probs, atol=1e-4
  )
  assert float(jnp.abs(jnp.where(rollout.completion_mask, after - before, 0)).max()) > 1e-4


def test_the_learning_rate_rises_and_falls():
  def factors(**changes):
    schedule = make_config(num_iterations=10, **changes).algorithm().learning_rate_factor
    return np.array([schedule(i) for i in range(10)])

  np.testing.assert_allclose(factors(learning_rate_schedule="constant"), np.ones(10))
  linear = factors(learning_rate_schedule="linear")
  np.testing.assert_allclose(linear, 1 - 0.09 * np.arange(10), rtol=1e-5)
  cosine = factors(learning_rate_schedule="cosine", warmup_iterations=3)
  np.testing.assert_allclose(cosine[:4], [0.25, 0.5, 0.75, 1], rtol=1e-5)
  assert (np.diff(cosine[3:]) < 0).all() and cosine[-1] > 0.1
  # Adam's first step is the learning rate in every coordinate that has a gradient.
  slow, _ = update(make_config(warmup_iterations=3))
  fast, _ = update(make_config())
  moved = [
    optax.tree.norm(jax.tree.map(jnp.subtract, state.params["policy"], make_params()["policy"]))
    for state in (slow, fast)
  ]
  assert float(moved[0] / moved[1]) == pytest.approx(0.25, rel=0.02)


def test_moments_and_parameters_stay_float32_where_the_network_is_bfloat16():
  decoder = dataclasses.replace(DECODER, dtype="bfloat16", remat="full")
  models = {"policy": policy_model(decoder), "value": scalar_model(decoder)}
  models["reference"] = models["policy"]
  others = {"reference": decoder_params()["policy"], "base": {}}
  config, found = make_config(), []
  for of_run in (models, {**MODELS, "reference": MODELS["policy"]}):
    state = start(config, decoder_params())
    found.append(update(config, decoder_rollout(), state=state, frozen=others, **of_run))
  (state, figures), (plain, plain_figures) = found
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
  assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))} == {
    jnp.dtype("float32")
  }
  assert figures["policy/loss"] == pytest.approx(plain_figures["policy/loss"], abs=0.2)
  gap = optax.tree.norm(jax.tree.map(jnp.subtract, gradient(state), gradient(plain)))
  assert float(gap / optax.tree.norm(gradient(plain))) < 0.2
