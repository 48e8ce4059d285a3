"""RLHF with PPO: policy, reference, reward and value model, and a KL penalty to the reference.

    python -m experiments.ppo
    python -m experiments.ppo --policy=DIR --prompts=FILE.jsonl --reward=FILE.py:FUNCTION

Without flags it runs three stages on an embedded task, addition by characters: supervised
fine-tuning on demonstrations of which half are wrong, a reward model from preferences of which one
in twenty is swapped, and PPO; then it compares the SFT policy with the PPO policy on held-out
problems, with an exact verifier as the gold score that no stage has seen.

    J = E[r] - beta * KL(pi || pi_ref)     (Ouyang et al., InstructGPT, 2022, eq. 2)

with the KL in the reward or as a loss (--kl_placement and its companions, docs/kl.md), PPO's
clipped surrogate or its KL penalty (Schulman et al., 2017, eq. 7 and 8), and GAE.

Departures from InstructGPT:
1. Policy and value model share one Adam and one gradient norm.
2. Advantages are whitened over the batch, as in Ziegler et al. (2019).
"""

import dataclasses
import pathlib
from typing import ClassVar

from experiments.settings import common, rl
from experiments.settings.common import setting
from klrl.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rl.SurrogateConfig):
  """Settings of PPO. A change of those in `learner.Hypers`, or of beta, compiles nothing anew."""

  advantage: ClassVar[str] = "gae"

  value_trunk: str = setting(
    "separate",
    "whether the value model is one of its own or a head on the policy",
    choices=("separate", "shared"),
  )
  value_model: str = setting(
    "",
    "model directory to start the value model from; default: --value_init",
    read_when=("value_trunk", ("separate",)),
  )
  value_init: str = setting(
    "reward_model",
    "what the value model starts as; without a reward model the policy with a head of zeros",
    choices=("reward_model", "policy"),
    read_when=("value_model", ("",)),
  )
  gamma: float = setting(1.0, "discount per token", minimum=0.0, maximum=1.0)
  gae_lambda: float = setting(0.95, "lambda of GAE", minimum=0.0, maximum=1.0)
  whiten_advantages: bool = setting(True, "subtract the mean and divide by the deviation")
  value_clip_eps: float = setting(
    0.2, "a value may move this far from the old one, reward units; inf: free", minimum=0.0
  )
  vf_coef: float = setting(0.5, "weight of the value loss", minimum=0.0)
  dual_clip: float = setting(
    float("inf"),
    "bound of the ratio where the advantage is negative",
    minimum=1.0,
    read_when=("trust_region", ("clip",)),
  )
  pretrain_data: str = setting(
    "", "texts whose log-likelihood is mixed in: JSON lines with text, or plain text (.txt)"
  )
  ptx_coef: float = setting(0.0, "weight of the pretraining log-likelihood", minimum=0.0)

  def __post_init__(self):
    super().__post_init__()
    if bool(self.pretrain_data) != bool(self.ptx_coef):
      raise UserError("--pretrain_data and --ptx_coef go together: texts, and what they weigh.")
    if self.value_trunk == "shared" and self.value_init != "reward_model":
      raise UserError("--value_init is set, but a --value_trunk=shared starts as the policy.")


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""
  return rl.run(config, "ppo", "PPO", root=root)


if __name__ == "__main__":
  common.run(main, Config)
