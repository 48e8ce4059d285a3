"""Minimises a loss over examples: the step, and a whole run around it.

A loss is a function (params, batch, **coefficients) -> (weights, metrics), as in `gradients`. A
batch is some rows of a named tuple of arrays, so the same code serves any kind of example. The
coefficients are traced scalars in the state of the run.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from klrl import evaluation
from klrl.algorithm.gradients import enough_parts, gradients_of
from klrl.algorithm.optimizer import apply_gradients, init_optimizer, make_schedule
from klrl.devices import parallel, processes
from klrl.devices.unread import stored_as
from klrl.figures import find, of_summary
from klrl.models import join
from klrl.report.of_run import write_report
from klrl.run import loop, progress
from klrl.run.evaluations import Evaluations, best_figures, cadence
from klrl.run.summary import write_summary
from klrl.tasks import data, widths

NUM_PARTS = 32  # of the held-out rows: the error of a mean over them is right to an eighth


class SupervisedState(NamedTuple):
  """Everything that a checkpoint of a supervised stage holds."""

  params: dict
  opt_state: optax.OptState
  learning_rate: jax.Array
  max_grad_norm: jax.Array
  iteration: jax.Array  # int32
  coefficients: dict[str, jax.Array]  # of the loss


def init_supervised_state(
  params, config, coefficients: Mapping[str, float] = MappingProxyType({})
) -> SupervisedState:
  """Returns the state before the first step, with the config's learning_rate and max_grad_norm."""
  return SupervisedState(
    params,
    init_optimizer(params),
    jnp.float32(config.learning_rate),
    jnp.float32(config.max_grad_norm),
    jnp.int32(0),
    {name: jnp.float32(value) for name, value in coefficients.items()},
  )


def make_supervised_step(loss_fn, config):
  """Returns step(state, frozen, batch) -> (state, metrics), one step of Adam.

  Args:
    loss_fn: a loss of all parameters, the trained and the `frozen` ones.
    config: its num_iterations, warmup_iterations, learning_rate_schedule and accumulation are read.
  """
  schedule = make_schedule(
    config.learning_rate_schedule,
    num_iterations=config.num_iterations,
    warmup_iterations=config.warmup_iterations,
  )

  def step(state: SupervisedState, frozen, batch):
    gradients, metrics = gradients_of(
      lambda params, part, frozen, named: loss_fn(join(frozen, params), part, **named),
      state.params,
      batch,
      frozen,
      state.coefficients,
      num_parts=enough_parts(batch, config.accumulation),
    )
    params, opt_state, norm = apply_gradients(
      state.params,
      state.opt_state,
      gradients,
      learning_rate=state.learning_rate * schedule(state.iteration),
      max_grad_norm=state.max_grad_norm,
    )
    state = state._replace(params=params, opt_state=opt_state, iteration=state.iteration + 1)
    return state, metrics | {"gradient/norm": (norm, 1.0)}

  return step


def make_supervised_programs(mesh, loss_fn, config, shardings) -> tuple[Callable, Callable]:
  """Returns (step, measure), compiled; the step is that of `make_supervised_step` and donates.

  `measure(params, batch, coefficients) -> metrics` takes all parameters. The devices of `mesh`
  share the rows of a batch, whatever their number. `shardings` are those of the state.
  """

  def measure(params, batch, coefficients):
    return loss_fn(params, parallel.split_rows(batch), **coefficients)[1]

  step = parallel.on_mesh(mesh, make_supervised_step(loss_fn, config))
  step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  return step, jax.jit(parallel.on_mesh(mesh, measure))


def train(
  config,
  workdir: pathlib.Path,
  loss_fn,
  params,
  training: NamedTuple,
  held_out: NamedTuple,
  *,
  save: Callable[[pathlib.Path, Any], None],
  summary: Mapping[str, str],
  title: str,
  keys: Sequence[tuple[str, str]],
  frozen: dict | None = None,
  short_len: int = 0,
  coefficients: Mapping[str, float] = MappingProxyType({}),
  more: Callable[[Any], dict[str, Any]] = lambda params: {},
  losses: Sequence[str] = (),
  evaluate: Callable[[Any], dict[str, float | None]] | None = None,
) -> dict[str, Any]:
  """Trains from the newest checkpoint on, writes all files of a run and returns the summary.

  Args:
    config: the experiment's config.
    workdir: the run's folder.
    loss_fn: a loss.
    params: where to start; they are copied, so they survive.
    training: named tuple of arrays with one row per example.
    held_out: the same kind of examples, which are not trained on.
    save: (directory, all params on the devices), which all processes call, with `workdir / "model"`
      at the end.
    summary: {name in the summary: metric of `loss_fn`}, for `held_out_figures`.
    title: the name that is shown while it runs.
    keys: (metric, label) of the figures that are shown.
    frozen: the parameters that are not trained, if `params` are adapters.
    short_len: of the model's config, see `widths.without_padding`.
    coefficients: of the loss, by name.
    more: all params -> further figures for the summary, called once at the end.
    losses: names in `summary`; the console warns if training makes one of them larger, beyond the
      error.
    evaluate: all params -> figures for `evaluations.jsonl`; with it the `EvaluationFields` of
      `config` are read.
  """
  progress.console.print(
    f"{title}: {len(training[0])} rows to train on, {len(held_out[0])} held out; learning rate "
    f"{config.learning_rate:g}; results go to {workdir}",
    soft_wrap=True,
  )
  mesh = parallel.make_mesh(config.mesh)
  params = stored_as(params, config.param_dtype)
  state = init_supervised_state(parallel.put_own(mesh, params), config, coefficients)
  shardings = parallel.state_shardings(mesh, state)
  state = parallel.put(state, shardings)
  frozen = parallel.put(frozen or {}, parallel.state_shardings(mesh, frozen or {}))
  train_step, measure = make_supervised_programs(mesh, loss_fn, config, shardings)

  def step(state, iteration):
    rows = data.batch_rows(config.seed, iteration, config.batch_size, len(training[0]))
    batch = widths.without_padding(data.take(training, rows), short_len)
    batch = parallel.put(batch, parallel.by_rows(mesh))
    return train_step(state, frozen, batch)

  def measured(state):
    metrics = functools.partial(measure, coefficients=state.coefficients)
    params = join(frozen, state.params)
    return held_out_metrics(
      metrics, params, held_out, mesh, batch_size=config.batch_size, short_len=short_len
    )

  at_start = measured(state)
  start, state = loop.restore_or_init(workdir, state, keep=config.keep)
  if not start:
    progress.console.print(
      f"{title}: held out, {_before_training(summary, at_start)}", soft_wrap=True
    )
  evaluations = evaluate and Evaluations(
    workdir,
    lambda state: evaluate(join(frozen, state.params)),
    every=cadence(config.eval_every, config.num_iterations),
    num_iterations=config.num_iterations,
    keep_best=config.keep_best,
    save=lambda directory, state: save(directory, join(frozen, state.params)),
  )
  iterations = loop.iterate(
    step,
    state,
    start=start,
    workdir=workdir,
    evaluations=evaluations,
    **config.loop_settings(),
  )
  state = progress.watch(
    iterations, state, title=title, start=start, total=config.num_iterations, keys=keys
  )
  params = join(frozen, state.params)
  figures = {
    "held_out_examples": len(held_out[0]),
    "learning_rate": config.learning_rate,
    **held_out_figures(summary, at_start, measured(state)),
    **more(params),
    **(best_figures(workdir, config.keep_best) if evaluate else {}),
  }
  for name in losses:
    change = figures[name] - figures[f"{name}_before"]
    if change > 2 * (figures[f"{name}_change_stderr"] or 0.0):
      progress.warn(
        f"Training made the figure {name} worse: it is {of_summary(figures, name)} and was "
        f"{of_summary(figures, f'{name}_before')} before. Try a lower --learning_rate, fewer "
        "--num_iterations or more data."
      )
  save(workdir / "model", params)
  # The summary marks the run as finished, so the model comes before it.
  content = write_summary(workdir, figures, config.num_iterations)
  processes.on_writer(write_report)(workdir)
  return content


def _before_training(summary: Mapping[str, str], at_start: dict) -> str:
  """Returns the figures before training in words; shares would only count ties."""
  parts = []
  for name, metric in summary.items():
    figure = find(name)
    if figure.scale == 1:
      found = evaluation.ratio_and_stderr(name, *at_start[metric])
      parts.append(f"{figure.title} {of_summary(found, name)} {figure.unit}".strip())
  return f"before training: {', '.join(parts)}".lower()


def held_out_metrics(metrics, params, held_out, mesh, *, batch_size: int, short_len: int) -> dict:
  """Returns the (sums, counts) of `metrics(params, batch)`, [P] each, on the host.

  The P parts have at most `batch_size` rows, and there are about `NUM_PARTS` of them or more
  where there are as many rows: fewer would say little of the error.
  """
  num_rows = len(held_out[0])
  size = min(batch_size, -(-num_rows // NUM_PARTS))
  starts = range(0, num_rows, size)
  batches = (
    widths.without_padding(data.take(held_out, slice(start, start + size)), short_len)
    for start in starts
  )
  parts = [metrics(params, parallel.put(x, parallel.replicated(mesh))) for x in batches]
  return jax.tree.map(lambda *x: np.array(x), *map(parallel.fetch, parts))


def held_out_figures(summary: Mapping[str, str], before: dict, after: dict) -> dict[str, float]:
  """Returns the figures that `summary` names, from the (sums, counts) before and after training.

  Each has a `_stderr`. A figure that is no share also has `_before`, `_before_stderr`, and
  `_change_stderr`, the error of the difference on the same examples. (A share before training would
  only count ties.)
  """
  found = {}
  for name, metric in summary.items():
    (sums, counts), (sums_before, _) = after[metric], before[metric]
    found |= evaluation.ratio_and_stderr(name, sums, counts)
    if find(name).scale == 1:
      found |= evaluation.ratio_and_stderr(f"{name}_before", sums_before, counts)
      change = evaluation.ratio_and_stderr("change", sums - sums_before, counts)
      found[f"{name}_change_stderr"] = change["change_stderr"]
  return found
