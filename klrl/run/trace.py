"""Which operations of the compiled programs take the time, from a trace of `jax.profiler`."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
from rich.table import Table

from klrl.run import progress

_NUM_SHOWN = 15
_NS = 1e-9


class Operation(NamedTuple):
  """What one operation of a program took in all, without those that run inside it."""

  program: str
  name: str  # in the text of the compiled program
  calls: int  # events of the trace; some operations are several
  seconds: float


def operations(folder: pathlib.Path) -> list[Operation]:
  """Returns the operations of the newest trace in `folder`, those that took longest first.

  Seconds are summed over the devices and threads of this host that ran them; a loop has what is
  left of it without the operations of its body. The list is empty where there is no trace.
  """
  traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  if not traces:
    return []
  found: dict[tuple[str, str], list[float]] = {}
  for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
    for line in plane.lines:
      for key, seconds in _alone(_executed(line)):
        calls_and_seconds = found.setdefault(key, [0, 0.0])
        calls_and_seconds[0] += 1
        calls_and_seconds[1] += seconds
  every = [Operation(*key, int(calls), seconds) for key, (calls, seconds) in found.items()]
  return sorted(every, key=lambda operation: -operation.seconds)


def _executed(line) -> Iterator[tuple[float, float, tuple[str, str]]]:
  """Yields (start, end, (program, operation)) of the events of a line that are operations."""
  if "Async" in line.name:  # They overlap with others, and nobody waits for them.
    return
  for event in line.events:
    stats = dict(event.stats)
    # A CPU and a GPU tell the operation; on a TPU the line has nothing else.
    if "hlo_op" in stats or line.name == "XLA Ops":
      name = str(stats.get("hlo_op") or event.name.partition(" = ")[0].lstrip("%"))
      program = str(stats.get("hlo_module", "")).removeprefix("jit_")
      if not event.name.startswith("end: "):  # This is the end of another event.
        yield event.start_ns, event.start_ns + event.duration_ns, (program, name)


def _alone(events: Iterable) -> Iterator[tuple[tuple[str, str], float]]:
  """Yields (key, seconds) of events (start, end, key) without those that lie inside them."""
  around: list[list] = []  # [end, key, nanoseconds of its own], each inside the one before
  # Of those that start together the longest is around the others.
  for start, end, key in sorted(events, key=lambda event: (event[0], -event[1])):
    while around and around[-1][0] <= start:
      yield around[-1][1], around.pop()[2] * _NS
    if around:
      around[-1][2] -= min(end, around[-1][0]) - start
    around.append([end, key, end - start])
  for _, key, own in around:
    yield key, own * _NS


def show(folder: pathlib.Path, *, num_iterations: int) -> None:
  """Prints the operations that took longest in a trace of `num_iterations` iterations."""
  found = operations(folder)
  total = sum(operation.seconds for operation in found)
  if not total:
    progress.console.print(f"The trace in {folder} has no operation of a program.", soft_wrap=True)
    return
  table = Table(
    title=f"What took longest in {num_iterations} iterations; the trace is in {folder}",
    title_justify="left",
  )
  for column in ("program", "operation", "calls", "seconds", "share", "so far"):
    table.add_column(column, justify="left" if column in ("program", "operation") else "right")
  so_far = 0.0
  for program, name, calls, seconds in found[:_NUM_SHOWN]:
    so_far += seconds
    shares = f"{seconds / total:.1%}", f"{so_far / total:.1%}"
    table.add_row(program, name, f"{calls:,}", f"{seconds:.4g}", *shares)
  progress.console.print(table)
