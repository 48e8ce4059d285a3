"""The PPO learner: one rollout and its scores in, a new state and metrics out.

    J = E[r - beta * log(pi / pi_ref)]      (Ouyang et al., InstructGPT, 2022, eq. 2)

is optimised by PPO with four models: policy, frozen reference, reward (already applied: `scores`)
and value. Everything that a sweep may vary is a traced scalar in `Hypers`; what changes the
program (placements, epochs, aggregation) is read from the frozen config.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from klrl import completions, measures, ops
from klrl.optimizer import apply_gradients
from klrl.sampling import Rollout


class Hypers(NamedTuple):
  """Coefficients, float32 scalars; traced, so that changing one compiles nothing."""

  learning_rate: jax.Array
  max_grad_norm: jax.Array
  temperature: jax.Array
  gamma: jax.Array
  gae_lambda: jax.Array
  clip_eps_low: jax.Array
  clip_eps_high: jax.Array
  value_clip_eps: jax.Array
  vf_coef: jax.Array
  entropy_coef: jax.Array
  max_kl_old: jax.Array
  kl_target: jax.Array
  trust_region_target: jax.Array
  beta_final: jax.Array
  kl_horizon: jax.Array
  kl_step_size: jax.Array
  beta: jax.Array  # where a schedule starts; losses read the controller's


class TrainState(NamedTuple):
  """Everything that a checkpoint holds; the reference and the reward model are frozen elsewhere."""

  params: dict  # {"policy": ..., "value": ...}
  opt_state: optax.OptState
  controller: ops.ControllerState  # beta, of KL(pi || pi_ref)
  trust_region: ops.ControllerState  # trust_region_beta, of the KL to the old policy
  hypers: Hypers
  key: jax.Array
  iteration: jax.Array  # int32


class Batch(NamedTuple):
  """What the inner epochs read; leading axis B."""

  rollout: Rollout
  advantages: jax.Array  # [B, T]
  returns: jax.Array  # [B, T]
  old_values: jax.Array  # [B, T]


def hypers_from_config(config) -> Hypers:
  """Returns the config's fields of the same names as float32 scalars."""
  return Hypers(*(jnp.float32(getattr(config, name)) for name in Hypers._fields))


def make_update_fn(config, max_completion_len: int, policy, value_model, reference):
  """Returns update(state, reference_params, rollout, scores [B]) -> (state, metrics).

  One call is one PPO iteration after sampling: reference log-probs and values, rewards with the KL
  penalty, GAE, then `num_epochs` over `num_minibatches` minibatches. Pure; to be compiled by the
  caller. Metrics are (sum, count) pairs.

  Args:
    config: frozen; read are kl_placement, kl_every, controller, trust_region,
      trust_region_adaptive, loss_aggregation, num_epochs, num_minibatches, num_iterations,
      batch_size, whiten_advantages.
    max_completion_len: T, the constant of the aggregation `constant`.
    policy: a `models.Policy`; its old log-probs come from the sampler.
    value_model: a `models.ScalarModel`.
    reference: a `models.Policy`; another architecture than the policy's is fine.
  """
  loss_fn = _make_loss_fn(config, max_completion_len, policy, value_model)
  next_controller = _make_controller(config)

  def update(state: TrainState, reference_params, rollout: Rollout, scores):
    hypers, mask = state.hypers, rollout.completion_mask
    key, epochs_key = jax.random.split(state.key)
    kl, kl_metrics = _reference_kl(
      config, policy, reference, state, reference_params, rollout, temperature=hypers.temperature
    )
    rewards = ops.shaped_rewards(scores, kl, mask, beta=state.controller.beta)
    old_values = completions.values(value_model, state.params["value"], rollout)
    advantages, returns = ops.gae(
      rewards, old_values, mask, gamma=hypers.gamma, gae_lambda=hypers.gae_lambda
    )
    metrics = {
      **kl_metrics,
      **measures.rollout_metrics(rollout, scores),
      "reward/mean": (rewards.sum(), jnp.float32(scores.shape[0])),
      "value/explained_variance": measures.explained_variance(old_values, returns, mask),
      "controller/beta": (state.controller.beta, 1.0),
    }
    if config.trust_region in ("kl_old_new", "kl_new_old"):
      metrics["controller/trust_region_beta"] = (state.trust_region.beta, 1.0)
    if config.whiten_advantages:
      advantages = ops.whiten(advantages, mask)
    batch = Batch(rollout, advantages, returns, old_values)
    params, opt_state, epoch_metrics = _inner_epochs(config, loss_fn, state, batch, epochs_key)
    metrics |= epoch_metrics

    log_probs = completions.log_probs(
      policy, params["policy"], rollout, temperature=hypers.temperature
    )
    kl_old = {
      "kl/old_k1": measures.per_sequence(ops.k1(rollout.old_log_probs, log_probs), mask),
      "kl/old_k3": measures.per_sequence(ops.k3(rollout.old_log_probs, log_probs), mask),
    }
    trust_region = state.trust_region
    if config.trust_region_adaptive:
      trust_region = ops.doubling(
        trust_region,
        ops.divide(*kl_old["kl/old_k3"]),
        target_kl=hypers.trust_region_target,
      )
    controller = state.controller
    if config.kl_placement == "reward":
      measured_kl = ops.divide(*kl_metrics["kl/ref_k1"])
      controller = next_controller(controller, measured_kl, hypers)
    state = state._replace(
      params=params,
      opt_state=opt_state,
      controller=controller,
      trust_region=trust_region,
      key=key,
      iteration=state.iteration + 1,
    )
    return state, metrics | kl_old

  return update


def make_iteration_fn(
  config, max_completion_len: int, policy, value_model, reference, sample, score, gold=None
):
  """Returns iteration(state, frozen, prompts, prompt_mask, rows) -> (state, metrics).

  The whole iteration as one pure function, for scores that are computed on the device:
  `score(frozen, rollout, rows) -> [B]`. `frozen["reference"]` holds the reference's parameters,
  `rows [B]` int32 says which prompts to sample from. `gold(rollout, rows) -> [B]` is measured where
  it is given, and nothing is trained on it.
  """
  update = make_update_fn(config, max_completion_len, policy, value_model, reference)

  def iteration(state, frozen, prompts, prompt_mask, rows):
    state, rollout = sample_rollout(sample, state, prompts, prompt_mask, rows)
    scores = score(frozen, rollout, rows)
    state, metrics = update(state, frozen["reference"], rollout, scores)
    if gold is not None:
      metrics["gold/mean"] = (gold(rollout, rows).sum(), jnp.float32(len(rows)))
    return state, metrics

  return iteration


def sample_rollout(sample, state: TrainState, prompts, prompt_mask, rows):
  """Returns (state with a fresh key, Rollout) of the prompts in `rows [B]`."""
  key, sample_key = jax.random.split(state.key)
  rollout = sample(
    state.params["policy"],
    prompts[rows],
    prompt_mask[rows],
    sample_key,
    temperature=state.hypers.temperature,
  )
  return state._replace(key=key), rollout


def _reference_kl(config, policy, reference, state, reference_params, rollout, *, temperature):
  """Returns the per-token KL that goes into the reward [B, T], and the kl/ref_* metrics.

  All estimators are of KL(pi || pi_ref) at the policy that sampled. The exact one, and all of them
  when the objective has no KL, are measured every `kl_every` iterations only.
  """
  mask = rollout.completion_mask

  def sampled(ref_hidden):
    ref_log_probs = ops.token_log_probs_from_hidden(
      ref_hidden,
      reference.unembedding(reference_params),
      completions.completion_tokens(rollout),
      temperature=temperature,
    )
    kl = ops.k1(rollout.old_log_probs, ref_log_probs)
    k3 = ops.k3(rollout.old_log_probs, ref_log_probs)
    return kl, measures.sequence_stats("kl/ref_k1", kl, mask) | measures.sequence_stats(
      "kl/ref_k3", k3, mask
    )

  def exact(ref_hidden):
    params = state.params["policy"]
    kl = ops.exact_kl_from_hidden(
      completions.completion_hidden(policy, params, rollout),
      policy.unembedding(params),
      ref_hidden,
      reference.unembedding(reference_params),
      temperature=temperature,
    )
    return measures.sequence_stats("kl/ref_exact", kl, mask)

  def ref_hidden():
    return completions.completion_hidden(reference, reference_params, rollout)

  if config.kl_placement == "reward":
    hidden = ref_hidden()
    kl, metrics = sampled(hidden)
    return kl, metrics | _at_cadence(config, state, lambda: exact(hidden))

  def all_estimators():
    hidden = ref_hidden()
    return sampled(hidden)[1] | exact(hidden)

  metrics = _at_cadence(config, state, all_estimators)
  return jnp.zeros_like(rollout.old_log_probs), metrics


def _at_cadence(config, state, measure):
  """Returns `measure()` every `kl_every` iterations, and pairs with count 0 otherwise."""
  if not config.kl_every:
    return {}
  not_measured = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
  due = state.iteration % config.kl_every == 0
  return jax.lax.cond(due, measure, lambda: not_measured)


def _make_loss_fn(config, max_completion_len, policy, value_model):
  """Returns loss(params, batch, hypers, trust_region_beta) -> (loss, (metrics, kl_old))."""
  aggregate = ops.AGGREGATIONS[config.loss_aggregation]

  def mean(per_token, mask):
    return aggregate(per_token, mask, constant_length=max_completion_len)

  def policy_loss(log_probs, batch: Batch, hypers, trust_region_beta):
    old_log_probs, mask = batch.rollout.old_log_probs, batch.rollout.completion_mask
    if config.trust_region == "clip":
      return ops.clipped_policy_loss(
        log_probs,
        old_log_probs,
        batch.advantages,
        mask,
        clip_eps_low=hypers.clip_eps_low,
        clip_eps_high=hypers.clip_eps_high,
      )
    penalty = {"kl_old_new": ops.kl_old_new, "kl_new_old": ops.kl_new_old}.get(
      config.trust_region, lambda log_probs, old_log_probs: jnp.zeros_like(log_probs)
    )
    return ops.kl_penalised_policy_loss(
      log_probs,
      old_log_probs,
      batch.advantages,
      penalty(log_probs, old_log_probs),
      mask,
      trust_region_beta=trust_region_beta,
    )

  def loss_fn(params, batch: Batch, hypers: Hypers, trust_region_beta):
    rollout = batch.rollout
    mask = rollout.completion_mask
    log_probs, entropy = completions.log_probs_and_entropy(
      policy, params["policy"], rollout, temperature=hypers.temperature
    )
    # Padding gets ratio 1 before anything exponentiates it.
    log_probs = jnp.where(mask, log_probs, rollout.old_log_probs)
    values = completions.values(value_model, params["value"], rollout)
    metrics = {
      "policy/loss": mean(policy_loss(log_probs, batch, hypers, trust_region_beta), mask),
      "policy/entropy": mean(entropy, mask),
      "value/loss": mean(
        ops.clipped_value_loss(
          values,
          batch.old_values,
          batch.returns,
          mask,
          value_clip_eps=hypers.value_clip_eps,
        ),
        mask,
      ),
    }
    loss = (
      ops.divide(*metrics["policy/loss"])
      + hypers.vf_coef * ops.divide(*metrics["value/loss"])
      - hypers.entropy_coef * ops.divide(*metrics["policy/entropy"])
    )
    num_tokens = mask.sum().astype(jnp.float32)
    metrics["policy/entropy"] = (jnp.where(mask, entropy, 0.0).sum(), num_tokens)
    value_clipped = mask & (jnp.abs(values - batch.old_values) > hypers.value_clip_eps)
    metrics["value/clip_fraction"] = (value_clipped.sum(), num_tokens)
    if config.trust_region == "clip":
      clipped = ops.clip_fraction(
        log_probs,
        rollout.old_log_probs,
        batch.advantages,
        mask,
        clip_eps_low=hypers.clip_eps_low,
        clip_eps_high=hypers.clip_eps_high,
      )
      metrics["policy/clip_fraction"] = (clipped.sum(), num_tokens)
    kl_old = ops.divide(*measures.per_sequence(ops.k3(rollout.old_log_probs, log_probs), mask))
    return loss, (metrics, kl_old)

  return loss_fn


def _inner_epochs(config, loss_fn, state: TrainState, batch: Batch, key):
  """Returns (params, opt_state, metrics) after the epochs over shuffled minibatches.

  A minibatch whose KL(old || pi) exceeds `max_kl_old` is not stepped on, nor is any after it.
  """
  batch_size = batch.advantages.shape[0]
  hypers = state.hypers
  orders = jax.vmap(lambda key: jax.random.permutation(key, batch_size))(
    jax.random.split(key, config.num_epochs)
  )
  minibatches = orders.reshape(config.num_epochs * config.num_minibatches, -1)

  def step(carry, rows):
    params, opt_state = carry
    minibatch = jax.tree.map(lambda x: x[rows], batch)
    (_, (metrics, kl_old)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      params, minibatch, hypers, state.trust_region.beta
    )
    stop = kl_old > hypers.max_kl_old
    new_params, new_opt_state, norm = apply_gradients(
      params,
      opt_state,
      gradients,
      learning_rate=hypers.learning_rate,
      max_grad_norm=hypers.max_grad_norm,
    )
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(stop, old, new),
      (new_params, new_opt_state),
      (params, opt_state),
    )
    metrics["gradient/norm"] = (norm, 1.0)
    metrics["policy/num_updates"] = (jnp.where(stop, 0.0, 1.0), 1.0)
    return (params, opt_state), stop, jax.tree.map(jnp.float32, metrics)

  def guarded(carry, rows):
    trained, stopped = carry

    def skip():
      nothing = jax.eval_shape(step, trained, rows)[2]
      return trained, jnp.bool_(True), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)

    trained, stopped, metrics = jax.lax.cond(stopped, skip, lambda: step(trained, rows))
    return (trained, stopped), metrics

  (trained, _), metrics = jax.lax.scan(
    guarded, ((state.params, state.opt_state), jnp.bool_(False)), minibatches
  )
  metrics = jax.tree.map(lambda x: x.sum(axis=0), metrics)
  metrics["policy/num_updates"] = (metrics["policy/num_updates"][0], 1.0)
  return *trained, metrics


def _make_controller(config):
  """Returns next(state, measured_kl, hypers) -> state, the rule that moves beta."""

  def schedule(rule):
    # The last iteration is the one that has `beta_final`.
    num_steps = max(1, config.num_iterations - 1)
    return lambda state, kl, hypers: rule(
      state, kl, initial=hypers.beta, final=hypers.beta_final, num_iterations=num_steps
    )

  rules = {
    "fixed": lambda state, kl, hypers: ops.fixed(state, kl),
    "doubling": lambda state, kl, hypers: ops.doubling(state, kl, target_kl=hypers.kl_target),
    "proportional": lambda state, kl, hypers: ops.proportional(
      state,
      kl,
      target_kl=hypers.kl_target,
      num_samples=config.batch_size,
      horizon=hypers.kl_horizon,
    ),
    "dual_ascent": lambda state, kl, hypers: ops.dual_ascent(
      state, kl, target_kl=hypers.kl_target, step_size=hypers.kl_step_size
    ),
    "linear": schedule(ops.linear_schedule),
    "cosine": schedule(ops.cosine_schedule),
  }
  return rules[config.controller]
