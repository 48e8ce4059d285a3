"""A Bradley-Terry reward model from pairs of completions.

    python -m experiments.reward_model
    python -m experiments.reward_model --policy=DIR --data=FILE.jsonl

    loss = -log sigmoid(score(chosen) - score(rejected))

(Stiennon et al., "Learning to summarize from human feedback", 2020, section 3.4.) The score is read
at the last token. Without flags it starts from the embedded SFT model (running that stage first, if
need be) and learns from embedded preferences with one label in twenty swapped. With `--data` it
reads lines of `{"prompt": ..., "chosen": ..., "rejected": ...}`. The model is left in
WORKDIR/model.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import sft, shared_flags
from experiments.shared_flags import setting
from klrl import parallel, progress
from klrl.errors import UserError
from klrl.models import (
  check_tokenizer,
  load_policy,
  load_tokenizer,
  save_scalar,
  scalar_model,
  scalar_params_from,
)
from klrl.summary import read_summary
from klrl.supervised import train
from klrl.tasks import arithmetic, data
from klrl.workdir import create_workdir, find_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(shared_flags.RunConfig):
  """Settings of reward modelling."""

  num_iterations: int = setting(1000, "iterations", minimum=1)
  batch_size: int = setting(128, "pairs per iteration", minimum=1)
  learning_rate: float = setting(1e-3, "peak learning rate of Adam", minimum=0.0)
  max_grad_norm: float = setting(1.0, "largest global gradient norm", minimum=0.0)
  policy: str = setting("", "model directory to start from; default: the embedded SFT stage")
  data: str = setting("", "JSON lines with prompt, chosen, rejected; default: embedded arithmetic")
  num_preferences: int = setting(60_000, "embedded pairs", minimum=2, read_when=("data", ("",)))
  label_noise: float = setting(
    0.05,
    "share of swapped labels among embedded pairs",
    minimum=0.0,
    maximum=1.0,
    read_when=("data", ("",)),
  )
  sft_iterations: int = setting(
    700, "iterations of the embedded SFT stage", minimum=1, read_when=("policy", ("",))
  )


class Pairs(NamedTuple):
  """Chosen and rejected texts; [N, S] each."""

  chosen: np.ndarray
  chosen_mask: np.ndarray
  rejected: np.ndarray
  rejected_mask: np.ndarray


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is not run again."""
  if config.data and not config.policy:
    raise UserError("--data needs --policy=DIR, the model whose trunk the reward model takes over.")
  workdir = find_workdir("reward_model", config, root=root)
  if read_summary(workdir):
    progress.console.print(f"Reward model: finished before, in {workdir}", soft_wrap=True)
    return workdir
  mesh = parallel.make_mesh(config.mesh)
  parallel.check_batch_size(mesh, config.batch_size)
  directory = config.policy or str(run_sft_stage(config))
  model_config, policy_params = load_policy(directory)
  tokenizer = load_tokenizer(directory)
  check_tokenizer(tokenizer, model_config)
  training, held_out = _pairs(config, tokenizer, model_config.max_len)
  create_workdir(workdir, "reward_model", config)

  summary = train(
    config,
    workdir,
    make_bradley_terry_fn(scalar_model(model_config)),
    scalar_params_from(policy_params),
    training,
    held_out,
    save=lambda directory, params: save_scalar(directory, model_config, params, tokenizer),
    summary={"held_out_accuracy": "loss/accuracy", "held_out_loss": "loss/bradley_terry"},
    title="Reward model",
    keys=(("loss/bradley_terry", "loss"), ("loss/accuracy", "accuracy")),
  )
  progress.console.print(
    f"Reward model: agrees with {summary['held_out_accuracy']:.1%} of held-out labels, "
    f"model in {workdir}/model",
    soft_wrap=True,
  )
  return workdir


def run_sft_stage(config: Config) -> pathlib.Path:
  """Returns the folder of the embedded SFT stage, which is run where it was not before."""
  stage = sft.Config(
    num_iterations=config.sft_iterations,
    seed=config.init_seed,
    init_seed=config.init_seed,
    mesh=config.mesh,
  )
  return sft.main(stage, root="runs/stages")


def make_bradley_terry_fn(reward_model):
  """Returns loss(params, pairs) -> (loss, metrics): mean -log sigmoid(chosen - rejected), nats."""

  def loss_fn(params, batch: Pairs):
    # One forward pass over both halves; widths are equal by construction.
    scores = reward_model.scores(
      params,
      jnp.concatenate([batch.chosen, batch.rejected]),
      jnp.concatenate([batch.chosen_mask, batch.rejected_mask]),
    )
    chosen, rejected = jnp.split(scores, 2)
    count = jnp.float32(chosen.shape[0])
    total = -jax.nn.log_sigmoid(chosen - rejected).sum()
    return total / count, {
      "loss/bradley_terry": (total, count),
      "loss/accuracy": ((chosen > rejected).sum().astype(jnp.float32), count),
    }

  return loss_fn


def _pairs(config: Config, tokenizer, max_len: int) -> tuple[Pairs, Pairs]:
  if config.data:
    triples = [
      (record["prompt"], record["chosen"], record["rejected"])
      for record in data.read_records(config.data, ("prompt", "chosen", "rejected"))
    ]
  else:
    triples = arithmetic.preferences(
      config.init_seed, config.num_preferences, label_noise=config.label_noise
    )
  texts = [(prompt, chosen) for prompt, chosen, _ in triples]
  texts += [(prompt, rejected) for prompt, _, rejected in triples]
  examples = data.encode_examples(texts, tokenizer, max_len=max_len)
  half = len(triples)
  pairs = Pairs(
    examples.tokens[:half], examples.mask[:half], examples.tokens[half:], examples.mask[half:]
  )
  return data.split_held_out(pairs, config.data_seed)


if __name__ == "__main__":
  shared_flags.run(main, Config)
