"""Figures of a run: (sum, count) pairs on the device, JSON lines on disk.

A metric is a pair (sum, count) until `finalise` divides it on the host, so that micro-batches,
padding and early stops weigh as they should. A count of zero means "not measured" and becomes null.
Keys are `group/name`.
"""

import json
import math
import os
import pathlib

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.run import progress

# What is read of a line again.
_RECORD = {
  "iteration": schema.integer(0),
  "elapsed_seconds": schema.number(0),
  "evaluation_seconds": schema.number(0),
  "tokens_per_second": schema.optional(schema.number(0)),
}


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
  """Returns the objects of a file of JSON lines, without broken lines; [] if there is no file."""
  return [record for _, record in _lines(path) if record is not None]


def truncate(path: pathlib.Path, num_iterations: int) -> None:
  """Keeps one record of each of the first `num_iterations` iterations, for a run that goes on.

  It warns of records that are broken, missing or there twice. (A crash only cuts the last line.)

  Raises:
    UserError: `path` cannot be read.
  """
  if processes.is_writer():
    found = _keep(path, num_iterations - 1)
    found["missing"] = num_iterations - found.pop("kept")
    _tell(found, f"{path} should have one record of each of the {num_iterations} iterations before")


def keep_up_to(path: pathlib.Path, last: int) -> None:
  """Keeps one record of each iteration up to `last` that has one; warns and raises as above."""
  if processes.is_writer():
    found = _keep(path, last)
    del found["kept"]
    _tell(found, f"{path} should have one record of an iteration at most")


def _tell(found: dict[str, int], wanted: str) -> None:
  if any(found.values()):
    listed = ", ".join(f"{number} {what}" for what, number in found.items() if number)
    progress.warn(f"{wanted}: {listed}. The checkpoint is whole; these figures alone are missing.")


def _keep(path: pathlib.Path, last: int) -> dict[str, int]:
  """Keeps one record of each iteration up to `last`; returns how many, and how many were bad."""
  lines = _lines(path)
  # The last line of a file may have been cut off while it was written.
  num_broken = sum("iteration" not in (record or {}) for _, record in lines[:-1])
  before = [pair for pair in lines if (pair[1] or {}).get("iteration", math.inf) <= last]
  kept = {record["iteration"]: line for line, record in before}
  if os.path.lexists(path):
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(b"".join(kept[i] for i in sorted(kept)))
    temporary.replace(path)
  return {"broken": num_broken, "there twice": len(before) - len(kept), "kept": len(kept)}


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict | None]]:
  """Returns each line, with its newline, and its record, or None if it is broken."""
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}. Move it away.") from error
  return [(line, _record(line)) for line in content.splitlines(keepends=True) if line.strip()]


def _record(line: bytes) -> dict | None:
  try:
    if line.endswith(b"\n"):
      return schema.check(schema.parse(line, ""), _RECORD, "")
  except UserError:
    pass
  return None
