"""Rollouts that wait for their scores, in files, so that a reward that fails does not lose them.

To score on the host may take longer than all else in an iteration, and may fail in any way. So what
was sampled is written before it is scored, as `rollout-N.npz` in the folder of the run, where N
iterations were done before. The same command then scores it in place of sampling again. The file
goes when the iteration is done.
"""

import os
import pathlib

import numpy as np

from klrl.devices import processes

FILES = "rollout-*.npz"
_MARK = "mark"  # the array in the file that no rollout has


def path_of(directory: pathlib.Path, iteration: int) -> pathlib.Path:
  """Returns where the rollout of an iteration, counted from 0, is kept."""
  return directory / FILES.replace("*", str(iteration))


@processes.on_writer
def iterations(directory: pathlib.Path) -> set[int]:
  """Returns the iterations whose rollouts wait in `directory`."""
  names = (path.name for path in directory.glob(FILES))
  return {int(name[8:-4]) for name in names if name[8:-4].isdecimal()}


@processes.on_writer
def keep(path: pathlib.Path, mark: str, rollout: dict[str, np.ndarray]) -> None:
  """Writes the arrays of a rollout, all of them or nothing.

  Args:
    path: as `path_of` returns it.
    mark: of everything that the rollout depends on.
    rollout: arrays on the host by their names.
  """
  temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
  with temporary.open("wb") as file:
    np.savez(file, **{_MARK: np.array(mark)}, **rollout)
  temporary.replace(path)


@processes.on_writer
def kept(path: pathlib.Path, mark: str) -> dict[str, np.ndarray] | None:
  """Returns the arrays that `keep` wrote with this mark, or None if there are none, or damaged."""
  try:
    # It is a zip file, which has a checksum of each array.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
      arrays = dict(found)
  except Exception:  # NumPy and zipfile raise anything. It is sampled again.
    return None
  return arrays if arrays.pop(_MARK, None) == mark else None


@processes.on_writer
def drop(path: pathlib.Path) -> None:
  """Removes what `keep` wrote."""
  path.unlink(missing_ok=True)
