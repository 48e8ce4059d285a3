"""Where scores come from: a weighted sum of Python functions, the maths verifier, a reward model.

A function of the user's is `f(prompts, completions, **columns) -> list of float`. `columns` are the
other columns of the prompt file, one list each. The function may be slow; what it raises or returns
wrongly becomes one message that names the reward and the completion.
"""

import importlib.util
import math
import pathlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.tasks import math_answers

RewardFn = Callable[..., list[float]]

MATH, MODEL = "math", "model"  # sources that are no file

_LARGEST = float(np.finfo(np.float32).max)


class Reward(NamedTuple):
  """One term of the sum."""

  name: str  # short and unique, for metrics
  weight: float
  fn: RewardFn | None  # None: the reward model, which scores on the device


def load_rewards(spec: str) -> list[Reward]:
  """Returns the rewards that `[WEIGHT*]SOURCE,...` lists, in its order.

  A SOURCE is `FILE.py:FUNCTION`, `math` (klrl.tasks.math_answers) or `model` (the reward model). A
  reward is named after its function; where two would have one name, after file and function. A file
  is the user's own code and is run, once for all of its functions.

  Raises:
    UserError: an item that is none of these, has a weight that is 0 or not finite, or is there
      twice; a file that fails; math-verify is missing.
  """
  files = {}
  sources, rewards = [], []
  for item in spec.split(","):
    weight, source = _weight_and_source(item.strip())
    if source == MATH:
      math_answers.math_verify()
      reward = Reward(MATH, weight, math_answers.math_reward)
    elif source == MODEL:
      reward = Reward(MODEL, weight, None)
    else:
      source = path, name = _path_and_name(source)
      if path not in files:
        files[path] = _run_file(path, item)
      reward = Reward(name, weight, _function(files[path], name, item))
    if source in sources:
      raise UserError(f"--reward={spec}: {item} is there twice; give it once, with one weight.")
    sources.append(source)
    rewards.append(reward)
  taken = Counter([MATH, MODEL, *(source[1] for source in sources if isinstance(source, tuple))])
  for i, source in enumerate(sources):
    if isinstance(source, tuple) and taken[source[1]] > 1:
      rewards[i] = rewards[i]._replace(name=f"{source[0].stem}.{source[1]}")
  if len({reward.name for reward in rewards}) < len(rewards):
    raise UserError(f"--reward={spec}: two files and two functions share a name; rename one.")
  return rewards


def reads_model(spec: str) -> bool:
  """Returns whether the reward model is one of the rewards that `spec` lists."""
  return any(_weight_and_source(item.strip())[1] == MODEL for item in spec.split(","))


def weighted_scores(
  rewards: list[Reward],
  records: list[dict[str, Any]],
  completions: list[str],
  model_scores: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the weighted sum [B] float32 of the rewards, and each one before its weight, by name.

  Args:
    rewards: as `load_rewards` returns them.
    records: B rows of the prompt file.
    completions: B texts.
    model_scores: [B], what the reward model says; needed where it is one of the rewards.

  Raises:
    UserError: as `scores`; the sum is not a finite float32.
    ValueError: `model_scores` is missing.
  """
  if model_scores is None and any(reward.fn is None for reward in rewards):
    raise ValueError("The reward model is one of the rewards; pass model_scores.")
  by_name = {
    name: np.asarray(model_scores, np.float32)
    if fn is None
    else scores(fn, records, completions, name)
    for name, _, fn in rewards
  }
  total = sum(weight * by_name[name].astype(np.float64) for name, weight, _ in rewards)
  if not (np.abs(total) <= _LARGEST).all():
    worst = int(np.argmin(np.abs(total) <= _LARGEST))
    terms = ", ".join(f"{name} {values[worst]:g}" for name, values in by_name.items())
    raise UserError(
      f"The weighted sum of the rewards is {total[worst]:g} for completion "
      f"{completions[worst][:80]!r}: {terms}. Scores and their sum must be finite."
    )
  return total.astype(np.float32), by_name


def scores(
  reward_fn: RewardFn, records: list[dict[str, Any]], completions: list[str], name: str
) -> np.ndarray:
  """Returns [B] float32, what `reward_fn`, called `name`, says of the completions of `records`.

  Raises:
    UserError: it raises, returns another number of scores, or one that is not a finite float32.
  """
  prompts = [record["prompt"] for record in records]
  columns = {
    column: [record.get(column) for record in records]
    for column in sorted({column for record in records for column in record} - {"prompt"})
  }
  for taken in ("prompts", "completions"):
    if taken in columns:
      raise UserError(
        f"The prompts have a column {taken!r}, which reward {name} gets from the run; rename it."
      )
  try:
    returned = list(reward_fn(prompts=prompts, completions=completions, **columns))
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"The reward {name} failed: {_last_frame(error)}") from error
  if len(returned) != len(completions):
    raise UserError(
      f"The reward {name} returned {len(returned)} scores for {len(completions)} completions."
    )
  for i, score in enumerate(returned):
    try:
      is_finite = math.fabs(score) <= _LARGEST
    except (TypeError, OverflowError) as error:
      raise UserError(f"The reward {name} returned {score!r}, not a number.") from error
    if not is_finite:
      raise UserError(
        f"The reward {name} returned {score} for completion {completions[i][:80]!r} of prompt "
        f"{prompts[i][:80]!r}. Return a finite number for every completion."
      )
  return np.array(returned, np.float32)


def _weight_and_source(item: str) -> tuple[float, str]:
  weight, star, source = item.rpartition("*")
  if not star:
    return 1.0, item
  try:
    number = float(weight)
  except ValueError:
    number = 0.0
  if number == 0 or not math.isfinite(number):
    raise UserError(
      f"--reward={item}: the weight {weight!r} is no finite number other than 0; "
      "write e.g. 0.5*FILE.py:FUNCTION."
    )
  return number, source.strip()


def _path_and_name(source: str) -> tuple[pathlib.Path, str]:
  path, _, name = source.rpartition(":")
  if not path.endswith(".py") or not pathlib.Path(path).is_file():
    raise UserError(
      f"--reward={source}: there is no such Python file; write FILE.py:FUNCTION, math or model."
    )
  return pathlib.Path(path).resolve(), name


def _run_file(path: pathlib.Path, source: str) -> ModuleType:
  module_spec = importlib.util.spec_from_file_location(f"reward_of_{path.stem}", path)
  module = importlib.util.module_from_spec(module_spec)
  # Dataclasses and pickles in the file look their module up by name.
  sys.modules[module_spec.name] = module
  try:
    module_spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f"--reward={source}: the file fails: {_last_frame(error)}") from error
  return module


def _function(module: ModuleType, name: str, source: str) -> RewardFn:
  if not callable(getattr(module, name, None)):
    raise UserError(f"--reward={source}: the file defines no function {name!r}.")
  return getattr(module, name)


def _last_frame(error: Exception) -> str:
  frame = traceback.extract_tb(error.__traceback__)[-1]
  return (
    f"{type(error).__name__}: {error} ({pathlib.Path(frame.filename).name} line {frame.lineno})"
  )
