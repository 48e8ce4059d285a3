"""REINFORCE with a baseline: the shortest complete experiment, and the one to copy.

    python -m experiments.reinforce

    gradient of J = E[(R - b) * grad log pi],   R = score - beta * log(pi / pi_ref)

One gradient step on each rollout; b is the mean R of the rest of the batch (Williams, "Simple
Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992). Models,
prompts, scores and the KL penalty are the flags of every RL experiment. To make another algorithm,
copy this file and change what the class variables say: `algorithm.advantage_rules.RULES` has the
advantages, `algorithm.epochs.TRUST_REGIONS` the policy losses, `ops.AGGREGATIONS` what a loss is
divided by.
"""

import dataclasses
import pathlib
from typing import ClassVar

from experiments.settings import common, rl
from experiments.settings.common import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rl.RLConfig):
  """Settings of REINFORCE."""

  advantage: ClassVar[str] = "batch_mean"

  num_iterations: int = setting(200, "iterations", minimum=1)
  batch_size: int = setting(256, "completions per iteration", minimum=2)


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""
  return rl.run(config, "reinforce", "REINFORCE", root=root)


if __name__ == "__main__":
  common.run(main, Config)
