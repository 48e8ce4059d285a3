"""Gives memory that a process does not use back to the system.

The C library keeps what was freed for what is asked for next (glibc manual, "The GNU Allocator").
What the compilation of a run's programs leaves free is several times of what training uses, and it
grows a little with each checkpoint, as it is cut into smaller pieces.
"""

import ctypes
import functools


@functools.cache
def _trim():
  """Returns `malloc_trim` of the C library, or what does nothing where there is none."""
  try:
    return ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):
    return lambda pad: 0


def give_back() -> None:
  """Gives back whole pages that are free; what is used stays where it is."""
  _trim()(ctypes.c_size_t(0))
