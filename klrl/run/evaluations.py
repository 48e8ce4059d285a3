"""What is said of a policy while it trains: `evaluations.jsonl`, and the best model so far.

The policy is evaluated after 0, N, 2N, ... iterations and after the last one. A line of the file
has `iteration`, how many iterations were done, and the figures of the judge. A run that goes on
writes each line once, and the same lines as one that was not stopped.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.figures import labels, shown
from klrl.run import metrics, progress
from klrl.run.workdir import write_text

FILE = "evaluations.jsonl"
BEST = "model_best"  # the folder of the best model so far
RECORD = "evaluation.json"  # in it: what it was chosen by
BY_DEFAULT = -1  # `eval_every` for `_MANY` evaluations in a run
_MANY = 10


def cadence(eval_every: int, num_iterations: int) -> int:
  """Returns the number of iterations between evaluations, 0 for none."""
  return -(-num_iterations // _MANY) if eval_every == BY_DEFAULT else eval_every


class Evaluations:
  """The evaluations of one run, which `loop.iterate` asks for."""

  def __init__(
    self,
    workdir: pathlib.Path,
    evaluate: Callable[[Any], dict[str, float | None]],
    *,
    every: int,
    num_iterations: int,
    keep_best: str = "",
    save: Callable[[pathlib.Path, Any], None] = lambda directory, state: None,
    show: Sequence[str] = (),
  ):
    """Prepares the evaluations; nothing is written yet.

    Args:
      workdir: the run's folder.
      evaluate: evaluate(state) -> figures.
      every: iterations between two evaluations; 0 for none.
      num_iterations: of the run.
      keep_best: the figure by which the best model is chosen and kept, or "".
      save: save(directory, state) writes the model of a state; all processes call it.
      show: names of the figures that the console shows.
    """
    self._path, self._best = workdir / FILE, workdir / BEST
    self._evaluate, self._save, self._keep_best = evaluate, save, keep_best
    self._every, self._num_iterations = every, num_iterations
    self._show = show
    self._recorded: dict[int, dict] = {}

  def resume(self, start: int) -> None:
    """Keeps what was said of the first `start` iterations."""
    if not self._every:
      return
    metrics.keep_up_to(self._path, start)
    if self._keep_best:
      processes.on_writer(_mend)(self._best)
    lines = processes.on_writer(metrics.read_lines)(self._path)
    self._recorded = {line.pop("iteration"): line for line in lines}

  def is_due(self, done: int) -> bool:
    """Returns whether the state after `done` iterations is evaluated."""
    last = done == self._num_iterations
    return bool(self._every) and (done % self._every == 0 or last)

  def after(self, done: int, state) -> dict[str, float | None] | None:
    """Returns the figures of the state after `done` iterations, and records them once.

    It returns None where no evaluation is due.

    Raises:
      UserError: the figure by which the best model is chosen is not among those of the judge.
    """
    if not self.is_due(done):
      return None
    if done in self._recorded:
      return self._recorded[done]
    found = self._evaluate(state)
    # The parameters of a run are finite, but a forward pass need not be.
    figures = {k: x if x is None or math.isfinite(x) else None for k, x in found.items()}
    if self._keep_best:
      self._keep_if_best(done, state, figures)
    metrics.append_line(self._path, {"iteration": done, **figures})
    parts = [_shown(figures, name) for name in self._show if figures.get(name) is not None]
    if parts:
      progress.console.print(f"Held out after {done}: {', '.join(parts)}", soft_wrap=True)
    return figures

  def _keep_if_best(self, done: int, state, figures) -> None:
    name = self._keep_best
    if name not in figures:
      raise UserError(f"--keep_best={name}: this run has no such figure. Leave it out.")
    best = processes.on_writer(read_best)(self._best.parent)
    is_better = figures[name] is not None and (best is None or figures[name] > best[name])
    if not is_better:
      return
    # All files are there before one takes the place of the model before, so that a kill loses none.
    fresh = self._best.with_suffix(".partial")
    self._save(fresh, state)
    write_text(fresh / RECORD, json.dumps({"iteration": done, **figures}, indent=2) + "\n")
    processes.on_writer(_exchange)(self._best)


class OfMembers:
  """The evaluations of several runs that one loop trains."""

  def __init__(self, members: Sequence[Evaluations]):
    self._members = members

  def resume(self, start: int) -> None:
    """Does so for each."""
    for member in self._members:
      member.resume(start)

  def is_due(self, done: int) -> bool:
    """Returns whether any of them is."""
    return any(member.is_due(done) for member in self._members)

  def after(self, done: int, state) -> dict[str, float | None] | None:
    """Evaluates each; returns no figures of all together, and None where no evaluation is due."""
    found = [member.after(done, state) for member in self._members]
    return {} if any(x is not None for x in found) else None


def read_best(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns the figures of the best model in the folder of a run, and its `iteration`, or None.

  Raises:
    UserError: their file is damaged.
  """
  path = workdir / BEST / RECORD
  if not path.exists():
    return None
  record = schema.check(schema.read(path), {"iteration": schema.integer(0)}, path)
  rules = dict.fromkeys(record, schema.optional(schema.number()))
  return schema.check(record, rules, path, required=("iteration",))


def _shown(figures, name: str) -> str:
  ((_, label),) = labels(name)
  return f"{label} {shown(name, figures[name], figures.get(f'{name}_stderr'))}"


def best_figures(workdir: pathlib.Path, keep_best: str) -> dict[str, float | None]:
  """Returns what a summary says of the best model: its iteration and the figure it is chosen by.

  If no evaluation had that figure, no model was kept, which the console says.
  """
  if not keep_best:
    return {}
  best = processes.on_writer(read_best)(workdir)
  if best is None:
    progress.warn(
      f"--keep_best={keep_best}: no evaluation had a {keep_best}, so no model is kept in {BEST}."
    )
    return {}
  return {
    "best_iteration": best["iteration"],
    f"{keep_best}_best": best[keep_best],
    f"{keep_best}_best_stderr": best.get(f"{keep_best}_stderr"),
  }


def _exchange(best: pathlib.Path) -> None:
  """Puts the new model, which is whole, in the place of the one before."""
  old = best.with_suffix(".old")
  shutil.rmtree(old, ignore_errors=True)
  if best.exists():
    best.rename(old)
  best.with_suffix(".partial").rename(best)
  shutil.rmtree(old, ignore_errors=True)


def _mend(best: pathlib.Path) -> None:
  """Completes an exchange that was broken off."""
  old, fresh = best.with_suffix(".old"), best.with_suffix(".partial")
  if old.exists() and not best.exists():
    # The old one went because the new one was whole.
    (fresh if fresh.exists() else old).rename(best)
  for left in (old, fresh):
    shutil.rmtree(left, ignore_errors=True)
