"""The learning rate of a model of the user's, where nobody gave one.

    1e-6 * sqrt(1e9 / parameters), from 1e-6 to 1e-5, rounded to one digit

for reinforcement learning, DPO and distillation; ten times as much for SFT and reward models, and
ten times as much again for adapters. The root is what the rates of GPT-3 follow from 125 million to
1.3 billion parameters (Brown et al., 2020, table 2.1). The ends are what is usual: 1e-6 for PPO,
GRPO and DPO of some billion parameters, 1e-5 for their SFT and reward models. Adapters want about
ten times the rate of the whole model ("LoRA Without Regret", Thinking Machines, 2025).
"""

import math

from klrl.figures import digits

_LARGE, _SMALL = 1e9, 1e7  # parameters from which, and up to which, the rate stays the same
_RATE_OF_LARGE = 1e-6
_ADAPTERS = 10.0


def of_size(num_parameters: int, *, factor: float, lora_rank: int) -> float:
  """Returns the learning rate of Adam for a model of so many parameters.

  Args:
    num_parameters: of the whole model, whatever is trained of it.
    factor: of the kind of training, 1 for reinforcement learning.
    lora_rank: of the adapters that are trained; 0: the whole model.
  """
  size = min(max(num_parameters, _SMALL), _LARGE)
  rate = factor * _RATE_OF_LARGE * math.sqrt(_LARGE / size)
  return float(f"{rate * (_ADAPTERS if lora_rank else 1.0):.0e}")


def reason(num_parameters: int, rate: float, *, lora_rank: int) -> str:
  """Returns what a rate of `of_size` is for, as the console says it."""
  trained = f"adapters of rank {lora_rank} on a model" if lora_rank else "a model"
  return (
    f"Learning rate {rate:g}: the default for {trained} of {digits(num_parameters / 1e6)} million "
    "parameters; --learning_rate sets another."
  )
