"""The judge of a run on any model directories, side by side: score, gold, KL, NLL, diversity.

    python -m experiments.evaluate
    python -m experiments.evaluate --policy=RUN_DIR,RUN_DIR
    python -m experiments.evaluate --policy=DIR,DIR --reference=DIR --prompts=FILE.jsonl \\
        --reward=FILE.py:FUNCTION

Nothing is trained. Each model writes completions of the same prompts, with the same noise, by the
function that judges a policy before and after a run; the KLs, both ways, and the likelihood of what
is written are to `--reference`. WORKDIR gets `evaluate.json`, and `report.html` with all models in
one table, in one picture of score against KL, and prompt by prompt.

Without `--prompts` it is the held-out problems of the embedded task, the reference is the SFT
policy, and what is judged without `--policy` are that policy and the default PPO run, which is
trained if it is not there. With `--prompts` it is all of them; `--held_out` leaves out those that a
run with the same `--data_seed` and `--max_prompt_len`, which both decide the split, trains on.
Everything but `--policy` and `--prompts` may be missing.

Without flags it takes about half a minute on 2 cores after the default run of `experiments.ppo`.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments import ppo
from experiments.lab import laboratory
from experiments.lab.evaluate_page import report, rows_of, verdict
from experiments.settings import common, rl, training
from experiments.settings.common import again, setting
from klrl import inputs, judging
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import join
from klrl.run import progress
from klrl.tasks import data
from klrl.tasks.registry import TASKS
from klrl.tasks.rewards import reads_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
  common.LabConfig, common.PromptFields, common.ScoreFields, common.JudgeFields, common.StageFields
):
  """Settings of an evaluation."""

  policy: str = setting(
    "",
    "model directories or folders of runs, with commas between; default: the embedded SFT stage "
    "and the default PPO run",
  )
  reference: str = setting(
    "", "model directory that KL and NLL are to; default: the embedded SFT stage, else none"
  )
  task: str = setting(
    "arithmetic", "the embedded task", choices=tuple(TASKS), read_when=("prompts", ("",))
  )
  held_out: bool = setting(
    False,
    "of --prompts only the tenth that a run with the same --data_seed and --max_prompt_len does "
    "not train on",
  )
  temperature: float = again(rl.PolicyConfig, "temperature", default=1.0)
  dtype: str = again(common.RunConfig, "dtype", default="float32")
  mesh: str = again(common.RunConfig, "mesh", default="")
  init_seed: int = setting(0, "seed of the embedded stages", minimum=0)
  data_seed: int = setting(0, "seed of what is held out", minimum=0)
  accept_changed_inputs: bool = common.ACCEPT_CHANGED_INPUTS

  def __post_init__(self):
    super().__post_init__()
    self.check_scores()
    if self.prompts and not self.policy:
      raise UserError("--prompts of yours need models of yours: --policy=DIR,DIR.")
    if self.held_out and not self.prompts:
      raise UserError("--held_out is set, but the embedded task has no other prompts to judge by.")
    if self.prompts and reads_model(self.reward) and not self.reward_model:
      raise UserError("--reward names `model`: say which by --reward_model=DIR.")
    names = self.directories
    if len({*names}) < len(names):
      raise UserError(f"--policy={self.policy} names a directory twice.")
    self.settings()

  @property
  def directories(self) -> list[str]:
    """The models that were named."""
    return [name.strip() for name in self.policy.split(",") if name.strip()]

  def settings(self) -> rl.PolicyConfig:
    """Returns the settings of models and prompts, checked as those of a run are."""
    kind = rl.PolicyConfig if self.prompts else rl.RLConfig
    names = {field.name for field in dataclasses.fields(kind)} - {"workdir", "policy", "reference"}
    shared = [field.name for field in dataclasses.fields(self) if field.name in names]
    policy = self.directories[0] if self.prompts else ""
    return kind(policy=policy, **{name: getattr(self, name) for name in shared})


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Judges the models and returns the folder; what was finished before is shown."""

  def compute(_):
    directories, reference, reward_model = what_to_judge(config, root)
    names = names_of(directories)
    sources = [sources_of(config, directory, reference, reward_model) for directory in directories]
    for one in sources:  # What is wrong with the last is told before the first takes its time.
      inputs.check_inputs(one)
    judged = [judgement(config, *pair) for pair in zip(sources, names, strict=True)]
    return {
      "reference": reference,
      "num_rows": config.num_eval_rows,
      "num_prompts": judged[0]["num_prompts"],
      "temperature": config.temperature,
      "models": judged,
    }

  return laboratory.conduct(config, "evaluate", "evaluate.json", compute, report, show, root=root)


def what_to_judge(config: Config, root: str) -> tuple[list[str], str, str]:
  """Returns the directories of models, of the reference and of the reward model; "" for none.

  The stages of the embedded task, and its default run, are trained where they are missing.
  """
  if config.prompts:
    return config.directories, config.reference, config.reward_model
  settings = config.settings()
  stages = training.model_directories(settings)
  directories = config.directories
  if not directories:
    names = ["task", "init_seed"]
    names += (
      [] if TASKS[config.task].write_policy else ["sft_iterations", "reward_model_iterations"]
    )
    run = ppo.Config(
      accept_changed_inputs=config.accept_changed_inputs,
      **{name: getattr(config, name) for name in names},
    )
    directories = [stages["policy"], str(ppo.main(run, root=root))]
  return directories, config.reference or stages["policy"], stages["reward_model"]


def names_of(directories: list[str]) -> list[str]:
  """Returns a short name for each directory, by which it differs from the others."""
  paths = [pathlib.Path(directory).resolve() for directory in directories]
  # The model of a run is called by the run.
  paths = [path.parent if path.name == "model" else path for path in paths]
  depth = 1
  while True:
    names = ["/".join(path.parts[-depth:]) for path in paths]
    if len({*names}) == len(names) or depth > max(len(path.parts) for path in paths):
      return names
    depth += 1


def sources_of(config: Config, directory: str, reference: str, reward_model: str) -> inputs.Sources:
  """Returns where all comes from that judges the model in `directory`; "" is none."""
  return dataclasses.replace(
    config.settings().sources(),
    policy=directory,
    reference=reference,
    has_reference=bool(reference),
    reward_model=reward_model,
    reward=config.reward,
    reward_timeout=config.reward_timeout,
    reward_retries=config.reward_retries,
    enumerated=False,
  )


def judgement(config: Config, sources: inputs.Sources, name: str) -> dict[str, Any]:
  """Returns the figures and samples of the policy of `sources`, which is called `name`."""
  progress.console.print(f"Judging {name}, in {sources.policy}", soft_wrap=True)
  models = inputs.load_models(sources, policy=sources.policy, reward_model=sources.reward_model)
  task = inputs.load_task(sources, models)
  prompts = task.held_out
  if config.prompts and not config.held_out:
    prompts = both(task.held_out, task.training, pad_id=models.tokenizer.pad_id)
  mesh = parallel.make_mesh(config.mesh)
  trained = parallel.put_once(mesh, {"policy": models.policy_params})
  base = parallel.put_once(mesh, models.base)
  scores = task.rewards or models.reward_model is not None
  rows_at_once = config.eval_batch_size or config.num_eval_rows
  judge = judging.make_judge(
    config,
    mesh,
    models.policy,
    models.reference,
    parallel.put_once(mesh, models.reference_params),
    models.tokenizer,
    prompts,
    max_completion_len=task.max_completion_len,
    temperature=config.temperature,
    score=judging.make_completion_score_fn(
      mesh,
      task.rewards,
      models.reward_model,
      models.reward_params,
      rows_at_once=rows_at_once,
    )
    if scores
    else None,
    verifier=task.verifier,
    num_interim_rows=config.num_eval_rows,
    drawn_at_once=rows_at_once,
    read_at_once=rows_at_once,
  ).judge
  found = judge(join(base, trained)["policy"], when=name)
  return {
    "name": name,
    "directory": sources.policy,
    "num_prompts": min(len(prompts.tokens), config.num_eval_rows),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves((trained, base))),
    "figures": found.figures,
    "samples": found.samples,
  }


def both(first: data.Prompts, second: data.Prompts, *, pad_id: int) -> data.Prompts:
  """Returns the prompts of both, `first` first, padded on the left to one length."""
  length = max(part.tokens.shape[1] for part in (first, second))

  def padded(array, value):
    return np.pad(array, ((0, 0), (length - array.shape[1], 0)), constant_values=value)

  return data.Prompts(
    np.concatenate([padded(part.tokens, pad_id) for part in (first, second)]),
    np.concatenate([padded(part.mask, False) for part in (first, second)]),
    [*first.records, *second.records],
  )


def show(results: dict) -> None:
  """Prints the table and the verdict."""
  table = Table(title=f"{results['num_prompts']} prompts", title_justify="left")
  table.add_column("", overflow="fold")
  for model in results["models"]:
    table.add_column(model["name"], justify="right", overflow="fold")
  for figure, *cells in rows_of(results):
    table.add_row(f"{figure.label}, {figure.per}" if figure.per else figure.label, *cells)
  progress.console.print(table)
  progress.console.print(verdict(results), soft_wrap=True)


if __name__ == "__main__":
  common.launch(main, Config)
