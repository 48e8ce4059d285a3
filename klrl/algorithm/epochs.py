"""The inner epochs: several passes of Adam over one rollout, in shuffled minibatches.

The loss of a minibatch is the policy's, with the KL penalty's loss term where it has one, plus the
value's, minus an entropy bonus, plus the cross-entropy on pretraining texts: a loss as in
`gradients`. The first ones are (sum, count) pairs over the same tokens or sequences, so one divisor
serves policy loss and KL, and beta keeps its unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import completions, diagnostics, kl_terms, objective
from klrl.algorithm.gradients import gradients_of
from klrl.algorithm.optimizer import apply_gradients, make_schedule
from klrl.devices import parallel
from klrl.models import join
from klrl.sampling import Rollout


class Texts(NamedTuple):
  """Texts to keep likely, right-padded."""

  tokens: jax.Array  # [B, S] int32
  mask: jax.Array  # [B, S] bool


class Batch(NamedTuple):
  """What the inner epochs read of each completion; leading axis B."""

  rollout: Rollout
  scores: jax.Array  # [B]
  advantages: jax.Array  # [B, T]
  returns: jax.Array  # [B, T]
  old_values: jax.Array  # [B, T]
  ref_log_probs: jax.Array  # [B, T]; zeros where the objective has no KL
  ref_hidden: jax.Array | None  # [B, T, D_ref], where the exact KL is made anew
  sampler_weights: jax.Array  # [B, T], of policy loss and KL, for a sampler that is not old
  pretraining: Texts | None = None


class Context(NamedTuple):
  """What the inner epochs read and all completions share."""

  hypers: NamedTuple  # learner.Hypers
  frozen: dict  # parameters that are not trained, beside the trained ones
  beta: jax.Array
  trust_region_beta: jax.Array
  advantage_mean: jax.Array  # what the advantages were whitened by; 0 and 1 where they were not
  advantage_std: jax.Array
  ref_unembedding: jax.Array | None
  iteration: jax.Array


# How far the policy may get from the one that sampled; the last is held by nothing.
TRUST_REGIONS = ("clip", "sequence_clip", "truncated", "kl_old_new", "kl_new_old", "none")


def value_params(config, params):
  """Returns the parameters of the value model: its own, or a head on the policy's trunk."""
  if config.value_trunk == "shared":
    return {"decoder": params["policy"]["decoder"], **params["value"]}
  return params["value"]


def needs_exact_kl(config, penalty: objective.KLPenalty) -> bool:
  """Returns whether each minibatch computes the exact KL of its own."""
  refreshed = penalty.in_reward and config.kl_refresh == "minibatch"
  return penalty.reads_exact_kl and (penalty.in_loss or refreshed)


def make_loss_fn(config, max_completion_len: int, policy, value_model):
  """Returns loss(params, batch, context) -> (weights, metrics) of the trained parameters.

  Args:
    config: frozen; read are the KL penalty's fields, divergence, trust_region, loss_aggregation,
      kl_refresh and value_trunk.
    max_completion_len: the constant of the aggregation `constant`.
    policy: a `models.Policy`.
    value_model: a `models.ScalarModel`, or None.
  """
  penalty = objective.penalty_of(config)
  aggregate = ops.AGGREGATIONS[config.loss_aggregation]

  def mean(per_token, mask):
    return aggregate(per_token, mask, constant_length=max_completion_len)

  def loss_fn(params, batch: Batch, context: Context):
    params = join(context.frozen, params)
    rollout, hypers = batch.rollout, context.hypers
    mask, num_tokens = rollout.completion_mask, rollout.completion_mask.sum() * 1.0
    hidden = completions.completion_hidden(policy, params["policy"], rollout)
    unembedding = policy.unembedding(params["policy"])
    log_probs, entropy = ops.token_log_probs_and_entropy_from_hidden(
      hidden,
      unembedding,
      completions.completion_tokens(rollout),
      temperature=hypers.temperature,
    )
    # Padding gets ratio 1 before anything exponentiates it.
    log_probs = jnp.where(mask, log_probs, rollout.old_log_probs)
    exact_kl = None
    if needs_exact_kl(config, penalty):
      models = hidden, unembedding, batch.ref_hidden, context.ref_unembedding
      exact_kl = _exact_divergence(config, models, hypers)
    terms = kl_terms.TokenTerms(
      log_probs, rollout.old_log_probs, batch.ref_log_probs, mask, exact_kl
    )
    if penalty.in_reward and config.kl_refresh == "minibatch":
      batch = _refreshed(penalty, batch, context, terms)
    policy_loss, metrics = _policy_loss(config, log_probs, batch, context)
    metrics["policy/loss"] = mean(policy_loss * batch.sampler_weights, mask)
    weights = {"policy/loss": 1.0}
    # Means over the old policy's draws: the first is 1 wherever the draws are really its own.
    ratio = jnp.exp(log_probs - rollout.old_log_probs)
    metrics["policy/ratio"] = (jnp.where(mask, ratio, 0.0).sum(), num_tokens)
    metrics["policy/ratio_deviation"] = (jnp.where(mask, abs(ratio - 1), 0.0).sum(), num_tokens)
    metrics["policy/entropy"] = (jnp.where(mask, entropy, 0.0).sum(), num_tokens)
    metrics["policy/entropy_bonus"] = mean(entropy, mask)
    weights["policy/entropy_bonus"] = -hypers.entropy_coef
    if value_model is not None:
      if config.value_trunk == "shared":
        values = value_model.head(params["value"], hidden)
      else:
        values = completions.values(value_model, params["value"], rollout)
      per_token, value_metrics = _value_loss(values, batch, hypers)
      metrics |= value_metrics | {"value/loss": mean(per_token, mask)}
      weights["value/loss"] = hypers.vf_coef
    if batch.pretraining is not None:
      metrics["policy/pretraining_loss"] = _cross_entropy(policy, params["policy"], batch)
      weights["policy/pretraining_loss"] = hypers.ptx_coef
    if penalty.in_loss:
      kl_loss = kl_terms.kl_loss(penalty, terms, prefix_cap=hypers.prefix_cap)
      metrics["policy/kl_loss"] = mean(kl_loss * batch.sampler_weights, mask)
      # Whitening divides the reward, so it divides what the reward is weighed against.
      weights["policy/kl_loss"] = context.beta / context.advantage_std
      if penalty.correction == "prefix":
        bites, lost = kl_terms.prefix_cap_effect(penalty, terms, prefix_cap=hypers.prefix_cap)
        metrics["kl/prefix_cap_fraction"] = (bites.sum(), num_tokens)
        metrics["kl/prefix_cap_lost"] = diagnostics.per_sequence(lost, mask)
    for name, estimator in (("k1", ops.k1), ("k3", ops.k3)):
      metrics[f"kl/sampler_{name}"] = diagnostics.per_sequence(
        estimator(rollout.sampler_log_probs, log_probs), mask
      )
    metrics["kl/old_k3"] = diagnostics.per_sequence(ops.k3(rollout.old_log_probs, log_probs), mask)
    return weights, metrics

  return loss_fn


def _exact_divergence(config, models, hypers):
  """Returns [B, T] nats per token, what `divergence` names, of next-token distributions.

  `models` are hidden states and unembedding of the policy, then of its reference or teacher.
  """
  if config.divergence == "jensen_shannon":
    return ops.exact_jsd_from_hidden(
      *models, temperature=hypers.temperature, weight=hypers.jsd_weight
    )
  if config.divergence == "forward":
    models = models[2:] + models[:2]
  return ops.exact_kl_from_hidden(*models, temperature=hypers.temperature)


def _refreshed(penalty, batch: Batch, context: Context, terms: kl_terms.TokenTerms) -> Batch:
  """Returns the batch with advantages and returns under the current policy's KL."""
  hypers = context.hypers
  kl = kl_terms.reward_kl(penalty, terms.log_probs, terms.ref_log_probs, terms.exact_kl)
  advantages, returns = kl_terms.penalised_advantages(
    penalty,
    batch.scores,
    kl,
    batch.old_values,
    terms.mask,
    beta=context.beta,
    gamma=hypers.gamma,
    gae_lambda=hypers.gae_lambda,
  )
  # Equal advantages give exactly 0 here too; whitening in the iteration chose its zeros itself.
  centred = advantages - context.advantage_mean
  equal = ops.within_rounding(jnp.abs(centred), jnp.abs(context.advantage_mean))
  advantages = jnp.where(terms.mask & ~equal, centred, 0.0) / context.advantage_std
  return batch._replace(advantages=advantages, returns=returns)


def _policy_loss(config, log_probs, batch: Batch, context: Context):
  """Returns ([B, T] loss of the trust region that the config names, its metrics)."""
  hypers, mask = context.hypers, batch.rollout.completion_mask
  arguments = log_probs, batch.rollout.old_log_probs, batch.advantages, mask
  eps = {"clip_eps_low": hypers.clip_eps_low, "clip_eps_high": hypers.clip_eps_high}
  if config.trust_region == "clip":
    clipped = ops.clip_fraction(*arguments, **eps)
    metrics = {"policy/clip_fraction": (clipped.sum(), mask.sum() * 1.0)}
    return ops.clipped_policy_loss(*arguments, **eps, dual_clip=hypers.dual_clip), metrics
  if config.trust_region == "sequence_clip":
    return ops.gspo_loss(*arguments, **eps), {}
  if config.trust_region == "truncated":
    return ops.cispo_loss(*arguments, max_ratio=1 + hypers.clip_eps_high), {}
  penalty = {"kl_old_new": ops.kl_old_new, "kl_new_old": ops.kl_new_old}.get(
    config.trust_region, lambda log_probs, old_log_probs: jnp.zeros_like(log_probs)
  )
  loss = ops.kl_penalised_policy_loss(
    *arguments[:3],
    penalty(log_probs, batch.rollout.old_log_probs),
    mask,
    trust_region_beta=context.trust_region_beta,
  )
  return loss, {}


def _value_loss(values, batch: Batch, hypers):
  """Returns ([B, T] clipped value loss, its metrics)."""
  mask, eps = batch.rollout.completion_mask, hypers.value_clip_eps
  loss = ops.clipped_value_loss(values, batch.old_values, batch.returns, mask, value_clip_eps=eps)
  clipped = mask & (jnp.abs(values - batch.old_values) > eps)
  return loss, {"value/clip_fraction": (clipped.sum(), mask.sum() * 1.0)}


def _cross_entropy(policy, params, batch: Batch):
  """Returns (sum, count) of -log pi over the pretraining texts' tokens after the first, nats."""
  tokens, mask = batch.pretraining
  hidden = policy.hidden(params, tokens, mask)[:, :-1]
  log_probs = ops.token_log_probs_from_hidden(hidden, policy.unembedding(params), tokens[:, 1:])
  return ops.token_mean(-log_probs, mask[:, 1:])


def minibatch_rows(config, batch_size: int, key) -> jax.Array:
  """Returns [num_epochs * num_minibatches, rows] int, the rows of each minibatch, in turn.

  Every epoch has an order of its own, in which each row stands once.
  """
  keys = jax.random.split(key, config.num_epochs)
  orders = jax.vmap(lambda key: jax.random.permutation(key, batch_size))(keys)
  return orders.reshape(config.num_epochs * config.num_minibatches, -1)


def inner_epochs(config, loss_fn, params, opt_state, batch: Batch, context: Context, key):
  """Returns (params, opt_state, metrics) after `num_epochs` over `num_minibatches` minibatches.

  A minibatch whose KL(old || pi) exceeds `hypers.max_kl_old` is not stepped on, nor is any after
  it. Metrics are (sum, count) over all minibatches; `kl/sampler_*` over the first one, at which the
  policy is still the one that sampled, unless the rollout is late. `config` is read for num_epochs,
  num_minibatches, accumulation and the schedule of the learning rate.
  """
  schedule = make_schedule(config)
  batch_size = batch.scores.shape[0]
  minibatches = minibatch_rows(config, batch_size, key)

  def step(carry, rows):
    params, opt_state = carry
    minibatch = parallel.split_rows(jax.tree.map(lambda x: x[rows], batch))
    gradients, metrics = gradients_of(
      lambda params, part: loss_fn(params, part, context),
      params,
      minibatch,
      num_parts=config.accumulation,
    )
    stop = ops.divide(*metrics["kl/old_k3"]) > context.hypers.max_kl_old
    new_params, new_opt_state, norm = apply_gradients(
      params,
      opt_state,
      gradients,
      learning_rate=context.hypers.learning_rate * schedule(context.iteration),
      max_grad_norm=context.hypers.max_grad_norm,
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

  (trained, _), each = jax.lax.scan(guarded, ((params, opt_state), jnp.bool_(False)), minibatches)
  metrics = jax.tree.map(lambda x: x.sum(axis=0), each)
  metrics["policy/num_updates"] = (metrics["policy/num_updates"][0], 1.0)
  for name in ("kl/sampler_k1", "kl/sampler_k3"):
    metrics[name] = jax.tree.map(lambda x: x[0], each[name])
  return *trained, metrics
