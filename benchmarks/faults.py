"""Commands of klrl's to which something happens at one of their operations on files.

`run` starts a command as a user does, in a process of its own, and `Fault` says what happens to it
and when. A process is forked from one that has imported everything, so that a start costs what the
command itself does.
"""

import dataclasses
import errno
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import threading
import time

# Operations on files that the interpreter tells of before it does them.
_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EXPERIMENTS = ("reinforce", "ppo")
# What differs between two runs that are the same: when and in what time, and settings of files.
_TIMED = ("wall_seconds", "tokens_per_second")
_OTHERS = ("timing.jsonl", "report.html", "config.json", "flags.txt", "inputs.json", ".lock")

KILL, TORN, FULL, READ_ONLY, TERM, INT, TWICE = (
  *("kill", "torn", "full", "read-only", "SIGTERM", "SIGINT", "SIGINT twice"),
)

# Flags of the shortest run that saves all that there is: checkpoints, evaluations, the best model.
TREE = {
  "task": "tree",
  "num_iterations": 2,
  "batch_size": 32,
  "num_eval_rows": 16,
  "num_samples": 2,
  "mesh": "data=1",
  "save_every": 1,
  "keep": 1,
  "eval_every": 1,
  "keep_best": "score",
  "workdir": "run",
}


@dataclasses.dataclass(frozen=True)
class Fault:
  """What happens to a command, and at which of its operations on files.

  * `kill`: it is killed before the operation.
  * `torn`: the same, but a file that is to be written is there, and empty.
  * `full`: from then on no process can write a byte to a file, TensorStore's threads included.
  * `read-only`: from then on no operation of Python's succeeds.
  * `SIGTERM`, `SIGINT`, `SIGINT twice`: it receives these.
  """

  does: str = KILL
  number: int = 1  # of the operation, from 1, among those ...
  holding: str = ""  # ... whose text, "EVENT PATH", has this in it
  seconds: float = 0.0  # later


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a command ended."""

  status: int  # of the process; -9 if it was killed
  said: str  # on the console, in one line
  seconds: float


def run(
  experiment: str,
  flags: dict,
  folder: pathlib.Path,
  *,
  compiled: pathlib.Path,
  fault: Fault | None = None,
  operations: pathlib.Path | None = None,
  kill_after: float | None = None,
  while_it_runs=lambda process: None,
) -> Ended:
  """Runs `python -m experiments.EXPERIMENT --FLAG=VALUE ...` in `folder` and returns how it ended.

  Args:
    experiment: one of `_EXPERIMENTS`.
    flags: of the command.
    folder: where it runs; operations below it count.
    compiled: the folder of compiled programs.
    fault: what happens to it.
    operations: a file to which all operations are written, one a line.
    kill_after: seconds after which it is killed.
    while_it_runs: is called with the process.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([f"experiments.{name}" for name in _EXPERIMENTS])
  reader, writer = context.Pipe(duplex=False)
  arguments = [f"--{name}={value}" for name, value in flags.items()]
  arguments = (experiment, arguments, folder, compiled, fault, operations, writer)
  process = context.Process(target=_child, args=arguments)
  began, said = time.monotonic(), []
  process.start()
  writer.close()

  def listen():
    while data := os.read(reader.fileno(), 2**16):
      said.append(data)

  listener = threading.Thread(target=listen)
  listener.start()
  if kill_after is not None:
    process.join(kill_after)
    process.kill()
  while_it_runs(process)
  process.join()
  listener.join()
  text = " ".join(b"".join(said).decode(errors="replace").split())
  return Ended(process.exitcode, text, time.monotonic() - began)


def _child(experiment, arguments, folder, compiled, fault, operations, writer) -> None:
  os.dup2(writer.fileno(), 1)
  os.dup2(writer.fileno(), 2)
  folder.mkdir(exist_ok=True)
  os.chdir(folder)

  import jax

  from experiments.settings import common

  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_compilation_cache_dir", str(compiled))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  _watch(folder.resolve(), fault, operations)
  module = importlib.import_module(f"experiments.{experiment}")
  sys.argv = [experiment, *arguments, "--compilation_cache=none"]
  common.launch(module.main, module.Config)


def _watch(folder: pathlib.Path, fault: Fault | None, operations: pathlib.Path | None) -> None:
  """Calls what happens, or writes what is done, at each operation below `folder`."""
  log = operations and os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  counter, root, is_refused = itertools.count(1), f"{folder}/", False

  def hook(event, arguments):
    nonlocal is_refused
    path = _written(event, arguments)
    if path is None or not path.startswith(root):
      return
    text = f"{event} {path.removeprefix(root)}"
    if log:
      os.write(log, f"{text}\n".encode())
    if fault and fault.holding in text and next(counter) == fault.number:
      if fault.seconds:
        threading.Timer(fault.seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()
      elif fault.does == READ_ONLY:
        is_refused = True
      else:
        _happen(fault.does, event, arguments)
    if is_refused:
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

  sys.addaudithook(hook)


def _written(event: str, arguments) -> str | None:
  """Returns the path that an operation changes, or None if it changes none."""
  if event == "open":
    path, _, flags = arguments
    if not isinstance(path, str | bytes | os.PathLike) or not flags & _WRITING:
      return None
    directory = -1
  elif event in _EVENTS:
    path = arguments[0]
    directory = arguments[1] if event in ("os.remove", "os.rmdir") else -1
  else:
    return None
  if isinstance(directory, int) and directory >= 0:
    path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), os.fsdecode(path))
  return os.path.abspath(os.fsdecode(path))


def _happen(what: str, event: str, arguments) -> None:
  if what == FULL:
    # Python ignores the signal that comes with it, so that writing fails with an error.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return
  if what == TORN and event == "open":
    os.close(os.open(arguments[0], arguments[2], 0o666))
  number = {TERM: signal.SIGTERM, INT: signal.SIGINT, TWICE: signal.SIGINT}.get(
    what, signal.SIGKILL
  )
  os.kill(os.getpid(), number)
  if what == TWICE:
    # Signals do not queue: the first is to be noted before the second comes.
    threading.Timer(0.2, os.kill, [os.getpid(), number]).start()


def results_of(workdir: pathlib.Path) -> dict[str, object]:
  """Returns what must not depend on how often a run was stopped: each file's bytes by its path."""
  found = {}
  for path in sorted(workdir.rglob("*")):
    name = str(path.relative_to(workdir))
    if path.is_file() and not name.startswith("checkpoints/") and name not in _OTHERS:
      found[name] = path.read_bytes()
  summary = json.loads(found["summary.json"])
  found["summary.json"] = {key: x for key, x in summary.items() if key not in _TIMED}
  iterations = [json.loads(line)["iteration"] for line in found["metrics.jsonl"].splitlines()]
  if iterations != list(range(summary["num_iterations"])):
    raise AssertionError(f"{workdir} has figures of iterations {iterations}")
  return found
