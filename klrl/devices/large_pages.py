"""Memory in large pages, without which a CPU spends much of training on page faults.

The C library asks the system for them where `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` was set before
the process began (glibc manual, "Memory Allocation Tunables"). So a program sets it and begins once
more, before it has imported anything that takes time; process id, arguments and open files stay.
"""

import os
import pathlib
import sys

_NAME, _VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with() -> None:
  """Begins this program anew with large pages, where they are to be had by asking.

  It returns where the system gives them unasked, or to nobody, or the user has set GLIBC_TUNABLES,
  which is also how the second start knows itself.
  """
  if _NAME in os.environ or not sys.executable or not _given_who_ask():
    return
  command = [sys.executable, *sys.orig_argv[1:]]
  try:
    os.execve(sys.executable, command, os.environ | {_NAME: _VALUE})
  except OSError:  # The program goes on as it is.
    return


def _given_who_ask() -> bool:
  try:
    return sys.platform == "linux" and "[madvise]" in _SETTING.read_text()
  except OSError:
    return False
