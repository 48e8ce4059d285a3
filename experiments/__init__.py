"""The programs: flags in, files out. One that is run begins with the memory of `tunables`."""

import sys

from klrl.devices import tunables

# Python calls a program by this name until it has found it. A test or a notebook has another.
if sys.argv[0] == "-m":
  tunables.begin_anew()
