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

from klrl import completions, kl_terms, measures, objective, ops
from klrl.advantages import advantages_of, effective_beta
from klrl.epochs import Batch, Context, inner_epochs, make_loss_fn, needs_exact_kl
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
  max_kl_old: jax.Array
  prefix_cap: jax.Array
  kl_target: jax.Array
  trust_region_target: jax.Array
  beta_final: jax.Array
  kl_horizon: jax.Array
  kl_step_size: jax.Array
  beta: jax.Array  # where a schedule starts; losses read the controller's


class TrainState(NamedTuple):
  """Everything that a checkpoint holds; the reference and the reward model are frozen elsewhere."""

  params: dict  # {"policy": ..., "value": ...}, the second with a value model only
  opt_state: optax.OptState
  controller: ops.ControllerState  # beta, of KL(pi || pi_ref)
  trust_region: ops.ControllerState  # trust_region_beta, of the KL to the old policy
  hypers: Hypers
  key: jax.Array
  iteration: jax.Array  # int32


def hypers_from_config(config) -> Hypers:
  """Returns the config's fields of the same names as float32 scalars."""
  return Hypers(*(jnp.float32(getattr(config, name)) for name in Hypers._fields))


def make_update_fn(config, max_completion_len: int, policy, value_model, reference):
  """Returns update(state, reference_params, rollout, scores [B], pretraining) -> (state, metrics).

  One call is one iteration after sampling: reference log-probs and values, advantages with the KL
  penalty's reward part, then `num_epochs` over `num_minibatches` minibatches. `pretraining` is an
  `epochs.Texts` of B rows, whose log-likelihood is mixed into the loss, or None. Pure; to be
  compiled by the caller. Metrics are (sum, count) pairs.

  Args:
    config: frozen; read are the fields of the KL penalty (`objective.penalty_of`), kl_refresh,
      kl_every, controller, advantage, group_size, whiten_advantages, oversampling, trust_region,
      trust_region_adaptive, loss_aggregation, num_epochs, num_minibatches, num_iterations,
      batch_size.
    max_completion_len: T, the constant of the aggregation `constant`.
    policy: a `models.Policy`; its old log-probs come from the sampler.
    value_model: a `models.ScalarModel`, or None where `advantage` is not `gae`.
    reference: a `models.Policy`; another architecture than the policy's is fine.
  """
  penalty = objective.penalty_of(config)
  loss_fn = make_loss_fn(config, max_completion_len, policy, value_model)
  next_controller = _make_controller(config)

  def update(state: TrainState, reference_params, rollout: Rollout, scores, pretraining=None):
    hypers = state.hypers
    metrics = measures.rollout_metrics(rollout, scores)
    scores = shaped_scores(scores, rollout, max_completion_len, hypers)
    if config.oversampling > 1:
      rollout, scores, share = informative_groups(rollout, scores, config)
      metrics["rollout/informative_groups"] = (share, 1.0)
    mask = rollout.completion_mask
    key, epochs_key = jax.random.split(state.key)
    ref, kl_metrics = _measured_reference(
      config, policy, reference, state, reference_params, rollout
    )
    old_values = jnp.zeros_like(rollout.old_log_probs)
    if value_model is not None:
      old_values = completions.values(value_model, state.params["value"], rollout)
    kl = kl_terms.reward_kl(penalty, rollout.old_log_probs, ref.log_probs, ref.exact_kl)
    beta = state.controller.beta
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
      pretraining,
    )
    ref_unembedding = reference.unembedding(reference_params) if fresh_exact_kl else None
    context = Context(hypers, beta, state.trust_region.beta, mean, std, ref_unembedding)
    params, opt_state, epoch_metrics = inner_epochs(
      config, loss_fn, state.params, state.opt_state, batch, context, epochs_key
    )
    log_probs = completions.log_probs(
      policy, params["policy"], rollout, temperature=hypers.temperature
    )
    metrics |= {
      **kl_metrics,
      **epoch_metrics,
      "controller/beta": (beta, 1.0),
      "kl/old_k1": measures.per_sequence(ops.k1(rollout.old_log_probs, log_probs), mask),
      "kl/old_k3": measures.per_sequence(ops.k3(rollout.old_log_probs, log_probs), mask),
    }
    if value_model is not None:
      metrics["value/explained_variance"] = measures.explained_variance(old_values, returns, mask)
    if config.advantage == "group_relative" and penalty.in_loss:
      metrics["controller/effective_beta"] = (effective_beta(config, scores, beta), 1.0)
    controller, trust_region = state.controller, state.trust_region
    if penalty.placement != "none":
      kl_sum, num_sequences = metrics["kl/ref_k1"]
      metrics["objective/mean"] = (scores.sum() - beta * kl_sum, num_sequences)
      controller = next_controller(controller, ops.divide(*metrics["kl/ref_k1"]), hypers)
    if config.trust_region in ("kl_old_new", "kl_new_old"):
      metrics["controller/trust_region_beta"] = (trust_region.beta, 1.0)
    if config.trust_region_adaptive:
      trust_region = ops.doubling(
        trust_region,
        ops.divide(*metrics["kl/old_k3"]),
        target_kl=hypers.trust_region_target,
      )
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
  `score(frozen, rollout, rows) -> [B]`. `frozen["reference"]` holds the reference's parameters,
  `rows [B]` int32 says which prompts to sample from. `gold(rollout, rows) -> [B]` is measured where
  it is given, and nothing is trained on it.
  """
  update = make_update_fn(config, max_completion_len, policy, value_model, reference)

  def iteration(state, frozen, prompts, prompt_mask, rows, pretraining=None):
    state, rollout = sample_rollout(sample, state, prompts, prompt_mask, rows)
    scores = score(frozen, rollout, rows)
    state, metrics = update(state, frozen["reference"], rollout, scores, pretraining)
    if gold is not None:
      metrics["gold/mean"] = (gold(rollout, rows).sum(), jnp.float32(len(rows)))
    return state, metrics

  return iteration


def shaped_scores(scores, rollout: Rollout, max_completion_len: int, hypers: Hypers) -> jax.Array:
  """Returns `scores` [B] less what a completion pays for its length and for having no end.

  `overlong_buffer` is the number of tokens before the limit over which the penalty rises from 0 to
  1 (Qiying Yu et al., "DAPO", 2025, eq. 13; a completion that does not end pays all of it), 0 is
  off; `missing_eos_penalty` is subtracted where the completion was cut off at the limit.
  """
  lengths = rollout.completion_mask.sum(axis=-1)
  buffer = jnp.maximum(hypers.overlong_buffer, 1.0)
  over = jnp.clip((lengths - (max_completion_len - buffer)) / buffer, 0.0, 1.0)
  over = jnp.where(hypers.overlong_buffer > 0, over, 0.0)
  return scores - over - jnp.where(rollout.finished, 0.0, hypers.missing_eos_penalty)


def informative_groups(rollout: Rollout, scores, config):
  """Returns (rollout, scores, share): the first `batch_size` rows of groups whose scores differ.

  Where they do not suffice, groups of equal scores fill the batch; their advantages are zero.
  `share` is the share of groups whose scores differ. Qiying Yu et al., "DAPO", 2025, section 3.2,
  with a fixed amount of oversampling instead of sampling until the batch is full.
  """
  groups = scores.reshape(-1, config.group_size)
  uniform = groups.max(axis=-1) == groups.min(axis=-1)
  kept = jnp.argsort(uniform, stable=True)[: config.batch_size // config.group_size]
  rows = (kept[:, None] * config.group_size + jnp.arange(config.group_size)[None]).reshape(-1)
  rollout = jax.tree.map(lambda x: x[rows], rollout)
  return rollout, scores[rows], 1.0 - uniform.mean()


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


class _Reference(NamedTuple):
  """What the reference says of a rollout; zeros and None where nothing reads it."""

  log_probs: jax.Array  # [B, T]
  exact_kl: jax.Array | None  # [B, T], of the policy that sampled
  hidden: jax.Array | None  # [B, T, D_ref]


def _measured_reference(config, policy, reference, state, reference_params, rollout):
  """Returns (what the penalty reads of the reference, the kl/ref_* metrics).

  All estimators are of KL(pi || pi_ref) at the policy that sampled. The exact one, and all of them
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
      **measures.sequence_stats("kl/ref_k1", k1, mask),
      **measures.sequence_stats("kl/ref_k3", k3, mask),
    }

  def exact(hidden):
    params = state.params["policy"]
    kl = ops.exact_kl_from_hidden(
      completions.completion_hidden(policy, params, rollout),
      policy.unembedding(params),
      hidden,
      reference.unembedding(reference_params),
      temperature=temperature,
    )
    return kl, measures.sequence_stats("kl/ref_exact", kl, mask)

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
