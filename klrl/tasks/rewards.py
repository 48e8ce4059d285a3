"""Scores: a weighted sum of the user's functions, the maths verifier, and a reward model.

A user's function is `f(prompts, completions, **columns) -> list of float`, where `columns` are the
other columns of the prompt file, as one list each. `reward_calls` calls it.
"""

import functools
import importlib.util
import inspect
import math
import pathlib
import sys
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from klrl.devices import processes
from klrl.errors import UserError
from klrl.tasks import math_answers
from klrl.tasks.reward_calls import (
  ENDLESS,
  LARGEST,
  Ids,
  Patience,
  RewardFn,
  begin,
  check_parameters,
  checked,
  end,
  scores,
)

MATH, MODEL = "math", "model"  # sources that are no file


class Reward(NamedTuple):
  """One term of the sum."""

  name: str  # short and unique, for metrics
  weight: float
  fn: RewardFn | None  # None: the reward model, which scores on the device
  patience: Patience = ENDLESS


def weighted(item: str, of="--reward=", like="FILE.py:FUNCTION") -> tuple[float, str]:
  """Returns the weight and the source of an item `[WEIGHT*]SOURCE`, 1 where there is no weight.

  Raises:
    UserError: the weight is 0 or not finite. The message names the item after the words `of`, and
      shows a source `like` those that are meant.
  """
  weight, star, source = item.strip().rpartition("*")
  if not star:
    return 1.0, source
  try:
    number = float(weight)
  except ValueError:
    number = 0.0
  if number == 0 or not math.isfinite(number):
    raise UserError(
      f"{of}{item.strip()}: the weight {weight!r} is no finite number other than 0; "
      f"write e.g. 0.5*{like}."
    )
  return number, source.strip()


def load_rewards(spec: str, patience: Patience = ENDLESS) -> list[Reward]:
  """Returns the rewards that `[WEIGHT*]SOURCE,...` lists, in its order, each with `patience`.

  A SOURCE is `FILE.py:FUNCTION`, `math` (klrl.tasks.math_answers) or `model` (the reward model). A
  reward has the name of its function, or of file and function where two functions share a name. A
  file is the user's own code. It is run once in a process, and may import files beside it.

  Raises:
    UserError: an item is none of these, has a weight that is 0 or not finite, or is given twice; a
      file fails; or math-verify is missing.
  """
  sources, rewards = [], []
  for item in map(str.strip, spec.split(",")):
    weight, source = weighted(item)
    if source == MATH:
      math_answers.check_installed()
      reward = Reward(MATH, weight, math_answers.math_reward, patience)
    elif source == MODEL:
      reward = Reward(MODEL, weight, None)
    else:
      source = path, name = _path_and_name(source)
      reward = Reward(
        name, weight, _function(_run_file(path, patience.timeout), name, item), patience
      )
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


def check_rewards(spec: str, records: list[dict[str, Any]], patience: Patience = ENDLESS) -> None:
  """Raises UserError if one of the rewards of `spec` cannot be called for such prompts."""
  columns = sorted({column for record in records for column in record} - {"prompt"})
  for reward in load_rewards(spec, patience):
    if reward.fn is not None:
      check_parameters(reward.fn, reward.name, columns)


def reads_model(spec: str) -> bool:
  """Returns whether the reward model is one of the rewards that `spec` lists."""
  return any(weighted(item)[1] == MODEL for item in spec.split(","))


def weighted_scores(
  rewards: list[Reward],
  records: list[dict[str, Any]],
  completions: list[str],
  model_scores: np.ndarray | None = None,
  ids: Ids | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the weighted sum [B] float32 of the rewards, and each one before its weight, by name.

  A reward that abstains from a completion, by None, is NaN there and is not in its sum; the sum is
  NaN where all do.

  Args:
    rewards: as `load_rewards` returns them.
    records: B rows of the prompt file.
    completions: B texts.
    model_scores: [B], the scores of the reward model; needed if it is one of the rewards.
    ids: the tokens of the same rows, for functions that ask for them.

  Raises:
    UserError: as `reward_calls.scores`; the reward model computes NaN; the sum is not a finite
      float32.
    ValueError: `model_scores` is missing.
  """
  if model_scores is None and any(reward.fn is None for reward in rewards):
    raise ValueError("The reward model is one of the rewards; pass model_scores.")
  # Those that are `async` go on together.
  begun = {name: fn and begin(fn, records, completions, name, ids) for name, _, fn, _ in rewards}
  try:
    by_name = {
      name: np.asarray(model_scores, np.float32)
      if fn is None
      else scores(fn, records, completions, name, ids, patience, begun[name])
      for name, _, fn, patience in rewards
    }
  finally:
    for task in begun.values():
      end(task)
  if any(reward.fn is None and np.isnan(by_name[reward.name]).any() for reward in rewards):
    raise UserError("The reward model computes NaN. Train it again, or give another one.")
  terms = [reward.weight * by_name[reward.name].astype(np.float64) for reward in rewards]
  total = np.where(np.isnan(terms).all(axis=0), np.nan, np.nansum(terms, axis=0))
  if (np.abs(total) > LARGEST).any():
    worst = int(np.argmax(np.abs(total) > LARGEST))
    terms = ", ".join(f"{name} {values[worst]:g}" for name, values in by_name.items())
    raise UserError(
      f"The weighted sum of the rewards is {total[worst]:g} for completions[{worst}], "
      f"{completions[worst][:80]!r}: {terms}. Scores and their sum must be finite."
    )
  return total.astype(np.float32), by_name


def shared_scores(
  rewards: list[Reward],
  records: list[dict[str, Any]],
  completions: list[str],
  model_scores: np.ndarray | None = None,
  ids: Ids | None = None,
  *,
  unit: int = 1,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns what `weighted_scores` does, where each process calls the functions for its own rows.

  All processes must call it with the same rows. So many neighbouring rows as `unit` says stay
  together, which is for functions that compare the completions of one prompt.
  """

  def of_rows(rows: slice) -> np.ndarray:
    total, each = weighted_scores(
      rewards,
      records[rows],
      completions[rows],
      None if model_scores is None else model_scores[rows],
      ids and Ids(*(x[rows] for x in ids)),
    )
    return np.stack([total, *each.values()])

  total, *each = processes.in_shares(of_rows, len(completions), unit=unit)
  return total, dict(zip((reward.name for reward in rewards), each, strict=True))


def _path_and_name(source: str) -> tuple[pathlib.Path, str]:
  path, _, name = source.rpartition(":")
  if pathlib.Path(source).is_file():
    raise UserError(
      f"--reward={source} names a file and no function in it; write --reward={source}:FUNCTION."
    )
  if not path.endswith(".py") or not pathlib.Path(path).is_file():
    raise UserError(
      f"--reward={source}: there is no such Python file; write FILE.py:FUNCTION, math or model."
    )
  return pathlib.Path(path).resolve(), name


_modules: dict[pathlib.Path, ModuleType] = {}  # of the files that have run


def _run_file(path: pathlib.Path, timeout: float) -> ModuleType:
  """Returns the module of a user's file, which runs once, for at most `timeout` seconds."""
  if path in _modules:
    return _modules[path]
  folder = str(path.parent)
  if folder not in sys.path:
    sys.path.append(folder)  # It comes last, so that a user's file hides no package.
  module_spec = importlib.util.spec_from_file_location(_module_name(path), path)
  module = importlib.util.module_from_spec(module_spec)
  # Dataclasses and pickles in the file look their module up by name.
  sys.modules[module_spec.name] = module
  run = functools.partial(module_spec.loader.exec_module, module)
  checked(f"file {path}", run, str(path), timeout=timeout)
  _modules[path] = module
  return module


def _module_name(path: pathlib.Path) -> str:
  """Returns a name for the module, one by which the reward's worker processes find it if any is."""
  try:
    found = path.stem.isidentifier() and importlib.util.find_spec(path.stem)
  except ValueError:  # `__main__` may have no file.
    found = None
  is_it = found and found.origin and pathlib.Path(found.origin).resolve() == path
  return path.stem if is_it else f"reward_of_{path.stem}"


def _function(module: ModuleType, name: str, source: str) -> RewardFn:
  if not callable(getattr(module, name, None)):
    own = [
      key
      for key, value in vars(module).items()
      if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    raise UserError(
      f"--reward={source}: the file defines no function {name!r}"
      + (f"; it defines {', '.join(own)}." if own else ".")
    )
  return getattr(module, name)
