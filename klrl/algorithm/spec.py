"""An algorithm as a typed value: `Algorithm` is what is compiled, `Hypers` are its coefficients."""

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

  By default a coefficient leaves what it belongs to out, or without a bound.
  """

  learning_rate: jax.Array | float = 1e-5  # peak of the schedule
  max_grad_norm: jax.Array | float = 1.0
  temperature: jax.Array | float = 1.0  # of sampling, and of every log-prob
  beta: jax.Array | float = 0.0  # reward per nat, at the start; losses read the controller's
  beta_min: jax.Array | float = 1e-4  # of a controller that multiplies beta
  beta_max: jax.Array | float = 100.0  # of an adaptive controller
  beta_final: jax.Array | float = 0.0  # at the end of a schedule
  kl_target: jax.Array | float = 6.0  # nats per sequence
  kl_horizon: jax.Array | float = 10_000.0  # sequences, of the proportional controller
  kl_step_size: jax.Array | float = 0.01  # of dual ascent
  prefix_cap: jax.Array | float = jnp.inf  # largest weight of a prefix in the KL's loss term
  jsd_weight: jax.Array | float = 0.5  # of the reference in the Jensen-Shannon mixture
  gamma: jax.Array | float = 1.0  # discount per token
  gae_lambda: jax.Array | float = 1.0
  clip_eps_low: jax.Array | float = 1.0  # the ratio may fall to 1 - this
  clip_eps_high: jax.Array | float = jnp.inf  # and rise to 1 + this
  dual_clip: jax.Array | float = jnp.inf  # of the ratio where the advantage is negative
  trust_region_beta: jax.Array | float = 0.0  # of the KL to the old policy, at the start
  trust_region_target: jax.Array | float = 1.0  # KL(old || pi), nats per sequence
  max_kl_old: jax.Array | float = jnp.inf  # KL(old || pi), nats per sequence, that ends the epochs
  value_clip_eps: jax.Array | float = jnp.inf  # reward units
  vf_coef: jax.Array | float = 0.0
  entropy_coef: jax.Array | float = 0.0
  ptx_coef: jax.Array | float = 0.0  # of the pretraining texts' log-likelihood
  overlong_buffer: jax.Array | float = 0.0  # tokens before the limit over which a penalty rises
  missing_eos_penalty: jax.Array | float = 0.0  # of a completion that was cut off
  length_penalty: jax.Array | float = 0.0  # per token
  sampler_cap: jax.Array | float = 2.0  # largest weight for another sampler
  reference_decay: jax.Array | float = 0.99  # of a reference that is a moving average

  def traced(self) -> "Hypers":
    """Returns the same as float32 arrays."""
    return Hypers(*map(jnp.float32, self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
  """What one iteration does with a rollout, and so what is compiled.

  Fields that are functions are rows of the tables that are named, or anything of their signature.
  """

  batch_size: int
  """Completions that are trained on in an iteration."""
  num_iterations: int
  """Where schedules end."""
  advantage: Callable[[Experience, "Algorithm", Hypers], Advantages] = advantage_rules.batch_mean
  """How good each token was; `advantage_rules.RULES`."""
  group_size: int = 1
  """Completions of each prompt, which stand side by side."""
  whiten_advantages: bool = False
  """Whether the batch's mean is subtracted and its deviation divided by."""
  loss: Callable[[Terms, Hypers], tuple[Losses, dict]] = policy_losses.reinforce
  """What each token of a minibatch costs, and further metrics; `policy_losses.POLICY_LOSSES`."""
  aggregation: Callable = ops.token_mean
  """What the sum over tokens is divided by; `ops.AGGREGATIONS`."""
  shared_trunk: bool = False
  """Whether the value model, where there is one, is a head on the policy."""

  penalty: KLPenalty = NO_PENALTY
  """Where KL(pi || pi_ref) goes and how it is estimated; `objective.audit` says what it does."""
  kl_refresh: str = "iteration"
  """Whether a KL in the reward is computed anew in every minibatch: `objective.REFRESHES`."""
  kl_every: int = 0
  """Iterations between exact KLs that are measured and not needed; 0: never."""
  divergence: Callable = kl_terms.reverse_kl
  """What an exact KL is; `kl_terms.DIVERGENCES`."""
  controller: beta_rules.BetaRule = beta_rules.RULES["fixed"]
  """What moves beta."""
  adapts_trust_region: bool = False
  """Whether `trust_region_beta` is doubled and halved as in PPO."""

  num_epochs: int = 1
  """Passes over a rollout."""
  num_minibatches: int = 1
  """Steps per pass."""
  accumulation: int = 1
  """Parts a gradient is computed in."""
  learning_rate_factor: Callable[[jax.Array], jax.Array] = lambda iteration: jnp.float32(1.0)
  """Of the peak learning rate, by iteration."""

  oversampling: int = 1
  """Groups that are sampled for each that is trained on; those of equal scores go first."""
  normalise_scores: bool = False
  """Whether scores lose the mean of all so far and are divided by their deviation."""
  sampler_correction: str = "none"
  """Weights for a sampler that differs from the trainer: `ops.SAMPLER_CORRECTIONS`."""
  staleness: int = 0
  """Iterations that a rollout waits before it is trained on."""
  reference_rule: Callable | None = None
  """What moves the reference after an iteration; `memory.REFERENCE_RULES`. None: it is frozen."""
  reference_every: int = 1
  """Iterations between resets of a reference that is reset."""

  @property
  def samples(self) -> int:
    """Completions that are sampled in an iteration."""
    return self.oversampling * self.batch_size
