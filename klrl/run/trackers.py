"""Services that draw the figures of a run while it goes on: a table of two rows.

A tracker gets the figures under the names of `metrics.jsonl`, and those of `evaluations.jsonl` with
`evaluation/` before them, at the number of iterations that were done. The files of a run have all
of it as well, so a tracker that fails is told once and left out: it never ends a run.
"""

import contextlib
import json
import pathlib
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.run import progress
from klrl.run.workdir import write_text

EVALUATION = "evaluation/"
_ID = "wandb/klrl.json"  # in the run's folder: by what the service knows the run, and what it has


class Tracker(NamedTuple):
  """What takes figures."""

  log: Callable[[int, dict[str, float]], None]  # log(iterations done, figures)
  close: Callable[[], None]


class Kind(NamedTuple):
  """One row: which package a tracker needs, and how it is opened."""

  package: str  # that is imported
  extra: str  # of klrl, which installs it
  open: Callable[[pathlib.Path, str, int], Tracker]  # open(the run's folder, setting, start)


def _tensorboard(workdir: pathlib.Path, setting: str, start: int) -> Tracker:
  del setting
  import tensorboardX

  # What was written after the checkpoint is written again, and is not shown twice.
  purge = start or None
  writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

  def log(step, figures):
    for name, value in figures.items():
      writer.add_scalar(name, value, step)

  return Tracker(log, writer.close)


def _wandb(workdir: pathlib.Path, project: str, start: int) -> Tracker:
  del start
  import wandb

  config = schema.read(workdir / "config.json") if (workdir / "config.json").exists() else {}
  path = workdir / _ID
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps({"id": secrets.token_hex(8), "next": 0}) + "\n")
  known = schema.check(schema.read(path), _KNOWN, path, required=_KNOWN)
  run = wandb.init(
    project=project,
    dir=str(workdir),
    id=known["id"],
    name=workdir.name,
    config=config,
    resume="allow",
    settings=wandb.Settings(console="off", silent=True),
  )
  first = max(known["next"], run.step or 0)

  def log(step, figures):
    nonlocal first
    # A run that goes on computes again what was sent after its checkpoint: the same figures.
    if step >= first:
      run.log(figures, step=step)
      first = step + 1
      write_text(path, json.dumps({"id": known["id"], "next": first}) + "\n")

  return Tracker(log, run.finish)


_KNOWN = {"id": schema.text(64), "next": schema.integer(0)}
# By the setting that asks for it.
TRACKERS = {
  "tensorboard": Kind("tensorboardX", "tensorboard", _tensorboard),
  "wandb_project": Kind("wandb", "wandb", _wandb),
}


def check(name: str) -> None:
  """Raises UserError if the package of the tracker, a key of `TRACKERS`, is not installed."""
  kind = TRACKERS[name]
  try:
    __import__(kind.package)
  except ImportError as error:
    raise UserError(f"--{name} needs: pip install 'klrl[{kind.extra}]'") from error


class Log:
  """The trackers of a run, as its loop uses them."""

  def __init__(self, trackers: dict[str, Tracker]):
    self.trackers = trackers
    self._evaluated: dict[str, float | None] = {}

  def evaluated(self, figures: dict[str, float | None]) -> None:
    """Keeps the figures of an evaluation for the next call of `write`, which has their step."""
    self._evaluated = {f"{EVALUATION}{name}": x for name, x in figures.items()}

  def write(self, step: int, figures: dict[str, float | None]) -> None:
    """Sends the figures of iteration `step`, from 0, and those of the evaluation before it."""
    found = {name: x for name, x in (figures | self._evaluated).items() if x is not None}
    self._evaluated = {}
    for name, tracker in list(self.trackers.items()):
      if found and not _tried(name, lambda tracker=tracker: tracker.log(step, found)):
        del self.trackers[name]


@contextlib.contextmanager
def opened(workdir: pathlib.Path, start: int, settings: dict[str, bool | str]) -> Iterator[Log]:
  """Yields the log of the trackers that are asked for, of one process.

  Args:
    workdir: the run's folder, in which trackers keep their files.
    start: iterations that are done.
    settings: {key of `TRACKERS`: what is asked of it, or nothing}.
  """
  trackers = {}
  for name, setting in settings.items():
    if setting and processes.is_writer():

      def open_one(name=name, setting=setting):
        trackers[name] = TRACKERS[name].open(workdir, str(setting), start)

      _tried(name, open_one)
  log = Log(trackers)
  try:
    yield log
  finally:
    for name, tracker in log.trackers.items():
      _tried(name, tracker.close)


def _tried(name: str, call: Callable[[], object]) -> bool:
  """Calls; if it fails, says so and returns False."""
  try:
    call()
  except Exception as error:  # A service raises anything.
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    progress.warn(
      f"--{name} failed and is left out, while the run goes on: {first_line} "
      "All figures are in metrics.jsonl and evaluations.jsonl."
    )
    return False
  return True
