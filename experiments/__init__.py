"""The programs: flags in, files out. One that is run takes its memory in large pages."""

import sys

from klrl.devices import large_pages

# Python calls a program by this name until it has found it. A test or a notebook has another.
if sys.argv[0] == "-m":
  large_pages.restart_with()
