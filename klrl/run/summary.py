"""`summary.json`: the figures of a finished run, and the versions and devices it ran on."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable

import jax

from klrl import __version__, schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.figures import KLS
from klrl.run import fingerprints, lock, metrics, progress
from klrl.run.workdir import write_text

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "chex")
# These are in every summary, as null if the experiment has no such figure.
_ALWAYS = (
  "score_before",
  "score_after",
  "gold_before",
  "gold_after",
  *(f"{name}{suffix}" for name in KLS for suffix in ("", "_stderr")),
)


def environment() -> dict:
  """Returns the versions of the packages, and the devices."""
  return {
    "versions": {
      "python": platform.python_version(),
      "klrl": __version__,
      **{package: importlib.metadata.version(package) for package in _PACKAGES},
    },
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }


def write_summary(workdir: pathlib.Path, figures: dict, num_iterations: int) -> dict:
  """Writes `summary.json`, which marks the run as finished, and returns its content."""
  timing = processes.on_writer(metrics.read_lines)(workdir / "timing.jsonl")
  # The first iteration compiles, so its rate says nothing about the machine.
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
  """Returns the content of `summary.json`, or None if the run has not finished.

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
      f"{error} Remove it: the same command then makes it again from the last checkpoint."
    ) from error


def once(workdir: pathlib.Path, config, title: str, train: Callable[[], dict]) -> dict:
  """Returns the summary of the run in `workdir`, by `train()` unless it was finished before.

  No other command works in the folder at the same time. Without `--workdir` a second command waits
  and then has the same run; with it, the second command is refused.

  Args:
    workdir: the run's folder.
    config: its `workdir` and `num_iterations` are read; a run of fewer iterations is not finished.
    title: the name of the run on the console.
    train: trains in `workdir` and returns the summary.
  """
  summary = _finished(workdir, config)
  if not summary:
    with lock.held(workdir, wait=not config.workdir):
      summary = _finished(workdir, config)
      if not summary:
        return train()
      # A command that waited has not yet compared the inputs of the run.
      fingerprints.check(workdir, accept=config.accept_changed_inputs)
  progress.console.print(f"{title}: finished before, in {workdir}", soft_wrap=True)
  return summary


@processes.on_writer
def _finished(workdir: pathlib.Path, config) -> dict | None:
  """Returns the summary if the run has done all iterations of `config`, else None."""
  summary = read_summary(workdir)
  done = summary and summary.get("num_iterations")
  is_short = schema.integer().holds(done) and done < config.num_iterations
  return None if is_short else summary
