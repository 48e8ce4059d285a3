"""DPO and IPO: KL-regularised RL in closed form, from pairs of completions and without a rollout.

    python -m experiments.dpo
    python -m experiments.dpo --loss=ipo --beta=0.1
    python -m experiments.dpo --policy=DIR --data=FILE.jsonl

    h = log pi(y|x) - log pi_ref(y|x), of whole completions y
    DPO = -log sigmoid(beta * (h(chosen) - h(rejected)))
    IPO = (h(chosen) - h(rejected) - 1 / (2 * beta))**2

(Rafailov et al., "Direct Preference Optimization", 2023, eq. 7; Azar et al., "A General Theoretical
Paradigm to Understand Learning from Human Preferences", 2023, eq. 17.) The reference is the policy
as it starts; it is frozen, so that its log-probs are computed once, before training.

Without flags it starts from the embedded SFT model and learns from pairs which that model drew
itself, labelled by the embedded reward model: the chosen one is drawn with the Bradley-Terry
probability sigmoid(score - other score). That is the population for which the optimum of DPO is
pi* = pi_ref exp(score / beta) / Z, which is also what PPO with this beta against this reward model
looks for. (The embedded preferences, right answers against slips, come from no policy.) IPO is led
to a policy of its own by such labels, see `ops.ipo_loss`. With `--data` it reads lines of
`{"prompt": ..., "chosen": ..., "rejected": ...}`, or dialogues in the format of HH-RLHF.

Without flags it takes about a minute on 2 cores after the stages, and raises gold accuracy from 54%
to 87%.

Departures from the paper: Adam with a cosine schedule in place of RMSprop with a warm-up.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp

from experiments.lab.dpo_pairs import (
  Pairs,
  Start,
  completion_log_probs,
  embedded_start,
  own_shapes,
  own_start,
  stages_config,
)
from experiments.settings import common, training
from experiments.settings.common import again, setting
from klrl import evaluation, judging, ops
from klrl.cost import dry_run
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.figures import labels, of_summary
from klrl.models import Policy, add_lora, join, policy_model, save_policy
from klrl.run import progress
from klrl.run.summary import once
from klrl.run.workdir import create_workdir, find_workdir, write_text
from klrl.supervised import train

LOSSES = {"dpo": ops.dpo_loss, "ipo": ops.ipo_loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
  common.RunConfig,
  common.ChatFields,
  common.EvaluationFields,
  common.StageFields,
  common.DryRunFields,
):
  """Settings of DPO and IPO."""

  num_iterations: int = again(common.RunConfig, "num_iterations", default=600)
  batch_size: int = setting(128, "pairs per iteration", minimum=1)
  loss: str = setting("dpo", "what is minimised", choices=tuple(LOSSES))
  beta: float = setting(
    0.5, "of KL(pi || pi_ref), reward per nat of sequence KL; IPO: win rate per nat", minimum=1e-6
  )
  label_smoothing: float = setting(
    0.0, "share of labels taken to be swapped (conservative DPO)", minimum=0.0, maximum=0.5
  )
  policy: str = setting(
    "", "model to start from: a directory, or a name on the hub; default: the embedded SFT stage"
  )
  data: str = setting(
    "",
    "rows with prompt, chosen, rejected (texts or chats), or of HH-RLHF: JSON lines, Parquet, or "
    "OWNER/NAME[:SPLIT] of the hub; default: drawn pairs",
  )
  max_len: int = setting(
    0,
    "most tokens of a text, longer pairs are left out; 0: the context, beyond it an error",
    minimum=0,
  )
  num_pairs: int = setting(
    30_000, "pairs drawn from the policy", minimum=2, read_when=("data", ("",))
  )
  max_completion_len: int = setting(
    0, "most tokens of a drawn completion; 0: 4 for embedded arithmetic, else 64", minimum=0
  )

  def __post_init__(self):
    super().__post_init__()
    self.choose_learning_rate(embedded=5e-4)
    self.check_evaluations()
    self.check_chat("data")
    if self.policy and not self.data:
      raise UserError("--policy, a model of yours, needs pairs: --data=FILE.jsonl.")
    if self.data and not self.policy:
      raise UserError("--data, pairs of yours, need a model of yours to start from: --policy=DIR.")
    if self.max_len and not self.data:
      raise UserError("--max_len is set, but nothing reads it: drawn pairs all fit.")


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is not run again."""
  workdir = find_workdir("dpo", config, root=root)
  if config.dry_run:
    return dry_run.tell(workdir, _cost(config))
  title = config.loss.upper()
  summary = once(workdir, config, title, lambda: _train(config, workdir))
  training.show_summary(summary, title)
  agreement, many, margin = (
    of_summary(summary, f"held_out_{name}") for name in ("accuracy", "examples", "margin")
  )
  progress.console.print(
    f"Agrees with {agreement} of {many} held-out labels, implicit reward margin {margin}",
    soft_wrap=True,
  )
  progress.console.print(f"Report: {workdir}/report.html", soft_wrap=True)
  return workdir


def _cost(config: Config) -> list[dict]:
  """Returns what a step costs a device; no weights are read."""
  if not config.policy:
    raise UserError("--dry_run has nothing to say of the embedded task, which fits anywhere.")
  model_config, params, frozen, training = own_shapes(config)
  return dry_run.of_supervised(
    config,
    make_preference_fn(policy_model(model_config), config.loss),
    params,
    training,
    frozen=frozen,
    coefficients=coefficients(config),
    # The judge reads the reference: with adapters it is their base.
    beside={} if config.lora_rank else params,
  )


def coefficients(config: Config) -> dict[str, float]:
  """Returns the traced coefficients of the loss."""
  return {"beta": config.beta, "label_smoothing": config.label_smoothing}


def _train(config: Config, workdir: pathlib.Path) -> dict:
  parallel.check_batch_size(parallel.make_mesh(config.mesh), config.batch_size)
  start = (own_start if config.data else embedded_start)(config)
  stages = {} if config.policy else training.model_directories(stages_config(config))
  create_workdir(workdir, "dpo", config, read=stages.values())
  config = config.fitted(start.params)
  return train_on_pairs(config, workdir, start)


def train_on_pairs(config: Config, workdir: pathlib.Path, start: Start) -> dict:
  """Trains, judges before and after, writes all files of a run and returns the summary."""
  mesh = parallel.make_mesh(config.mesh)
  reference = parallel.put_once(mesh, start.params)
  model_config, params, frozen = add_lora(
    start.policy.config, reference, jax.random.key(config.init_seed), rank=config.lora_rank
  )
  policy = policy_model(model_config)
  judge, evaluate = judging.make_judge(
    config,
    mesh,
    policy,
    start.policy,
    reference,
    start.tokenizer,
    start.prompts,
    max_completion_len=start.max_completion_len,
    temperature=1.0,
    score=start.score,
    verifier=start.verifier,
    num_interim_rows=config.interim_rows(),
    drawn_at_once=config.drawn_at_once(),
    read_at_once=config.read_at_once(),
  )
  before = judge(join(frozen, params), when="before")
  evaluation.step_zero_checks(before.evaluation, starts_as_reference=True, dtype=config.dtype)

  if config.keep_best and before.figures[config.keep_best] is None:
    raise UserError(f"--keep_best={config.keep_best}: nothing gives that figure for --data.")

  def save(directory, params):
    save_policy(
      directory, model_config, params, start.tokenizer, dtype=config.saved_dtype, base=config.policy
    )

  def figures(params):
    after = judge(params, when="after")
    lines = "".join(json.dumps(record) + "\n" for record in before.samples + after.samples)
    write_text(workdir / "samples.jsonl", lines)
    return evaluation.before_and_after(before.figures, after.figures)

  return train(
    config,
    workdir,
    make_preference_fn(policy, config.loss),
    params if config.lora_rank else start.params,  # which are read anew, in their own dtype
    start.training,
    start.held_out,
    frozen=frozen,
    short_len=model_config.short_len,
    save=save,
    evaluate=evaluate,
    summary={
      "held_out_loss": f"loss/{config.loss}",
      "held_out_accuracy": "preference/accuracy",
      "held_out_margin": "preference/margin",
    },
    coefficients=coefficients(config),
    more=figures,
    title=config.loss.upper(),
    keys=(
      *labels(f"loss/{config.loss}", "preference/margin"),
      ("preference/accuracy", f"agreement of {config.batch_size} pairs"),
    ),
  )


def make_preference_fn(policy: Policy, loss: str):
  """Returns loss(params, pairs, *, beta, label_smoothing) -> (weights, metrics), means over pairs.

  `loss` is a name in LOSSES. A share `label_smoothing` of the labels is taken to be swapped, and
  the loss is its mean over both. Eric Mitchell, "A note on DPO with noisy preferences and its
  relationship to IPO", 2023. Both scalars may be traced.
  """

  def loss_fn(params, pairs: Pairs, *, beta, label_smoothing):
    log_probs = completion_log_probs(
      policy, params, pairs.tokens, pairs.mask, pairs.completion_mask
    )
    (chosen, rejected), (ref_chosen, ref_rejected) = log_probs.T, pairs.ref_log_probs.T
    as_labelled = LOSSES[loss](chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    swapped = LOSSES[loss](rejected, chosen, ref_rejected, ref_chosen, beta=beta)
    losses = (1 - label_smoothing) * as_labelled + label_smoothing * swapped
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    means = {
      f"loss/{loss}": losses,
      "preference/accuracy": (margin > 0).astype(losses.dtype),
      "preference/margin": beta * margin,  # of the implicit reward beta * log(pi / pi_ref)
      "preference/chosen_log_prob": chosen,
      "preference/rejected_log_prob": rejected,
    }
    count = jnp.asarray(len(losses), losses.dtype)
    return {f"loss/{loss}": 1.0}, {name: (x.sum(), count) for name, x in means.items()}

  return loss_fn


if __name__ == "__main__":
  common.launch(main, Config)
