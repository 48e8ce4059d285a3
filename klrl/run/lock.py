"""One command at a time works in a folder: the lock of a run's folder, which names its holder.

The operating system releases it when the process ends, however it ends; what stays of a killed one
is a file that says nothing any more.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time

from klrl.devices import processes
from klrl.errors import UserError
from klrl.run import progress

FILE = ".lock"
_SECONDS = 1.0  # between two looks at whether another has finished
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[str] = set()  # by this process


@contextlib.contextmanager
def held(directory: pathlib.Path, *, wait: bool):
  """Makes `directory` if need be and holds it; removes what it made, if nothing else is in there.

  All processes of a command enter it, and the writer holds it. A process that holds it already
  passes.

  Args:
    directory: of a run.
    wait: whether to wait for another that holds it, which is said, or to refuse.

  Raises:
    UserError: another process holds it, and is named; or there can be no such folder.
  """
  with contextlib.ExitStack() as stack:
    holder = processes.on_writer(_hold)(directory, stack)
    if holder and not wait:
      raise UserError(
        f"{directory} is in use by {holder}. Wait until that has ended, or choose another "
        "--workdir."
      )
    if holder:
      progress.console.print(
        f"Waiting for {holder}, who works in {directory}; its result will be used.", soft_wrap=True
      )
    while holder:
      time.sleep(_SECONDS)
      holder = processes.on_writer(_hold)(directory, stack)
    yield


def _hold(directory: pathlib.Path, stack: contextlib.ExitStack) -> str:
  """Returns "" with the lock held until `stack` ends, or who holds it."""
  path = directory.resolve() / FILE
  if str(path) in _held:
    return ""
  while True:
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(
        f"The folder {directory} cannot be made: {error.strerror}. Choose another --workdir."
      ) from error
    with contextlib.ExitStack() as own:
      try:
        file = own.enter_context(path.open("a+", encoding="utf-8"))
      except FileNotFoundError:  # Its holder has just removed the folder.
        continue
      try:
        # Not flock: what a reward forks would hold it on. This one also goes over NFS.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except (BlockingIOError, PermissionError):
        file.seek(0)
        return _named(file.read(1000))
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          raise
        progress.warn(
          f"The file system of {directory} has no locks. See to it that no other command uses it."
        )
      if not _is_there(path, file):  # Its holder has just removed it.
        continue
      file.truncate(0)
      json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
      file.flush()
      _held.add(str(path))
      own.callback(_leave, path, made)
      stack.push(own.pop_all())
      return ""


def _named(content: str) -> str:
  try:
    holder = json.loads(content)
    return f"process {int(holder['process'])} on {holder['host']}"
  except (ValueError, KeyError, TypeError):  # It has not written it yet.
    return "another process"


def _is_there(path: pathlib.Path, file) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def _leave(path: pathlib.Path, made: list[pathlib.Path]) -> None:
  """Removes the lock's file, and of the folders that were made for it those that stayed empty."""
  _held.discard(str(path))
  with contextlib.suppress(OSError):
    path.unlink()
    for folder in made:
      folder.rmdir()
