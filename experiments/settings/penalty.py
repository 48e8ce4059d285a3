"""The KL penalty's settings: the same flags, with the same names, on every RL experiment."""

import dataclasses

from experiments.settings.common import RunConfig, setting
from klrl import ops
from klrl.algorithm import objective
from klrl.errors import UserError

_ADAPTIVE = ("doubling", "proportional", "dual_ascent")
_MULTIPLYING = ("doubling", "proportional")
_SCHEDULED = ("linear", "cosine")
PENALISED = ("reward", "loss", "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig(RunConfig):
  """The KL penalty and its beta; see docs/kl.md."""

  beta: float = setting(
    0.5,
    "KL coefficient, reward per nat of sequence KL(pi || pi_ref)",
    minimum=0.0,
    read_when=("kl_placement", PENALISED),
  )
  kl_placement: str = setting("reward", "where the KL goes", choices=objective.PLACEMENTS)
  kl_divergence: str = setting(
    "reverse",
    "what is penalised: KL(pi || pi_ref), or another divergence",
    choices=objective.DIVERGENCES,
    read_when=("kl_placement", PENALISED),
  )
  jsd_weight: float = setting(
    0.5,
    "weight of pi_ref in the Jensen-Shannon mixture; near 0 it is forward, near 1 reverse",
    minimum=1e-3,
    maximum=1 - 1e-3,
    read_when=("kl_divergence", ("jensen_shannon",)),
  )
  kl_alpha: float = setting(
    0.5,
    "of the alpha-divergence: near 0 it is KL(pi || pi_ref), near 1 KL(pi_ref || pi)",
    minimum=1e-3,
    maximum=1 - 1e-3,
    read_when=("kl_divergence", ("alpha",)),
  )
  kl_estimator: str = setting(
    "k1",
    "how the KL is estimated",
    choices=objective.ESTIMATORS,
    read_when=("kl_placement", PENALISED),
  )
  kl_correction: str = setting(
    "none",
    "importance weight of a loss term, for tokens of an older policy",
    choices=objective.CORRECTIONS,
    read_when=("kl_placement", PENALISED),
  )
  kl_credit: str = setting(
    "sequence",
    "whether a token answers for the KL of later ones",
    choices=objective.CREDITS,
    read_when=("kl_placement", PENALISED),
  )
  kl_weight: str = setting(
    "none",
    "weight of each token's KL: the certainty of pi_ref, or 1 / (1 + its position)",
    choices=objective.WEIGHTS,
    read_when=("kl_placement", PENALISED),
  )
  kl_weight_power: float = setting(
    1.0, "power of that weight", minimum=0.0, read_when=("kl_weight", objective.WEIGHTS[1:])
  )
  allow_biased_kl: bool = setting(
    False, "run a penalty that is refused, with a warning", read_when=("kl_placement", PENALISED)
  )
  kl_every: int = setting(
    10, "iterations between measurements of the exact KL and of KL(old||pi); 0: never", minimum=0
  )
  loss_aggregation: str = setting(
    "token_mean", "what a loss is divided by", choices=tuple(ops.AGGREGATIONS)
  )
  controller: str = setting(
    "fixed",
    "the rule that moves beta",
    choices=("fixed", *_ADAPTIVE, *_SCHEDULED),
    read_when=("kl_placement", PENALISED),
  )
  kl_budget: float = setting(
    0.0,
    "KL(pi || pi_ref), nats per sequence, at which beta is to hold the policy, by dual ascent from "
    "--beta; 0: none",
    minimum=0.0,
    read_when=("kl_placement", PENALISED),
  )
  kl_target: float = setting(
    6.0, "nats per sequence to steer to", minimum=1e-6, read_when=("controller", _ADAPTIVE)
  )
  kl_horizon: float = setting(
    10_000.0,
    "sequences over which the proportional rule acts",
    minimum=1.0,
    read_when=("controller", ("proportional",)),
  )
  kl_step_size: float = setting(
    0.01, "step of dual ascent", minimum=0.0, read_when=("controller", ("dual_ascent",))
  )
  beta_min: float = setting(
    1e-4,
    "smallest beta of a rule that multiplies it, reward per nat; dual ascent may end at 0",
    minimum=1e-9,
    read_when=("controller", _MULTIPLYING),
  )
  beta_max: float = setting(
    100.0,
    "largest beta of an adaptive rule, reward per nat",
    minimum=1e-9,
    maximum=1e9,
    read_when=("controller", _ADAPTIVE),
  )
  beta_final: float = setting(
    0.0, "beta at the end of a schedule", minimum=0.0, read_when=("controller", _SCHEDULED)
  )

  def __post_init__(self):
    super().__post_init__()
    self.kl_warnings()  # raises where the penalty is refused
    if self.kl_budget and self.controller != "fixed":
      raise UserError(
        f"--kl_budget and --controller={self.controller} both move beta; give one of them."
      )
    if self.beta == 0 and (self.kl_budget or self.controller in _MULTIPLYING):
      rule = "--kl_budget" if self.kl_budget else f"--controller={self.controller}"
      raise UserError(f"{rule} multiplies beta, and --beta=0 stays 0.")
    lowest = 0.0 if self.controller == "dual_ascent" else self.beta_min
    moves = self.kl_budget or self.controller in _ADAPTIVE
    if moves and not lowest <= self.beta <= self.beta_max:
      name, bound = ("min", "below") if self.beta < lowest else ("max", "above")
      rule = "--kl_budget" if self.kl_budget else f"--controller={self.controller}"
      raise UserError(
        f"--beta={self.beta} is {bound} --beta_{name}={getattr(self, f'beta_{name}')}, where "
        f"{rule} would keep it: give another --beta or --beta_{name}."
      )

  def penalty(self) -> objective.KLPenalty:
    """Returns the KL penalty."""
    return objective.KLPenalty(
      self.kl_placement,
      self.kl_estimator,
      self.kl_correction,
      self.kl_credit,
      divergence=self.kl_divergence,
      weight=self.kl_weight,
    )

  def beta_rule(self) -> str:
    """Returns the name of the rule that moves beta, of `beta_rules.RULES`."""
    return "budget" if self.kl_budget else self.controller

  def kl_warnings(self) -> list[str]:
    """Returns what is wrong with the penalty and was allowed all the same.

    Raises:
      UserError: as `objective.warnings_of`.
    """
    return objective.warnings_of(
      self.penalty(),
      allowed=self.allow_biased_kl,
      per_token_mean=self.loss_aggregation == "sequence_mean_token_mean",
    )

  def check_horizon(self) -> None:
    """Raises UserError where one step of the proportional rule could take all of beta, or more."""
    if self.controller == "proportional" and self.kl_horizon <= self.batch_size / 5:
      raise UserError(
        f"--kl_horizon={self.kl_horizon:g}: the proportional rule multiplies beta by "
        "1 - batch_size / kl_horizon / 5 where the KL is small, which must be positive. Write a "
        f"--kl_horizon above {self.batch_size / 5:g}; 10000 is the published one."
      )
