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
import faulthandler
import functools
import inspect
import itertools
import math
import os
import pathlib
import reprlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.run import progress
from klrl.tasks import chats

RewardFn = Callable[..., list[float]]

LARGEST = float(np.finfo(np.float32).max)
_LONGEST_MESSAGE = 1000
# Code that goes on after its time is interrupted again each second, and ended after the second.
_SECONDS_TO_INSIST, _SECONDS_TO_END = 1.0, 30.0
# A server that failed gets this long before the next try, and twice as long before each one after.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class Ids(NamedTuple):
  """The tokens of prompts and completions, without padding."""

  prompt_ids: list[list[int]]
  completion_ids: list[list[int]]


class Patience(NamedTuple):
  """How long a call of a reward may take, and how often one that failed is made again."""

  timeout: float = 0.0  # seconds; 0: as long as it likes
  retries: int = 0


ENDLESS = Patience()  # but for one call


def scores(
  reward_fn: RewardFn,
  records: list[dict[str, Any]],
  completions: list[str],
  name: str,
  ids: Ids | None = None,
  patience: Patience = ENDLESS,
  begun: asyncio.Task | None = None,
) -> np.ndarray:
  """Returns [B] float32, the scores by `reward_fn`, called `name`, of the completions of `records`.

  It is NaN where the function abstains by returning None.

  Args:
    reward_fn: the user's function.
    records: B rows of the prompt file; the function is not called for none.
    completions: B texts.
    name: the name of the reward in messages.
    ids: the tokens of the same B rows; needed if the function asks for them.
    patience: how long the function may take, and how often it is called again if it fails.
    begun: the first call, if it has begun; see `begin`.

  Raises:
    UserError: the function cannot be called like this, raises or exits, takes too long, returns
      another number of scores, or a score that is not a finite float32.
  """
  if not records:  # This process has no rows.
    return np.zeros(0, np.float32)
  given = _arguments(reward_fn, records, completions, name, ids)

  def call():
    nonlocal begun
    task, begun = begun, None
    goes_on = task is not None and task.get_loop() is _event_loop().get_loop()
    returned = task if goes_on else reward_fn(**given())
    try:
      return _as_list(returned, len(completions))
    except _NoList:
      raise UserError(
        f"The reward {name}{_at(reward_fn)} returned {reprlib.repr(returned)}; return a list with "
        "one number for each completion."
      ) from None

  def attempt():
    returned = checked(name, call, _place(reward_fn)[0], timeout=patience.timeout)
    if len(returned) != len(completions):
      number = "more" if len(returned) > len(completions) else len(returned)
      raise UserError(
        f"The reward {name} returned {number} scores for {len(completions)} completions."
      )
    prompts = [record["prompt"] for record in records]
    rows = enumerate(zip(returned, completions, prompts, strict=True))
    return np.array([_finite(name, i, *row) for i, row in rows], np.float32)

  return _tried(attempt, name, patience.retries)


def begin(
  reward_fn: RewardFn,
  records: list[dict[str, Any]],
  completions: list[str],
  name: str,
  ids: Ids | None = None,
) -> asyncio.Task | None:
  """Returns the first call of an `async` function, for `scores` to await, and None of another one.

  What has begun goes on while another is awaited. Arguments and errors are those of `scores`.
  """
  if not (records and inspect.iscoroutinefunction(reward_fn)):
    return None
  given = _arguments(reward_fn, records, completions, name, ids)
  return _event_loop().get_loop().create_task(reward_fn(**given()))


def end(task: asyncio.Task | None) -> None:
  """Cancels a call that `begin` returned, if it goes on; an error in it is of no interest."""
  if task is not None and not task.cancel() and not task.cancelled():
    task.exception()


def _arguments(reward_fn, records, completions, name, ids) -> Callable[[], dict[str, Any]]:
  """Returns what makes the arguments of a call, new ones each time; raises as `scores`."""
  columns = sorted({column for record in records for column in record} - {"prompt"})
  check_parameters(reward_fn, name, columns)
  asked_for = [field for field in Ids._fields if field in _parameters(reward_fn)]
  if asked_for and ids is None:
    raise ValueError(f"The reward {name} asks for {', '.join(asked_for)}; pass ids.")
  for taken in ("prompts", "completions", *asked_for):
    if taken in columns:
      raise UserError(
        f"The prompts have a column {taken!r}, which reward {name} gets from the run; rename it."
      )

  def copies() -> dict[str, Any]:
    return {
      "prompts": [copy.deepcopy(record["prompt"]) for record in records],
      "completions": [
        chats.said_by(chats.ASSISTANT, text) if chats.is_chat(record["prompt"]) else text
        for record, text in zip(records, completions, strict=True)
      ],
      **{field: copy.deepcopy(getattr(ids, field)) for field in asked_for},
      **{column: [copy.deepcopy(record.get(column)) for record in records] for column in columns},
    }

  return copies


def _tried(attempt: Callable, name: str, retries: int) -> Any:
  """Returns `attempt()`, which is made again up to `retries` times if it raises a UserError."""
  for number in range(retries):
    try:
      return attempt()
    except UserError as error:
      _say_again(name, str(error))
      time.sleep(min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE))
  try:
    return attempt()
  except UserError as error:
    after = f" It was tried {retries + 1} times, see --reward_retries." if retries else ""
    raise UserError(f"{error}{after}") from error


_said_again: set[str] = set()


def _say_again(name: str, failure: str) -> None:
  if name not in _said_again:
    _said_again.add(name)
    progress.warn(f"{failure} It is tried again; this is not said again.")


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


def checked(name: str, call: Callable, file: str | None, *, timeout: float = 0.0) -> Any:
  """Returns `call()`, which runs the user's code; an error in it becomes one message.

  Args:
    name: the name of the reward in messages.
    call: runs the code.
    file: the file of the code, if there is one.
    timeout: seconds that it may take; 0 for any number.

  Raises:
    UserError: the code raises anything but Ctrl-C, or takes too long; `sys.exit` counts as an
      error.
  """
  try:
    with _where_it_left(), _limited(timeout):
      return call()
  except (UserError, KeyboardInterrupt):
    raise
  except _TookTooLong as error:
    place = _line(*_last_place(error, file))
    raise UserError(
      f"The reward {name} has not returned after --reward_timeout={timeout:g} seconds; it was at "
      f"{place}."
    ) from error
  except BaseException as error:
    raise UserError(f"The reward {name} failed: {_told(error, file)}.") from error


class _TookTooLong(BaseException):
  """Raised inside the user's code, which catches an `Exception` more often than not."""


@contextlib.contextmanager
def _limited(seconds: float):
  """Raises `_TookTooLong` inside the body after so many seconds; 0 is no limit.

  A signal does this, which also interrupts what waits, and regular expressions. Signals reach the
  main thread alone, so elsewhere there is no limit. What a signal cannot interrupt, such as a
  library that never comes back, ends the process with a traceback, which needs no Python.
  """
  if not seconds or threading.current_thread() is not threading.main_thread():
    yield
    return

  def interrupt(*_):
    raise _TookTooLong

  before = signal.signal(signal.SIGALRM, interrupt)
  faulthandler.dump_traceback_later(seconds + _SECONDS_TO_END, exit=True, file=2)
  signal.setitimer(signal.ITIMER_REAL, seconds, _SECONDS_TO_INSIST)
  try:
    try:
      yield
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
  finally:  # Again, since the signal may arrive in the line above.
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, before)


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
  """Returns the error in one line, with its place."""
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
    where = _last_place(error, file)
  return f"{type(error).__name__}: {text[:_LONGEST_MESSAGE]} ({_line(*where)})"


def _last_place(error: BaseException, file: str | None) -> tuple[str, int]:
  """Returns file and line of the last frame of an error that is in a file beside `file`."""
  frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  folder = file and pathlib.Path(file).parent
  own = [frame for frame in frames if pathlib.Path(frame[0]).parent == folder]
  return (own or frames)[-1]


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

    try:
      returned = _event_loop().run(awaited())
    except _TookTooLong:
      _event_loop.cache_clear()  # What is pending there would go on in the next call.
      raise
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


def _finite(name: str, row: int, score, completion: str, prompt: chats.Text) -> float:
  """Returns the score of `completions[row]` as the function got them, and NaN for None."""
  at = f"completions[{row}], {completion[:80]!r} of prompt {chats.beginning(prompt)}"
  try:
    value = _one(score.tolist()) if hasattr(score, "tolist") else score
    if value is None:
      return math.nan
    magnitude, number = math.fabs(value), float(value)  # float() would read a text as a number.
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise UserError(
      f"The reward {name} returned {reprlib.repr(score)}, not a number, for {at}."
    ) from error
  if not magnitude <= LARGEST:
    raise UserError(
      f"The reward {name} returned {number} for {at}. Return a finite number for every "
      "completion, or None to say nothing of it."
    )
  return number
