"""What every RL experiment shares: its settings, its stages, and the way from config to report.

`RLConfig` is one gradient step on each rollout; `SurrogateConfig` adds several, with what holds the
policy near the one that sampled. What an experiment does not offer as a flag is a class variable,
which a subclass may turn into a field.
"""

import dataclasses
import pathlib
from typing import ClassVar

from rich.table import Table

from experiments import reward_model, sft
from experiments.settings.common import (
  STAGES,
  DryRunFields,
  EvaluationFields,
  StageFields,
  TaskFields,
  setting,
)
from experiments.settings.kl import KLConfig
from klrl import inputs, ops, rlhf
from klrl.algorithm import epochs, memory, objective
from klrl.algorithm.advantage_rules import GROUP_RULES
from klrl.algorithm.optimizer import SCHEDULES
from klrl.cost import dry_run
from klrl.devices import parallel, processes
from klrl.errors import UserError
from klrl.figures import before_and_after
from klrl.models import scalar_params_from
from klrl.report.of_run import write_report
from klrl.run import lock, progress
from klrl.run.summary import once
from klrl.run.workdir import create_workdir, find_workdir
from klrl.tasks import arithmetic, tree
from klrl.tasks.rewards import reads_model

_KL_TRUST_REGIONS = ("kl_old_new", "kl_new_old")
_CLIPPED = ("clip", "sequence_clip")
_OTHER_TASKS = ("reward", "reward_model", "max_completion_len", "sft_iterations")
_OTHER_TASKS += ("reward_model_iterations",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(KLConfig, TaskFields, EvaluationFields, StageFields, DryRunFields):
  """Reinforcement learning; what an experiment does not offer is a class variable."""

  scored: ClassVar[bool] = True  # by a reward model or a function; else every score is 0
  advantage: ClassVar[str] = "batch_mean"
  group_size: ClassVar[int] = 1
  oversampling: ClassVar[int] = 1
  whiten_advantages: ClassVar[bool] = False
  value_model: ClassVar[str] = ""
  value_init: ClassVar[str] = "reward_model"
  value_trunk: ClassVar[str] = "separate"
  gamma: ClassVar[float] = 1.0
  gae_lambda: ClassVar[float] = 1.0
  vf_coef: ClassVar[float] = 0.0
  value_clip_eps: ClassVar[float] = float("inf")
  trust_region: ClassVar[str] = "none"
  clip_eps_low: ClassVar[float] = 1.0
  clip_eps_high: ClassVar[float] = float("inf")
  dual_clip: ClassVar[float] = float("inf")
  trust_region_beta: ClassVar[float] = 0.0
  trust_region_adaptive: ClassVar[bool] = False
  trust_region_target: ClassVar[float] = 1.0
  max_kl_old: ClassVar[float] = float("inf")
  num_epochs: ClassVar[int] = 1
  num_minibatches: ClassVar[int] = 1
  pretrain_data: ClassVar[str] = ""
  ptx_coef: ClassVar[float] = 0.0
  overlong_buffer: ClassVar[int] = 0
  staleness: ClassVar[int] = 0
  jsd_weight: ClassVar[float] = 0.5

  num_iterations: int = setting(80, "iterations", minimum=1)
  batch_size: int = setting(128, "completions per iteration", minimum=1)
  policy: str = setting("", "model directory to train; default: the embedded SFT stage")
  reference: str = setting(
    "",
    "model directory of pi_ref, or `uniform`, the KL to which is minus the entropy up to a "
    "constant; default: the policy at the start",
  )
  reference_update: str = setting(
    "frozen",
    "how pi_ref follows the policy; held-out figures are against the first one",
    choices=memory.REFERENCE_UPDATES,
  )
  reference_decay: float = setting(
    0.99,
    "share of itself that pi_ref keeps each iteration",
    minimum=0.0,
    maximum=1.0,
    read_when=("reference_update", ("ema",)),
  )
  reference_every: int = setting(
    20, "iterations between resets of pi_ref", minimum=1, read_when=("reference_update", ("reset",))
  )
  temperature: float = setting(1.0, "of sampling, and of every log-prob", minimum=1e-3)
  missing_eos_penalty: float = setting(
    0.0, "taken off the score of a completion that was cut off at the limit", minimum=0.0
  )
  length_penalty: float = setting(0.0, "taken off the score for each token", minimum=0.0)
  normalise_scores: bool = setting(
    False, "take off the mean of all scores so far and divide by their deviation"
  )
  sampler_dtype: str = setting(
    "trainer", "what the sampler computes in", choices=("trainer", "float32", "bfloat16")
  )
  sampler_correction: str = setting(
    "none",
    "weights for a sampler that differs from the trainer: per token, or per completion",
    choices=ops.SAMPLER_CORRECTIONS,
  )
  sampler_cap: float = setting(
    2.0, "largest such weight", minimum=1.0, read_when=("sampler_correction", ("token", "sequence"))
  )
  learning_rate_schedule: str = setting(
    "constant", "how the learning rate falls, to a tenth of its peak", choices=SCHEDULES
  )
  entropy_coef: float = setting(0.0, "weight of the entropy bonus", minimum=0.0)

  def __post_init__(self):
    super().__post_init__()
    self.choose_learning_rate(embedded=5e-4, own=1e-6)
    if self.policy and (missing := self.missing_inputs()):
      raise UserError(f"--policy, a model of yours, needs {', and '.join(missing)}.")
    if self.prompts and not self.policy:
      raise UserError("--prompts of yours need a model of yours: --policy=DIR.")
    for name, default in (("prompt_template", "{prompt}"), ("max_prompt_len", 0)):
      if getattr(self, name) != default and not self.prompts:
        raise UserError(f"--{name} is set, but nothing reads it without --prompts.")
    if self.task == "tree":
      self._check_tree()
    if self.reward and self.reward_model and not reads_model(self.reward):
      raise UserError(
        "--reward and --reward_model both score; give one of them, or a sum that names `model`, "
        f"e.g. --reward=model,{self.reward}."
      )
    for name in ("num_minibatches", "group_size"):
      self.check_divides(name, self.batch_size, "--batch_size")
    rows = self.batch_size // self.num_minibatches
    self.check_divides("accumulation", rows, "--batch_size / --num_minibatches")
    if self.scored and self.advantage == "batch_mean" and self.batch_size < 2:
      raise UserError("--batch_size=1: the baseline is the mean of the rest of the batch.")
    if self.reference and self.kl_placement == "none" and not self.kl_every:
      raise UserError("--reference is set, but nothing reads it: no KL is penalised or measured.")
    if self.reference_update != "frozen":
      if self.reference:
        raise UserError(
          f"--reference_update={self.reference_update} starts at the policy; leave --reference out."
        )
      if self.kl_placement == "none":
        raise UserError("--reference_update moves a reference that no KL is penalised to.")
    if self.kl_refresh == "minibatch" and self.advantage in GROUP_RULES:
      raise UserError(
        f"--kl_refresh=minibatch needs an advantage per token; {self.advantage} compares whole "
        "completions. Use a KL in the loss, which is fresh in every minibatch."
      )

  def missing_inputs(self) -> list[str]:
    """Returns the flags that a model of the user's takes and that are not given."""
    missing = []
    if not self.prompts:
      missing.append("prompts: --prompts=FILE.jsonl")
    if _reads_reward_model(self) and not self.reward_model:
      missing.append(
        "something to score with: --reward=FILE.py:FUNCTION, or --reward_model=DIR, which `model` "
        "in --reward stands for"
      )
    return missing

  def _check_tree(self):
    if not self.scored:
      raise UserError("--task=tree is a table of scores, and this experiment reads none.")
    for field in dataclasses.fields(self):
      if field.name in _OTHER_TASKS and getattr(self, field.name) != field.default:
        raise UserError(f"--{field.name} is set, but nothing reads it with --task=tree.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig(RLConfig):
  """Several gradient steps on each rollout."""

  num_epochs: int = setting(2, "passes over a rollout", minimum=1)
  num_minibatches: int = setting(4, "gradient steps per pass", minimum=1)
  staleness: int = setting(0, "iterations that a rollout waits before it is trained on", minimum=0)
  prefix_cap: float = setting(
    float("inf"),
    "largest weight of a prefix; below inf the KL's gradient is biased",
    minimum=1.0,
    read_when=("kl_correction", ("prefix",)),
  )
  kl_refresh: str = setting(
    "iteration",
    "when the KL in the reward is computed anew",
    choices=objective.REFRESHES,
    read_when=("kl_placement", ("reward", "both")),
  )
  trust_region: str = setting(
    "clip",
    "what holds the policy near the one that sampled",
    choices=epochs.TRUST_REGIONS,
  )
  clip_eps_low: float = setting(
    0.2,
    "ratio may fall to 1 - this",
    minimum=0.0,
    maximum=1.0,
    read_when=("trust_region", _CLIPPED),
  )
  clip_eps_high: float = setting(
    0.2,
    "ratio may rise to 1 + this",
    minimum=0.0,
    read_when=("trust_region", (*_CLIPPED, "truncated")),
  )
  trust_region_beta: float = setting(
    1.0,
    "coefficient of the KL to the old policy, per nat and token",
    minimum=0.0,
    read_when=("trust_region", _KL_TRUST_REGIONS),
  )
  trust_region_adaptive: bool = setting(
    False,
    "double or halve trust_region_beta by PPO's rule, within {:g} and {:g}".format(
      *ops.BETA_BOUNDS
    ),
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

  def __post_init__(self):
    super().__post_init__()
    lowest, highest = ops.BETA_BOUNDS
    if self.trust_region_adaptive and not lowest <= self.trust_region_beta <= highest:
      raise UserError(
        f"--trust_region_beta={self.trust_region_beta}: --trust_region_adaptive keeps it from "
        f"{lowest:g} to {highest:g}. Write a value in between."
      )


def run(config: RLConfig, name: str, title: str, *, root: str) -> pathlib.Path:
  """Runs an experiment and returns its folder; a finished one is shown, not run again."""
  config.check_horizon()
  workdir = find_workdir(name, config, root=root)
  if config.dry_run:
    reports = dry_run.of_run(config, *shapes_of_inputs(config))
    dry_run.show(reports)
    dry_run.write(workdir, reports)
    return workdir
  summary = once(workdir, config, title, lambda: _train(config, workdir, name, title))
  processes.on_writer(write_report)(workdir)  # Also of a finished run, by the present code.
  show_summary(summary, title)
  progress.console.print(f"Report: {workdir}/report.html", soft_wrap=True)
  return workdir


def _train(config: RLConfig, workdir: pathlib.Path, name: str, title: str) -> dict:
  # What can be wrong is looked at before the stages take their time.
  parallel.check_batch_size(parallel.make_mesh(config.mesh), config.batch_size)
  inputs.check_inputs(config)
  directories = model_directories(config)
  models = inputs.load_models(config, **directories)
  task = inputs.load_task(config, models)
  create_workdir(workdir, name, config, read=stages_of(config, directories))
  progress.console.print(
    f"{title}: {len(task.training.tokens)} prompts, {len(task.held_out.tokens)} held out; "
    f"learning rate {config.learning_rate:g}; results go to {workdir}",
    soft_wrap=True,
  )
  return rlhf.run(config, workdir, models, task, title=title)


def stages_of(config: RLConfig, directories: dict[str, str]) -> list[str]:
  """Returns those of the models' directories that trained stages left."""
  return [] if config.task == "tree" else [path for path in directories.values() if path]


def shapes_of_inputs(config: RLConfig) -> tuple[inputs.Models, inputs.Task]:
  """Returns what a run starts from, of models their shapes alone.

  No weights are read and no stage is trained: models of directories are as their config.json has
  them, those of the embedded stages as these make them.
  """
  if config.task == "tree":
    raise UserError("--dry_run has nothing to say of --task=tree, which fits anywhere.")
  inputs.check_inputs(config)
  tokenizer = arithmetic.make_tokenizer()
  from_configs = dry_run.FROM_CONFIGS

  def policy(path):
    if path != inputs.EMBEDDED:
      return from_configs.policy(path)
    return sft.fresh_decoder(sft.Config(), tokenizer)

  def scalar(path):
    if path != inputs.EMBEDDED:
      return from_configs.scalar(path)
    model_config, params = policy(path)
    return model_config, scalar_params_from(params)

  def tokenizer_of(path):
    return tokenizer if path == inputs.EMBEDDED else from_configs.tokenizer(path)

  reward_model = config.reward_model
  if not config.policy and _reads_reward_model(config):
    reward_model = reward_model or inputs.EMBEDDED
  models = dry_run.shapes_of_models(
    config,
    inputs.Loaders(policy, scalar, tokenizer_of),
    policy=config.policy or inputs.EMBEDDED,
    reward_model=reward_model,
  )
  return models, inputs.load_task(config, models)


def _reads_reward_model(config: RLConfig) -> bool:
  return config.scored and (not config.reward or reads_model(config.reward))


def model_directories(config: RLConfig) -> dict[str, str]:
  """Returns the directories of policy and reward model, running the embedded stages if need be."""
  if config.policy:
    return {"policy": config.policy, "reward_model": config.reward_model}
  if config.task == "tree":
    write = processes.on_writer(tree.write_policy)
    root = pathlib.Path(STAGES)
    with lock.held(root / "tree", wait=True):
      directory = write(root, config.init_seed)
    return {"policy": str(directory), "reward_model": ""}
  stages = reward_model.Config(
    num_iterations=config.reward_model_iterations,
    sft_iterations=config.sft_iterations,
    seed=config.init_seed,
    init_seed=config.init_seed,
    mesh=config.mesh,
  )
  sft_dir = reward_model.run_sft_stage(stages)
  if not _reads_reward_model(config):
    return {"policy": str(sft_dir), "reward_model": ""}
  reward_dir = config.reward_model or reward_model.main(stages, root=STAGES)
  return {"policy": str(sft_dir), "reward_model": str(reward_dir)}


def show_summary(summary: dict, title: str) -> None:
  """Prints the before/after table."""
  table = Table(title=f"Held-out prompts, before and after {title}", title_justify="left")
  for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
    table.add_column(column, justify=justify)
  for figure, before, after in before_and_after(summary):
    unit = f", {figure.per}" if figure.per else ""
    table.add_row(f"{figure.label}{unit}", before, after)
  progress.console.print(table)
