"""The learning rate of a model of the user's: a rule of its size, told with its reason."""

import numpy as np
import pytest

from experiments import distill, dpo, grpo, ppo, reward_model, sft
from experiments.settings import learning_rates

MILLION = 10**6
RL = {"policy": "d", "prompts": "p.jsonl"}
OWN = {
  ppo: RL | {"reward": "r.py:f"},
  grpo: RL | {"reward": "r.py:f"},
  distill: RL | {"teacher": "t"},
  dpo: {"policy": "d", "data": "d.jsonl"},
  sft: {"policy": "d", "data": "d.jsonl"},
  reward_model: {"policy": "d", "data": "d.jsonl"},
}


@pytest.mark.parametrize(
  ("millions", "rate"),
  [(0.26, 1e-5), (10, 1e-5), (40, 5e-6), (268, 2e-6), (600, 1e-6), (1000, 1e-6), (70_000, 1e-6)],
)
def test_a_larger_model_gets_a_lower_rate_within_what_is_usual(millions, rate):
  size = int(millions * MILLION)
  assert learning_rates.of_size(size, factor=1.0, lora_rank=0) == pytest.approx(rate)
  assert learning_rates.of_size(size, factor=1.0, lora_rank=8) == pytest.approx(10 * rate)


def test_a_rate_has_one_digit_and_falls_with_the_size():
  sizes = np.geomspace(1e6, 1e10, 50)
  rates = [learning_rates.of_size(int(size), factor=1.0, lora_rank=0) for size in sizes]
  assert rates == sorted(rates, reverse=True)
  assert all(float(f"{rate:.0e}") == rate for rate in rates)


@pytest.mark.parametrize("experiment", OWN, ids=lambda module: module.__name__)
def test_every_kind_of_training_follows_the_rule(experiment, capsys):
  params = {"large": np.empty((16_000, 16_000), bool), "small": np.empty(12, bool)}
  supervised = 10 if experiment in (sft, reward_model) else 1
  for rank, factor in ((0, 1), (4, 10)):
    config = experiment.Config(**OWN[experiment], lora_rank=rank)
    fitted = config.fitted(params)
    assert fitted.learning_rate == pytest.approx(2e-6 * supervised * factor)
    # What is chosen is no part of the settings: a run in the same folder is the same run.
    assert config.learning_rate == -1
  given = experiment.Config(**OWN[experiment], learning_rate=0.5)
  assert given.fitted(params) is given
  assert experiment.Config().fitted(params).learning_rate == experiment.Config().learning_rate > 0


def test_the_reason_names_the_size_and_the_adapters():
  said = learning_rates.reason(268 * MILLION, 2e-6, lora_rank=0)
  assert said.startswith("Learning rate 2e-06: the default for a model of 268 million parameters")
  said = learning_rates.reason(8_030 * MILLION, 1e-5, lora_rank=16)
  assert "for adapters of rank 16 on a model of 8,030 million parameters" in said
  assert "of 0.264 million" in learning_rates.reason(264_000, 1e-5, lora_rank=0)
