"""Supervised fine-tuning: cross-entropy on demonstrations, KL(data || pi) up to a constant.

    python -m experiments.sft
    python -m experiments.sft --policy=DIR --data=FILE.jsonl
    python -m experiments.sft --policy=DIR --data=FILE.txt --packing

Without flags it trains a small decoder from scratch on embedded arithmetic demonstrations, half of
which are wrong; their distribution is known, so the summary has the forward KL itself. With
`--data` it trains on lines of `{"prompt": ..., "completion": ...}`; on chats, of which it learns
what the assistant says (docs/data.md has all forms); or on plain text: documents separated by
`<|endoftext|>` or, where there is none, by blank lines, and cut where they are longer than the
context. `--packing` puts several examples into a row, where one each would be mostly padding, and
changes no gradient. The model is left in WORKDIR/model.

Without flags it takes about a minute on 2 cores and ends at a held-out cross-entropy of 0.66 nats
per token, of which 0.60 are the entropy of the demonstrations.
"""

import dataclasses
import functools
import pathlib

import jax

from experiments.settings import common
from experiments.settings.common import again, setting
from klrl import inputs, ops
from klrl.algorithm.distributions import over_vocabulary
from klrl.cost import dry_run
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.figures import labels, of_summary, shown
from klrl.models import (
  DecoderConfig,
  Policy,
  add_lora,
  policy_model,
  save_policy,
)
from klrl.run import progress
from klrl.run.summary import once
from klrl.run.workdir import create_workdir, find_workdir
from klrl.supervised import train
from klrl.tasks import arithmetic, data, demonstrations, packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.RunConfig, common.ChatFields, common.DryRunFields):
  """Settings of supervised fine-tuning."""

  rate_factor = 10.0
  num_iterations: int = again(common.RunConfig, "num_iterations", default=700)
  policy: str = setting(
    "", "model to start from: a directory, or a name on the hub; default: a fresh small decoder"
  )
  data: str = setting(
    "",
    "rows with prompt and completion, messages, Alpaca's or ShareGPT's columns, or text: JSON "
    "lines, Parquet, or OWNER/NAME[:SPLIT] of the hub; or plain text (.txt); default: embedded "
    "arithmetic",
  )
  loss_on: str = setting(
    "completion", "which tokens the loss counts", choices=("completion", "all")
  )
  packing: bool = setting(False, "several examples in a row; --batch_size counts rows")
  max_len: int = setting(
    0,
    "longest example in tokens: longer ones are left out, text is cut (0: the model's context, and "
    "a longer example is an error)",
    minimum=0,
  )
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

  def __post_init__(self):
    super().__post_init__()
    self.choose_learning_rate(embedded=4e-3)
    self.check_has_frozen()
    self.check_chat("data")
    if self.policy and not self.data:
      raise UserError("--policy, a model of yours, needs texts: --data=FILE.jsonl or FILE.txt.")
    if self.data and not self.policy:
      raise UserError("--data of yours needs a model of yours to start from: --policy=DIR.")
    if self.lora_rank and not self.policy:
      raise UserError("--lora_rank adapts a model that is there already; name it by --policy=DIR.")
    if self.is_text and self.chat:
      raise UserError(f"--chat is set, but plain text holds no prompts ({self.data}).")
    if self.is_text and self.loss_on == "all":
      raise UserError(
        f"--loss_on is set, but plain text has no prompts ({self.data}): every token counts."
      )

  @property
  def is_text(self) -> bool:
    """Whether the data are plain text."""
    return data.is_text(self.data)


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is not run again."""
  workdir = find_workdir("sft", config, root=root)
  if config.dry_run:
    return dry_run.tell(workdir, _cost(config))
  once(workdir, config, "SFT", lambda: _train(config, workdir))
  return workdir


def _cost(config: Config) -> list[dict]:
  """Returns what a step costs a device; no weights are read."""
  load = functools.partial(_model, config)
  model_config, params, frozen, tokenizer = dry_run.shapes_of_start(config, load)
  policy = policy_model(model_config)
  loss_fn, (training, *_) = make_cross_entropy_fn(policy), _examples(config, policy, tokenizer)
  return dry_run.of_supervised(config, loss_fn, params, training, frozen=frozen)


def _train(config: Config, workdir: pathlib.Path) -> dict:
  mesh = parallel.make_mesh(config.mesh)
  parallel.check_batch_size(mesh, config.batch_size)
  *model, tokenizer = _model(config)
  model_config, params, frozen = add_lora(
    *model, jax.random.key(config.init_seed), rank=config.lora_rank
  )
  policy = policy_model(model_config)
  training, held_out, more = _examples(config, policy, tokenizer)
  create_workdir(workdir, "sft", config)
  config = config.fitted(frozen or params)

  summary = train(
    config,
    workdir,
    make_cross_entropy_fn(policy),
    params,
    training,
    held_out,
    frozen=frozen,
    short_len=model_config.short_len,
    save=lambda directory, params: save_policy(
      directory, model_config, params, tokenizer, dtype=config.saved_dtype, base=config.policy
    ),
    summary={"held_out_cross_entropy": "loss/cross_entropy"},
    more=more,
    losses=("held_out_cross_entropy",),
    title="SFT",
    keys=labels("loss/cross_entropy", "gradient/norm"),
  )
  kl = summary.get("held_out_forward_kl")
  progress.console.print(
    f"SFT: held-out cross-entropy {of_summary(summary, 'held_out_cross_entropy')} nats per token, "
    f"before training {of_summary(summary, 'held_out_cross_entropy_before')}, "
    + ("" if kl is None else f"KL(data‖π) {shown('held_out_forward_kl', kl)}, ")
    + f"model in {workdir}/model",
    soft_wrap=True,
  )
  return summary


def make_cross_entropy_fn(policy):
  """Returns loss(params, batch) -> (weights, metrics): mean -log pi of completion tokens, in nats.

  A token weighs the same whichever row it is in, so packing changes nothing.

  Its minimum over policies is at pi = data, where it is the entropy of the data: minimising it
  minimises KL(data || pi).
  """

  def loss_fn(params, batch: data.Examples):
    hidden = policy.hidden(params, batch.tokens, batch.mask, batch.segment_ids)[:, :-1]
    models = [(hidden, policy.unembedding(params))]
    log_probs = over_vocabulary(ops.taken, models, [batch.tokens[:, 1:]])
    cross_entropy = ops.token_mean(-log_probs, batch.completion_mask[:, 1:])
    return {"loss/cross_entropy": 1.0}, {"loss/cross_entropy": cross_entropy}

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


def _model(config: Config, loaders: inputs.Loaders = inputs.FROM_DISK):
  if not config.policy:
    tokenizer = arithmetic.make_tokenizer()
    fresh = fresh_decoder(config, tokenizer)
    return *inputs.computing(config, fresh, tokenizer.num_tokens), tokenizer
  return inputs.load_start(config, config.policy, data.read_texts, loaders=loaders)


def _examples(config: Config, policy: Policy, tokenizer):
  """Returns training and held-out rows, and what gives the figures that only they allow."""
  max_len = data.row_len(config.max_len, policy.config.max_len)
  are_documents = config.is_text
  if config.is_text:
    texts = [("", document) for document in data.read_documents(config.data)]
  elif config.data:
    texts, are_documents = data.read_texts(config.data, inputs.asking(config))
  else:
    texts = arithmetic.demonstrations(
      config.init_seed, config.num_demonstrations, quality=config.demonstration_quality
    )
  whole = config.loss_on == "all"
  encoded = data.encode_whole(texts, tokenizer) if whole else data.encode_texts(texts, tokenizer)
  if not are_documents and config.max_len:
    kept = data.fitting_rows(encoded, max_len=max_len)
    progress.console.print(f"SFT: {len(kept)} of {len(encoded)} examples are short enough")
    texts, encoded = ([column[i] for i in kept] for column in (texts, encoded))
  elif not are_documents:
    data.check_lengths(encoded, max_len)

  parts = data.split_indices(len(encoded), config.data_seed)
  if config.data:
    data.warn_of_shared_prompts(*([data.asked(*texts[i]) for i in rows] for rows in parts))
  arrays = []
  for rows in parts:
    part = [encoded[i] for i in rows]
    part = data.windows(part, max_len) if are_documents else part
    if config.packing:
      arrays.append(packing.pack(part, tokenizer.pad_id, row_len=max_len))
    else:
      arrays.append(data.examples_of(part, tokenizer.pad_id))
  if config.data:
    return *arrays, lambda params: {}
  return *arrays, demonstrations.make_forward_kl_fn(
    policy,
    tokenizer,
    [texts[i][0] for i in parts[1]],
    quality=config.demonstration_quality,
    with_prompt=whole,
  )


if __name__ == "__main__":
  common.launch(main, Config)
