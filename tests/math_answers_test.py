"""Tests of final answers: which one a text gives, which are equal, what a hostile text can do."""

import json
import pathlib
import re
import sys
import threading
import time

import pytest

from klrl.errors import UserError
from klrl.tasks import math_answers, math_worker
from klrl.tasks.math_answers import VERIFIER, final_answer, is_right, math_reward
from klrl.tasks.math_worker import Worker

GSM8K = pathlib.Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
    ("#### 72\nQuestion: another?", "72"),
    ("#### 5\n#### 72", "72"),
    (r"so \boxed{7} and \boxed{\frac{1}{2}} is it, not 3", "1/2"),
    (r"\boxed{5} #### 72", "72"),
    (r"#### \boxed{72}", "72"),
    ("it is 3 or 72.", "72"),
    ("it costs $1,080.00", "1080"),
    ("#### $18", "18"),
    ("#### -$18", "-18"),
    ("#### **72**", "72"),
    ("#### 2**3", "2**3"),
    ("half, i.e. 0.5", "1/2"),
    (".25", "1/4"),
    ("072", "72"),
    ("2/4", "1/2"),
    (r"-\frac{2}{4}", "-1/2"),
    ("20-4=16", "16"),
    ("20-4", "4"),
    ("x = -4", "-4"),
    ("50%", "50"),
    (r"\boxed{50\%}", "50"),
    ("#### 5 miles per hour.", "5"),
    (r"\boxed{5\text{ cm}}", "5"),
    ("#### 5cm", "5"),
    # Words that say how many are no units.
    ("#### 5 million", "5 million"),
    ("#### 2 pi", "2 pi"),
    (r"\boxed{\text{Monday}}", "Monday"),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}"),
    ("#### 1/0", "1/0"),
    ("no number", None),
    ("", None),
    ("####", None),
    (r"\boxed{", None),
    (r"\boxed{7", None),
    ("9" * 101, None),
    ("9" * 100, "9" * 100),
  ],
)
def test_a_text_has_one_final_answer_in_a_normal_form(text, answer):
  assert final_answer(text) == answer


@pytest.mark.parametrize(
  ("completion", "reference"),
  [
    ("#### 72", "so 24+48\n#### 72"),
    ("0.5", "1/2"),
    ("1,000", "1000"),
    ("$18", "18"),
    ("50%", "50"),
    (r"\boxed{18 \text{ dollars}}", "#### 18"),
    (r"\boxed{\sqrt{12}}", r"$2\sqrt{3}$"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    (r"\boxed{\{1, 2\}}", "2, 1"),
    (r"\boxed{[0, 1)}", "[0,1)"),
    (r"\boxed{\frac{\pi}{2}}", r"\pi/2"),
    (r"\boxed{10^{6}}", "1,000,000"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("#### Monday", "Monday"),
  ],
)
def test_equal_answers_are_right(completion, reference):
  assert is_right(completion, reference)


@pytest.mark.parametrize(
  ("completion", "reference"),
  [
    ("#### 72", "#### 27"),
    ("", "72"),
    ("#### ", "72"),
    ("-5", "5"),
    ("0.333333", "1/3"),
    ("#### 3 million", "3"),
    ("#### 1,23", "123"),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{2}"),
    (r"\boxed{(0, 1)}", "[0,1]"),
    ("#### Monday", "Friday"),
    # An anagram is another product of letters.
    ("#### listen", "silent"),
    ("#### 72 or 73", "72"),
  ],
)
def test_other_answers_are_wrong(completion, reference):
  assert not is_right(completion, reference)


HOSTILE = [
  "9**9**9**9",
  "9^{9^{9^9}}",
  "9^99^99",
  "(((9^{99})^{99})^{99})^{99}",
  "99!!!!",
  "9E999999999",
  "9E-999999999",
  "(" * 5000 + "1" + ")" * 5000,
  "((((1+x)+1)+1)+1)^9",
  "(x+y+z+a+b+c)^9(x+y+z+a+b)^9(x+y+z+a+b+c)^9",
  "9" * 100_000,
  "1" + ",000" * 25_000 + "1",
  "1/" * 50_000,
  "-" * 100_000,
  r"\frac{" * 20_000,
  r"\boxed{" * 20_000,
  "####" * 25_000,
  "$" * 100_000,
  " " * 100_000,
  "5" + " aa" * 60 + "!",
  "\\infty-\\infty",
  r"\frac{0}{0}",
  r"\int_0^1 x dx",
  "\x00\ud800",
  "zeros(99)",
]


@pytest.mark.parametrize(
  ("answer", "may"),
  [
    (r"2\sqrt{3} + x^{12} y^2", True),
    (r"\left(\frac{1}{2}\right)^{-3}", True),
    ("9E99", True),
    ("9E100", False),
    ("9^{100}", False),
    ("9^9^9", False),
    ("9^{9}^9", False),
    ("9^{9^9}", False),
    ("(9)^{10}", False),
    ("((((x))))", True),
    ("(((((x)))))", False),
    ("xy", False),
    (r"\sin x", False),
    ("5!", False),
    ("x_1", False),
  ],
)
def test_math_verify_sees_bounded_forms_only(answer, may):
  """A single big power cannot be stopped where numbers are those of a C library (gmpy2)."""
  assert math_answers._is_bounded(answer) == may


@pytest.mark.parametrize("wrap", ["%s", r"\boxed{%s}", "#### %s"])
def test_a_hostile_completion_is_wrong_in_bounded_time(wrap):
  is_right(r"\boxed{\sqrt{2}}", r"\sqrt{3}")  # imports
  for text in HOSTILE:
    began = time.monotonic()
    assert is_right(wrap.replace("%s", text), r"\sqrt{7}x+1") is False
    assert time.monotonic() - began < 5, text[:60]


def test_what_takes_too_long_is_wrong_and_its_process_is_ended():
  worker = Worker()
  assert worker.verified(r"\sqrt{2}", r"\sqrt{2}", timeout=60.0) is True
  process = worker._process
  assert worker.verified(r"\sqrt{2}", r"\sqrt{2}", timeout=0.0) is False
  assert process.poll() is not None
  # The next one is not given the answer of the one before.
  assert worker.verified(r"\sqrt{2}", r"\sqrt{3}", timeout=60.0) is False
  assert worker.verified(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", timeout=60.0) is True
  worker.stop()


SPY = """
import runpy, sys
import sympy.parsing.sympy_parser as sympy_parser
import sympy.physics.units  # evaluates names of its own when it is imported
eval_expr = sympy_parser.eval_expr

def recording(code, *args):
  with open({seen!r}, "a") as file:
    print(str(code), file=file)
  return eval_expr(code, *args)

sympy_parser.eval_expr = recording
runpy.run_path({program!r}, run_name="__main__")
"""


def test_no_text_is_evaluated(tmp_path, monkeypatch):
  seen, spy = tmp_path / "seen", tmp_path / "spy.py"
  spy.write_text(SPY.format(seen=str(seen), program=str(math_worker._PROGRAM)))
  monkeypatch.setattr(math_worker, "_PROGRAM", spy)
  worker = Worker()
  monkeypatch.setattr(math_answers, "_worker", lambda: worker)
  touched = tmp_path / "touched"
  call = f"__import__('os').system('touch {touched}')"
  codes = [call, f'exec("{call}")', f"x_{{{call}}}", rf"\operatorname{{{call}}}", f"1+{call}"]
  codes += [
    rf"\text{{{call}}}",
    f"f({call})",
    "exec(x)",
    "x.y(1)",
    "E",
    "1E5",
    "S(1)",
    "x 9*9 )",
  ]
  for wrap in ["%s", r"\boxed{%s}", "#### %s", "$%s$", "The final answer is $%s$. I hope"]:
    for code in [*codes, *HOSTILE]:
      is_right(wrap.replace("%s", code), r"\sqrt{7.5}x+1")
  worker.stop()
  evaluated = seen.read_text().splitlines()
  assert not touched.exists()
  assert evaluated, "this looks at the wrong function"
  assert not [code for code in evaluated if not re.fullmatch(r"\w+ \('?[0-9.E]+'? \)", code)]


def test_it_works_in_any_thread():
  found = []
  thread = threading.Thread(target=lambda: found.append(is_right(r"\boxed{\sqrt{4}}", "2")))
  thread.start()
  thread.join()
  assert found == [True]


def test_the_reward_is_one_or_zero():
  assert math_reward(["p", "q"], ["#### 1", "2"], answer=["#### 1", "3"], level=[1, 2]) == [
    1.0,
    0.0,
  ]


def test_answers_may_be_numbers_and_completions_chats():
  completions = [[{"role": "assistant", "content": "It is 12."}], "12", "3"]
  assert math_answers.math_reward(["p"] * 3, completions, [12, 12.0, 2]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("columns", [{}, {"answer": ["1", None]}, {"answer": ["1", [2]]}])
def test_a_row_without_an_answer_is_one_clear_error(columns):
  with pytest.raises(UserError, match=r"needs a text column `answer`; prompt '[pq]' has"):
    math_reward(["p", "q"], ["1", "1"], **columns)
  with pytest.raises(UserError, match="prompt 'p' has none"):
    VERIFIER.is_right("1", {"prompt": "p"})


def test_a_reference_without_an_answer_is_one_clear_error():
  with pytest.raises(UserError, match=r"The reference '#### ' holds no answer"):
    is_right("1", "#### ")


def test_without_the_library_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  math_answers._worker.cache_clear()
  with pytest.raises(UserError, match=r"pip install 'klrl\[math\]'"):
    is_right(r"\boxed{\sqrt{2}}", r"\sqrt{3}")
  assert is_right("0.5", "1/2"), "numbers need no library"


def test_equal_normal_forms_are_alike_to_the_verifier():
  for a, b in [("50%", "50"), ("0.5", "1/2"), ("$7", "7 miles")]:
    assert VERIFIER.answer_of(a) == VERIFIER.answer_of(b)
    for reference in ("50", "0.5", "1/2", "7", "50%"):
      record = {"prompt": "p", "answer": reference}
      assert VERIFIER.is_right(a, record) == VERIFIER.is_right(b, record)


def test_all_of_gsm8k():
  if not GSM8K.is_file():
    pytest.skip("GSM8K is not there")
  answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
  numbers = [int(answer.split("####")[1].replace(",", "")) for answer in answers]
  assert len(answers) == 7473
  assert [int(final_answer(answer)) for answer in answers] == numbers
  for i, answer in enumerate(answers):
    assert is_right(answer, answer)
    assert is_right(answer.replace("####", "The answer is $"), answer)
    assert is_right(answers[i - 1], answer) == (numbers[i - 1] == numbers[i])
