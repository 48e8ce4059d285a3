"""PPO by TRL's trainer, which its releases up to 1.12.0 have: policy, reference and critic."""

import copy
import logging
import pathlib
import sys
import types
import warnings

import datasets
import torch
import transformers
import trl
import trl_model
import workload
from trl.experimental import ppo

args = workload.arguments()
size = workload.SIZES[args.size]
if args.algorithm != "ppo":
  sys.exit("This is PPO.")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class FreeReward(torch.nn.Module):
  """Stands where the trainer wants a reward model, and has no parameters."""

  base_model_prefix = "trunk"

  def __init__(self):
    super().__init__()
    self.trunk = lambda input_ids, **_: types.SimpleNamespace(
      hidden_states=[input_ids[..., None].float()]
    )

  def score(self, hidden):
    return hidden % 13 / 13


class EndOfStep(transformers.TrainerCallback):
  def on_step_end(self, *_, **__):
    clock.end_iteration()


clock = workload.Clock(args.warm, args.timed)
tokenizer, policy = trl_model.tokenizer(size), trl_model.policy(size)
critic = transformers.Qwen2ForSequenceClassification(trl_model.model_config(size, num_labels=1))
num_episodes = size.num_rows * clock.num_iterations
config = ppo.PPOConfig(
  **trl_model.trainer_settings(pathlib.Path(args.folder), size),
  total_episodes=num_episodes,
  gradient_accumulation_steps=1,
  num_mini_batches=1,
  num_ppo_epochs=1,
  local_rollout_forward_batch_size=size.num_rows,
  response_length=size.completion_len,
  stop_token=None,
  temperature=1.0,
  kl_coef=workload.BETA,
  num_sample_generations=0,
)
rows = [tokenizer(prompt)["input_ids"] for prompt in workload.prompts(size, num_episodes)]
prompts = datasets.Dataset.from_dict({"input_ids": rows})
trainer = ppo.PPOTrainer(
  args=config,
  processing_class=tokenizer,
  model=policy,
  ref_model=copy.deepcopy(policy),
  reward_model=FreeReward(),
  value_model=critic.float(),
  train_dataset=prompts,
  eval_dataset=prompts.select(range(size.num_rows)),
  callbacks=[EndOfStep()],
)
module = sys.modules[ppo.PPOTrainer.__module__]
module.batch_generation = clock.timed("generate", module.batch_generation)
clock.begin()
trainer.train()
clock.report(versions={"trl": trl.__version__, "torch": torch.__version__})
