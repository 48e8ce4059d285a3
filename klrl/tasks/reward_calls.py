"""Calls a user's reward function and checks what it returns.

The function is `f(prompts, completions, **columns)`, plain or `async`. It gets copies, so its
changes reach neither the samples nor the next reward. If it has parameters `prompt_ids` or
`completion_ids`, it gets the tokens too. Where prompts are chats, it gets them as lists of messages
and each completion as [{"role": "assistant", "content": ...}], as in TRL. It may return a list, or
an array or tensor of any library and on any device. A None in a list abstains: it says nothing of
that completion.
"""

import asyncio
import atexit
import contextlib
import copy
import functools
import inspect
import itertools
import math
import os
import pathlib
import reprlib
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.tasks import chats

RewardFn = Callable[..., list[float]]

LARGEST = float(np.finfo(np.float32).max)
_LONGEST_MESSAGE = 1000


class Ids(NamedTuple):
  """The tokens of prompts and completions, without padding."""

  prompt_ids: list[list[int]]
  completion_ids: list[list[int]]


def scores(
  reward_fn: RewardFn,
  records: list[dict[str, Any]],
  completions: list[str],
  name: str,
  ids: Ids | None = None,
) -> np.ndarray:
  """Returns [B] float32, the scores by `reward_fn`, called `name`, of the completions of `records`.

  It is NaN where the function abstains by returning None.

  Args:
    reward_fn: the user's function.
    records: B rows of the prompt file.
    completions: B texts.
    name: the name of the reward in messages.
    ids: the tokens of the same B rows; needed if the function asks for them.

  Raises:
    UserError: the function cannot be called like this, raises or exits, returns another number of
      scores, or a score that is not a finite float32.
  """
  prompts = [record["prompt"] for record in records]
  columns = {
    column: [copy.deepcopy(record.get(column)) for record in records]
    for column in sorted({column for record in records for column in record} - {"prompt"})
  }
  given = {
    "prompts": copy.deepcopy(prompts),
    "completions": [
      chats.said_by(chats.ASSISTANT, completion) if chats.is_chat(prompt) else completion
      for prompt, completion in zip(prompts, completions, strict=True)
    ],
  }
  check_parameters(reward_fn, name, columns)
  asked_for = [field for field in Ids._fields if field in _parameters(reward_fn)]
  if asked_for and ids is None:
    raise ValueError(f"The reward {name} asks for {', '.join(asked_for)}; pass ids.")
  given |= {field: copy.deepcopy(getattr(ids, field)) for field in asked_for}
  for taken in given:
    if taken in columns:
      raise UserError(
        f"The prompts have a column {taken!r}, which reward {name} gets from the run; rename it."
      )

  def call():
    returned = reward_fn(**given, **columns)
    try:
      return _as_list(returned, len(completions))
    except _NoList:
      raise UserError(
        f"The reward {name}{_at(reward_fn)} returned {reprlib.repr(returned)}; return a list with "
        "one number for each completion."
      ) from None

  returned = checked(name, call, _place(reward_fn)[0])
  if len(returned) != len(completions):
    number = "more" if len(returned) > len(completions) else len(returned)
    raise UserError(
      f"The reward {name} returned {number} scores for {len(completions)} completions."
    )
  return np.array(
    [_finite(name, *row) for row in zip(returned, completions, prompts, strict=True)],
    np.float32,
  )


def check_parameters(reward_fn: RewardFn, name: str, columns: Iterable[str]) -> None:
  """Raises UserError if `reward_fn`, called `name`, cannot be called for such columns."""
  try:
    signature = inspect.signature(reward_fn)
  except (TypeError, ValueError):  # Some functions of C have no signature.
    return
  asked_for = (field for field in Ids._fields if field in signature.parameters)
  arguments = ("prompts", "completions", *asked_for, *columns)
  try:
    signature.bind(**dict.fromkeys(arguments))
  except TypeError as error:
    called = ", ".join(f"{argument}=..." for argument in arguments)
    raise UserError(
      f"The reward {name}{_at(reward_fn)} is called as {name}({called}), with every column of the "
      f"prompts by its name: {error}. Write def {name}(prompts, completions, **columns)."
    ) from error


def checked(name: str, call: Callable, file: str | None) -> Any:
  """Returns `call()`, which runs the user's code; an error in it becomes one message.

  Args:
    name: the name of the reward in messages.
    call: runs the code.
    file: the file of the code, if there is one.

  Raises:
    UserError: the code raises anything but Ctrl-C; `sys.exit` counts as an error.
  """
  try:
    with _where_it_left():
      return call()
  except (UserError, KeyboardInterrupt):
    raise
  except BaseException as error:
    raise UserError(f"The reward {name} failed: {_told(error, file)}.") from error


_folder: pathlib.Path | None = None  # the folder that the user's code changed to, if it did


@contextlib.contextmanager
def _where_it_left():
  """Runs the user's code in the folder that it last changed to, and the run in its own."""
  global _folder
  ours = os.getcwd()
  if _folder is not None and _folder.is_dir():
    os.chdir(_folder)
  try:
    yield
  finally:
    here = os.getcwd()
    _folder = None if here == ours else pathlib.Path(here)
    os.chdir(ours)


def _told(error: BaseException, file: str | None) -> str:
  """Returns the error in one line, with its place: the last frame in a file beside `file`."""
  try:
    text = str(error)
  except KeyboardInterrupt:
    raise
  except BaseException:
    text = "(its message cannot be made)"
  if isinstance(error, SystemExit):
    text += ", which would end the run; raise an error instead"
  if isinstance(error, SyntaxError) and error.filename:
    text, where = error.msg, (error.filename, error.lineno)
  else:
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    folder = file and pathlib.Path(file).parent
    own = [frame for frame in frames if pathlib.Path(frame[0]).parent == folder]
    where = (own or frames)[-1]
  return f"{type(error).__name__}: {text[:_LONGEST_MESSAGE]} ({_line(*where)})"


def _place(fn: Callable) -> tuple[str | None, int]:
  """Returns the file and line of a function, or (None, 0) if it is not written in Python."""
  code = getattr(inspect.unwrap(fn), "__code__", None)
  return (code.co_filename, code.co_firstlineno) if code else (None, 0)


def _at(fn: Callable) -> str:
  file, line = _place(fn)
  return f" ({_line(file, line)})" if file else ""


def _line(file: str, line: int) -> str:
  return f"{pathlib.Path(file).name} line {line}"


def _parameters(fn: Callable) -> set[str]:
  """Returns the parameters of `fn`; `**columns` names none."""
  try:
    return set(inspect.signature(fn).parameters)
  except (TypeError, ValueError):  # Some functions of C have no signature.
    return set()


@functools.cache
def _event_loop() -> asyncio.Runner:
  # One loop serves the whole run: a client that a reward opens in one call works in the next.
  runner = asyncio.Runner()
  atexit.register(runner.close)
  return runner


class _NoList(Exception):
  """What a reward returned is no list, array or iterator."""


def _as_list(returned, num_scores: int) -> list:
  """Returns the result of a reward as a list; a list that is too long is cut one score too late."""
  if inspect.isawaitable(returned):

    async def awaited():
      return await returned

    returned = _event_loop().run(awaited())
  is_array = hasattr(returned, "tolist")  # of any library, whatever its dtype, device and gradient
  try:
    rows = iter(returned.tolist() if is_array else returned)
  except TypeError as error:
    raise _NoList from error
  if is_array:
    return [_one(row) for row in rows]
  return list(itertools.islice(rows, num_scores + 1))


def _one(row):
  """Returns the number in a row of an array [B, 1], and anything else as it is."""
  return row[0] if isinstance(row, list) and len(row) == 1 else row


def _finite(name: str, score, completion: str, prompt: chats.Text) -> float:
  try:
    value = _one(score.tolist()) if hasattr(score, "tolist") else score
    if value is None:
      return math.nan
    magnitude, number = math.fabs(value), float(value)  # float() would read a text as a number.
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise UserError(f"The reward {name} returned {reprlib.repr(score)}, not a number.") from error
  if not magnitude <= LARGEST:
    raise UserError(
      f"The reward {name} returned {number} for completion {completion[:80]!r} of prompt "
      f"{chats.beginning(prompt)}. Return a finite number for every completion, or None to say "
      "nothing of it."
    )
  return number
