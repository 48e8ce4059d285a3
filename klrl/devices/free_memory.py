"""Gives memory that a process does not use back to the system.

The C library keeps what was freed for what is asked for next (glibc manual, "The GNU Allocator").
What the compilation of a run's programs leaves free is several times of what training uses, and it
grows a little with each checkpoint, as it is cut into smaller pieces.

Where the library asks for large pages (`tunables`), the kernel would make one of each stretch of
2 MiB in which anything is used, the free pages in it included: a run would grow for an hour. So the
heap has small pages from then on (madvise(2), MADV_NOHUGEPAGE). What is large lies outside of it.
"""

import ctypes
import functools
import mmap
import pathlib


@functools.cache
def _library():
  """Returns the C library with `malloc_trim` and `madvise`, None where it lacks one."""
  try:
    library = ctypes.CDLL(None)
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  except (AttributeError, OSError, TypeError):
    return None
  return library


def give_back() -> None:
  """Gives back whole pages that are free; what is used stays where it is."""
  library = _library()
  if library is None:
    return
  library.malloc_trim(0)
  maps = pathlib.Path("/proc/self/maps")
  for line in maps.read_text().splitlines() if maps.exists() else ():
    if line.endswith("[heap]"):
      start, end = (int(address, 16) for address in line.split()[0].split("-"))
      library.madvise(start, end - start, mmap.MADV_NOHUGEPAGE)
