"""`summary.json`: the figures that a finished run is judged by, and what it ran on."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable

import jax

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.figures import KLS
from klrl.run import fingerprints, lock, metrics, progress
from klrl.run.workdir import write_text

_PACKAGES = ("klrl", "jax", "flax", "optax", "orbax-checkpoint", "chex")
# Present in every summary, null where an experiment has no such figure.
_ALWAYS = (
  "score_before",
  "score_after",
  "gold_before",
  "gold_after",
  *(f"{name}{suffix}" for name in KLS for suffix in ("", "_stderr")),
)


def environment() -> dict:
  """Returns the versions and the device that figures were made with."""
  return {
    "versions": {
      "python": platform.python_version(),
      **{package: importlib.metadata.version(package) for package in _PACKAGES},
    },
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }


def write_summary(workdir: pathlib.Path, figures: dict, num_iterations: int) -> dict:
  """Writes `summary.json`, which marks the run of so many iterations as finished; returns it."""
  timing = processes.on_writer(metrics.read_lines)(workdir / "timing.jsonl")
  # The first iteration compiles; a rate that includes it says nothing about the machine.
  rates = sorted(line.get("tokens_per_second") or 0.0 for line in timing[1:])
  summary = {
    **dict.fromkeys(_ALWAYS),
    **figures,
    "wall_seconds": timing[-1].get("elapsed_seconds", 0.0) if timing else 0.0,
    "tokens_per_second": (rates[len(rates) // 2] or None) if rates else None,
    "num_iterations": num_iterations,
    **environment(),
  }
  write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
  return summary


def read_summary(workdir: pathlib.Path) -> dict | None:
  """Returns the content of `summary.json`, None where the run has not finished.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / "summary.json"
  if not os.path.lexists(path):
    return None
  try:
    summary = schema.check(schema.read(path), {}, path)
    figures = [name for name in summary if name.endswith(("_before", "_after", "_stderr"))]
    return schema.check(summary, dict.fromkeys(figures, schema.optional(schema.number())), path)
  except UserError as error:
    raise UserError(
      f"{error} Remove it: the same command then makes it anew from the last checkpoint."
    ) from error


def once(workdir: pathlib.Path, config, title: str, train: Callable[[], dict]) -> dict:
  """Returns the summary of the run in `workdir`: of `train()`, unless it was finished before.

  Nobody else works in the folder meanwhile. Without `--workdir` whoever comes second waits and has
  the same run; with it, it is refused.

  Args:
    workdir: the run's folder.
    config: reads `workdir` and `num_iterations`; a run of fewer is not finished.
    title: what the run is called on the console.
    train: trains in `workdir` and returns the summary.
  """
  summary = _finished(workdir, config)
  if not summary:
    with lock.held(workdir, wait=not config.workdir):
      summary = _finished(workdir, config)
      if not summary:
        return train()
      # Who waited has looked at the folder before there was anything in it.
      fingerprints.check(workdir, accept=config.accept_changed_inputs)
  progress.console.print(f"{title}: finished before, in {workdir}", soft_wrap=True)
  return summary


@processes.on_writer
def _finished(workdir: pathlib.Path, config) -> dict | None:
  """Returns the summary of a run that has done all iterations of `config`, else None."""
  summary = read_summary(workdir)
  done = summary and summary.get("num_iterations")
  is_short = schema.integer().holds(done) and done < config.num_iterations
  return None if is_short else summary
