"""Tests of rewards: how they load, how they add up, and each way of being wrong."""

import asyncio
import itertools
import os
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from klrl.errors import UserError
from klrl.tasks import math_answers
from klrl.tasks.reward_calls import Ids, Patience, scores
from klrl.tasks.rewards import Reward, load_rewards, weighted_scores

RECORDS = [{"prompt": "first"}, {"prompt": "second"}]


def write(tmp_path, source, name="reward.py"):
  path = tmp_path / name
  path.write_text(source)
  return path


def only(spec):
  """Returns the function of a list of one reward."""
  (reward,) = load_rewards(spec)
  return reward.fn


def test_the_named_function_is_loaded_and_gives_float32_scores(tmp_path):
  path = write(
    tmp_path,
    "import math\n"
    "def other(prompts, completions): return [0] * len(prompts)\n"
    "def lengths(prompts, completions): return [math.sqrt(len(c)) for c in completions]\n",
  )
  returned = scores(only(f"{path}:lengths"), RECORDS, ["aaaa", ""], "lengths")
  np.testing.assert_array_equal(returned, np.float32([2, 0]))
  assert returned.dtype == np.float32


def test_a_folder_may_hold_a_colon(tmp_path):
  folder = tmp_path / "a:b"
  folder.mkdir()
  path = write(folder, "def f(prompts, completions): return [1, 2]")
  assert only(f"{path}:f")([], []) == [1, 2]


@pytest.mark.parametrize("returned", [np.array([1.5, 2.0]), (1, True), iter([np.float32(1), 2])])
def test_any_sequence_of_numbers_will_do(returned):
  assert scores(lambda prompts, completions: returned, RECORDS, ["a", "b"], "f").shape == (2,)


@pytest.mark.parametrize(
  ("name", "source", "function", "message"),
  [
    ("reward.py", "", "absent.py:f", r"--reward=.*absent\.py:f: there is no such Python file"),
    ("reward.py", "", "reward.py", r"names a file and no function.*reward\.py:FUNCTION"),
    ("reward.txt", "", "reward.txt:f", "no such Python file; write FILE.py:FUNCTION"),
    ("reward.py", "def g(): pass", "reward.py:f", "the file defines no function 'f'; it defines g"),
    ("reward.py", "f = 3", "reward.py:f", "defines no function 'f'"),
    ("reward.py", "f = 3", "reward.py:", "defines no function ''"),
    ("reward.py", "\n1 / 0", "reward.py:f", r"failed: ZeroDivisionError.*\(reward\.py line 2\)"),
    ("reward.py", "import no_such_module", "reward.py:f", "failed: ModuleNotFoundError.*no_such"),
    ("reward.py", "exit(3)", "reward.py:f", r"failed: SystemExit: 3, which would end the run"),
    (
      "reward.py",
      "def f(:",
      "reward.py:f",
      r"failed: SyntaxError: .* \(reward\.py line 1\)\.$",
    ),
  ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(tmp_path, name, source, function, message):
  write(tmp_path, source, name)
  with pytest.raises(UserError, match=message):
    load_rewards(f"{tmp_path}/{function}")


def test_a_function_that_raises_is_named_with_its_line(tmp_path):
  path = write(tmp_path, "def f(prompts, completions):\n  return [c.absent for c in completions]\n")
  with pytest.raises(UserError, match=r"reward f failed: AttributeError: .*\(reward\.py line 2\)"):
    scores(only(f"{path}:f"), RECORDS, ["a", "b"], "f")


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    ([1.0], "returned 1 scores for 2 completions"),
    ([1.0, 2.0, 3.0], "returned more scores for 2 completions"),
    (itertools.count(), "returned more scores for 2 completions"),
    ([], "returned 0 scores for 2 completions"),
    (None, r"returned None; return a list with one number for each completion"),
    (1.0, r"\(reward_functions_test\.py line \d+\) returned 1.0; return a list"),
    (np.float32(1), r"returned np\.float32\(1\.0\); return a list"),
    ([1.0, "2.0"], r"returned '2.0', not a number, for completions\[1\], 'bbb' of prompt 'second'"),
    ("ab", "returned 'a', not a number"),
    ([[1.0], [2.0]], r"returned \[1.0\], not a number"),
    ([1.0, float("nan")], r"returned nan for completions\[1\], 'bbb' of prompt 'second'"),
    ([float("-inf"), 1.0], r"returned -inf for completions\[0\], 'aaa' of prompt 'first'"),
    # Finite numbers that no float32 holds.
    ([1.0, 1e39], r"returned 1e\+39 for completions\[1\], 'bbb'"),
    ([1.0, 10**400], r"returned 10+\.\.\.0+, not a number"),
  ],
)
def test_each_wrong_answer_is_one_clear_error(returned, message):
  with pytest.raises(UserError, match=message):
    scores(lambda prompts, completions: returned, RECORDS, ["aaa", "bbb"], "f")


def test_none_abstains_and_is_in_no_sum(style):
  path = write(
    style.parent,
    "def f(prompts, completions): return [None, 2.0, None]\n"
    "def g(prompts, completions): return [1.0, 1.0, None]\n",
    "abstains.py",
  )
  records = [*RECORDS, {"prompt": "third"}]
  total, by_name = weighted_scores(load_rewards(f"{path}:f,0.5*{path}:g"), records, ["a", "b", "c"])
  np.testing.assert_array_equal(total, [0.5, 2.5, np.nan])
  np.testing.assert_array_equal(by_name["f"], [np.nan, 2.0, np.nan])
  np.testing.assert_array_equal(by_name["g"], [1.0, 1.0, np.nan])


def test_of_chats_prompts_and_completions_are_messages_and_are_copies():
  prompts = [[{"role": "user", "content": text}] for text in ("first", "second")]
  seen = {}

  def f(prompts, completions, completion_ids, n):
    seen.update(prompts=prompts, completions=completions, ids=completion_ids)
    prompts[0][0]["content"] = completions[0][0]["content"] = "changed"
    return n

  records = [{"prompt": prompt, "n": i} for i, prompt in enumerate(prompts)]
  ids = Ids([[1], [2]], [[3], [4]])
  assert scores(f, records, ["a", "b"], "f", ids).tolist() == [0, 1]
  assert seen["prompts"][1] == [{"role": "user", "content": "second"}]
  assert seen["completions"][1] == [{"role": "assistant", "content": "b"}]
  assert seen["ids"] == [[3], [4]]
  assert prompts[0][0]["content"] == "first"
  with pytest.raises(UserError, match=r"returned nan for completions\[1\], 'b' of prompt"):
    scores(lambda prompts, completions, n: [1.0, float("nan")], records, ["a", "b"], "f")
  with pytest.raises(UserError, match=r"sum of the rewards is 1e\+39 for completions\[0\], 'a'"):
    weighted_scores(
      [Reward("f", 1e39, lambda prompts, completions, n: [1, 1])], records, ["a", "b"]
    )


def test_other_columns_arrive_as_lists_and_missing_ones_as_none():
  records = [{"prompt": "p", "answer": "4", "level": 1}, {"prompt": "q", "answer": "5"}]
  seen = {}

  def reward_fn(prompts, completions, **columns):
    seen.update(columns, prompts=prompts, completions=completions)
    return [0.0, 1.0]

  scores(reward_fn, records, ["a", "b"], "f")
  assert seen == {
    "prompts": ["p", "q"],
    "completions": ["a", "b"],
    "answer": ["4", "5"],
    "level": [1, None],
  }


def test_what_fails_in_a_library_is_told_with_the_line_of_the_users_own_file(tmp_path):
  write(tmp_path, "def half(x):\n  return int(x) / 2\n", "helping.py")
  path = write(
    tmp_path,
    "import json\nfrom helping import half\n\n"
    "def f(prompts, completions):\n  return [json.loads(c) for c in completions]\n\n"
    "def g(prompts, completions):\n  return [half(c) for c in completions]\n",
  )
  with pytest.raises(UserError, match=r"JSONDecodeError: .*\(reward\.py line 5\)"):
    scores(only(f"{path}:f"), RECORDS, ["a", "b"], "f")
  with pytest.raises(UserError, match=r"ValueError: .*\(helping\.py line 2\)"):
    scores(only(f"{path}:g"), RECORDS, ["a", "b"], "g")


def test_a_function_of_other_parameters_is_told_with_its_line_and_what_to_write(tmp_path):
  path = write(tmp_path, "\n\ndef f(texts):\n  return [0.0 for _ in texts]\n")
  message = r"f \(reward\.py line 3\) is called as f\(prompts=\.\.\., completions=\.\.\.\).*"
  with pytest.raises(
    UserError, match=message + r"Write def f\(prompts, completions, \*\*columns\)"
  ):
    scores(only(f"{path}:f"), RECORDS, ["a", "b"], "f")


def test_a_column_that_the_function_does_not_take_is_named():
  with pytest.raises(UserError, match="unexpected keyword argument 'answer'"):
    scores(lambda prompts, completions: [0.0], [{"prompt": "p", "answer": "4"}], ["a"], "f")


def test_it_is_called_by_keyword_so_that_the_order_of_arguments_is_free(tmp_path):
  def swapped(completions, prompts):
    return [len(completion) for completion in completions]

  np.testing.assert_array_equal(scores(swapped, RECORDS, ["a", "bc"], "swapped"), [1, 2])
  np.testing.assert_array_equal(
    scores(lambda completions, **_: [1, 2], RECORDS, ["", ""], "f"), [1, 2]
  )


class Unprintable(BaseException):
  def __repr__(self):
    raise RuntimeError("no words")

  __str__ = __repr__


def _raise(error):
  raise error


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (SystemExit(0), r"reward f failed: SystemExit: 0, which would end the run; raise an error"),
    (SystemExit(), "reward f failed: SystemExit"),
    (GeneratorExit("gone"), "reward f failed: GeneratorExit: gone"),
    (BaseException("gone"), "reward f failed: BaseException: gone"),
    (Unprintable(), r"failed: Unprintable: \(its message cannot be made\)"),
    (ValueError("x" * 10**6), "failed: ValueError: x{1000} "),
  ],
  ids=lambda value: type(value).__name__,
)
def test_whatever_a_function_raises_is_one_message(error, message):
  with pytest.raises(UserError, match=message):
    scores(lambda prompts, completions: _raise(error), RECORDS, ["a", "b"], "f")


def test_ctrl_c_inside_a_function_stays_ctrl_c():
  with pytest.raises(KeyboardInterrupt):
    scores(lambda prompts, completions: _raise(KeyboardInterrupt), RECORDS, ["a", "b"], "f")


def test_a_score_that_cannot_be_printed_is_named():
  with pytest.raises(UserError, match=r"reward f returned .*Unprintable.*, not a number"):
    scores(lambda prompts, completions: [1.0, Unprintable()], RECORDS, ["a", "b"], "f")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_arrays_of_any_library_will_do(dtype, shape):
  torch = pytest.importorskip("torch")
  tensor = torch.tensor([0.5, -2.0], dtype=getattr(torch, dtype), requires_grad=True)
  for returned in (
    tensor.reshape(shape),
    list(tensor.reshape(shape)),
    jnp.array([0.5, -2.0], dtype).reshape(shape),
    list(jnp.array([0.5, -2.0], dtype).reshape(shape)),
  ):
    own = scores(lambda prompts, completions, own=returned: own, RECORDS, ["a", "b"], "f")
    np.testing.assert_array_equal(own, np.float32([0.5, -2.0]))


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1, 1)])
def test_an_array_of_another_shape_is_refused(shape):
  with pytest.raises(UserError, match=r"not a number|returned 1 scores"):
    scores(lambda prompts, completions: np.ones(shape), RECORDS, ["a", "b"], "f")


def test_coroutines_share_one_event_loop():
  loops = []

  async def lengths(prompts, completions):
    loops.append(asyncio.get_running_loop())
    await asyncio.sleep(0)
    return [len(completion) for completion in completions]

  async def broken(prompts, completions):
    raise ConnectionError("server gone")

  for _ in range(2):
    np.testing.assert_array_equal(scores(lengths, RECORDS, ["aaaa", ""], "f"), [4, 0])
  assert loops[0] is loops[1]
  with pytest.raises(UserError, match="reward f failed: ConnectionError: server gone"):
    scores(broken, RECORDS, ["a", "b"], "f")


def test_coroutines_of_a_sum_are_awaited_together_and_a_failure_ends_the_others():
  arrived, ended = [], []

  def make(name, others, *, fails=False):
    async def fn(prompts, completions):
      arrived.append(name)
      try:
        while len(arrived) < others:  # One after the other, the first would wait for ever.
          await asyncio.sleep(0.001)
        if fails:
          raise ConnectionError("server gone")
        await asyncio.sleep(60 if others > 2 else 0)
      except asyncio.CancelledError:
        ended.append(name)
        raise
      return [1.0, 2.0]

    return Reward(name, 1.0, fn, Patience(timeout=20.0))

  total, _ = weighted_scores([make("f", 2), make("g", 2)], RECORDS, ["a", "b"])
  assert total.tolist() == [2, 4] and arrived == ["f", "g"]
  arrived.clear()
  both = [make("f", 3, fails=True), make("g", 3), make("h", 3)]
  with pytest.raises(UserError, match="reward f failed: ConnectionError: server gone"):
    weighted_scores(both, RECORDS, ["a", "b"])
  arrived.clear()
  weighted_scores([make("f", 2), make("g", 2)], RECORDS, ["a", "b"])
  assert ended == ["g", "h"]


def test_what_a_function_changes_is_its_own_copy():
  def vandal(prompts, completions, tags, completion_ids):
    for tag, ids in zip(tags, completion_ids, strict=True):
      tag.append("seen")
      ids.clear()
    prompts[:] = completions[:] = ["gone", "gone"]
    return [1.0, 1.0]

  records = [{"prompt": "p", "tags": ["a"]}, {"prompt": "q", "tags": []}]
  texts, ids = ["  Once", "There"], Ids([[1], [2]], [[3], [4, 5]])
  for _ in range(2):
    scores(vandal, records, texts, "vandal", ids)
  assert records == [{"prompt": "p", "tags": ["a"]}, {"prompt": "q", "tags": []}]
  assert texts == ["  Once", "There"]
  assert ids == Ids([[1], [2]], [[3], [4, 5]])


def test_tokens_are_given_to_whoever_asks_by_name_alone():
  ids = Ids([[1], [2]], [[3], [4, 5]])
  seen = []

  def asks(completions, completion_ids, *, prompt_ids, **columns):
    seen.append((completion_ids, prompt_ids, set(columns)))
    return [0.0, 0.0]

  def takes_anything(**columns):
    seen.append(set(columns))
    return [0.0, 0.0]

  for fn in (asks, takes_anything):
    scores(fn, RECORDS, ["a", "b"], "f", ids)
  assert seen == [([[3], [4, 5]], [[1], [2]], {"prompts"}), {"prompts", "completions"}]
  with pytest.raises(ValueError, match="pass ids"):
    scores(asks, RECORDS, ["a", "b"], "f")
  records = [{"prompt": "p", "prompt_ids": [7]}] * 2
  with pytest.raises(UserError, match="have a column 'prompt_ids'"):
    scores(asks, records, ["a", "b"], "f", ids)


def test_a_function_may_go_to_another_folder_and_the_run_stays(tmp_path, monkeypatch):
  (tmp_path / "own").mkdir()
  (tmp_path / "run").mkdir()
  monkeypatch.chdir(tmp_path / "run")
  seen = []

  def wandering(prompts, completions):
    seen.append(os.getcwd())
    os.chdir(tmp_path / "own")
    return [1.0, 1.0]

  for _ in range(2):
    scores(wandering, RECORDS, ["a", "b"], "f")
    assert os.getcwd() == str(tmp_path / "run")
  assert seen == [str(tmp_path / "run"), str(tmp_path / "own")]
  scores(
    lambda prompts, completions: os.chdir(tmp_path / "run") or [1, 1], RECORDS, ["a", "b"], "f"
  )


def test_a_file_may_import_what_lies_beside_it_and_start_workers(tmp_path):
  write(tmp_path, "NUMBER = 7\n", "lies_beside.py")
  path = write(
    tmp_path,
    "import lies_beside\n"
    "def f(prompts, completions): return [lies_beside.NUMBER] * len(completions)\n",
    "with_neighbour.py",
  )
  fn = only(f"{path}:f")
  assert fn([], ["a"]) == [7]
  # A worker process is handed the function's name and the search path.
  worker = f"import pickle, sys; sys.path[:] = {sys.path}; pickle.loads({pickle.dumps(fn)})"
  subprocess.run([sys.executable, "-c", worker], check=True)


def test_a_file_of_a_taken_name_does_not_hide_the_module_of_that_name(tmp_path):
  path = write(tmp_path, "def f(prompts, completions): return [1.0]\n", "json.py")
  assert only(f"{path}:f")([], ["a"]) == [1.0]
  assert sys.modules["json"].loads("3") == 3


STYLE = (
  "import pathlib\n"
  "with open(pathlib.Path(__file__).with_suffix('.runs'), 'a') as runs: runs.write('.')\n"
  "def length(prompts, completions): return [len(c) for c in completions]\n"
  "def nan(prompts, completions): return [float('nan')] * len(prompts)\n"
  "def huge(prompts, completions): return [3e38] * len(prompts)\n"
  "def math(prompts, completions): return [0.5] * len(prompts)\n"
)


@pytest.fixture
def style(tmp_path):
  return write(tmp_path, STYLE, "style.py")


def test_the_rewards_of_a_list_have_names_and_weights(style):
  rewards = load_rewards(f"math, 0.5*{style}:length,-2e-1 * model")
  assert [(reward.name, reward.weight) for reward in rewards] == [
    ("math", 1.0),
    ("length", 0.5),
    ("model", -0.2),
  ]
  assert rewards[0].fn is math_answers.math_reward
  assert rewards[1].fn([], ["abc"]) == [3]
  assert rewards[2].fn is None


def test_the_total_is_the_weighted_sum_and_each_reward_is_kept_without_its_weight(style):
  records = [{"prompt": "p", "answer": "7"}, {"prompt": "q", "answer": "8"}]
  takes_columns = write(
    style.parent, "def seven(prompts, completions, answer): return [a == '7' for a in answer]"
  )
  rewards = load_rewards(f"math,-0.01*{takes_columns}:seven,2*model")
  total, by_name = weighted_scores(rewards, records, ["7", "#### 7"], np.float32([0.5, -1.5]))
  np.testing.assert_array_equal(by_name["math"], [1, 0])
  np.testing.assert_array_equal(by_name["seven"], [1, 0])
  np.testing.assert_array_equal(by_name["model"], [0.5, -1.5])
  # 1 * 1 - 0.01 * 1 + 2 * 0.5, and 0 - 0 + 2 * -1.5.
  np.testing.assert_array_equal(total, np.float32([1.99, -3]))
  assert {total.dtype, *(values.dtype for values in by_name.values())} == {np.dtype(np.float32)}


def test_one_reward_of_weight_one_is_its_own_total(style):
  total, by_name = weighted_scores(load_rewards(f"{style}:length"), RECORDS, ["aaaa", ""])
  np.testing.assert_array_equal(total, [4, 0])
  assert list(by_name) == ["length"]


def test_a_file_of_two_rewards_is_run_once(style):
  for _ in range(2):  # when flags are checked, and when the run begins
    load_rewards(f"{style}:length,{style.parent}/./style.py:huge")
  assert style.with_suffix(".runs").read_text() == "."


def test_a_clash_of_names_is_settled_by_the_files(style):
  other = write(style.parent, STYLE, "other.py")
  rewards = load_rewards(f"{style}:length,{other}:length,{style}:math,math,{other}:huge")
  assert [reward.name for reward in rewards] == [
    "style.length",
    "other.length",
    "style.math",
    "math",
    "huge",
  ]
  # A function called `math` alone is not the verifier.
  assert [reward.name for reward in load_rewards(f"{style}:math")] == ["style.math"]


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("", "--reward=: there is no such Python file; write FILE.py:FUNCTION, math or model"),
    ("math,", "write FILE.py:FUNCTION, math or model"),
    ("math,maths", "--reward=maths: there is no such Python file"),
    (
      "math,2*STYLE:absent",
      r"--reward=2\*.*style.py:absent: the file defines no function 'absent'",
    ),
    ("0*math", r"--reward=0\*math: the weight '0' is no finite number other than 0; write e\.g\."),
    ("-0.0*model", "the weight '-0.0' is no finite"),
    ("nan*math", "the weight 'nan' is no finite"),
    ("inf*math", "the weight 'inf' is no finite"),
    ("1e999*math", "the weight '1e999' is no finite"),
    ("much*math", "the weight 'much' is no finite"),
    ("*math", "the weight '' is no finite"),
    ("2*3*math", r"the weight '2\*3' is no finite"),
    ("math,model,0.5*math", r"0.5\*math is there twice; give it once, with one weight"),
    ("STYLE:length,2*STYLE:length", "style.py:length is there twice"),
    ("STYLE:length,COPY:length", "share a name; rename one"),
  ],
)
def test_an_item_that_cannot_be_used_is_one_clear_error(style, spec, message):
  (style.parent / "copy").mkdir()
  copy = write(style.parent / "copy", STYLE, "style.py")
  with pytest.raises(UserError, match=message):
    load_rewards(spec.replace("STYLE", str(style)).replace("COPY", str(copy)))


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("STYLE:length,STYLE:nan", "The reward nan returned nan for completions\\[0\\], 'aaa'"),
    ("STYLE:length,math", "The reward `math` needs a text column `answer`; prompt 'first'"),
    ("2*STYLE:huge", r"weighted sum of the rewards is 6e\+38 for completions\[0\], 'aaa': huge 3"),
    ("STYLE:length,model", "The reward model computes NaN"),
  ],
)
def test_a_reward_that_fails_is_named(style, spec, message):
  rewards = load_rewards(spec.replace("STYLE", str(style)))
  with pytest.raises(UserError, match=message):
    weighted_scores(rewards, RECORDS, ["aaa", "bbb"], np.float32([0, np.nan]))


def test_missing_scores_of_the_reward_model_are_an_error():
  with pytest.raises(ValueError, match="pass model_scores"):
    weighted_scores(load_rewards("model"), RECORDS, ["a", "b"])


def test_the_verifier_needs_its_library_before_the_run_begins(monkeypatch):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  with pytest.raises(UserError, match=r"pip install 'klrl\[math\]'"):
    load_rewards("math")


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_a_column_of_a_name_that_the_run_uses_is_named(column):
  records = [{"prompt": "a", column: "b"}]
  with pytest.raises(UserError, match=f"have a column '{column}'"):
    scores(lambda **columns: [0.0], records, ["c"], "own")
