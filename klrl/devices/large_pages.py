"""Memory in large pages, without which a CPU spends much of training on page faults.

The C library asks the system for them where `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` was set before
the process began (glibc manual, "Memory Allocation Tunables"). So a program sets it and begins once
more, before it has imported anything that takes time; process id, arguments and open files stay.
"""

import contextlib
import os
import pathlib
import sys

_NAME, _VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def variables() -> dict[str, str]:
  """Returns the variable with which a process takes large pages; {} where asking changes nothing.

  That is where the system gives them unasked, or to nobody, or the user has set GLIBC_TUNABLES.
  """
  try:
    asked = sys.platform == "linux" and "[madvise]" in _SETTING.read_text()
  except OSError:
    asked = False
  return {_NAME: _VALUE} if asked and _NAME not in os.environ else {}


def restart_with() -> None:
  """Begins this program anew with `variables`; it returns where there are none, as then."""
  if not (found := variables()) or not sys.executable:
    return
  command = [sys.executable, *sys.orig_argv[1:]]
  with contextlib.suppress(OSError):  # The program goes on as it is.
    os.execve(sys.executable, command, os.environ | found)
