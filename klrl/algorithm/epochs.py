"""The inner epochs: several passes of Adam over one rollout, in shuffled minibatches.

A minibatch minimises the algorithm's loss plus that of texts which others wrote, as a loss of
`gradients`. All losses of tokens are aggregated in the same way, so policy loss and KL have one
divisor, and beta keeps its unit.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import completions, diagnostics, kl_terms, shared_rows
from klrl.algorithm.distributions import log_probs_and_entropy_of, over_vocabulary
from klrl.algorithm.gradients import enough_parts, gradients_of
from klrl.algorithm.optimizer import apply_gradients
from klrl.algorithm.spec import Algorithm, Hypers
from klrl.algorithm.terms import Experience, Terms, Texts
from klrl.devices import parallel
from klrl.models import join
from klrl.sampling import Rollout


class Batch(NamedTuple):
  """What the inner epochs read of each completion; the leading axis is B."""

  rollout: Rollout
  scores: jax.Array  # [B]
  advantages: jax.Array  # [B, T]
  returns: jax.Array  # [B, T]
  old_values: jax.Array  # [B, T]
  ref_log_probs: jax.Array  # [B, T]; zeros where the objective has no KL
  ref_hidden: jax.Array | None  # [B, T, D_ref], if each minibatch computes the exact KL
  sampler_hidden: jax.Array | None  # [B, T, D], if a loss reads what the sampler expects
  sampler_weights: jax.Array  # [B, T], weights of policy loss and KL for an inexact sampler
  pretraining: Texts | None = None
  kl_weights: jax.Array | None = None  # [B, T], where the terms of the penalty have weights


class Context(NamedTuple):
  """What the inner epochs read that is the same for all completions."""

  hypers: Hypers
  frozen: dict  # the parameters of the trained models that are not trained
  beta: jax.Array
  trust_region_beta: jax.Array
  advantage_mean: jax.Array  # mean and deviation that whitened the advantages; 0 and 1 without
  advantage_std: jax.Array
  ref_unembedding: ops.Unembedding | None
  sampler_unembedding: ops.Unembedding | None
  iteration: jax.Array


def value_params(params, *, shared_trunk: bool):
  """Returns the parameters of the value model: its own, or a head on the policy's trunk."""
  if shared_trunk:
    return {"decoder": params["policy"]["decoder"], **params["value"]}
  return params["value"]


def needs_exact_kl(algorithm: Algorithm) -> bool:
  """Returns whether each minibatch computes an exact KL."""
  penalty = algorithm.penalty
  return penalty.reads_exact_kl and (penalty.in_loss or _refreshes(algorithm))


def _refreshes(algorithm: Algorithm) -> bool:
  return algorithm.penalty.in_reward and algorithm.kl_refresh == "minibatch"


def make_loss_fn(algorithm: Algorithm, policy, value_model):
  """Returns loss(params, batch, context) -> (weights, metrics) of the trained parameters.

  `policy` is a `models.Policy`, and `value_model` is a `models.ScalarModel` or None.
  """

  def loss_fn(params, batch: Batch, context: Context):
    params = join(context.frozen, params)
    kl, terms = _terms(algorithm, policy, value_model, params, batch, context)
    losses, metrics = algorithm.loss(terms, context.hypers)
    weights = {name: weight for name, (weight, loss) in losses.items() if loss is not None}
    # A constant divisor is the limit of a completion, which a shortened rollout does not show.
    missing = (algorithm.max_completion_len or terms.mask.shape[1]) - terms.mask.shape[1]

    def whole(x):
      return jnp.pad(x, ((0, 0), (0, missing)))

    metrics |= {
      name: algorithm.aggregation(whole(loss), whole(terms.mask))
      for name, (_, loss) in losses.items()
      if loss is not None
    }
    if batch.pretraining is not None:
      weights["policy/pretraining_loss"] = context.hypers.ptx_coef
      loss = _loss_of_texts(algorithm, policy, params["policy"], batch.pretraining, context)
      metrics["policy/pretraining_loss"] = algorithm.aggregation(
        loss, batch.pretraining.completion_mask
      )
    sampler_log_probs = batch.rollout.sampler_log_probs
    metrics |= diagnostics.of_minibatch(algorithm, terms, kl, sampler_log_probs, context.hypers)
    return weights, metrics

  return loss_fn


def _terms(
  algorithm: Algorithm, policy, value_model, params, batch: Batch, context: Context
) -> tuple[kl_terms.TokenTerms, Terms]:
  """Returns the terms that the KL penalty and the loss read of a minibatch."""
  rollout, hypers, penalty = batch.rollout, context.hypers, algorithm.penalty
  mask = rollout.completion_mask
  groups = {"group_size": algorithm.group_size}
  hidden = completions.completion_hidden(policy, params["policy"], rollout, **groups)
  unembedding = policy.unembedding(params["policy"])
  log_probs, entropy, exact_kl, sampler_mean = _of_distributions(
    algorithm, hidden, unembedding, batch, context
  )
  # Padding gets ratio 1 before anything exponentiates it.
  log_probs = jnp.where(mask, log_probs, rollout.old_log_probs)
  kl = kl_terms.TokenTerms(
    log_probs,
    rollout.old_log_probs,
    batch.ref_log_probs,
    mask,
    exact_kl,
    weights=batch.kl_weights,
  )
  if _refreshes(algorithm):
    batch = _refreshed(algorithm, batch, context, kl)
  kl_loss = None
  if penalty.in_loss:
    kl_loss = kl_terms.kl_loss(penalty, kl, prefix_cap=hypers.prefix_cap) * batch.sampler_weights
  values = None
  if value_model is not None and algorithm.shared_trunk:
    values = value_model.head(params["value"], hidden)
  elif value_model is not None:
    values = completions.values(value_model, params["value"], rollout, **groups)
  return kl, Terms(
    log_probs=log_probs,
    old_log_probs=rollout.old_log_probs,
    mask=mask,
    advantages=batch.advantages,
    entropy=entropy,
    sampler_weights=batch.sampler_weights,
    sampler_mean=sampler_mean,
    kl_loss=kl_loss,
    # Whitening divides the advantages, so it divides the weight of the KL beside them too.
    beta=context.beta / context.advantage_std,
    trust_region_beta=context.trust_region_beta,
    values=values,
    old_values=batch.old_values,
    returns=batch.returns,
  )


def _of_distributions(algorithm: Algorithm, hidden, unembedding, batch: Batch, context: Context):
  """Returns log-probs, entropy, the exact divergence and the sampler's mean log-prob, [B, T] each.

  The last two are None if nothing reads them. All are made in one pass over the vocabulary.
  """
  hypers, tokens = context.hypers, completions.completion_tokens(batch.rollout)
  models = {
    "reference": (batch.ref_hidden, context.ref_unembedding),
    "sampler": (batch.sampler_hidden, context.sampler_unembedding),
  }
  others = [name for name, (hidden_of_other, _) in models.items() if hidden_of_other is not None]
  models = [(hidden, unembedding), *(models[name] for name in others)]
  if not others:
    of_tokens = completions.of_tokens(
      log_probs_and_entropy_of, models, batch.rollout, [tokens], temperature=hypers.temperature
    )
    return *of_tokens, None, None

  def figures(log_probs, *arguments):
    *of_others, tokens, hypers = arguments
    of = dict(zip(others, of_others, strict=True))
    exact = mean = None
    if "reference" in of:
      exact = algorithm.exact_divergence(log_probs, of["reference"], hypers)
    if "sampler" in of:
      mean = ops.mean_under(log_probs, of["sampler"])
    return *log_probs_and_entropy_of(log_probs, tokens), exact, mean

  return completions.of_tokens(
    figures, models, batch.rollout, [tokens], [hypers], temperature=hypers.temperature
  )


def _refreshed(
  algorithm: Algorithm, batch: Batch, context: Context, terms: kl_terms.TokenTerms
) -> Batch:
  """Returns the batch with advantages and returns by the KL of the present policy."""
  slope = kl_terms.slope_of(algorithm.penalty, context.hypers)
  kl = kl_terms.reward_kl(
    algorithm.penalty,
    terms.log_probs,
    terms.ref_log_probs,
    terms.mask,
    terms.exact_kl,
    slope,
    terms.weights,
  )
  x = Experience(batch.scores, kl, batch.old_values, terms.mask, context.beta)
  advantages, returns = algorithm.advantage(x, algorithm, context.hypers)
  # Equal advantages give exactly 0 here too, as `ops.whiten` does.
  centred = advantages - context.advantage_mean
  equal = ops.within_rounding(jnp.abs(centred), jnp.abs(context.advantage_mean))
  advantages = jnp.where(terms.mask & ~equal, centred, 0.0) / context.advantage_std
  return batch._replace(advantages=advantages, returns=returns)


def _loss_of_texts(algorithm: Algorithm, policy, params, texts: Texts, context: Context):
  """Returns [B, T] -log pi of the tokens of texts, or the divergence at their prefixes, nats."""
  hidden = completions.completion_hidden(policy, params, texts)
  models, temperature = [(hidden, policy.unembedding(params))], context.hypers.temperature
  if algorithm.text_divergence is None or texts.ref_hidden is None:
    tokens = completions.completion_tokens(texts)
    return -over_vocabulary(ops.taken, models, [tokens], temperature=temperature)
  assert context.ref_unembedding is not None
  models.append((texts.ref_hidden, context.ref_unembedding))
  return over_vocabulary(
    algorithm.text_divergence, models, (), [context.hypers], temperature=temperature
  )


def parts_of_minibatch(algorithm: Algorithm, rollout: Rollout) -> int:
  """Returns in how many parts the gradient of a minibatch of the rollout is computed."""
  num_rows = len(rollout.tokens) // algorithm.num_minibatches
  minibatch = jax.eval_shape(lambda x: jax.tree.map(lambda x: x[:num_rows], x), rollout)
  return enough_parts(
    minibatch,
    algorithm.accumulation,
    group_size=algorithm.group_size,
    share=rollout.packing.share if rollout.packing else 1.0,
  )


def minibatch_rows(algorithm: Algorithm, batch_size: int, num_parts: int, key) -> jax.Array:
  """Returns [num_epochs * num_minibatches, rows] int, the rows of each minibatch, in turn.

  Every epoch has a random order of its own, with each row once. The rows of a group stay together,
  as many of them as divide one of the `num_parts` parts of a minibatch (`gradients.gradients_of`),
  so that their prompt is computed once.
  """
  rows_per_part = batch_size // (algorithm.num_minibatches * num_parts)
  together = math.gcd(algorithm.group_size, rows_per_part)
  keys = jax.random.split(key, algorithm.num_epochs)
  orders = jax.vmap(lambda key: jax.random.permutation(key, batch_size // together))(keys)
  rows = orders[..., None] * together + jnp.arange(together)[None, None]
  # A part has every `num_parts`-th row.
  parts = rows.reshape(-1, num_parts, rows_per_part).swapaxes(1, 2)
  return parts.reshape(-1, num_parts * rows_per_part)


def dealt(minibatches, num_parts: int, rollout: Rollout, *, group_size: int) -> jax.Array:
  """Returns [minibatches, parts, devices, rows]: `minibatch_rows`, dealt anew within a minibatch.

  So each device has about as many tokens in each part, which are packed into as many rows. The
  longest texts are dealt first, to and fro. What a device has of a group stays together.
  """
  parts = minibatches.reshape(len(minibatches), -1, num_parts).swapaxes(1, 2)
  rows_per_part = parts.shape[2]
  on_device = parallel.rows_per_device(rows_per_part)
  together = math.gcd(group_size, on_device)
  shape = len(parts), num_parts, rows_per_part // on_device, on_device
  cards = parts.reshape(len(parts), -1, together)
  of_prompts, of_completions = shared_rows.lengths(rollout)
  lengths = (of_prompts + of_completions)[cards].sum(axis=-1)
  longest_first = jnp.argsort(-lengths, axis=1, stable=True)
  cards = jnp.take_along_axis(cards, longest_first[..., None], axis=1)
  turns = cards.reshape(len(parts), on_device // together, -1, together)
  turns = turns.at[:, 1::2].set(turns[:, 1::2, ::-1])
  return turns.swapaxes(1, 2).reshape(shape)


def inner_epochs(
  algorithm: Algorithm, loss_fn, params, opt_state, batch: Batch, context: Context, key
):
  """Returns (params, opt_state, metrics) after `num_epochs` over `num_minibatches` minibatches.

  If KL(old || pi) of a minibatch exceeds `hypers.max_kl_old`, no step is taken on it or on any
  after it. Metrics are (sum, count) over all minibatches, but `kl/sampler_*` over the first one,
  where the policy is still the one that sampled, unless the rollout is late.
  """
  hypers = context.hypers
  learning_rate = hypers.learning_rate * algorithm.learning_rate_factor(context.iteration)
  batch_size = batch.scores.shape[0]
  num_parts = parts_of_minibatch(algorithm, batch.rollout)
  minibatches = minibatch_rows(algorithm, batch_size, num_parts, key)
  if (packing := batch.rollout.packing) is not None:
    parts = dealt(minibatches, num_parts, batch.rollout, group_size=packing.group_size)
    minibatches = parts.reshape(len(parts), num_parts, -1).swapaxes(1, 2).reshape(len(parts), -1)

  @jax.jit  # The shapes of its metrics are asked for too: it is traced once.
  def step(carry, rows):
    params, opt_state = carry
    minibatch = parallel.split_rows(jax.tree.map(lambda x: x[rows], batch))
    gradients, metrics = gradients_of(loss_fn, params, minibatch, context, num_parts=num_parts)
    stop = ops.divide(*metrics.pop("kl/old_k3")) > hypers.max_kl_old
    new_params, new_opt_state, norm = apply_gradients(
      params,
      opt_state,
      gradients,
      learning_rate=learning_rate,
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

  (trained, _), each = jax.lax.scan(guarded, ((params, opt_state), jnp.bool_(False)), minibatches)
  metrics = jax.tree.map(lambda x: x.sum(axis=0), each)
  metrics["policy/num_updates"] = (metrics["policy/num_updates"][0], 1.0)
  for name in ("kl/sampler_k1", "kl/sampler_k3"):
    metrics[name] = jax.tree.map(lambda x: x[0], each[name])
  return *trained, metrics
