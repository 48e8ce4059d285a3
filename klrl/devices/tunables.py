"""How the C library gives out memory: in large pages, and from as many pools as there are cores.

Without large pages a CPU spends much of training on page faults. And each of the threads that save
a checkpoint may begin a pool of its own, up to eight for each core, so that a run would grow with
every save. The library reads both before the process begins (glibc manual, "Memory Allocation
Tunables"). So a program sets them and begins once more, before it has imported anything that takes
time; process id, arguments and open files stay.
"""

import contextlib
import os
import sys

_NAME = "GLIBC_TUNABLES"


def variables() -> dict[str, str]:
  """Returns the variable to begin a process with; {} where the user has set it, or on no Linux."""
  if sys.platform != "linux" or _NAME in os.environ:
    return {}
  num_cores = len(os.sched_getaffinity(0))
  return {_NAME: f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max={num_cores}"}


def begin_anew() -> None:
  """Begins this program anew with `variables`; it returns where there are none, as then."""
  if not (found := variables()) or not sys.executable:
    return
  command = [sys.executable, *sys.orig_argv[1:]]
  with contextlib.suppress(OSError):  # The program goes on as it is.
    os.execve(sys.executable, command, os.environ | found)
