"""Figures of a run: (sum, count) pairs on the device, JSON lines on disk.

A metric is a pair (sum, count) until `finalise` divides it on the host, so that micro-batches,
padding and early stops weigh as they should. A count of zero means "not measured" and becomes null.
Keys are `group/name`.
"""

import json
import math
import pathlib

from klrl import processes
from klrl.errors import UserError


def finalise(pairs) -> dict[str, float | None]:
  """Returns sum / count of each (sum, count) pair as Python floats; None where the count is 0."""
  return {
    name: float(total) / float(count) if float(count) else None
    for name, (total, count) in sorted(pairs.items())
  }


def first_not_finite(figures: dict[str, float | None]) -> str | None:
  """Returns the name of the first figure that is NaN or infinite, causes before consequences."""
  # A bad score makes a bad loss, which makes a bad gradient: name the cause.
  order = ("score", "rollout", "kl", "value", "policy", "loss", "gradient")
  rank = {group: position for position, group in enumerate(order)}
  bad = [name for name, x in figures.items() if x is not None and not math.isfinite(x)]
  return min(bad, key=lambda name: (rank.get(name.split("/")[0], len(order)), name), default=None)


def append_line(path: pathlib.Path, record: dict) -> None:
  """Appends one JSON object as a line."""
  if processes.is_writer():
    with path.open("a") as file:
      file.write(json.dumps(record) + "\n")


def read_lines(path: pathlib.Path) -> list[dict]:
  """Returns the JSON objects of a file of lines; [] where there is no file."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines() if line]


def truncate(path: pathlib.Path, num_iterations: int) -> None:
  """Keeps the records of the first `num_iterations` iterations, as a resumed run needs it."""
  if path.exists() and processes.is_writer():
    kept = [
      line
      for line in path.read_text().splitlines(keepends=True)
      if line.endswith("\n") and json.loads(line)["iteration"] < num_iterations
    ]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class TensorBoard:
  """Writes every figure as a scalar event; needs the extra `tensorboard`."""

  def __init__(self, directory: pathlib.Path):
    try:
      import tensorboardX
    except ImportError as error:
      raise UserError("--tensorboard needs: pip install 'klrl[tensorboard]'") from error
    self._writer = tensorboardX.SummaryWriter(str(directory))

  def write(self, iteration: int, figures: dict[str, float | None]) -> None:
    for name, value in figures.items():
      if value is not None:
        self._writer.add_scalar(name, value, iteration)

  def close(self) -> None:
    self._writer.close()
