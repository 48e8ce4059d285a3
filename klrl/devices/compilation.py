"""Compiled programs that outlive the process: the next start of a command reads them from the disk.

JAX finds a program by the whole of it, its flags, its versions and the machine's instructions, so a
program that has changed in any way is compiled anew, and no figure depends on the folder.
"""

import contextlib
import os
import pathlib
import time

import jax

from klrl.errors import UserError

AUTO, NONE = "auto", "none"
# Variables of JAX's own, with which the user has decided already.
OF_JAX = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
# Faster ones are compiled as quickly as they are read.
_SECONDS_WORTH_KEEPING = 0.2
_DAYS_KEPT = 30


def users_folder() -> pathlib.Path:
  """Returns where programs are kept by default, in the folder of the user's cache."""
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
  return pathlib.Path(root, "klrl", "compiled")


def keep(where: str) -> None:
  """Keeps what this process compiles from now on, and reads what others kept.

  Programs that were kept 30 days ago are removed, so that the folder does not grow for ever.

  Args:
    where: a folder; or `auto`, the user's, unless a variable of `OF_JAX` is set or nothing can be
      written there; or `none`.

  Raises:
    UserError: the folder that is named cannot be written to.
  """
  if where == NONE or (where == AUTO and any(name in os.environ for name in OF_JAX)):
    return
  try:
    # The path is part of what JAX finds a program by, so one folder has to have one name.
    folder = (users_folder() if where == AUTO else pathlib.Path(where)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(folder)
    _remove_old(folder)
  except (OSError, RuntimeError) as error:  # The latter where there is no home.
    if where == AUTO:
      return
    raise UserError(
      f"--compilation_cache={where}: no folder that can be written to ({error}). Name another, or "
      "none."
    ) from error
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS_WORTH_KEEPING)


def _remove_old(folder: pathlib.Path) -> None:
  for path in folder.glob("*-cache"):
    with contextlib.suppress(FileNotFoundError):  # Another start may have removed it.
      if path.stat().st_mtime < time.time() - _DAYS_KEPT * 24 * 3600:
        path.unlink()
