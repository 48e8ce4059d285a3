r"""Final answers of mathematical texts, and whether two of them are equal.

A text's answer is what follows its last `####` on that line (GSM8K; K. Cobbe et al., "Training
Verifiers to Solve Math Word Problems", 2021), else what its last `\boxed{...}` holds, else its last
number. Two numbers are equal if they are exactly; of other answers math-verify decides.

A completion is anybody's text, so math-verify gets to see bounded arithmetic and algebra only: at
most 100 characters, small powers, few brackets, single letters, commands of a fixed list; what else
an answer may be is compared as text. What passes may still take long, so `math_worker` does it in
a process of its own, which is ended after two seconds.
"""

import functools
import importlib.util
import re
from fractions import Fraction
from typing import Any

from klrl.errors import UserError
from klrl.tasks import chats
from klrl.tasks.math_worker import Worker
from klrl.tasks.verifier import Verifier

_MAX_LEN = 100  # characters of an answer
_MAX_DEPTH = 4  # brackets within brackets; the parser's time grows exponentially in it
_TIMEOUT = 2.0  # seconds, for math-verify's part

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_FRACTION = re.compile(
  rf"(-?)(?:\\[dt]?frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|({_NUMBER})(?:/({_NUMBER}))?)\s*\\?%?"
)
# Loose in its commas, so that a long text is read in one pass. A minus after a number or bracket
# is a subtraction's.
_LOOSE = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"
_LAST_NUMBER = re.compile(
  r"(?:(?<![\w)}\]])-\$?)?"
  rf"(?:\\[dt]?frac\{{-?{_LOOSE}\}}\{{-?{_LOOSE}\}}|{_LOOSE}(?:/{_LOOSE})?)(?:\s?\\?%)?"
)
_NORMAL_NUMBER = re.compile(r"-?[0-9]+(?:/[0-9]+)?")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
# Words that change the number are no units.
_UNIT = re.compile(
  r"(?<=[0-9%})]) ?(?!pi\b|dozen|hundred|thousand|[mbtr]+illion)[A-Za-z]{2,}\.?"
  r"(?: [A-Za-z]{2,}\.?){0,3}$"
)
# What math-verify may see. A power of a power, of a bracket or to a large number could take hours.
_BOUNDED = re.compile(
  r"(?:[0-9\s+\-*/=().,{}\[\]%<>|]|\\[{}%,;! ]"
  # A single letter; where it could be an exponent's E, one of at most two digits.
  r"|(?<![A-Za-z])(?!E[\s+-]*[0-9]{3})[A-Za-z](?![A-Za-z])"
  r"|\\(?:d?frac|tfrac|sqrt|pi|infty|times|cdot|div|pm|left|right|leq?|geq?|cup|in)(?![A-Za-z])"
  r"|(?<=[0-9A-Za-z])\s*\^\s*(?:\{-?[0-9]{1,2}\}|-?[0-9]{1,2}(?![0-9])|\{?[A-Za-z]\}?)(?!\s*\^)"
  r"|(?<=[)}\]])\^(?:\{-?[0-9]\}|[0-9](?![0-9]))(?!\s*\^))*"
)


def check_installed() -> None:
  """Raises UserError where math-verify is not installed; it is imported by `math_worker` alone."""
  if importlib.util.find_spec("math_verify") is None:
    raise UserError("The reward `math` needs the library math-verify: pip install 'klrl[math]'.")


@functools.cache
def _worker() -> Worker:
  check_installed()
  return Worker()


def final_answer(text: str) -> str | None:
  """Returns a normal form of the text's final answer, for majority votes; None without an answer.

  A number is an exact fraction without unit, currency or percent sign (`$1,080.00` is "1080",
  `0.5 miles` is "1/2"); any other answer is its own text. One of more than 100 characters is none.
  """
  answer = _marked(text)
  if answer is None:
    for match in _LAST_NUMBER.finditer(text):
      answer = match[0]
  return None if answer is None else _normal_form(answer)


def is_right(completion: str, reference_answer: str) -> bool:
  r"""Returns whether the completion's final answer equals the reference's.

  The reference is a text with `#### 72` or `\boxed{72}`, or a bare answer. Numbers are compared
  exactly, all else by math-verify. Ends within seconds whatever the completion is, and calls wrong
  what cannot be compared.

  Raises:
    UserError: math-verify is needed and not installed, or the reference holds no answer.
  """
  reference = _marked(reference_answer)
  reference = _normal_form(reference_answer if reference is None else reference)
  if reference is None:
    raise UserError(
      f"The reference {reference_answer[:80]!r} holds no answer of at most {_MAX_LEN} characters."
    )
  answer = final_answer(completion)
  if answer is None or answer == reference:
    return answer == reference
  if _NORMAL_NUMBER.fullmatch(answer) and _NORMAL_NUMBER.fullmatch(reference):
    return False
  return _is_bounded(answer) and _is_bounded(reference) and _verified(reference, answer)


def math_reward(prompts, completions, answer=None, **columns: Any) -> list[float]:
  """Returns 1 for each completion whose final answer is that of the column `answer`, else 0.

  An answer is text or a number. A completion is text, or the messages of a chat.

  Raises:
    UserError: a row has no `answer`; as `is_right`.
  """
  answer = answer or [None] * len(prompts)
  for prompt, reference in zip(prompts, answer, strict=True):
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
      raise UserError(
        f"The reward `math` needs a text column `answer`; prompt {chats.beginning(prompt)} has "
        f"{'none' if reference is None else repr(reference)}."
      )
  texts = (x[-1]["content"] if chats.is_chat(x) else x for x in completions)
  return [float(is_right(text, str(a))) for text, a in zip(texts, answer, strict=True)]


def _marked(text: str) -> str | None:
  r"""Returns what follows the last `####`, else what is in the last `\boxed{}`."""
  _, mark, after = text.rpartition("####")
  if mark:
    return after.strip().partition("\n")[0]
  _, mark, after = text.rpartition(r"\boxed{")
  if not mark:
    return None
  depth = 1
  for i, char in enumerate(after[: 2 * _MAX_LEN]):
    depth += (char == "{") - (char == "}")
    if depth == 0:
      return after[:i]
  return ""


def _normal_form(answer: str) -> str | None:
  boxed = _marked(answer)
  answer = answer if boxed is None else boxed
  if len(answer) > 2 * _MAX_LEN:
    return None
  answer = _TEXT.sub(r" \1 ", answer)
  answer = re.sub(r"\\?[$€£¥]|\\[()\[\]]", "", answer)
  answer = " ".join(answer.split()).strip("*").rstrip(".")
  answer = _UNIT.sub("", answer).strip()
  if not 0 < len(answer) <= _MAX_LEN:
    return None
  match = _FRACTION.fullmatch(answer)
  if not match:
    return answer
  sign, *parts = match.groups()
  above, below = ([Fraction(part.replace(",", "")) for part in parts if part] + [Fraction(1)])[:2]
  return str(Fraction(f"{sign}1") * above / below) if below else answer


def _is_bounded(answer: str) -> bool:
  depth = deepest = 0
  for char in answer:
    depth += (char in "({[") - (char in ")}]")
    deepest = max(deepest, depth)
  return deepest <= _MAX_DEPTH and bool(_BOUNDED.fullmatch(answer))


def _verified(reference: str, answer: str) -> bool:
  return _worker().verified(reference, answer, timeout=_TIMEOUT)


def _is_right_of(completion: str, record: dict[str, Any]) -> bool:
  return math_reward([record["prompt"]], [completion], [record.get("answer")]) == [1.0]


VERIFIER = Verifier(final_answer, _is_right_of)
