"""Tests that memory which nothing uses goes back to the system."""

import ctypes
import os
import pathlib
import re
import subprocess
import sys

import pytest

from klrl.devices import free_memory


def resident_mib():
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmRSS:\s*(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library of this system has no trim"
)
def test_what_was_freed_between_used_blocks_is_given_back():
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  size = 2**16  # Below the size from which the library asks the system for each block.
  blocks = [libc.malloc(size) for _ in range(1000)]
  for block in blocks:
    ctypes.memset(block, 1, size)
  for block in blocks[:-1]:
    libc.free(block)
  before = resident_mib()
  free_memory.give_back()
  assert resident_mib() < before - 50
  libc.free(blocks[-1])


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="no Linux")
def test_the_kernel_makes_no_large_pages_of_the_heap_again():
  program = """
import ctypes, re
from klrl.devices import free_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
kept = [libc.malloc(2**16) for _ in range(100)]
def flags():
  heaps = open("/proc/self/smaps").read().split("[heap]")[1:]
  return [re.search("VmFlags:(.*)", heap)[1].split() for heap in heaps]
before = flags()
free_memory.give_back()
print(any("hg" in found for found in before), any("hg" in found for found in flags()))
"""
  environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
  said = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
  ).stdout.split()
  if said[0] == "False":
    pytest.skip("this kernel or this C library has no large pages")
  assert said == ["True", "False"]


def test_nothing_happens_where_the_library_cannot(monkeypatch):
  monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
  free_memory._library.cache_clear()
  free_memory.give_back()
  free_memory._library.cache_clear()
