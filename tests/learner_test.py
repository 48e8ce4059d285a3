"""Tests of the PPO learner on a tiny decoder: what reaches the state, and what does not."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BAG as POLICY
from small_decoders import BAG_VALUE as VALUE
from small_decoders import bag_params, bag_value_params

from experiments import ppo
from klrl import ops
from klrl.algorithm import completions, learner
from klrl.devices import parallel
from klrl.models import DecoderConfig, policy_model, scalar_model
from klrl.sampling import Rollout, make_sample_fn

BATCH, PROMPT_LEN, MAX_COMPLETION_LEN, VOCAB, EOS = 8, 3, 4, 7, 2


def make_config(**changes):
  return ppo.Config(**{"batch_size": BATCH, "num_epochs": 2, "num_minibatches": 2, **changes})


def make_state(config, *, seed=0):
  params = {
    "policy": bag_params(VOCAB, seed=2 * seed),
    "value": bag_value_params(VOCAB, seed=2 * seed + 1),
  }
  return learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(seed + 1))


def make_prompts():
  tokens = jax.random.randint(jax.random.key(5), (BATCH, PROMPT_LEN), 3, VOCAB)
  mask = jnp.ones((BATCH, PROMPT_LEN), bool).at[0, 0].set(False)
  return tokens, mask


@functools.cache
def make_rollout() -> Rollout:
  sample = make_sample_fn(POLICY, max_completion_len=MAX_COMPLETION_LEN, eos_id=EOS, pad_id=0)
  state = make_state(make_config())
  tokens, mask = make_prompts()
  return jax.jit(sample)(
    state.params["policy"], tokens, mask, jax.random.key(9), temperature=jnp.float32(1.0)
  )


def scores_of(rollout):
  return jnp.sum(rollout.completion_mask & (rollout.tokens[:, PROMPT_LEN:] == 3), axis=1) * 1.0


def frozen():
  return {"reference": make_state(make_config(), seed=3).params["policy"], "base": {}}


@functools.cache
def compiled_update(config):
  return jax.jit(learner.make_update_fn(config.algorithm(), POLICY, VALUE, POLICY))


def update(config, rollout=None, *, state=None, scores=None):
  rollout = make_rollout() if rollout is None else rollout
  # Traced coefficients do not need a program of their own.
  fields = {field.name for field in dataclasses.fields(config)} & {*learner.Hypers._fields}
  traced = {name: getattr(make_config(), name) for name in fields}
  fn = compiled_update(dataclasses.replace(config, **traced))
  state, metrics = fn(
    make_state(config) if state is None else state,
    frozen(),
    rollout,
    scores_of(rollout) if scores is None else scores,
  )
  return state, {name: float(ops.divide(*pair)) for name, pair in metrics.items()}, metrics


def moved(state):
  start = make_state(make_config()).params["policy"]
  return float(
    jnp.sqrt(
      sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(
          jax.tree.leaves(state.params["policy"]), jax.tree.leaves(start), strict=True
        )
      )
    )
  )


def test_objective_is_score_minus_beta_times_k1_to_the_reference():
  beta = 0.7
  _, figures, _ = update(make_config(beta=beta))
  expected = figures["score/mean"] - beta * figures["kl/ref_k1"]
  np.testing.assert_allclose(figures["objective/mean"], expected, rtol=1e-5)
  assert abs(figures["kl/ref_k1"]) > 0.1


def test_metrics_match_a_recomputation_with_dense_logits():
  rollout, config = make_rollout(), make_config(learning_rate=0.0, kl_every=1)
  _, figures, _ = update(config)
  mask = np.asarray(rollout.completion_mask)
  attention = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)

  def vocab_log_probs(params):
    hidden = POLICY.hidden(params, rollout.tokens, attention)[:, PROMPT_LEN - 1 : -1]
    return np.asarray(jax.nn.log_softmax(hidden @ POLICY.unembedding(params)))

  pi = vocab_log_probs(make_state(config).params["policy"])
  ref = vocab_log_probs(frozen()["reference"])
  tokens = np.asarray(rollout.tokens)[:, PROMPT_LEN:, None]
  log_ratio = np.take_along_axis(pi - ref, tokens, axis=-1)[..., 0]
  entropy = -(np.exp(pi) * pi).sum(-1)
  exact = (np.exp(pi) * (pi - ref)).sum(-1)
  expected = {
    "kl/ref_k1": log_ratio[mask].sum() / BATCH,
    "kl/ref_k1_per_token": log_ratio[mask].mean(),
    "kl/ref_k3": (np.exp(-log_ratio) - 1 + log_ratio)[mask].sum() / BATCH,
    "kl/ref_exact": exact[mask].sum() / BATCH,
    "policy/entropy": entropy[mask].mean(),
    "kl/old_k3": 0.0,
    "policy/clip_fraction": 0.0,
  }
  for name, value in expected.items():
    np.testing.assert_allclose(figures[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
  sums = np.where(mask, log_ratio, 0).sum(1)
  np.testing.assert_allclose(
    figures["kl/ref_k1_stderr"], sums.std(ddof=1) / np.sqrt(BATCH), rtol=1e-4
  )


def test_zero_learning_rate_moves_nothing_and_default_moves_both_models():
  config = make_config(learning_rate=0.0)
  state, _, _ = update(config)
  chex.assert_trees_all_equal(state.params, make_state(config).params)
  state, _, _ = update(make_config())
  for old, new in zip(
    jax.tree.leaves(make_state(config).params["value"]),
    jax.tree.leaves(state.params["value"]),
    strict=True,
  ):
    assert np.any(old != new)
  assert moved(state) > 0


def test_coefficients_are_traced_and_structure_is_static():
  update_fn = learner.make_update_fn(make_config().algorithm(), POLICY, VALUE, POLICY)
  rollout, traces = make_rollout(), []

  @jax.jit
  def fn(*arguments):
    traces.append(arguments)
    return update_fn(*arguments)

  for beta, learning_rate, gae_lambda in ((0.1, 1e-3, 0.95), (0.0, 1e-2, 1.0), (3.0, 0.0, 0.0)):
    state = make_state(make_config(beta=beta, learning_rate=learning_rate, gae_lambda=gae_lambda))
    fn(state, frozen(), rollout, scores_of(rollout))
  assert len(traces) == 1


@pytest.mark.parametrize(
  "change",
  [
    {"beta": 2.0},
    {"gamma": 0.5},
    {"gae_lambda": 0.1},
    {"clip_eps_low": 0.0, "clip_eps_high": 0.0},
    {"value_clip_eps": 1e-3},
    {"vf_coef": 5.0},
    {"entropy_coef": 1.0},
    {"max_grad_norm": 1e-3},
    {"learning_rate": 1e-4},
    {"temperature": 0.5},
    {"num_epochs": 1},
    {"num_minibatches": 1},
    {"whiten_advantages": False},
    {"loss_aggregation": "sequence_mean_token_mean"},
    {"loss_aggregation": "constant"},
    {"kl_placement": "none"},
    {"kl_credit": "token"},
    {"kl_refresh": "minibatch"},
    {"kl_placement": "both", "kl_estimator": "k2"},
    {"kl_placement": "both", "kl_estimator": "exact", "kl_refresh": "minibatch"},
    {"kl_placement": "loss", "kl_estimator": "exact", "kl_credit": "token"},
    {"trust_region": "none"},
    {"trust_region": "kl_old_new"},
    {"trust_region": "kl_new_old"},
    {"trust_region": "kl_new_old", "trust_region_beta": 7.0},
    {"trust_region": "sequence_clip"},
    {"trust_region": "truncated"},
    {"trust_region": "k2"},
    {"trust_region": "tv_mask", "trust_region_size": 1e-3},
    {"trust_region": "kl_mask", "trust_region_size": 1e-5},
    {"trust_region": "smooth"},
    {"trust_region": "regression"},
    {"missing_eos_penalty": 1.0},
  ],
)
def test_every_setting_changes_the_update(change):
  base = {"learning_rate": 3e-2, "num_epochs": 2}
  state, figures, _ = update(make_config(**base))
  changed, changed_figures, _ = update(make_config(**{**base, **change}))
  leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(changed.params), strict=True)
  # A change of the loss's scale alone is undone by clipping and Adam; the loss still tells.
  assert any(np.any(a != b) for a, b in leaves) or (
    figures["policy/loss"] != changed_figures["policy/loss"]
  )


def test_max_kl_old_ends_the_epochs_and_counts_only_steps_taken():
  config = make_config(learning_rate=1e-2, max_kl_old=0.0)
  state, figures, _ = update(config)
  # The first minibatch is on-policy, up to rounding; every one after it is not.
  assert figures["policy/num_updates"] <= 1
  _, free, _ = update(make_config(learning_rate=1e-2))
  assert free["policy/num_updates"] == 4
  assert moved(state) <= 1.01 * moved(
    update(make_config(learning_rate=1e-2, num_epochs=1, num_minibatches=1))[0]
  )


def test_strong_trust_region_penalty_keeps_the_policy_closer():
  base = {"learning_rate": 3e-2, "num_epochs": 2}  # as above, which has compiled the same
  old, rollout = make_state(make_config()).params["policy"], make_rollout()

  def kl_old(**changes):
    new = update(make_config(**base, **changes))[0].params["policy"]
    kl = completions.exact_kl(POLICY, old, POLICY, new, rollout, temperature=1.0)
    return np.sum(kl, where=rollout.completion_mask)

  free = kl_old(trust_region="none")
  for region in ("kl_old_new", "kl_new_old", "k2"):
    held = kl_old(trust_region=region, trust_region_beta=10.0)
    assert held < 0.6 * free, (region, held, free)
  for region in ("tv_mask", "kl_mask", "smooth"):
    held = kl_old(trust_region=region, trust_region_size=1e-3)
    assert held < 0.9 * free, (region, held, free)


def test_adaptive_trust_region_doubles_after_a_large_step():
  config = make_config(
    learning_rate=3e-2,
    trust_region="kl_old_new",
    trust_region_adaptive=True,
    trust_region_target=1e-4,
  )
  state, figures, _ = update(config)
  assert figures["kl/old_k3"] > 1.5e-4
  np.testing.assert_allclose(state.trust_region.beta, 2 * config.trust_region_beta)


@pytest.mark.parametrize(
  ("controller", "expected"),
  [
    ("fixed", 0.1),
    ("doubling", 0.2),
    ("proportional", 0.1 * (1 + 0.2 * BATCH / 10_000)),
    ("linear", 0.1 * (1 - 1 / 49)),
  ],
)
def test_controller_moves_beta_by_the_measured_kl(controller, expected):
  change = {"controller": controller, "beta": 0.1, "num_iterations": 50}
  if controller in ("doubling", "proportional"):
    change["kl_target"] = 1e-6  # The reference is another model: the KL is far above.
  state, figures, _ = update(make_config(**change))
  assert figures["kl/ref_k1"] > 1e-3
  np.testing.assert_allclose(state.controller.beta, expected, rtol=1e-5)


def test_the_beta_of_a_budget_answers_to_the_kl_of_its_own_iteration():
  state, figures, _ = update(make_config(kl_budget=1e-6, beta=0.1))
  assert figures["kl/ref_k1"] > 2e-6
  np.testing.assert_allclose(figures["controller/beta"], 0.1 * np.exp(0.8 + 4.0), rtol=1e-5)
  assert state.controller.beta == np.float32(figures["controller/beta"])


def test_what_takes_a_pass_of_its_own_is_measured_at_its_cadence_only():
  config = make_config(kl_placement="none", kl_every=2)
  state = make_state(config)
  _, _, first = update(config, state=state)
  _, _, second = update(config, state=state._replace(iteration=jnp.int32(1)))
  # Without a KL in the objective, nothing else scores the reference.
  for name in ("kl/ref_k1", "kl/old_k1", "kl/old_k3"):
    assert float(first[name][1]) > 0
    assert float(second[name][1]) == 0
  never = make_config(kl_placement="none", kl_every=0)
  fn = learner.make_update_fn(never.algorithm(), POLICY, VALUE, POLICY)
  rollout = make_rollout()
  poisoned = jax.tree.map(lambda x: x * jnp.nan, frozen())
  state, _ = jax.jit(fn)(make_state(never), poisoned, rollout, scores_of(rollout))
  chex.assert_tree_all_finite(state.params)


def test_longer_padding_changes_nothing():
  rollout, extra = make_rollout(), 3
  config = make_config(num_minibatches=1, num_epochs=1)

  def pad(x, value=0):
    return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value)

  padded = rollout._replace(
    tokens=pad(rollout.tokens),
    completion_mask=pad(rollout.completion_mask, False),
    old_log_probs=pad(rollout.old_log_probs),
    sampler_log_probs=pad(rollout.sampler_log_probs),
  )
  state, figures, _ = update(config)
  padded_state, padded_figures, _ = update(config, padded)
  chex.assert_trees_all_close(state.params, padded_state.params, atol=1e-5)
  chex.assert_trees_all_close(figures, padded_figures, rtol=1e-4, atol=1e-5)


def test_garbage_in_the_padding_reaches_nothing():
  rollout = make_rollout()
  assert not np.all(rollout.completion_mask)
  dirty = rollout._replace(
    old_log_probs=jnp.where(rollout.completion_mask, rollout.old_log_probs, jnp.nan)
  )
  config = make_config(trust_region="kl_new_old")
  clean_state, clean, _ = update(config)
  dirty_state, figures, _ = update(config, dirty)
  chex.assert_trees_all_equal(clean_state.params, dirty_state.params)
  chex.assert_trees_all_equal(clean, figures)


def test_an_update_of_decoders_on_a_mesh_equals_that_on_one_device():
  decoder = DecoderConfig(
    vocab_size=VOCAB,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=16,
    max_len=16,
  )
  policy, value = policy_model(decoder), scalar_model(decoder)
  params = {"policy": policy.init(jax.random.key(0)), "value": value.init(jax.random.key(1))}
  config, rollout = make_config(), make_rollout()
  start = learner.init_state(config.algorithm(), config.hypers(), params, jax.random.key(2))
  others = {"reference": policy.init(jax.random.key(3)), "base": {}}
  fn = learner.make_update_fn(config.algorithm(), policy, value, policy)
  whole = jax.jit(fn)(start, others, rollout, scores_of(rollout))
  mesh = parallel.make_mesh("fsdp=2,tensor=2")
  shardings, rows = parallel.state_shardings(mesh, start), parallel.by_rows(mesh)
  sharded = jax.jit(fn, out_shardings=(shardings, None))(
    jax.device_put(start, shardings),
    parallel.put_once(mesh, others),
    *jax.device_put((rollout, scores_of(rollout)), rows),
  )
  (state, metrics), (sharded_state, sharded_metrics) = jax.device_get((whole, sharded))
  # Adam turns rounding of gradients near zero into steps, hence not tighter.
  chex.assert_trees_all_close(sharded_state.params, state.params, atol=2e-5)
  figures, sharded_figures = (
    {name: float(ops.divide(*pair)) for name, pair in found.items()}
    for found in (metrics, sharded_metrics)
  )
  chex.assert_trees_all_close(sharded_figures, figures, rtol=1e-3, atol=1e-5)


def test_ppo_learns_which_token_pays():
  config = make_config(
    batch_size=64, num_minibatches=2, num_epochs=2, learning_rate=1e-2, beta=0.0, num_iterations=15
  )
  sample = make_sample_fn(POLICY, max_completion_len=MAX_COMPLETION_LEN, eos_id=EOS, pad_id=0)
  iterate = jax.jit(
    learner.make_iteration_fn(
      config.algorithm(),
      POLICY,
      VALUE,
      POLICY,
      sample,
      lambda frozen, rollout, rows: scores_of(rollout),
    )
  )
  tokens, mask = make_prompts()
  state, frozen = make_state(config), {"reference": make_state(config).params["policy"], "base": {}}
  history, rows = [], jnp.arange(64) % BATCH
  for _ in range(config.num_iterations):
    state, metrics = iterate(state, frozen, tokens[rows], mask[rows], rows)
    history.append(float(ops.divide(*metrics["score/mean"])))
  assert history[-1] > history[0] + 1.0, history
  assert int(state.iteration) == config.num_iterations
