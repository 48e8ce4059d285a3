"""The learner of every RL experiment: from a rollout and its scores to a new state and metrics.

    J = E[r] - beta * KL(pi || pi_ref)      (Ouyang et al., InstructGPT, 2022, eq. 2)

An `Algorithm` says what an iteration does, and `Hypers` are its coefficients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from klrl import ops
from klrl.algorithm import (
  advantage_rules,
  completions,
  diagnostics,
  kl_terms,
  memory,
  preparation,
  shared_rows,
)
from klrl.algorithm.epochs import (
  Batch,
  Context,
  dealt,
  inner_epochs,
  make_loss_fn,
  minibatch_rows,
  needs_exact_kl,
  parts_of_minibatch,
  value_params,
)
from klrl.algorithm.optimizer import init_optimizer
from klrl.algorithm.spec import Algorithm, Hypers
from klrl.algorithm.terms import Experience, Texts
from klrl.models import join
from klrl.sampling import Rollout


class TrainState(NamedTuple):
  """Everything that a checkpoint holds; frozen parameters are elsewhere."""

  params: (
    dict  # the trained ones, {"policy": ..., "value": ...}; the second with a value model only
  )
  opt_state: optax.OptState
  controller: ops.ControllerState | ops.BudgetState  # beta, of KL(pi || pi_ref)
  trust_region: ops.ControllerState  # trust_region_beta, of the KL to the old policy
  hypers: Hypers  # arrays
  key: jax.Array
  iteration: jax.Array  # int32
  score_stats: memory.ScoreStats
  reference: dict | None = None  # like params["policy"], if the reference moves
  replay: Rollout | None = None  # those that wait, if rollouts are trained on late


def init_state(algorithm: Algorithm, hypers: Hypers, params: dict, key) -> TrainState:
  """Returns the state before the first iteration, with a frozen reference and nothing to replay."""
  hypers = hypers.traced()
  has_kl = algorithm.penalty.placement != "none"
  # These are copies, since an update donates each buffer, and may do so only once.
  beta = jnp.array(hypers.beta) if has_kl else jnp.float32(0.0)
  trust_region_beta = jnp.array(hypers.trust_region_beta)
  return TrainState(
    params=params,
    opt_state=init_optimizer(params),
    controller=algorithm.controller.start(beta),
    trust_region=ops.ControllerState(trust_region_beta, jnp.int32(0)),
    hypers=hypers,
    key=key,
    iteration=jnp.int32(0),
    score_stats=memory.no_scores(),
  )


def make_after_sampling_fn(algorithm: Algorithm, policy):
  """Returns after_sampling(state, frozen, rollout) -> (state, the rollout to train on).

  The state that follows `sample_rollout` has a key that this has not used. Log-probs of an inexact
  sampler become the trainer's. If rollouts are trained on late, the new one waits in the state, and
  that of iteration `memory.trained_on` comes out: it is the one that the `packing` is of.
  """

  def after_sampling(state: TrainState, frozen, rollout: Rollout):
    state = state._replace(key=_key_after_sampling(state.key))
    packing = rollout.packing
    if state.replay is not None:
      rollout = rollout._replace(packing=None)
    if algorithm.sampler_correction != "none":
      params = join(frozen["base"], state.params)["policy"]
      rollout = preparation.rescored(
        policy, params, rollout, state.hypers, group_size=algorithm.group_size
      )
    if state.replay is None:
      return state, rollout
    replay, rollout = memory.exchanged(state.replay, rollout, state.iteration)
    return state._replace(replay=replay), rollout._replace(packing=packing)

  return after_sampling


def _key_after_sampling(key):
  return jax.random.split(key)[0]


def _keys_of_update(key):
  """Returns (the key that remains, that of the inner epochs)."""
  return jax.random.split(key)


def fitting(algorithm: Algorithm, state: TrainState, rollout: Rollout, packings) -> jax.Array:
  """Returns [packings] bool: with which of them the rollout fits wherever an update reads it.

  The state is that of `sample_rollout`, and the rollout is the one that is trained on. An update
  reads all of it at once, and the minibatches of the inner epochs in their parts; on each device
  the texts that are there must fit.
  """
  assert algorithm.oversampling == 1
  _, key = _keys_of_update(_key_after_sampling(state.key))
  (group_size,) = {each.group_size for each in packings}
  num_rows, groups = len(rollout.tokens), {"group_size": group_size}
  of_whole = shared_rows.need_of(rollout, shared_rows.by_device(jnp.arange(num_rows)), **groups)

  @functools.cache  # On an accelerator all packings have as many parts.
  def of_parts(num_parts):
    minibatches = minibatch_rows(algorithm, num_rows, num_parts, key)
    parts = dealt(minibatches, num_parts, rollout, **groups)
    return shared_rows.need_of(rollout, parts.reshape(-1, parts.shape[-1]), **groups)

  def fits(each):
    num_parts = parts_of_minibatch(algorithm, rollout._replace(packing=each))
    return shared_rows.fits(each, of_whole) & shared_rows.fits(each, of_parts(num_parts))

  return jnp.stack([fits(each) for each in packings])


def make_update_fn(
  algorithm: Algorithm, policy, value_model, reference, rehearse=None, *, sampler=None
):
  """Returns update(state, frozen, rollout, scores [B], pretraining) -> (state, metrics).

  One call is one iteration after `make_after_sampling_fn`, whose rollout it takes: log-probs of the
  reference and values, advantages with the KL penalty's cost in the reward, then the inner epochs.
  `frozen` holds the parameters of the `reference` and, if adapters are trained, those of their
  `base`. The tokens in `completion_mask` are those that the policy chose; the mask may have holes,
  and whatever stands in them is read and not learnt from, see `completions`. `pretraining` is a
  `terms.Texts` of B rows, whose loss is mixed in, or None. A completion whose score is NaN has
  none: nothing is learnt from it, and it is in no mean of scores. The function is pure and is
  compiled by the caller. Metrics are (sum, count) pairs. `kl/ref_*`, and `objective/mean`, the mean
  of score - beta * k1 with the score as it was given, are of all sampled completions, before scores
  are shaped and groups are dropped.

  Args:
    algorithm: the choices.
    policy: a `models.Policy`; its old log-probs come from the sampler.
    value_model: a `models.ScalarModel`, or None if the advantage rule reads no values.
    reference: a `models.Policy`; its architecture may differ from the policy's.
    rehearse: draws completions of the reference, as `sampling.make_sample_fn` returns it, whose
      loss is mixed in instead of `pretraining`; None if the algorithm does not rehearse.
    sampler: the policy in the sampler's arithmetic, for a loss that reads its distributions; None
      is the policy.
  """
  penalty = algorithm.penalty
  has_kl = penalty.placement != "none"
  loss_fn = make_loss_fn(algorithm, policy, value_model)

  def update(state: TrainState, frozen, rollout: Rollout, scores, pretraining=None):
    hypers, base = state.hypers, frozen["base"]
    models = join(base, state.params)
    metrics = diagnostics.rollout_metrics(rollout, scores)
    reference_params = frozen["reference"]
    if state.reference is not None:
      reference_params = join(base, {"policy": state.reference})["policy"]
    # It is measured on all that was sampled, since the groups that are kept are no sample of pi.
    ref, kl_metrics = _measured_reference(
      algorithm, policy, reference, state, models["policy"], reference_params, rollout
    )
    if has_kl and algorithm.controller.at_once:
      state = _steered(algorithm, state, kl_metrics)
    beta = state.controller.beta
    if has_kl:
      kl_sum, num_sequences = kl_metrics["kl/ref_k1"]
      total, num_scored = ops.masked_sum_count(scores, ~jnp.isnan(scores))
      cost = beta * kl_sum * (num_scored / num_sequences)
      metrics["objective/mean"] = (total - cost, num_scored)
    scores = preparation.shaped_scores(
      scores, rollout, hypers, max_completion_len=algorithm.max_completion_len
    )
    rollout, scores = preparation.without_unscored(rollout, scores)
    scored = rollout.completion_mask.any(axis=1)
    score_std = jnp.float32(1.0)
    if algorithm.normalise_scores:
      score_stats, scores, score_std = memory.normalised(state.score_stats, scores, scored)
      state = state._replace(score_stats=score_stats)
    if algorithm.oversampling > 1:
      (rollout, ref), scores, share = preparation.informative_groups(
        (rollout, ref),
        scores,
        scored,
        group_size=algorithm.group_size,
        batch_size=algorithm.batch_size,
      )
      metrics["rollout/informative_groups"] = (share, 1.0)
    mask = rollout.completion_mask
    key, epochs_key = _keys_of_update(state.key)
    weights, sampler_metrics = preparation.corrected(rollout, algorithm.sampler_correction, hypers)
    old_values = jnp.zeros_like(rollout.old_log_probs)
    if value_model is not None:
      of_values = value_params(models, shared_trunk=algorithm.shared_trunk)
      old_values = completions.values(
        value_model, of_values, rollout, group_size=algorithm.group_size
      )
    slope = kl_terms.slope_of(penalty, hypers)
    kl = kl_terms.reward_kl(
      penalty, rollout.old_log_probs, ref.log_probs, mask, ref.exact_kl, slope, ref.weights
    )
    experience = Experience(scores, kl, old_values, mask, beta)
    advantages, returns = algorithm.advantage(experience, algorithm, hypers)
    mean, std = jnp.float32(0.0), jnp.float32(1.0)
    if algorithm.whiten_advantages:
      mean, std = ops.mean_and_std(advantages, mask)
      advantages = ops.whiten(advantages, mask)
    if rehearse is not None:
      key, rehearsal_key = jax.random.split(key)
      drawn = rehearse(
        reference_params,
        rollout.tokens[:, : rollout.prompt_mask.shape[1]],
        rollout.prompt_mask,
        rehearsal_key,
        temperature=hypers.temperature,
      )
      pretraining = Texts(drawn.tokens, drawn.prompt_mask, drawn.completion_mask)
    if pretraining is not None and algorithm.text_divergence is not None:
      hidden = completions.completion_hidden(reference, reference_params, pretraining)
      pretraining = pretraining._replace(ref_hidden=hidden)
    fresh_exact_kl = needs_exact_kl(algorithm)
    of_sampler = None, None
    if algorithm.reads_sampler:
      # The distributions that it drew from: its parameters are those before this update.
      drew, before = sampler or policy, models["policy"]
      hidden = completions.completion_hidden(drew, before, rollout, group_size=algorithm.group_size)
      of_sampler = hidden, drew.unembedding(before)
    batch = Batch(
      rollout,
      scores,
      advantages,
      returns,
      old_values,
      ref.log_probs,
      ref.hidden if fresh_exact_kl else None,
      of_sampler[0],
      weights,
      pretraining,
      ref.weights,
    )
    ref_unembedding = None
    if fresh_exact_kl or algorithm.text_divergence is not None:
      ref_unembedding = reference.unembedding(reference_params)
    context = Context(
      hypers,
      base,
      beta,
      state.trust_region.beta,
      mean,
      std,
      ref_unembedding,
      of_sampler[1],
      state.iteration,
    )
    params, opt_state, epoch_metrics = inner_epochs(
      algorithm, loss_fn, state.params, state.opt_state, batch, context, epochs_key
    )

    def kl_old():
      """Takes a pass over the whole batch, which the epochs do not need."""
      trained = join(base, params)["policy"]
      log_probs = completions.log_probs(
        policy,
        trained,
        rollout,
        temperature=hypers.temperature,
        group_size=algorithm.group_size,
      )
      estimators = {"kl/old_k1": ops.k1, "kl/old_k3": ops.k3}
      return {
        name: diagnostics.per_sequence(estimator(rollout.old_log_probs, log_probs), mask)
        for name, estimator in estimators.items()
      }

    # The trust region is steered by it after every iteration.
    cadence = 1 if algorithm.adapts_trust_region else algorithm.kl_every
    metrics |= {
      **sampler_metrics,
      **kl_metrics,
      **epoch_metrics,
      **_at_cadence(cadence, state, kl_old),
      "controller/beta": (beta, 1.0),
    }
    if value_model is not None:
      explained = diagnostics.explained_variance(old_values, returns, mask)
      metrics["value/explained_variance"] = explained
    # The cost of a nat of KL in the unit of the scores, if something divides the scores alone.
    is_relative = algorithm.advantage is advantage_rules.GROUP_RULES["group_relative"]
    if is_relative and (penalty.in_loss or penalty.credit == "token"):
      score_std *= advantage_rules.group_deviation(scores, experience.scored, algorithm.group_size)
    if has_kl:
      metrics["controller/effective_beta"] = (beta * score_std, 1.0)
    if has_kl and not algorithm.controller.at_once:
      state = _steered(algorithm, state, metrics)
    trust_region, controller_metrics = _controlled(algorithm, state, metrics)
    if state.reference is not None and algorithm.reference_rule is not None:
      moved = algorithm.reference_rule(
        state.reference, params["policy"], state.iteration, algorithm, hypers
      )
      state = state._replace(reference=moved)
    if algorithm.reset_optimizer:
      fresh = init_optimizer(params)
      opt_state = memory.replaced_when_due(opt_state, fresh, state.iteration, algorithm)
    state = state._replace(
      params=params,
      opt_state=opt_state,
      trust_region=trust_region,
      key=key,
      iteration=state.iteration + 1,
    )
    return state, metrics | controller_metrics

  return update


def make_update_after_sampling_fn(
  algorithm: Algorithm, policy, value_model, reference, rehearse=None, *, sampler=None
):
  """Returns what `make_update_fn` returns, for a rollout that has just been sampled.

  The scores are those of the rollout that is trained on, see `make_after_sampling_fn`.
  """
  after_sampling = make_after_sampling_fn(algorithm, policy)
  update = make_update_fn(algorithm, policy, value_model, reference, rehearse, sampler=sampler)

  def update_after_sampling(state: TrainState, frozen, rollout: Rollout, *arguments):
    state, rollout = after_sampling(state, frozen, rollout)
    return update(state, frozen, rollout, *arguments)

  return update_after_sampling


def _steered(algorithm: Algorithm, state: TrainState, metrics) -> TrainState:
  """Returns the state with the beta that answers to the KL in `metrics`."""
  measured = ops.divide(*metrics["kl/ref_k1"])
  controller = algorithm.controller.step(state.controller, measured, algorithm, state.hypers)
  return state._replace(controller=controller)


def _controlled(algorithm: Algorithm, state: TrainState, metrics):
  """Returns (trust region, metrics) after an iteration with these `metrics`."""
  hypers, trust_region = state.hypers, state.trust_region
  found = {}
  if algorithm.penalty.placement != "none" and algorithm.controller.lowest is not None:
    lowest = algorithm.controller.lowest(hypers)
    found["controller/at_bound"] = _one_if(
      ops.at_bound(state.controller, minimum=lowest, maximum=hypers.beta_max)
    )
  if algorithm.adapts_trust_region:
    measured = ops.divide(*metrics["kl/old_k3"])
    trust_region = ops.doubling(trust_region, measured, target_kl=hypers.trust_region_target)
    found["controller/trust_region_at_bound"] = _one_if(ops.at_bound(trust_region))
  return trust_region, found


def make_scored_update_fn(
  algorithm: Algorithm,
  policy,
  value_model,
  reference,
  score,
  gold=None,
  *,
  rehearse=None,
  sampler=None,
):
  """Returns update(state, frozen, rollout, rows, pretraining) -> (state, metrics).

  It is what `make_update_after_sampling_fn` returns, with scores that are computed on the device by
  `score(frozen, rollout, rows) -> [B]`; `rows [B]` int32 says which of all prompts those of the
  rollout are that is trained on. If `gold(rollout, rows) -> [B]` is given it is measured, and
  nothing is trained on it. `rehearse` and `sampler` are those of `make_update_fn`.
  """
  after_sampling = make_after_sampling_fn(algorithm, policy)
  update = make_update_fn(algorithm, policy, value_model, reference, rehearse, sampler=sampler)

  def scored_update(state, frozen, rollout, rows, pretraining=None):
    state, rollout = after_sampling(state, frozen, rollout)
    scores = score(frozen, rollout, rows)
    # A reward model never abstains: an infinite score ends the run, as NaN does elsewhere.
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    state, metrics = update(state, frozen, rollout, scores, pretraining)
    if gold is not None:
      metrics["gold/mean"] = (gold(rollout, rows).sum(), jnp.float32(len(rows)))
    return state, metrics

  return scored_update


def make_iteration_fn(
  algorithm: Algorithm, policy, value_model, reference, sample, *scores, **more
):
  """Returns iteration(state, frozen, prompts, prompt_mask, rows, pretraining) -> (state, metrics).

  This is the whole iteration as one pure function: it samples from `prompts` [B, P], and does what
  `make_scored_update_fn` returns, which has the other arguments.
  """
  update = make_scored_update_fn(algorithm, policy, value_model, reference, *scores, **more)

  def iteration(state, frozen, prompts, prompt_mask, rows, pretraining=None):
    rollout = sample_rollout(sample, state, frozen, prompts, prompt_mask)
    return update(state, frozen, rollout, rows, pretraining)

  return iteration


def sample_rollout(sample, state: TrainState, frozen, prompts, prompt_mask) -> Rollout:
  """Returns a rollout of the prompts [B, P].

  The state itself does not change, so that it can be saved if the host fails to score.
  """
  _, sample_key = jax.random.split(state.key)
  return sample(
    join(frozen["base"], state.params)["policy"],
    prompts,
    prompt_mask,
    sample_key,
    temperature=state.hypers.temperature,
  )


class _Reference(NamedTuple):
  """What the penalty reads of the reference, for a rollout; zeros and None if it reads nothing."""

  log_probs: jax.Array  # [B, T]
  exact_kl: jax.Array | None  # [B, T], the divergence from it before this iteration's steps
  hidden: jax.Array | None  # [B, T, D_ref]
  weights: jax.Array | None = None  # [B, T], of the penalty's terms


def _measured_reference(
  algorithm: Algorithm, policy, reference, state, params, reference_params, rollout
):
  """Returns (what the penalty reads of the reference, the kl/ref_* metrics).

  All estimators are of KL(pi || pi_ref) at the policy that sampled. For a late rollout the exact KL
  is that of the present policy, whose next-token distributions are available. The exact KL, and all
  estimators if the objective has no KL, are measured every `kl_every` iterations only.
  """
  penalty, mask = algorithm.penalty, rollout.completion_mask
  temperature = state.hypers.temperature

  def hidden_of(policy, params):
    return completions.completion_hidden(policy, params, rollout, group_size=algorithm.group_size)

  def of_reference(hidden, fn, rows):
    models = [(hidden, reference.unembedding(reference_params))]
    return completions.of_tokens(fn, models, rollout, rows, temperature=temperature)

  def weights(hidden):
    certainty = None
    if penalty.weight == "certainty":
      certainty = of_reference(hidden, ops.certainty_of, [])
    return kl_terms.token_weights(penalty, certainty, mask, state.hypers)

  def sampled(hidden):
    log_probs = of_reference(hidden, ops.taken, [completions.completion_tokens(rollout)])
    k1, k3 = (estimator(rollout.old_log_probs, log_probs) for estimator in (ops.k1, ops.k3))
    return log_probs, {
      **diagnostics.sequence_stats("kl/ref_k1", k1, mask),
      **diagnostics.sequence_stats("kl/ref_k3", k3, mask),
    }

  def figures(log_probs, ref_log_probs, hypers):
    kl = ops.kl_of(log_probs, ref_log_probs)
    return kl, algorithm.exact_divergence(log_probs, ref_log_probs, hypers)

  def exact(hidden):
    models = (
      (hidden_of(policy, params), policy.unembedding(params)),
      (hidden, reference.unembedding(reference_params)),
    )
    kl, divergence = completions.of_tokens(
      figures, models, rollout, coefficients=[state.hypers], temperature=temperature
    )
    return divergence, diagnostics.sequence_stats("kl/ref_exact", kl, mask)

  if penalty.placement == "none":

    def all_estimators():
      hidden = hidden_of(reference, reference_params)
      return sampled(hidden)[1] | exact(hidden)[1]

    metrics = _at_cadence(algorithm.kl_every, state, all_estimators)
    return _Reference(jnp.zeros_like(rollout.old_log_probs), None, None), metrics

  hidden = hidden_of(reference, reference_params)
  log_probs, metrics = sampled(hidden)
  if penalty.in_reward and penalty.reads_exact_kl:
    exact_kl, exact_metrics = exact(hidden)
    return _Reference(log_probs, exact_kl, hidden, weights(hidden)), metrics | exact_metrics
  metrics |= _at_cadence(algorithm.kl_every, state, lambda: exact(hidden)[1])
  return _Reference(log_probs, None, hidden, weights(hidden)), metrics


def _one_if(condition):
  """Returns the (sum, count) pair of a yes or no."""
  return condition.astype(jnp.float32), 1.0


def _at_cadence(kl_every: int, state, measure):
  """Returns `measure()` every `kl_every` iterations, and pairs with count 0 otherwise."""
  if not kl_every:
    return {}
  if kl_every == 1:
    return measure()
  measure = jax.jit(measure)  # It is traced once for its shapes and its values.
  not_measured = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
  due = state.iteration % kl_every == 0
  return jax.lax.cond(due, measure, lambda: not_measured)
