"""The embedded task: add two numbers, character by character.

    prompt "38+07="   completion "45"

Operands are below 50 and every number has two digits. All data are generated here. Demonstrations
are of imperfect quality, and preferences carry label noise. An exact verifier (`accuracy`) gives
the gold score, which no training stage ever sees. A tenth of the problems is held out.
"""

import numpy as np
import tokenizers

from klrl.models import TokenizerInfo
from klrl.tasks.verifier import Verifier

MAX_COMPLETION_LEN = 4  # room for one digit too many
_SPECIAL = ("<pad>", "<s>", "</s>")
_OPERANDS = 50


def make_tokenizer() -> TokenizerInfo:
  """Returns a tokenizer with one token per character, and the three special ones."""
  vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *"0123456789+="])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
  )
  tokenizer.add_special_tokens(list(_SPECIAL))
  return TokenizerInfo(tokenizer, bos_id=1, eos_id=2, pad_id=0)


def problems(*, held_out: bool) -> np.ndarray:
  """Returns [N, 2] int, the operands of one of the two fixed parts, in random order."""
  order = np.random.default_rng(0).permutation(_OPERANDS**2)
  num_held_out = len(order) // 10
  part = order[:num_held_out] if held_out else order[num_held_out:]
  return np.stack(np.divmod(part, _OPERANDS), axis=1)


def prompt(a: int, b: int) -> str:
  """Returns the text of a problem."""
  return f"{a:02d}+{b:02d}="


def answer(a: int, b: int) -> str:
  """Returns the right completion of a problem."""
  return f"{a + b:02d}"


def prompt_records(*, held_out: bool) -> list[dict[str, str]]:
  """Returns `{"prompt", "answer"}` for every problem of a part."""
  return [
    {"prompt": prompt(a, b), "answer": answer(a, b)}
    for a, b in problems(held_out=held_out).tolist()
  ]


def demonstrations(seed: int, num: int, *, quality: float) -> list[tuple[str, str]]:
  """Returns (prompt, completion) texts, of which a fraction `quality` is right.

  The others have a slip as people make them: a carry is forgotten, the sum is one off, or a digit
  is misread.
  """
  rng = np.random.default_rng((seed, 1))
  pairs = _draw_problems(rng, num)
  return [
    (prompt(a, b), answer(a, b) if rng.random() < quality else _slip(rng, a, b))
    for a, b in pairs.tolist()
  ]


def preferences(seed: int, num: int, *, label_noise: float) -> list[tuple[str, str, str]]:
  """Returns (prompt, chosen, rejected) texts; a fraction `label_noise` has the labels swapped.

  Each pair sets the right answer against a slip or, half of the time, a wild guess. A reward model
  that sees only slips stays on a plateau for hundreds of iterations.
  """
  rng = np.random.default_rng((seed, 2))
  triples = []
  for a, b in _draw_problems(rng, num).tolist():
    pair = answer(a, b), _slip(rng, a, b) if rng.random() < 0.5 else _wild_guess(rng, a, b)
    chosen, rejected = pair[::-1] if rng.random() < label_noise else pair
    triples.append((prompt(a, b), chosen, rejected))
  return triples


def _draw_problems(rng: np.random.Generator, num: int) -> np.ndarray:
  pool = problems(held_out=False)
  return pool[rng.integers(len(pool), size=num)]


def _slip(rng: np.random.Generator, a: int, b: int) -> str:
  """Returns a wrong answer of two digits."""
  right = a + b
  while True:
    match rng.integers(3):
      case 0:  # A carry forgotten, or one that was not there.
        wrong = right - 10 if a % 10 + b % 10 >= 10 else right + 10
      case 1:
        wrong = right + rng.choice((-1, 1))
      case _:  # One digit misread.
        digits = list(answer(a, b))
        digits[rng.integers(2)] = str(rng.integers(10))
        wrong = int("".join(digits))
    if wrong != right and 0 <= wrong < 100:
      return f"{wrong:02d}"


def _wild_guess(rng: np.random.Generator, a: int, b: int) -> str:
  """Returns a wrong answer of two digits, all equally likely."""
  return f"{(a + b + rng.integers(1, 100)) % 100:02d}"


# This is `verifier.accuracy` of a text, in which no special token appears.
VERIFIER = Verifier(
  answer_of=lambda completion: completion if completion.isdecimal() else None,
  is_right=lambda completion, record: completion == record["answer"],
)
