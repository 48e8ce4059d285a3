"""RLHF with PPO: policy, reference, reward and value model, and a KL penalty to the reference.

    python -m experiments.ppo
    python -m experiments.ppo --policy=DIR --prompts=FILE.jsonl --reward=FILE.py:FUNCTION

Without flags it runs three stages on an embedded task, addition by characters: supervised
fine-tuning on demonstrations of which half are wrong, a reward model from preferences of which one
in twenty is swapped, and PPO; then it compares the SFT policy with the PPO policy on held-out
problems, with an exact verifier as the gold score that no stage has seen.

    J = E[r] - beta * KL(pi || pi_ref)     (Ouyang et al., InstructGPT, 2022, eq. 2)

with the KL in the reward or as a loss (--kl_placement and its companions, docs/kl.md), PPO's
clipped surrogate or its KL penalty (Schulman et al., 2017, eq. 7 and 8), and GAE.

Departures from InstructGPT:
1. No pretraining mix.
2. Policy and value model share one Adam and one gradient norm.
3. Advantages are whitened over the batch, as in Ziegler et al. (2019).
"""

import dataclasses
import pathlib

from rich.table import Table

from experiments import reward_model, shared_flags
from experiments.kl_flags import KLConfig
from experiments.shared_flags import setting
from klrl import inputs, parallel, progress, rlhf
from klrl.errors import UserError
from klrl.report import write_report
from klrl.summary import read_summary
from klrl.workdir import create_workdir, find_workdir

_KL_TRUST_REGIONS = ("kl_old_new", "kl_new_old")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(KLConfig):
  """Settings of PPO. A change of those in `learner.Hypers`, or of beta, compiles nothing anew."""

  num_iterations: int = setting(80, "iterations", minimum=1)
  batch_size: int = setting(128, "completions per iteration", minimum=1)

  policy: str = setting("", "model directory to train; default: the embedded SFT stage")
  reference: str = setting("", "model directory of pi_ref; default: the policy at the start")
  reward_model: str = setting("", "model directory that scores; default: the embedded stage")
  value_model: str = setting(
    "", "model directory to start the value model from; default: the reward model, else the policy"
  )
  prompts: str = setting("", "JSON lines with a column prompt; default: embedded arithmetic")
  reward: str = setting("", "FILE.py:FUNCTION that scores, f(prompts, completions, **columns)")
  max_completion_len: int = setting(
    0, "most tokens of a completion; 0: 4 for embedded arithmetic, else 64", minimum=0
  )
  temperature: float = setting(1.0, "of sampling, and of every log-prob", minimum=1e-3)

  trust_region: str = setting(
    "clip",
    "what holds the policy near the one that sampled",
    choices=("clip", *_KL_TRUST_REGIONS, "none"),
  )
  clip_eps_low: float = setting(
    0.2,
    "ratio may fall to 1 - this",
    minimum=0.0,
    maximum=1.0,
    read_when=("trust_region", ("clip",)),
  )
  clip_eps_high: float = setting(
    0.2, "ratio may rise to 1 + this", minimum=0.0, read_when=("trust_region", ("clip",))
  )
  trust_region_beta: float = setting(
    1.0,
    "coefficient of the KL to the old policy, per nat and token",
    minimum=0.0,
    read_when=("trust_region", _KL_TRUST_REGIONS),
  )
  trust_region_adaptive: bool = setting(
    False,
    "double or halve trust_region_beta by PPO's rule",
    read_when=("trust_region", _KL_TRUST_REGIONS),
  )
  trust_region_target: float = setting(
    0.05,
    "KL(old || pi) to steer to, nats per sequence",
    minimum=1e-6,
    read_when=("trust_region_adaptive", (True,)),
  )
  max_kl_old: float = setting(
    float("inf"), "KL(old || pi), nats per sequence, that ends an iteration's epochs", minimum=0.0
  )

  num_epochs: int = setting(2, "passes over a rollout", minimum=1)
  num_minibatches: int = setting(4, "gradient steps per pass", minimum=1)
  learning_rate: float = setting(5e-4, "learning rate of Adam", minimum=0.0)
  max_grad_norm: float = setting(1.0, "largest global gradient norm", minimum=0.0)
  gamma: float = setting(1.0, "discount per token", minimum=0.0, maximum=1.0)
  gae_lambda: float = setting(0.95, "lambda of GAE", minimum=0.0, maximum=1.0)
  whiten_advantages: bool = setting(True, "subtract the mean and divide by the deviation")
  value_clip_eps: float = setting(
    0.2, "a value may move this far from the old one, reward units; inf: free", minimum=0.0
  )
  vf_coef: float = setting(0.5, "weight of the value loss", minimum=0.0)
  entropy_coef: float = setting(0.0, "weight of the entropy bonus", minimum=0.0)

  num_eval_rows: int = setting(512, "held-out completions before and after", minimum=2)
  num_samples: int = setting(8, "completions shown in the report", minimum=0)
  sft_iterations: int = setting(
    700, "iterations of the embedded SFT stage", minimum=1, read_when=("policy", ("",))
  )
  reward_model_iterations: int = setting(
    1000, "iterations of the embedded reward model stage", minimum=1, read_when=("policy", ("",))
  )

  def __post_init__(self):
    super().__post_init__()
    if self.policy and not (self.reward or self.reward_model):
      raise UserError(
        "--policy needs something to score with: --reward=FILE.py:FUNCTION or --reward_model=DIR."
      )
    if bool(self.policy) != bool(self.prompts):
      raise UserError("--policy and --prompts go together: a model of yours needs your prompts.")
    if self.reward and self.reward_model:
      raise UserError("--reward and --reward_model both score; give one of them.")
    if self.batch_size % self.num_minibatches:
      raise UserError(
        f"--batch_size={self.batch_size} is not a multiple of "
        f"--num_minibatches={self.num_minibatches}."
      )
    if self.reference and self.kl_placement == "none" and not self.kl_every:
      raise UserError("--reference is set, but nothing reads it: no KL is penalised or measured.")


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""
  workdir = find_workdir("ppo", config, root=root)
  summary = read_summary(workdir)
  if summary:
    progress.console.print(f"PPO: finished before, in {workdir}", soft_wrap=True)
    write_report(workdir)
  else:
    # What can be wrong is looked at before the stages take their time.
    parallel.check_batch_size(parallel.make_mesh(config.mesh), config.batch_size)
    inputs.check_inputs(config)
    models = inputs.load_models(config, **model_directories(config))
    task = inputs.load_task(config, models)
    create_workdir(workdir, "ppo", config)
    progress.console.print(
      f"PPO: {len(task.training.tokens)} prompts, {len(task.held_out.tokens)} held out; "
      f"results go to {workdir}",
      soft_wrap=True,
    )
    summary = rlhf.run(
      config,
      workdir,
      models,
      task,
      keys=(
        ("score/mean", "score"),
        ("gold/mean", "gold"),
        ("kl/ref_k1", "KL to reference, nats/sequence"),
        ("controller/beta", "beta"),
        ("rollout/length", "length"),
      ),
    )
  show_summary(summary)
  progress.console.print(f"Report: {workdir}/report.html", soft_wrap=True)
  return workdir


def model_directories(config: Config) -> dict[str, str]:
  """Returns the directories of policy and reward model, running the embedded stages if need be."""
  if config.policy:
    return {"policy": config.policy, "reward_model": config.reward_model}
  stages = reward_model.Config(
    num_iterations=config.reward_model_iterations,
    sft_iterations=config.sft_iterations,
    seed=config.init_seed,
    init_seed=config.init_seed,
    mesh=config.mesh,
  )
  sft_dir = reward_model.run_sft_stage(stages)
  if config.reward:
    return {"policy": str(sft_dir), "reward_model": ""}
  reward_dir = config.reward_model or reward_model.main(stages, root="runs/stages")
  return {"policy": str(sft_dir), "reward_model": str(reward_dir)}


def show_summary(summary: dict) -> None:
  """Prints the before/after table."""
  table = Table(title="Held-out prompts, before and after PPO", title_justify="left")
  for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
    table.add_column(column, justify=justify)
  rows = (
    ("gold accuracy", "gold", "{:.1%}"),
    ("score", "score", "{:.3f}"),
    ("KL(pi||ref) k1, nats/sequence", "kl_ref_k1", "{:.3f}"),
    ("KL(pi||ref) k3, nats/sequence", "kl_ref_k3", "{:.3f}"),
    ("KL(pi||ref) exact, nats/sequence", "kl_ref_exact", "{:.3f}"),
    ("KL(pi||ref) k1, nats/token", "kl_ref_k1_per_token", "{:.4f}"),
    ("KL(pi||ref) k3, nats/token", "kl_ref_k3_per_token", "{:.4f}"),
    ("KL(pi||ref) exact, nats/token", "kl_ref_exact_per_token", "{:.4f}"),
    ("NLL under the reference, nats/token", "nll", "{:.3f}"),
    ("entropy, nats/token", "entropy", "{:.3f}"),
    ("length, tokens", "length", "{:.2f}"),
    ("distinct-2", "distinct_2", "{:.3f}"),
  )
  for label, name, form in rows:
    cells = []
    for when in ("before", "after"):
      value, stderr = summary.get(f"{name}_{when}"), summary.get(f"{name}_{when}_stderr")
      text = "" if value is None else form.format(value)
      cells.append(f"{text} ± {form.format(stderr)}" if text and stderr is not None else text)
    if any(cells):
      table.add_row(label, *cells)
  progress.console.print(table)


if __name__ == "__main__":
  shared_flags.run(main, Config)
