"""A Bradley-Terry reward model from pairs of completions.

    python -m experiments.reward_model
    python -m experiments.reward_model --policy=DIR --data=FILE.jsonl

    loss = -log sigmoid(score(chosen) - score(rejected))

(Stiennon et al., "Learning to summarize from human feedback", 2020, section 3.4), with a margin,
label smoothing and centring where asked for, see `preference_loss`. The score is read at the last
token. Without flags it starts from the embedded SFT model (running that stage first, if need be)
and learns from embedded preferences with one label in twenty swapped. With `--data` it reads lines
of `{"prompt": ..., "chosen": ..., "rejected": ...}`, or of whole dialogues as in HH-RLHF. The model
is left in WORKDIR/model.

Without flags it takes one to two minutes on 2 cores after the SFT stage and agrees with 91% of
held-out labels, where the noise allows 95%.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import sft
from experiments.settings import common
from experiments.settings.common import again, setting
from klrl import inputs
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.figures import labels, of_summary
from klrl.models import (
  add_lora,
  save_scalar,
  scalar_model,
  scalar_params_from,
)
from klrl.run import progress
from klrl.run.summary import once
from klrl.run.workdir import create_workdir, find_workdir
from klrl.supervised import train
from klrl.tasks import arithmetic, data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.RunConfig, common.ChatFields):
  """Settings of reward modelling."""

  rate_factor = 10.0
  num_iterations: int = again(common.RunConfig, "num_iterations", default=1000)
  batch_size: int = setting(128, "pairs per iteration", minimum=1)
  policy: str = setting(
    "", "model to start from: a directory, or a name on the hub; default: the embedded SFT stage"
  )
  margin: float = setting(
    0.0, "by how much chosen should win, times the column margin where there is one", minimum=0.0
  )
  label_smoothing: float = setting(
    0.0, "share of labels taken to be swapped", minimum=0.0, maximum=0.5
  )
  centring_coef: float = setting(0.0, "weight of (chosen + rejected)^2", minimum=0.0)
  data: str = setting(
    "",
    "rows with prompt, chosen, rejected (texts or chats), or of HH-RLHF: JSON lines, Parquet, or "
    "OWNER/NAME[:SPLIT] of the hub; default: embedded arithmetic",
  )
  max_len: int = setting(
    0,
    "longest text in tokens, pairs with a longer one are left out (0: the model's context, and a "
    "longer text is an error)",
    minimum=0,
  )
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

  def __post_init__(self):
    super().__post_init__()
    self.choose_learning_rate(embedded=1e-3)
    self.check_has_frozen()
    self.check_chat("data")
    if self.data and not self.policy:
      raise UserError(
        "--data needs --policy=DIR, the model whose trunk the reward model takes over."
      )


class Pairs(NamedTuple):
  """Two texts of one prompt each, the chosen one first."""

  tokens: np.ndarray  # [N, 2, S] int32
  mask: np.ndarray  # [N, 2, S] bool, real tokens
  margins: np.ndarray  # [N] float32, by how much the data prefer the chosen one


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is not run again."""
  workdir = find_workdir("reward_model", config, root=root)
  once(workdir, config, "Reward model", lambda: _train(config, workdir))
  return workdir


def _train(config: Config, workdir: pathlib.Path) -> dict:
  mesh = parallel.make_mesh(config.mesh)
  parallel.check_batch_size(mesh, config.batch_size)
  directory = config.policy or str(run_sft_stage(config))
  model_config, policy_params, tokenizer = inputs.load_start(config, directory, data.read_pairs)
  training, held_out = _pairs(config, tokenizer, model_config.max_len)
  create_workdir(workdir, "reward_model", config, read=[directory])
  config = config.fitted(policy_params)

  model_config, params, frozen = add_lora(
    model_config,
    scalar_params_from(policy_params),
    jax.random.key(config.init_seed),
    rank=config.lora_rank,
  )
  reward_model = scalar_model(model_config)
  score = jax.jit(functools.partial(scores_of_pairs, reward_model))

  def calibration(params):
    parts = [
      score(params, data.take(held_out, slice(i, i + config.batch_size)))
      for i in range(0, len(held_out.tokens), config.batch_size)
    ]
    chosen, rejected = np.concatenate(parts).T
    return {"held_out_calibration_error": calibration_error(chosen - rejected)}

  summary = train(
    config,
    workdir,
    make_preference_fn(reward_model),
    params,
    training,
    held_out,
    frozen=frozen,
    short_len=model_config.short_len,
    save=lambda folder, params: save_scalar(
      folder, model_config, params, tokenizer, dtype=config.saved_dtype, base=directory
    ),
    summary={
      "held_out_accuracy": "loss/accuracy",
      "held_out_loss": "loss/bradley_terry",
      "held_out_mean_score": "loss/mean_score",
    },
    coefficients={
      name: getattr(config, name) for name in ("margin", "label_smoothing", "centring_coef")
    },
    more=calibration,
    title="Reward model",
    keys=(
      *labels("loss/bradley_terry"),
      ("loss/accuracy", f"agreement of {config.batch_size} pairs"),
    ),
  )
  progress.console.print(
    f"Reward model: agrees with {of_summary(summary, 'held_out_accuracy')} of "
    f"{of_summary(summary, 'held_out_examples')} held-out labels (calibration error "
    f"{of_summary(summary, 'held_out_calibration_error')}), "
    f"model in {workdir}/model",
    soft_wrap=True,
  )
  return summary


def run_sft_stage(config: Config) -> pathlib.Path:
  """Returns the folder of the embedded SFT stage, which is run where it was not before."""
  stage = sft.Config(
    num_iterations=config.sft_iterations,
    seed=config.init_seed,
    init_seed=config.init_seed,
    mesh=config.mesh,
  )
  return sft.main(stage, root=common.STAGES)


def preference_loss(chosen, rejected, margins, *, margin, label_smoothing, centring_coef):
  """Returns [N], the loss of each pair, nats; gradient flows to the scores.

      -(1 - label_smoothing) * log sigmoid(chosen - rejected - margin * margins)
          - label_smoothing  * log sigmoid(rejected - chosen - margin * margins)
          + centring_coef    * (chosen + rejected)^2

  Args:
    chosen: [N] scores.
    rejected: [N] scores.
    margins: [N], by how much each is better, in the unit of the data.
    margin: scalar, may be traced; what one unit of `margins` is in scores. H. Touvron et al.,
      "Llama 2" (2023), equation 2.
    label_smoothing: probability that a label is swapped, the margin with it; the loss is its
      expectation. E. Mitchell, "A note on DPO with noisy preferences" (2023), there for DPO.
    centring_coef: of the pull towards scores whose mean is zero, which preferences leave open.
      J. Eisenstein et al., "Helping or Herding?" (2023).
  """
  difference, least = chosen - rejected, margin * margins
  return (
    -(1 - label_smoothing) * jax.nn.log_sigmoid(difference - least)
    - label_smoothing * jax.nn.log_sigmoid(-difference - least)
    + centring_coef * (chosen + rejected) ** 2
  )


def scores_of_pairs(reward_model, params, pairs: Pairs) -> jax.Array:
  """Returns [N, 2], the scores of both texts; carries gradient to `params`."""
  tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (pairs.tokens, pairs.mask))
  return reward_model.scores(params, tokens, mask).reshape(-1, 2)


def make_preference_fn(reward_model):
  """Returns loss(params, pairs, **coefficients of `preference_loss`) -> (weights, metrics).

  The metric `loss/bradley_terry` is without margin, smoothing and centring, whatever they are, so
  that runs can be compared by it.
  """

  def loss_fn(params, batch: Pairs, **coefficients):
    chosen, rejected = scores_of_pairs(reward_model, params, batch).T
    count = jnp.float32(chosen.shape[0])
    total = preference_loss(chosen, rejected, batch.margins, **coefficients).sum()
    return {"loss/total": 1.0}, {
      "loss/total": (total, count),
      "loss/bradley_terry": (-jax.nn.log_sigmoid(chosen - rejected).sum(), count),
      "loss/accuracy": ((chosen > rejected).sum().astype(jnp.float32), count),
      "loss/mean_score": ((chosen + rejected).sum() / 2, count),
    }

  return loss_fn


def calibration_error(differences: np.ndarray, *, num_bins: int = 10) -> float:
  """Returns the expected calibration error of sigmoid(chosen - rejected), from 0 to 1.

      sum over bins of (pairs in it / pairs) * |share that is right - mean confidence|

  The model prefers the higher score with a confidence from 1/2 to 1, in `num_bins` equal bins; it
  is right where that is the chosen one. A tie is right by half. C. Guo et al., "On Calibration of
  Modern Neural Networks" (2017), equation 3. With few pairs per bin noise alone makes it positive.

  Args:
    differences: [N] chosen - rejected.
    num_bins: number of bins.
  """
  differences = np.asarray(differences, np.float64)
  confidences = 1 / (1 + np.exp(-np.abs(differences)))
  gaps = (np.sign(differences) + 1) / 2 - confidences
  bins = np.minimum((2 * confidences - 1) * num_bins, num_bins - 1).astype(int)
  return float(np.abs(np.bincount(bins, gaps)).sum() / len(gaps))


def _pairs(config: Config, tokenizer, context: int) -> tuple[Pairs, Pairs]:
  max_len = data.row_len(config.max_len, context)
  if config.data:
    pairs = data.read_pairs(config.data, inputs.asking(config))
  else:
    pairs = [
      data.Pair(*texts)
      for texts in arithmetic.preferences(
        config.init_seed, config.num_preferences, label_noise=config.label_noise
      )
    ]
  chosen = data.encode_texts([(pair.prompt, pair.chosen) for pair in pairs], tokenizer)
  rejected = data.encode_texts([(pair.prompt, pair.rejected) for pair in pairs], tokenizer)
  if config.max_len:
    kept = data.fitting_rows(chosen, rejected, max_len=max_len)
    progress.console.print(f"Reward model: {len(kept)} of {len(pairs)} pairs are short enough")
    pairs, chosen, rejected = ([column[i] for i in kept] for column in (pairs, chosen, rejected))
  else:
    data.check_lengths(chosen, max_len)
    data.check_lengths(rejected, max_len)
  both = [text.tokens for pair in zip(chosen, rejected, strict=True) for text in pair]
  padded = data.pad(both, tokenizer.pad_id, left=False)
  tokens, mask = (x.reshape(len(pairs), 2, -1) for x in padded)
  margins = np.array([pair.margin for pair in pairs], np.float32)
  rows = data.split_indices(len(pairs), config.data_seed)
  if config.data:
    data.warn_of_shared_prompts(*([pairs[i].prompt for i in part] for part in rows))
  arrays = Pairs(tokens, mask, margins)
  return tuple(data.take(arrays, part) for part in rows)


if __name__ == "__main__":
  common.launch(main, Config)
