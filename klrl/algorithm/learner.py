"""The learner of every RL experiment: one rollout and its scores in, a new state and metrics out.

    J = E[r] - beta * KL(pi || pi_ref)      (Ouyang et al., InstructGPT, 2022, eq. 2)

An algorithm is a choice of advantage (`advantages.RULES`; a value model serves `gae` alone), of
policy loss (`epochs.TRUST_REGIONS`), of aggregation and of KL penalty (`objective.KLPenalty`).
Everything that a sweep may vary is a traced scalar in `Hypers`; what changes the program
(placements, epochs, aggregation) is read from the frozen config.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from klrl import ops
from klrl.algorithm import completions, diagnostics, kl_terms, memory, objective
from klrl.algorithm.advantage_rules import advantages_of, group_deviation
from klrl.algorithm.epochs import (
  Batch,
  Context,
  inner_epochs,
  make_loss_fn,
  needs_exact_kl,
  value_params,
)
from klrl.algorithm.optimizer import init_optimizer
from klrl.algorithm.preparation import informative_groups, rescored, sampler_weights, shaped_scores
from klrl.models import join
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
  dual_clip: jax.Array
  value_clip_eps: jax.Array
  vf_coef: jax.Array
  entropy_coef: jax.Array
  ptx_coef: jax.Array
  overlong_buffer: jax.Array
  missing_eos_penalty: jax.Array
  length_penalty: jax.Array
  sampler_cap: jax.Array
  reference_decay: jax.Array
  jsd_weight: jax.Array
  max_kl_old: jax.Array
  prefix_cap: jax.Array
  kl_target: jax.Array
  trust_region_target: jax.Array
  beta_min: jax.Array
  beta_max: jax.Array
  beta_final: jax.Array
  kl_horizon: jax.Array
  kl_step_size: jax.Array
  beta: jax.Array  # where a schedule starts; losses read the controller's


class TrainState(NamedTuple):
  """Everything that a checkpoint holds; what is frozen is elsewhere."""

  params: dict  # {"policy": ..., "value": ...}, what is trained; the second with a value model only
  opt_state: optax.OptState
  controller: ops.ControllerState  # beta, of KL(pi || pi_ref)
  trust_region: ops.ControllerState  # trust_region_beta, of the KL to the old policy
  hypers: Hypers
  key: jax.Array
  iteration: jax.Array  # int32
  score_stats: memory.ScoreStats
  reference: dict | None = None  # as params["policy"], where the reference moves
  replay: memory.Replay | None = None  # where rollouts are trained on late


def hypers_from_config(config) -> Hypers:
  """Returns the config's fields of the same names as float32 scalars."""
  return Hypers(*(jnp.float32(getattr(config, name)) for name in Hypers._fields))


def init_state(config, params: dict, key) -> TrainState:
  """Returns the state before the first iteration, with a frozen reference and nothing to replay."""
  return TrainState(
    params=params,
    opt_state=init_optimizer(params),
    controller=ops.ControllerState(
      jnp.float32(config.beta if config.kl_placement != "none" else 0.0), jnp.int32(0)
    ),
    trust_region=ops.ControllerState(jnp.float32(config.trust_region_beta), jnp.int32(0)),
    hypers=hypers_from_config(config),
    key=key,
    iteration=jnp.int32(0),
    score_stats=memory.no_scores(),
  )


def make_update_fn(config, max_completion_len: int, policy, value_model, reference):
  """Returns update(state, frozen, rollout, scores [B], pretraining) -> (state, metrics).

  One call is one iteration after sampling: reference log-probs and values, advantages with the KL
  penalty's reward part, then `num_epochs` over `num_minibatches` minibatches. `frozen` holds the
  parameters of the `reference` and, where adapters are trained, those of their `base`.
  `pretraining` is an `epochs.Texts` of B rows, whose log-likelihood is mixed into the loss, or
  None. Pure; to be compiled by the caller. Metrics are (sum, count) pairs; `kl/ref_*` and
  `objective/mean`, the mean of score - beta * k1 with the score as it was given, are of all that
  was sampled, before scores are shaped and groups dropped.

  Args:
    config: frozen; read are the fields of the KL penalty (`objective.penalty_of`), divergence,
      kl_refresh, kl_every, controller, advantage, group_size, whiten_advantages, oversampling,
      trust_region, trust_region_adaptive, loss_aggregation, num_epochs, num_minibatches,
      num_iterations, batch_size, accumulation, the schedule of the learning rate, value_trunk,
      sampler_correction, staleness, normalise_scores, reference_update, reference_every.
    max_completion_len: T, the constant of the aggregation `constant`.
    policy: a `models.Policy`; its old log-probs come from the sampler.
    value_model: a `models.ScalarModel`, or None where `advantage` is not `gae`.
    reference: a `models.Policy`; another architecture than the policy's is fine.
  """
  penalty = objective.penalty_of(config)
  loss_fn = make_loss_fn(config, max_completion_len, policy, value_model)
  next_controller = _make_controller(config)

  def update(state: TrainState, frozen, rollout: Rollout, scores, pretraining=None):
    hypers, base = state.hypers, frozen["base"]
    models = join(base, state.params)
    metrics = diagnostics.rollout_metrics(rollout, scores)
    rollout = rescored(config, policy, models["policy"], rollout, hypers)
    if config.staleness:
      replay, rollout, scores = memory.exchanged(state.replay, rollout, scores, state.iteration)
      state = state._replace(replay=replay)
    reference_params = frozen["reference"]
    if state.reference is not None:
      reference_params = join(base, {"policy": state.reference})["policy"]
    # Of all that was sampled: the groups that are trained on are no draw of the policy's.
    ref, kl_metrics = _measured_reference(
      config, policy, reference, state, models["policy"], reference_params, rollout
    )
    beta = state.controller.beta
    if penalty.placement != "none":
      kl_sum, num_sequences = kl_metrics["kl/ref_k1"]
      metrics["objective/mean"] = (scores.sum() - beta * kl_sum, num_sequences)
    scores = shaped_scores(scores, rollout, max_completion_len, hypers)
    score_std = jnp.float32(1.0)
    if config.normalise_scores:
      score_stats, scores, score_std = memory.normalised(state.score_stats, scores)
      state = state._replace(score_stats=score_stats)
    if config.oversampling > 1:
      (rollout, ref), scores, share = informative_groups((rollout, ref), scores, config)
      metrics["rollout/informative_groups"] = (share, 1.0)
    mask = rollout.completion_mask
    key, epochs_key = jax.random.split(state.key)
    weights, sampler_metrics = sampler_weights(config, rollout, hypers)
    old_values = jnp.zeros_like(rollout.old_log_probs)
    if value_model is not None:
      old_values = completions.values(value_model, value_params(config, models), rollout)
    kl = kl_terms.reward_kl(penalty, rollout.old_log_probs, ref.log_probs, ref.exact_kl)
    advantages, returns, mean, std = advantages_of(
      config, penalty, scores, kl, old_values, mask, hypers=hypers, beta=beta
    )
    fresh_exact_kl = needs_exact_kl(config, penalty)
    batch = Batch(
      rollout,
      scores,
      advantages,
      returns,
      old_values,
      ref.log_probs,
      ref.hidden if fresh_exact_kl else None,
      weights,
      pretraining,
    )
    ref_unembedding = reference.unembedding(reference_params) if fresh_exact_kl else None
    context = Context(
      hypers, base, beta, state.trust_region.beta, mean, std, ref_unembedding, state.iteration
    )
    params, opt_state, epoch_metrics = inner_epochs(
      config, loss_fn, state.params, state.opt_state, batch, context, epochs_key
    )
    log_probs = completions.log_probs(
      policy, join(base, params)["policy"], rollout, temperature=hypers.temperature
    )
    metrics |= {
      **sampler_metrics,
      **kl_metrics,
      **epoch_metrics,
      "controller/beta": (beta, 1.0),
      "kl/old_k1": diagnostics.per_sequence(ops.k1(rollout.old_log_probs, log_probs), mask),
      "kl/old_k3": diagnostics.per_sequence(ops.k3(rollout.old_log_probs, log_probs), mask),
    }
    if value_model is not None:
      metrics["value/explained_variance"] = diagnostics.explained_variance(
        old_values, returns, mask
      )
    # What a nat of KL costs in the scores' own unit, where something divides the scores alone.
    if config.advantage == "group_relative" and (penalty.in_loss or penalty.credit == "token"):
      score_std *= group_deviation(config, scores)
    if penalty.placement != "none":
      metrics["controller/effective_beta"] = (beta * score_std, 1.0)
    controller, trust_region = state.controller, state.trust_region
    if penalty.placement != "none":
      controller = next_controller(controller, ops.divide(*metrics["kl/ref_k1"]), hypers)
    if config.controller in ("doubling", "proportional", "dual_ascent"):
      lowest = 0.0 if config.controller == "dual_ascent" else hypers.beta_min
      metrics["controller/at_bound"] = _one_if(
        ops.at_bound(controller, minimum=lowest, maximum=hypers.beta_max)
      )
    if config.trust_region in ("kl_old_new", "kl_new_old"):
      metrics["controller/trust_region_beta"] = (trust_region.beta, 1.0)
    if config.trust_region_adaptive:
      measured = ops.divide(*metrics["kl/old_k3"])
      trust_region = ops.doubling(trust_region, measured, target_kl=hypers.trust_region_target)
      metrics["controller/trust_region_at_bound"] = _one_if(ops.at_bound(trust_region))
    if state.reference is not None:
      moved = memory.moved_reference(
        config, state.reference, params["policy"], hypers, state.iteration
      )
      state = state._replace(reference=moved)
    state = state._replace(
      params=params,
      opt_state=opt_state,
      controller=controller,
      trust_region=trust_region,
      key=key,
      iteration=state.iteration + 1,
    )
    return state, metrics

  return update


def make_iteration_fn(
  config, max_completion_len: int, policy, value_model, reference, sample, score, gold=None
):
  """Returns iteration(state, frozen, prompts, prompt_mask, rows, pretraining) -> (state, metrics).

  The whole iteration as one pure function, for scores that are computed on the device:
  `score(frozen, rollout, rows) -> [B]`. `rows [B]` int32 says which prompts to sample from.
  `gold(rollout, rows) -> [B]` is measured where it is given, and nothing is trained on it.
  """
  update = make_update_fn(config, max_completion_len, policy, value_model, reference)

  def iteration(state, frozen, prompts, prompt_mask, rows, pretraining=None):
    rollout = sample_rollout(sample, state, frozen, prompts, prompt_mask, rows)
    scores = score(frozen, rollout, rows)
    state, metrics = update(after_sampling(state), frozen, rollout, scores, pretraining)
    if gold is not None:
      metrics["gold/mean"] = (gold(rollout, rows).sum(), jnp.float32(len(rows)))
    return state, metrics

  return iteration


def sample_rollout(sample, state: TrainState, frozen, prompts, prompt_mask, rows) -> Rollout:
  """Returns a rollout of the prompts in `rows [B]`; `after_sampling` is the state that follows.

  The state itself is left as it is, so that it can be saved where the host fails to score.
  """
  _, sample_key = jax.random.split(state.key)
  return sample(
    join(frozen["base"], state.params)["policy"],
    prompts[rows],
    prompt_mask[rows],
    sample_key,
    temperature=state.hypers.temperature,
  )


def after_sampling(state: TrainState) -> TrainState:
  """Returns the state with a key that `sample_rollout` has not used."""
  key, _ = jax.random.split(state.key)
  return state._replace(key=key)


class _Reference(NamedTuple):
  """What the reference says of a rollout; zeros and None where nothing reads it."""

  log_probs: jax.Array  # [B, T]
  exact_kl: jax.Array | None  # [B, T], of the policy before this iteration's steps
  hidden: jax.Array | None  # [B, T, D_ref]


def _measured_reference(config, policy, reference, state, params, reference_params, rollout):
  """Returns (what the penalty reads of the reference, the kl/ref_* metrics).

  All estimators are of KL(pi || pi_ref) at the policy that sampled; of a late rollout the exact one
  is that of the present policy, whose next-token distributions are at hand. It, and all of them
  when the objective has no KL, are measured every `kl_every` iterations only.
  """
  penalty, mask = objective.penalty_of(config), rollout.completion_mask
  temperature = state.hypers.temperature

  def sampled(hidden):
    log_probs = ops.token_log_probs_from_hidden(
      hidden,
      reference.unembedding(reference_params),
      completions.completion_tokens(rollout),
      temperature=temperature,
    )
    k1, k3 = (estimator(rollout.old_log_probs, log_probs) for estimator in (ops.k1, ops.k3))
    return log_probs, {
      **diagnostics.sequence_stats("kl/ref_k1", k1, mask),
      **diagnostics.sequence_stats("kl/ref_k3", k3, mask),
    }

  def exact(hidden):
    kl = ops.exact_kl_from_hidden(
      completions.completion_hidden(policy, params, rollout),
      policy.unembedding(params),
      hidden,
      reference.unembedding(reference_params),
      temperature=temperature,
    )
    return kl, diagnostics.sequence_stats("kl/ref_exact", kl, mask)

  if penalty.placement == "none":

    def all_estimators():
      hidden = completions.completion_hidden(reference, reference_params, rollout)
      return sampled(hidden)[1] | exact(hidden)[1]

    metrics = _at_cadence(config, state, all_estimators)
    return _Reference(jnp.zeros_like(rollout.old_log_probs), None, None), metrics

  hidden = completions.completion_hidden(reference, reference_params, rollout)
  log_probs, metrics = sampled(hidden)
  if penalty.in_reward and penalty.reads_exact_kl:
    exact_kl, exact_metrics = exact(hidden)
    return _Reference(log_probs, exact_kl, hidden), metrics | exact_metrics
  metrics |= _at_cadence(config, state, lambda: exact(hidden)[1])
  return _Reference(log_probs, None, hidden), metrics


def _one_if(condition):
  """Returns the (sum, count) pair of a yes or no."""
  return condition.astype(jnp.float32), 1.0


def _at_cadence(config, state, measure):
  """Returns `measure()` every `kl_every` iterations, and pairs with count 0 otherwise."""
  if not config.kl_every:
    return {}
  not_measured = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
  due = state.iteration % config.kl_every == 0
  return jax.lax.cond(due, measure, lambda: not_measured)


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
    "doubling": lambda state, kl, hypers: ops.doubling(
      state, kl, target_kl=hypers.kl_target, minimum=hypers.beta_min, maximum=hypers.beta_max
    ),
    "proportional": lambda state, kl, hypers: ops.proportional(
      state,
      kl,
      target_kl=hypers.kl_target,
      num_samples=config.batch_size,
      horizon=hypers.kl_horizon,
      minimum=hypers.beta_min,
      maximum=hypers.beta_max,
    ),
    "dual_ascent": lambda state, kl, hypers: ops.dual_ascent(
      state,
      kl,
      target_kl=hypers.kl_target,
      step_size=hypers.kl_step_size,
      maximum=hypers.beta_max,
    ),
    "linear": schedule(ops.linear_schedule),
    "cosine": schedule(ops.cosine_schedule),
  }
  return rules[config.controller]
