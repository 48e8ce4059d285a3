"""Commands as processes of their own, forked from one that has imported what they need.

An import of JAX takes three seconds of a core, and a fork none.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import pathlib
import runpy
import sys
import threading
from multiprocessing import forkserver

_ROOT = pathlib.Path(__file__).parents[1]
_IMPORTED = ("experiments.ppo", "experiments.reinforce")
# Variables that JAX reads when it is imported, which is before the command begins.
_READ_AT_IMPORT = {
  "JAX_COMPILATION_CACHE_DIR": str,
  "JAX_NUM_CPU_DEVICES": int,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
}


class Process:
  """`python COMMAND` in `folder`; COMMAND is -m MODULE [FLAG ...] or -c CODE.

  `environment` is all that the process knows of it. No backend of JAX's has been started yet, so
  that XLA_FLAGS are read as they would be by a process of the shell's.
  """

  def __init__(self, command: list[str], folder: pathlib.Path, environment: dict[str, str]):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    with contextlib.chdir(_ROOT):  # from where the server imports them
      forkserver.ensure_running()
    self._reader, writer = context.Pipe(duplex=False)
    self._process = context.Process(target=_run, args=(command, folder, environment, writer))
    self._process.start()
    writer.close()

  def finished(self, timeout: float = 500.0) -> tuple[int, str]:
    """Returns (status, output) after the end, which comes in `timeout` seconds at the latest.

    The status of a process that a signal has ended is negative.
    """
    limit = threading.Timer(timeout, self._process.kill)
    limit.start()
    said = []
    while data := os.read(self._reader.fileno(), 2**16):
      said.append(data)
    self._process.join()
    limit.cancel()
    return self._process.exitcode, b"".join(said).decode(errors="replace")


def _run(command, folder, environment, writer) -> None:
  os.dup2(writer.fileno(), 1)
  os.dup2(writer.fileno(), 2)
  writer.close()
  os.chdir(folder)
  gc.freeze()  # as in conftest.py
  gc.set_threshold(100_000, 20, 20)
  os.environ.clear()
  os.environ.update(environment)

  import jax

  for name, kind in _READ_AT_IMPORT.items():
    if name in environment:
      jax.config.update(name.lower(), kind(environment[name]))
  how, what, *arguments = command
  sys.argv = [what, *arguments]
  try:
    if how == "-c":
      exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
      sys.modules.pop(what, None)  # It is run, whether or not it has been imported.
      runpy.run_module(what, run_name="__main__", alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # A forked process leaves them out.
