"""The way of an experiment that measures and trains no model of its own: figures once, then a page.

WORKDIR gets a JSON file of all figures, and `report.html`, which is made from them anew each time.
"""

import json
import pathlib
import time
from collections.abc import Callable

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.run import lock, progress
from klrl.run.summary import environment
from klrl.run.workdir import create_workdir, find_workdir, write_text


def conduct(
  config,
  name: str,
  file: str,
  compute: Callable[[pathlib.Path], dict],
  report: Callable[[dict], str],
  show: Callable[[dict], None],
  *,
  root: str,
) -> pathlib.Path:
  """Runs an experiment and returns its folder; a finished one is shown, not computed again.

  Args:
    config: its settings.
    name: of the experiment.
    file: of its figures.
    compute: from the folder to figures that JSON holds; it makes the folder if it keeps runs there.
    report: from figures to a page.
    show: prints figures.
    root: where folders with default names are.
  """
  workdir = find_workdir(name, config, root=root)
  path = workdir / file
  is_there = processes.on_writer(path.exists)
  was_there = is_there()
  if was_there:
    progress.console.print(f"{name}: finished before, in {workdir}", soft_wrap=True)
  else:
    with lock.held(workdir, wait=not config.workdir):
      if not is_there():
        began = time.monotonic()
        results = compute(workdir)
        create_workdir(workdir, name, config)  # Now, so that a failure leaves nothing behind.
        results = results | {"seconds": round(time.monotonic() - began, 3), **environment()}
        write_text(path, json.dumps(results, indent=1) + "\n")
  # Read again, so that a page never shows what the file does not hold.
  try:
    results = processes.on_writer(schema.read)(path)
  except UserError as error:
    raise UserError(f"{error} Remove it: the same command makes it anew.") from error
  try:
    text = report(results)
  except (LookupError, TypeError, AttributeError, ValueError) as error:
    if not was_there:
      raise
    raise UserError(
      f"{path} does not hold what its page is made of: {error!r}. Remove it: the same command "
      "makes it anew."
    ) from error
  write_text(workdir / "report.html", text)
  show(results)
  progress.console.print(f"Report: {workdir}/report.html", soft_wrap=True)
  return workdir
