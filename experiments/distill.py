"""On-policy distillation: the student writes, and comes closer to its teacher where it goes.

    python -m experiments.distill
    python -m experiments.distill --policy=STUDENT_DIR --teacher=DIR --prompts=FILE.jsonl

    minimise KL(student || teacher)    at prefixes that the student writes

Rishabh Agarwal et al., "On-Policy Distillation of Language Models", 2024. It is KL-regularised RL
with no reward and the teacher as the reference: `--kl_correction=prefix --kl_credit=sequence` makes
a token answer for the KL that follows it too. `--divergence=forward` is KL(teacher || student) at
the student's prefixes, which covers what the teacher may say. Without flags the student is the
embedded SFT policy and the teacher the policy of the default PPO run.

Departure: the loss is the KL summed over the vocabulary at the student's own prefixes alone; no
completions of the teacher or of data are mixed in.
"""

import dataclasses
import pathlib
from typing import ClassVar

from experiments import ppo, rl, shared_flags
from experiments.kl_flags import PENALISED
from experiments.shared_flags import setting
from klrl import objective
from klrl.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rl.SurrogateConfig):
  """Settings of distillation."""

  scored: ClassVar[bool] = False
  reward: ClassVar[str] = ""
  reward_model: ClassVar[str] = ""
  reward_model_iterations: ClassVar[int] = 1000
  reference: ClassVar[property] = property(lambda config: config.teacher)

  teacher: str = setting("", "model directory to learn from; default: the default PPO run")
  divergence: str = setting("reverse", "which KL to the teacher", choices=("reverse", "forward"))
  beta: float = setting(
    1.0, "what the KL is multiplied by", minimum=0.0, read_when=("kl_placement", PENALISED)
  )
  kl_placement: str = setting("loss", "where the KL goes", choices=objective.PLACEMENTS[:-1])
  kl_estimator: str = setting("exact", "how the KL is estimated", choices=objective.ESTIMATORS)
  kl_credit: str = setting(
    "token", "whether a token answers for the KL of later ones", choices=objective.CREDITS
  )

  def __post_init__(self):
    super().__post_init__()
    if self.policy and not self.teacher:
      raise UserError("--policy, a student of yours, needs --teacher=DIR, whom to learn from.")
    penalty = objective.penalty_of(self)
    if self.divergence == "forward" and str(penalty) != "loss/exact/none/token":
      raise UserError(
        f"--divergence=forward is a loss at given prefixes; with {penalty} its gradient would be "
        "no divergence's. Leave the --kl_ flags out."
      )


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""
  if not config.teacher:
    teacher = ppo.Config(
      init_seed=config.init_seed, sft_iterations=config.sft_iterations, mesh=config.mesh
    )
    config = dataclasses.replace(config, teacher=str(ppo.main(teacher, root=root)))
  return rl.run(config, "distill", "Distillation", root=root)


if __name__ == "__main__":
  shared_flags.run(main, Config)
