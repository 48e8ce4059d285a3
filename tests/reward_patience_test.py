"""Tests of the patience with a reward: one that takes too long is interrupted, one that fails is
called again.
"""

import asyncio
import contextlib
import os
import re
import signal
import time

import forked
import pytest

from klrl.errors import UserError
from klrl.tasks import reward_calls
from klrl.tasks.reward_calls import Patience, scores
from klrl.tasks.rewards import load_rewards

RECORDS = [{"prompt": "first"}, {"prompt": "second"}]


def hangs_in_a_loop(prompts, completions):
  while True:
    with contextlib.suppress(Exception):
      time.sleep(60)


def hangs_in_a_regular_expression(prompts, completions):
  return [re.match("(a*)*b", "a" * 40) for _ in completions]


async def hangs_in_a_coroutine(prompts, completions):
  await asyncio.sleep(60)


def hangs_in_a_generator(prompts, completions):
  yield 1.0
  time.sleep(60)


@pytest.mark.parametrize(
  "fn",
  [
    hangs_in_a_loop,
    hangs_in_a_regular_expression,
    hangs_in_a_coroutine,
    hangs_in_a_generator,
  ],
  ids=lambda fn: fn.__name__,
)
def test_a_function_that_takes_too_long_is_interrupted_and_the_next_one_is_not(fn):
  before = signal.getsignal(signal.SIGALRM)
  with pytest.raises(UserError, match=r"f has not returned after --reward_timeout=0.05 seconds"):
    scores(fn, RECORDS, ["a", "b"], "f", patience=Patience(timeout=0.05))

  async def slow(prompts, completions):
    await asyncio.sleep(0.01)
    return [1, 2]

  assert scores(slow, RECORDS, ["a", "b"], "f").tolist() == [1, 2]
  assert signal.getsignal(signal.SIGALRM) == before
  assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_the_line_at_which_it_hangs_is_told(tmp_path):
  path = tmp_path / "slow.py"
  path.write_text("import time\n\ndef f(prompts, completions):\n  time.sleep(60)\n")
  (reward,) = load_rewards(f"{path}:f")
  with pytest.raises(UserError, match=r"seconds; it was at slow\.py line 4\."):
    scores(reward.fn, RECORDS, ["a", "b"], "f", patience=Patience(timeout=0.05))


def test_a_file_that_hangs_at_its_import_is_interrupted(tmp_path):
  path = tmp_path / "hanging.py"
  path.write_text("import time\n\ntime.sleep(60)\n\ndef f(**columns):\n  return [0, 0]\n")
  message = r"hanging\.py has not returned after .*=0\.05 seconds; it was at hanging\.py line 3\."
  with pytest.raises(UserError, match=message):
    load_rewards(f"{path}:f", Patience(timeout=0.05))


# It catches everything, so that no exception of ours gets out.
STUBBORN = """
import time
from klrl.tasks import reward_calls

def stubborn(prompts, completions):
  while True:
    try:
      time.sleep(60)
    except BaseException:
      pass

reward_calls._SECONDS_TO_END = 0.2
patience = reward_calls.Patience(timeout=0.1)
reward_calls.scores(stubborn, [{"prompt": "p"}], ["c"], "stubborn", patience=patience)
"""


def test_what_cannot_be_interrupted_ends_the_process_and_shows_where_it_was(tmp_path):
  process = forked.Process(["-c", STUBBORN], tmp_path, dict(os.environ))
  status, said = process.finished()
  assert status == 1 and "Timeout (0:00:00.3" in said and "in stubborn" in said


def test_a_call_that_fails_is_made_again_with_fresh_arguments_and_this_is_said_once(
  monkeypatch, capsys
):
  pauses, calls = [], []
  monkeypatch.setattr(time, "sleep", pauses.append)
  monkeypatch.setattr(reward_calls, "_said_again", set())
  failures = [ConnectionError("server gone"), [1.0], [float("nan"), 1.0], SystemExit(0)]

  def unsure(prompts, completions):
    calls.append((list(prompts), list(completions)))
    completions.clear()
    found = failures.pop(0) if failures else [1.0, 2.0]
    if isinstance(found, BaseException):
      raise found
    return found

  with pytest.raises(UserError, match=r"returned nan .*It was tried 3 times, see --rew"):
    scores(unsure, RECORDS, ["a", "b"], "unsure", patience=Patience(retries=2))
  assert scores(unsure, RECORDS, ["a", "b"], "unsure", patience=Patience(retries=2)).tolist() == [
    *(1, 2)
  ]
  assert calls == [(["first", "second"], ["a", "b"])] * 5
  assert pauses == [1, 2, 1]
  told = " ".join(capsys.readouterr().out.split())
  assert told.count("It is tried again") == 1 and "ConnectionError: server gone" in told


def test_every_function_of_a_sum_has_the_patience_of_the_run(tmp_path):
  (tmp_path / "own.py").write_text("def f(prompts, completions): return [1.0]\n")
  patience = Patience(5.0, 2)
  rewards = load_rewards(f"math,2*{tmp_path}/own.py:f,model", patience)
  assert [reward.patience for reward in rewards if reward.fn] == [patience] * 2
