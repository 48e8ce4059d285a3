"""GRPO by TRL's trainer, in float32 and without recomputation, as the others compute."""

import logging
import pathlib
import sys
import warnings

import datasets
import torch
import transformers
import trl
import trl_model
import workload

args = workload.arguments()
size = workload.SIZES[args.size]
if args.algorithm != "grpo":
  sys.exit("This is GRPO.")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

folder = pathlib.Path(args.folder)
tokenizer = trl_model.tokenizer(size)
# The trainer reads its reference from a folder.
trl_model.policy(size).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")
clock = workload.Clock(args.warm, args.timed)
lengths = set()


def reward(completions, completion_ids, **_):
  lengths.update(map(len, completion_ids))
  return [workload.score(text) for text in completions]


class EndOfStep(transformers.TrainerCallback):
  def on_step_end(self, *_, **__):
    clock.end_iteration()


config = trl.GRPOConfig(
  **trl_model.trainer_settings(folder, size),
  max_steps=clock.num_iterations,
  model_init_kwargs={"dtype": "float32"},
  num_generations=size.group_size,
  max_completion_length=size.completion_len,
  generation_kwargs={"min_new_tokens": size.completion_len},
  temperature=1.0,
  beta=workload.BETA,
  epsilon=workload.CLIP,
  num_iterations=1,
  loss_type="grpo",
)
prompts = workload.prompts(size, size.num_prompts * clock.num_iterations)
trainer = trl.GRPOTrainer(
  model=str(folder / "model"),
  reward_funcs=reward,
  args=config,
  train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
  processing_class=tokenizer,
  callbacks=[EndOfStep()],
)
# A clock around a method of the trainer's changes nothing else.
trainer._generate_single_turn = clock.timed("generate", trainer._generate_single_turn)
clock.begin()
trainer.train()
assert lengths == {size.completion_len}, lengths
clock.report(versions={"trl": trl.__version__, "torch": torch.__version__})
