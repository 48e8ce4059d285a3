"""Supervised fine-tuning: cross-entropy on demonstrations, KL(data || pi) up to a constant.

    python -m experiments.sft
    python -m experiments.sft --policy=DIR --data=FILE.jsonl

Without flags it trains a small decoder from scratch on embedded arithmetic demonstrations, half of
which are wrong. With `--data` it trains on lines of `{"prompt": ..., "completion": ...}`. The loss
counts the completion's tokens only. The model is left in WORKDIR/model.
"""

import dataclasses
import pathlib

import jax

from experiments import shared_flags
from experiments.shared_flags import setting
from klrl import ops, parallel, progress
from klrl.errors import UserError
from klrl.models import (
  DecoderConfig,
  check_tokenizer,
  load_policy,
  load_tokenizer,
  policy_model,
  save_policy,
)
from klrl.summary import read_summary
from klrl.supervised import train
from klrl.tasks import arithmetic, data
from klrl.workdir import create_workdir, find_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(shared_flags.RunConfig):
  """Settings of supervised fine-tuning."""

  num_iterations: int = setting(700, "iterations", minimum=1)
  learning_rate: float = setting(4e-3, "peak learning rate of Adam", minimum=0.0)
  max_grad_norm: float = setting(1.0, "largest global gradient norm", minimum=0.0)
  policy: str = setting("", "model directory to start from; default: a fresh small decoder")
  data: str = setting("", "JSON lines with prompt and completion; default: embedded arithmetic")
  num_demonstrations: int = setting(
    50_000, "embedded demonstrations", minimum=1, read_when=("data", ("",))
  )
  demonstration_quality: float = setting(
    0.5,
    "share of right embedded demonstrations",
    minimum=0.0,
    maximum=1.0,
    read_when=("data", ("",)),
  )
  width: int = setting(64, "width of a fresh decoder", minimum=8, read_when=("policy", ("",)))
  num_layers: int = setting(2, "layers of a fresh decoder", minimum=1, read_when=("policy", ("",)))


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is not run again."""
  if bool(config.policy) != bool(config.data):
    raise UserError("--policy and --data go together: a model of yours needs data of yours.")
  workdir = find_workdir("sft", config, root=root)
  if read_summary(workdir):
    progress.console.print(f"SFT: finished before, in {workdir}", soft_wrap=True)
    return workdir
  mesh = parallel.make_mesh(config.mesh)
  parallel.check_batch_size(mesh, config.batch_size)
  model_config, params, tokenizer = _model(config)
  training, held_out = _examples(config, tokenizer, model_config.max_len)
  create_workdir(workdir, "sft", config)

  summary = train(
    config,
    workdir,
    make_cross_entropy_fn(policy_model(model_config)),
    params,
    training,
    held_out,
    save=lambda directory, params: save_policy(directory, model_config, params, tokenizer),
    summary={"held_out_cross_entropy": "loss/cross_entropy"},
    title="SFT",
    keys=(("loss/cross_entropy", "cross-entropy"), ("gradient/norm", "gradient")),
  )
  progress.console.print(
    f"SFT: held-out cross-entropy {summary['held_out_cross_entropy']:.4f} nats per token, "
    f"model in {workdir}/model",
    soft_wrap=True,
  )
  return workdir


def make_cross_entropy_fn(policy):
  """Returns loss(params, batch) -> (loss, metrics): mean -log pi over completion tokens, in nats.

  Its minimum over policies is at pi = data, where it is the entropy of the data: minimising it
  minimises KL(data || pi).
  """

  def loss_fn(params, batch: data.Examples):
    hidden = policy.hidden(params, batch.tokens, batch.mask)[:, :-1]
    log_probs = ops.token_log_probs_from_hidden(
      hidden, policy.unembedding(params), batch.tokens[:, 1:]
    )
    total, count = ops.token_mean(-log_probs, batch.completion_mask[:, 1:])
    return ops.divide(total, count), {"loss/cross_entropy": (total, count)}

  return loss_fn


def fresh_decoder(config: Config, tokenizer) -> tuple[DecoderConfig, dict]:
  """Returns the configuration and random parameters of a small decoder for the embedded task."""
  model_config = DecoderConfig(
    vocab_size=tokenizer.tokenizer.get_vocab_size(),
    width=config.width,
    num_layers=config.num_layers,
    num_heads=4,
    num_kv_heads=4,
    head_dim=config.width // 4,
    mlp_dim=4 * config.width,
    max_len=32,
  )
  return model_config, policy_model(model_config).init(jax.random.key(config.init_seed))


def _model(config: Config):
  if not config.policy:
    tokenizer = arithmetic.make_tokenizer()
    return *fresh_decoder(config, tokenizer), tokenizer
  model_config, params = load_policy(config.policy)
  tokenizer = load_tokenizer(config.policy)
  check_tokenizer(tokenizer, model_config)
  return model_config, params, tokenizer


def _examples(config: Config, tokenizer, max_len: int) -> tuple[data.Examples, data.Examples]:
  """Returns training and held-out examples; a twentieth is held out, at most 512 and at least 1."""
  if config.data:
    texts = [
      (record["prompt"], record["completion"])
      for record in data.read_records(config.data, ("prompt", "completion"))
    ]
  else:
    texts = arithmetic.demonstrations(
      config.init_seed, config.num_demonstrations, quality=config.demonstration_quality
    )
  examples = data.encode_examples(texts, tokenizer, max_len=max_len)
  return data.split_held_out(examples, config.data_seed)


if __name__ == "__main__":
  shared_flags.run(main, Config)
