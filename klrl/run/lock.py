"""The lock of a run's folder, in which one command works at a time. The file names its holder.

The operating system releases the lock when the process ends, however it ends. The file of a killed
process stays, and has no effect.
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
_SECONDS = 1.0  # between two tries while another command works in the folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[str] = set()  # by this process


@contextlib.contextmanager
def held(directory: pathlib.Path, *, wait: bool):
  """Makes `directory` if needed and locks it; at the end removes it if nothing else is in it.

  All processes of a command enter this context, and the writer holds the lock. A process that holds
  it already may enter again.

  Args:
    directory: the folder of a run.
    wait: whether to wait, with a message, if another command holds the lock, or to raise.

  Raises:
    UserError: another process, which is named, holds the lock; or the folder cannot be made.
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
  """Returns "" if the lock is now held, until `stack` ends, or else the name of its holder."""
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
        # With flock, processes that a reward forks would keep the lock. lockf also works on NFS.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except (BlockingIOError, PermissionError):
        file.seek(0)
        return _named(file.read(1000))
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          raise
        progress.warn(
          f"The file system of {directory} has no locks. Make sure that no other command uses it."
        )
      if not _is_there(path, file):  # Its holder has just removed it.
        continue
      file.truncate(0)
      since = time.strftime("%Y-%m-%d %H:%M:%S %z")
      json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": since}, file)
      file.flush()
      _held.add(str(path))
      own.callback(_leave, path, made)
      stack.push(own.pop_all())
      return ""


def _named(content: str) -> str:
  try:
    holder = json.loads(content)
    return f"process {int(holder['process'])} on {holder['host']}, since {holder['since']}"
  except (ValueError, KeyError, TypeError):  # The holder has not written it yet.
    return "another process"


def _is_there(path: pathlib.Path, file) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def _leave(path: pathlib.Path, made: list[pathlib.Path]) -> None:
  """Removes the lock's file, and those folders made for it that are still empty."""
  _held.discard(str(path))
  with contextlib.suppress(OSError):
    path.unlink()
    for folder in made:
      folder.rmdir()
