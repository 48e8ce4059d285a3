"""The way of an RL experiment from its config to its report, the embedded stages included."""

import dataclasses
import inspect
import os
import pathlib

import jax
from rich.table import Table

from experiments import reward_model, sft
from experiments.settings.common import STAGES
from experiments.settings.rl import PolicyConfig
from klrl import inputs, rlhf
from klrl.cost import dry_run
from klrl.devices import parallel, processes
from klrl.errors import UserError
from klrl.figures import before_and_after
from klrl.models import scalar_params_from
from klrl.report.of_run import write_report
from klrl.run import lock, progress
from klrl.run.summary import once
from klrl.run.workdir import create_workdir, find_workdir
from klrl.tasks.registry import TASKS


def run(config: PolicyConfig, name: str, title: str, *, root: str) -> pathlib.Path:
  """Runs an experiment and returns its folder; a finished one is shown, not run again."""
  config.check_horizon()
  workdir = find_workdir(name, config, root=root)
  if config.dry_run:
    return dry_run.tell(workdir, dry_run.of_run(config, *shapes_of_inputs(config)))
  summary = once(workdir, config, title, lambda: _train(config, workdir, name, title))
  processes.on_writer(write_report)(workdir)  # Also of a finished run, by the present code.
  show_summary(summary, title)
  progress.console.print(f"Report: {workdir}/report.html", soft_wrap=True)
  return workdir


def _train(config: PolicyConfig, workdir: pathlib.Path, name: str, title: str) -> dict:
  check_before_stages(config, parallel.make_mesh(config.mesh))
  sources = config.sources()
  directories = model_directories(config)
  models = inputs.load_models(sources, **directories)
  task = inputs.load_task(sources, models)
  if config.keep_best == "gold" and task.verifier is None:
    raise UserError(
      "--keep_best=gold: nothing checks the answers to these prompts. Take --keep_best=score."
    )
  read = [*stages_of(config, directories), source_of(config)]
  create_workdir(workdir, name, config, read=read)
  config = config.fitted(models.base.get("policy") or models.policy_params)
  progress.console.print(
    f"{title}: {len(task.training.tokens)} prompts, {len(task.held_out.tokens)} held out; "
    f"learning rate {config.learning_rate:g}; results go to {workdir}",
    soft_wrap=True,
  )
  return rlhf.train_policy(config, workdir, models, task, title=title)


def check_before_stages(config: PolicyConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises UserError where an input is wrong, before the stages take their time."""
  parallel.check_batch_size(mesh, config.batch_size)
  if config.policy or TASKS[config.task].write_policy:
    inputs.check_inputs(config.sources())
  else:
    shapes_of_inputs(config)  # All that can be known of models before stages have trained them.


def source_of(config: PolicyConfig) -> str:
  """Returns the path of the experiment's file, which is an input like any other: it is edited."""
  return os.path.relpath(inspect.getfile(type(config)))


def stages_of(config: PolicyConfig, directories: dict[str, str]) -> list[str]:
  """Returns those of the models' directories that trained stages left."""
  has_own = TASKS[config.task].write_policy
  return [] if has_own else [path for path in directories.values() if path]


def shapes_of_inputs(config: PolicyConfig) -> tuple[inputs.Models, inputs.Task]:
  """Returns what a run starts from, of models their shapes alone.

  No weights are read and no stage is trained: models of directories are as their config.json has
  them, those of the embedded stages as these make them.
  """
  if TASKS[config.task].write_policy:
    raise UserError(f"--dry_run has nothing to say of --task={config.task}, which fits anywhere.")
  sources = config.sources()
  inputs.check_inputs(sources)
  tokenizer = TASKS[config.task].tokenizer()
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

  reward_model = sources.reward_model
  if not config.policy and config.reads_reward_model():
    reward_model = reward_model or inputs.EMBEDDED
  models = dry_run.shapes_of_models(
    sources,
    inputs.Loaders(policy, scalar, tokenizer_of),
    policy=config.policy or inputs.EMBEDDED,
    reward_model=reward_model,
  )
  return models, inputs.load_task(sources, models)


def model_directories(config: PolicyConfig) -> dict[str, str]:
  """Returns the directories of policy and reward model, running the embedded stages if need be."""
  if config.policy:
    return {"policy": config.policy, "reward_model": config.sources().reward_model}
  if write_policy := TASKS[config.task].write_policy:
    root = pathlib.Path(STAGES)
    with lock.held(root / config.task, wait=True):
      directory = write_policy(root, config.init_seed)
    return {"policy": str(directory), "reward_model": config.sources().reward_model}
  if not config.reads_reward_model():
    return {"policy": str(reward_model.run_sft_stage(_stages(config))), "reward_model": ""}
  stages = dataclasses.replace(_stages(config), num_iterations=config.reward_model_iterations)
  policy = reward_model.run_sft_stage(stages)
  directory = config.reward_model or reward_model.main(stages, root=STAGES)
  return {"policy": str(policy), "reward_model": str(directory)}


def _stages(config: PolicyConfig) -> reward_model.Config:
  return reward_model.Config(
    sft_iterations=config.sft_iterations,
    seed=config.init_seed,
    init_seed=config.init_seed,
    mesh=config.mesh,
  )


def show_summary(summary: dict, title: str) -> None:
  """Prints the before/after table."""
  table = Table(title=f"Held-out prompts, before and after {title}", title_justify="left")
  for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
    table.add_column(column, justify=justify)
  for figure, before, after in before_and_after(summary):
    unit = f", {figure.per}" if figure.per else ""
    table.add_row(f"{figure.label}{unit}", before, after)
  progress.console.print(table)
