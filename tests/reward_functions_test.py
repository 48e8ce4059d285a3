"""Tests of the reward functions that users write: how they load, and each way of being wrong."""

import numpy as np
import pytest

from klrl.errors import UserError
from klrl.tasks.rewards import load_reward_fn, scores

RECORDS = [{"prompt": "first"}, {"prompt": "second"}]


def write(tmp_path, source, name="reward.py"):
  path = tmp_path / name
  path.write_text(source)
  return path


def test_the_named_function_is_loaded_and_gives_float32_scores(tmp_path):
  path = write(
    tmp_path,
    "import math\n"
    "def other(prompts, completions): return [0] * len(prompts)\n"
    "def lengths(prompts, completions): return [math.sqrt(len(c)) for c in completions]\n",
  )
  returned = scores(load_reward_fn(f"{path}:lengths"), RECORDS, ["aaaa", ""])
  np.testing.assert_array_equal(returned, np.float32([2, 0]))
  assert returned.dtype == np.float32


def test_a_folder_may_hold_a_colon(tmp_path):
  folder = tmp_path / "a:b"
  folder.mkdir()
  path = write(folder, "def f(prompts, completions): return [1, 2]")
  assert load_reward_fn(f"{path}:f")([], []) == [1, 2]


@pytest.mark.parametrize("returned", [np.array([1.5, 2.0]), (1, True), iter([np.float32(1), 2])])
def test_any_sequence_of_numbers_will_do(returned):
  assert scores(lambda prompts, completions: returned, RECORDS, ["a", "b"]).shape == (2,)


@pytest.mark.parametrize(
  ("name", "source", "function", "message"),
  [
    ("reward.py", "", "absent.py:f", r"--reward=.*absent\.py:f: there is no such Python file"),
    ("reward.py", "", "reward.py", "write FILE.py:FUNCTION"),
    ("reward.txt", "", "reward.txt:f", "no such Python file; write FILE.py:FUNCTION"),
    ("reward.py", "def g(): pass", "reward.py:f", r"--reward=.*: the file defines no function 'f'"),
    ("reward.py", "f = 3", "reward.py:f", "defines no function 'f'"),
    ("reward.py", "f = 3", "reward.py:", "defines no function ''"),
    ("reward.py", "\n1 / 0", "reward.py:f", r"fails: ZeroDivisionError.*\(reward\.py line 2\)"),
    ("reward.py", "import no_such_module", "reward.py:f", "fails: ModuleNotFoundError.*no_such"),
    ("reward.py", "def f(:", "reward.py:f", r"fails: SyntaxError.*reward\.py, line 1"),
  ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(tmp_path, name, source, function, message):
  write(tmp_path, source, name)
  with pytest.raises(UserError, match=message):
    load_reward_fn(f"{tmp_path}/{function}")


def test_a_function_that_raises_is_named_with_its_line(tmp_path):
  path = write(tmp_path, "def f(prompts, completions):\n  return [c.absent for c in completions]\n")
  with pytest.raises(UserError, match=r"failed: AttributeError: .*\(reward\.py line 2\)"):
    scores(load_reward_fn(f"{path}:f"), RECORDS, ["a", "b"])


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    ([1.0], "returned 1 scores for 2 completions"),
    ([1.0, 2.0, 3.0], "returned 3 scores for 2 completions"),
    ([], "returned 0 scores for 2 completions"),
    (None, "failed: TypeError: 'NoneType' object is not iterable"),
    (1.0, "failed: TypeError: 'float' object is not iterable"),
    ([1.0, None], "returned None, not a number"),
    ([1.0, "2.0"], "returned '2.0', not a number"),
    ("ab", "returned 'a', not a number"),
    ([[1.0], [2.0]], r"returned \[1.0\], not a number"),
    ([1.0, float("nan")], "returned nan for completion 'bbb' of prompt 'second'"),
    ([float("-inf"), 1.0], "returned -inf for completion 'aaa' of prompt 'first'"),
    # Finite numbers that no float32 holds.
    ([1.0, 1e39], r"returned 1e\+39 for completion 'bbb'"),
    ([1.0, 10**400], "returned 10+, not a number"),
  ],
)
def test_each_wrong_answer_is_one_clear_error(returned, message):
  with pytest.raises(UserError, match=message):
    scores(lambda prompts, completions: returned, RECORDS, ["aaa", "bbb"])


def test_other_columns_arrive_as_lists_and_missing_ones_as_none():
  records = [{"prompt": "p", "answer": "4", "level": 1}, {"prompt": "q", "answer": "5"}]
  seen = {}

  def reward_fn(prompts, completions, **columns):
    seen.update(columns, prompts=prompts, completions=completions)
    return [0.0, 1.0]

  scores(reward_fn, records, ["a", "b"])
  assert seen == {
    "prompts": ["p", "q"],
    "completions": ["a", "b"],
    "answer": ["4", "5"],
    "level": [1, None],
  }


def test_a_column_that_the_function_does_not_take_is_named():
  with pytest.raises(UserError, match="unexpected keyword argument 'answer'"):
    scores(lambda prompts, completions: [0.0], [{"prompt": "p", "answer": "4"}], ["a"])


def test_it_is_called_by_keyword_so_that_the_order_of_arguments_is_free(tmp_path):
  def swapped(completions, prompts):
    return [len(completion) for completion in completions]

  np.testing.assert_array_equal(scores(swapped, RECORDS, ["a", "bc"]), [1, 2])
  np.testing.assert_array_equal(scores(lambda completions, **_: [1, 2], RECORDS, ["", ""]), [1, 2])
