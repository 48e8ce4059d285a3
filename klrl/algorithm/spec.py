"""An algorithm as a typed value: `Algorithm` holds its choices, and `Hypers` its coefficients.

The choices decide what is compiled. The coefficients are traced, so that a sweep compiles once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from klrl import ops
from klrl.algorithm import advantage_rules, beta_rules, kl_terms, policy_losses
from klrl.algorithm.objective import NO_PENALTY, KLPenalty
from klrl.algorithm.terms import Advantages, Experience, Losses, Terms


class Hypers(NamedTuple):
  """Coefficients: scalars that are traced, so that changing one compiles nothing.

  With their defaults no term but the policy loss has a weight, and no ratio, value or KL a bound.
  """

  learning_rate: jax.Array | float = 1e-5  # at the peak of the schedule
  max_grad_norm: jax.Array | float = 1.0
  temperature: jax.Array | float = 1.0  # of sampling, and of every log-prob
  beta: jax.Array | float = 0.0  # reward per nat, at the start; losses read the controller's beta
  beta_min: jax.Array | float = 1e-4  # bound of a controller that multiplies beta
  beta_max: jax.Array | float = 100.0  # bound of an adaptive controller
  beta_final: jax.Array | float = 0.0  # at the end of a schedule of beta
  kl_target: jax.Array | float = 6.0  # nats per sequence
  kl_horizon: jax.Array | float = 10_000.0  # sequences, of the proportional controller
  kl_step_size: jax.Array | float = 0.01  # of dual ascent
  prefix_cap: jax.Array | float = jnp.inf  # largest weight of a prefix in the KL's loss term
  jsd_weight: jax.Array | float = 0.5  # share of the reference in the Jensen-Shannon mixture
  kl_weight_power: jax.Array | float = 1.0  # of the weights of the KL's terms by token
  kl_alpha: jax.Array | float = 0.5  # of the alpha-divergence; 0 is KL(pi || ref), 1 KL(ref || pi)
  best_of: jax.Array | float = 1.0  # draws, the best of which the rule `best_of_n` imitates
  forward_share: jax.Array | float = 0.0  # of KL(best-of-n || policy) in that rule
  gamma: jax.Array | float = 1.0  # discount per token
  gae_lambda: jax.Array | float = 1.0
  clip_eps_low: jax.Array | float = 1.0  # the ratio may fall to 1 - this
  clip_eps_high: jax.Array | float = jnp.inf  # and rise to 1 + this
  dual_clip: jax.Array | float = jnp.inf  # bound of the ratio where the advantage is negative
  trust_region_beta: jax.Array | float = 0.0  # weight of the KL to the old policy, at the start
  trust_region_size: jax.Array | float = jnp.inf  # of a shift in probability, or nats per token
  trust_region_target: jax.Array | float = 1.0  # KL(old || pi), nats per sequence
  max_kl_old: jax.Array | float = jnp.inf  # above this KL(old || pi), nats per sequence, epochs end
  value_clip_eps: jax.Array | float = jnp.inf  # reward units
  vf_coef: jax.Array | float = 0.0
  entropy_coef: jax.Array | float = 0.0
  ptx_coef: jax.Array | float = 0.0  # weight of the loss of texts that the policy has not written
  overlong_buffer: jax.Array | float = 0.0  # tokens before the limit over which a penalty rises
  missing_eos_penalty: jax.Array | float = 0.0  # for a completion that was cut off at the limit
  length_penalty: jax.Array | float = 0.0  # for each token
  sampler_cap: jax.Array | float = 2.0  # largest weight that corrects for an inexact sampler
  sampler_floor: jax.Array | float = 0.0  # smallest ratio that a mask of such weights keeps
  reference_decay: jax.Array | float = 0.99  # share that a moving average of a reference keeps

  def traced(self) -> "Hypers":
    """Returns these coefficients as float32 arrays."""
    return Hypers(*map(jnp.float32, self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
  """The choices of an algorithm: what one iteration does with a rollout.

  A field that is a function takes a row of the table that its docstring names, or any other
  function with the same signature.
  """

  batch_size: int
  """Completions that are trained on in an iteration."""
  num_iterations: int
  """The iteration at which schedules end."""
  max_completion_len: int | None = None
  """The limit of a completion; a rollout may have fewer columns. None: it has as many."""
  advantage: Callable[[Experience, "Algorithm", Hypers], Advantages] = advantage_rules.batch_mean
  """Returns how good each token was; see `advantage_rules.RULES`."""
  group_size: int = 1
  """Completions of each prompt, in neighbouring rows."""
  whiten_advantages: bool = False
  """Whether advantages get mean 0 and deviation 1 over the batch."""
  loss: Callable[[Terms, Hypers], tuple[Losses, dict]] = policy_losses.importance_weighted
  """Returns the losses of each token and further metrics; see `policy_losses.POLICY_LOSSES`."""
  aggregation: Callable = ops.token_mean
  """Makes (sum, count) of the losses of tokens; see `ops.AGGREGATIONS`."""
  shared_trunk: bool = False
  """Whether the value model, if there is one, is a head on the policy."""

  penalty: KLPenalty = NO_PENALTY
  """Where KL(pi || pi_ref) is put and how it is estimated; `objective.audit` says what it does."""
  kl_refresh: str = "iteration"
  """When a KL in the reward is computed: once an `iteration`, or again in every `minibatch`.

  A minibatch has rows in random order, so the advantage rule must then compare no completions.
  """
  kl_every: int = 0
  """Iterations between measurements of the exact KL and of KL(old || pi); 0 is never.

  What a loss or the trust region reads is measured in every iteration all the same.
  """
  divergence: Callable[[jax.Array, jax.Array, Hypers], jax.Array] | None = None
  """The divergence [...] that `exact` stands for, of log-probs [..., V] of policy and reference.

  None is the one that `penalty` names, of `kl_terms.DIVERGENCES`.
  """
  text_divergence: Callable[[jax.Array, jax.Array, Hypers], jax.Array] | None = None
  """The divergence that is mixed into the loss at the prefixes of `Texts`, as `divergence` is.

  None is the cross-entropy of their tokens.
  """
  rehearses: bool = False
  """Whether the reference writes these texts, to the prompts of each iteration."""
  controller: beta_rules.BetaRule = beta_rules.RULES["fixed"]
  """Moves beta after each iteration; see `beta_rules.RULES`."""
  adapts_trust_region: bool = False
  """Whether `trust_region_beta` is doubled and halved, as in PPO."""

  num_epochs: int = 1
  """Passes over a rollout."""
  num_minibatches: int = 1
  """Gradient steps in each pass."""
  accumulation: int = 1
  """Parts in which a gradient is computed at least, one after the other; see `enough_parts`."""
  learning_rate_factor: Callable[[jax.Array], jax.Array] = lambda iteration: jnp.float32(1.0)
  """Returns the share of the peak learning rate at an iteration."""

  oversampling: int = 1
  """Groups sampled for each group that is trained on; groups of equal scores are dropped first."""
  normalise_scores: bool = False
  """Whether scores get mean 0 and deviation 1 over all scores so far."""
  sampler_correction: str = "none"
  """The weights that correct for an inexact sampler; see `ops.SAMPLER_CORRECTIONS`."""
  reads_sampler: bool = False
  """Whether a loss reads `terms.sampler_mean`, for which a sampled rollout must not be late."""
  staleness: int = 0
  """Iterations by which a rollout is late when it is trained on."""
  reference_rule: Callable | None = None
  """Moves the reference after each iteration; see `memory.REFERENCE_RULES`. None: it is frozen."""
  reference_every: int = 1
  """Iterations between resets of a reference that is reset."""
  reset_optimizer: bool = False
  """Whether a reset of the reference makes the optimizer forget its moments."""

  @property
  def samples(self) -> int:
    """The number of completions sampled in an iteration."""
    return self.oversampling * self.batch_size

  @property
  def exact_divergence(self) -> Callable[[jax.Array, jax.Array, Hypers], jax.Array]:
    """The divergence that `exact` stands for."""
    return self.divergence or kl_terms.DIVERGENCES[self.penalty.divergence].exact
