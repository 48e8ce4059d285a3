"""Reward functions that users write: `f(prompts, completions, **columns) -> list of float`.

`columns` are the other columns of the prompt file, one list each. The function may be slow; what it
raises or returns wrongly becomes one message that names the completion.
"""

import importlib.util
import math
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from klrl.errors import UserError

RewardFn = Callable[..., list[float]]

_LARGEST = float(np.finfo(np.float32).max)


def load_reward_fn(spec: str) -> RewardFn:
  """Returns the function that `FILE.py:NAME` names. The file is the user's own code and is run.

  Raises:
    UserError: no such Python file or function, or the file fails when it is run.
  """
  path, _, name = spec.rpartition(":")
  if not path.endswith(".py") or not pathlib.Path(path).is_file():
    raise UserError(f"--reward={spec}: there is no such Python file; write FILE.py:FUNCTION.")
  module_spec = importlib.util.spec_from_file_location(f"reward_of_{pathlib.Path(path).stem}", path)
  module = importlib.util.module_from_spec(module_spec)
  # Dataclasses and pickles in the file look their module up by name.
  sys.modules[module_spec.name] = module
  try:
    module_spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f"--reward={spec}: the file fails: {_last_frame(error)}") from error
  if not callable(getattr(module, name, None)):
    raise UserError(f"--reward={spec}: the file defines no function {name!r}.")
  return getattr(module, name)


def scores(
  reward_fn: RewardFn, records: list[dict[str, Any]], completions: list[str]
) -> np.ndarray:
  """Returns [B] float32, what `reward_fn` says of the completions of `records`.

  Raises:
    UserError: it raises, returns another number of scores, or one that is not a finite float32.
  """
  prompts = [record["prompt"] for record in records]
  columns = {
    name: [record.get(name) for record in records]
    for name in sorted({name for record in records for name in record} - {"prompt"})
  }
  try:
    returned = list(reward_fn(prompts=prompts, completions=completions, **columns))
  except Exception as error:
    raise UserError(f"The reward function failed: {_last_frame(error)}") from error
  if len(returned) != len(completions):
    raise UserError(
      f"The reward function returned {len(returned)} scores for {len(completions)} completions."
    )
  for i, score in enumerate(returned):
    try:
      is_finite = math.fabs(score) <= _LARGEST
    except (TypeError, OverflowError) as error:
      raise UserError(f"The reward function returned {score!r}, not a number.") from error
    if not is_finite:
      raise UserError(
        f"The reward function returned {score} for completion {completions[i][:80]!r} of prompt "
        f"{prompts[i][:80]!r}. Return a finite number for every completion."
      )
  return np.array(returned, np.float32)


def _last_frame(error: Exception) -> str:
  frame = traceback.extract_tb(error.__traceback__)[-1]
  return (
    f"{type(error).__name__}: {error} ({pathlib.Path(frame.filename).name} line {frame.lineno})"
  )
