"""A whole RLHF run around the learner.

    inputs.load_models, inputs.load_task -> run: judge, iterate, judge, save, summarise

The learner decides how a rollout changes the state; everything here is the same for all algorithms.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from klrl import evaluation, judging
from klrl.algorithm import advantage_rules, objective
from klrl.algorithm.epochs import value_params
from klrl.devices import parallel, processes
from klrl.figures import labels
from klrl.inputs import Models, Task
from klrl.models import join, save_policy, save_scalar
from klrl.programs import Setup, init_run, make_step_fn, set_up
from klrl.run import checkpoint, loop, progress, symptoms
from klrl.run.evaluations import Evaluations, best_figures, cadence
from klrl.run.summary import write_summary
from klrl.run.workdir import write_text

# The figures that are shown while a run goes on.
_SHOWN = labels(
  "score/mean", "gold/mean", "kl/ref_k1", "controller/beta", "controller/at_bound", "rollout/length"
)
_HELD_OUT = ("gold", "score", "kl_ref_exact")


def train_policy(
  config, workdir: pathlib.Path, models: Models, task: Task, *, title: str
) -> dict[str, Any]:
  """Trains, judges before and after, and writes the run's files without the report.

  Returns the summary.

  Args:
    config: the experiment's config.
    workdir: the run's folder.
    models: as `inputs.load_models` returned them.
    task: as `inputs.load_task` returned it.
    title: the name of the run in the progress display.
  """
  figures = announce(config)
  setup = set_up(config, parallel.make_mesh(config.mesh), models, task)
  state = init_run(setup)
  shardings = parallel.state_shardings(setup.mesh, state)
  # A run that goes on finds its programs on the disk, or has none left to compile.
  is_new = processes.is_alone() and not checkpoint.saved_iterations(workdir / "checkpoints")
  step = make_step_fn(setup, shardings, workdir=workdir, ahead_of=state if is_new else None)
  judge, evaluate = make_judge(setup)
  before = judge(state.params, when="before")
  start, state = loop.restore_or_init(workdir, state, keep=config.keep)
  if start == 0:
    check_start(config, before)
  evaluations = make_evaluations(
    workdir, setup, evaluate, lambda state: state.params, show=_HELD_OUT
  )
  iterations = loop.iterate(
    step,
    state,
    start=start,
    workdir=workdir,
    evaluations=evaluations,
    **config.loop_settings(),
  )
  iterations = progress.warned(iterations, "kl/old_k1", symptoms.LARGEST_KL_OLD, symptoms.far_step)
  state = progress.watch(
    iterations, state, title=title, start=start, total=config.num_iterations, keys=_SHOWN
  )
  after = judge(state.params, when="after")
  figures |= best_figures(workdir, config.keep_best) | {"learning_rate": config.learning_rate}
  figures = with_symptoms(figures, workdir)
  beta = state.controller.beta
  return write_results(workdir, setup, state.params, before, after, figures, beta=beta)


def announce(config) -> dict[str, Any]:
  """Prints what the KL penalty does, with warnings, and returns both for the summary."""
  algorithm, warnings = config.algorithm(), config.kl_warnings()
  steps = algorithm.num_epochs * algorithm.num_minibatches
  description = objective.description(
    algorithm.penalty,
    kl_refresh=algorithm.kl_refresh,
    one_step=steps == 1 and not algorithm.staleness,
  )
  if algorithm.divergence is not None:
    description += " The exact divergence is one of the experiment's own: a divergence of its own."
  progress.console.print(description, soft_wrap=True)
  for warning in warnings:
    progress.warn(warning)
  return {"kl_penalty": description} | ({"warnings": warnings} if warnings else {})


def with_symptoms(figures: dict[str, Any], workdir: pathlib.Path, name="") -> dict[str, Any]:
  """Returns the figures of a summary with `warnings` of what went wrong in the run.

  What shows at its end alone is said on the console, after the `name` of the run.
  """
  far, fell = symptoms.of_run(workdir)
  if fell:
    progress.warn(f"{name}: {fell}" if name else fell)
  found = [*figures.get("warnings", []), *filter(None, (far, fell))]
  return figures | ({"warnings": found} if found else {})


def make_judge(setup: Setup) -> judging.Judge:
  """Returns the judge of a run, whose functions take the trained parameters on the devices."""
  config, models, task = setup.config, setup.models, setup.task
  mesh, frozen = setup.mesh, setup.frozen
  score = judging.make_completion_score_fn(
    mesh,
    task.rewards,
    models.reward_model,
    frozen["reward_model"],
    rows_at_once=config.read_at_once(),
  )
  judge, evaluate = judging.make_judge(
    config,
    mesh,
    models.policy,
    models.reference,
    frozen["reference"],
    models.tokenizer,
    task.held_out,
    max_completion_len=task.max_completion_len,
    temperature=config.temperature,
    score=score,
    verifier=task.verifier,
    num_interim_rows=config.interim_rows(),
    drawn_at_once=config.drawn_at_once(),
    read_at_once=config.read_at_once(),
    prefill=task.prefill,
  )

  def policy_of(params):
    return join(frozen["base"], params)["policy"]

  return judging.Judge(
    lambda params, *, when: judge(policy_of(params), when=when),
    lambda params: evaluate(policy_of(params)),
  )


def make_evaluations(
  workdir: pathlib.Path, setup: Setup, evaluate: Callable, params_of: Callable, *, show=()
) -> Evaluations:
  """Returns the evaluations of a run while it trains, as the config of `setup` has them.

  Args:
    workdir: the run's folder.
    setup: of the run.
    evaluate: that of `make_judge`.
    params_of: params_of(state) -> the trained parameters.
    show: names of figures that the console shows.
  """
  config = setup.config
  return Evaluations(
    workdir,
    lambda state: evaluate(params_of(state)),
    every=cadence(config.eval_every, config.num_iterations),
    num_iterations=config.num_iterations,
    keep_best=config.keep_best,
    save=lambda directory, state: save_trained_policy(directory, setup, params_of(state)),
    show=show,
  )


def judge_start(setup: Setup, judge, start: int) -> judging.Judgement:
  """Returns the judgement of the policy at the start, and checks it if the run begins here."""
  params = {"policy": setup.models.policy_params}
  params = parallel.put(params, parallel.state_shardings(setup.mesh, params))
  before = judge(params, when="before")
  if start == 0:
    check_start(setup.config, before)
  return before


def check_start(config, before: judging.Judgement) -> None:
  """Raises UserError where the judgement of a policy at its start shows that a model is wrong."""
  evaluation.step_zero_checks(
    before.evaluation,
    starts_as_reference=not config.sources().reference,
    dtype=config.dtype,
  )


def save_trained_policy(directory: pathlib.Path, setup: Setup, params) -> None:
  """Writes the policy of trained parameters, adapters merged; all processes call it."""
  _save_policy(directory, setup, join(setup.frozen["base"], params))


def _save_policy(directory: pathlib.Path, setup: Setup, params) -> None:
  models = setup.models
  save_policy(
    directory,
    models.policy.config,
    params["policy"],
    models.tokenizer,
    dtype=setup.config.saved_dtype,
    base=models.policy_path,
  )


def write_results(
  workdir: pathlib.Path, setup: Setup, params, before, after, figures, *, beta
) -> dict:
  """Writes models, samples and `summary.json` of a trained run, and returns the summary.

  If the task is enumerated, the summary also has `tree.Exact.figures`, and `optimum.json` has the
  frontier of the best policies.

  Args:
    workdir: the run's folder.
    setup: of the run.
    params: the trained parameters.
    before: the judgement at the start.
    after: the judgement of `params`.
    figures: further figures for the summary.
    beta: beta at the end, reward per nat.
  """
  models = setup.models
  params = join(setup.frozen["base"], params)
  _save_policy(workdir / "model", setup, params)
  if models.value_model is not None:
    value = value_params(params, shared_trunk=setup.algorithm.shared_trunk)
    dtype = setup.config.saved_dtype
    save_scalar(
      workdir / "value_model", models.value_model.config, value, models.tokenizer, dtype=dtype
    )
  samples = "".join(json.dumps(record) + "\n" for record in before.samples + after.samples)
  write_text(workdir / "samples.jsonl", samples)
  found = evaluation.before_and_after(before.figures, after.figures)
  if (exact := setup.task.exact) is not None:
    temperature = setup.config.temperature
    imitates = setup.algorithm.advantage is advantage_rules.best_of_n
    found |= exact.figures(
      parallel.fetch(params["policy"]),
      beta=float(beta),
      temperature=temperature,
      best_of=setup.config.best_of if imitates else None,
    )
    frontier = exact.frontier(temperature=temperature)
    write_text(workdir / "optimum.json", json.dumps(frontier) + "\n")
  return write_summary(workdir, found | figures, setup.config.num_iterations)
