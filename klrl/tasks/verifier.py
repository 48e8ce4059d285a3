"""Tasks whose answers can be checked, and figures of several completions of one prompt."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Verifier(NamedTuple):
  """Checks the completions of a task by their text alone.

  answer_of: completion -> its answer, the same text for equal answers; None if it has none.
  is_right: (completion, record of the prompt) -> whether it is right, the same for equal answers.
  """

  answer_of: Callable[[str], str | None]
  is_right: Callable[[str, dict[str, Any]], bool]


def right(verifier: Verifier, texts: list[str], records: list[dict[str, Any]]) -> np.ndarray:
  """Returns [B] float32, 1 where the completion is right, else 0."""
  return np.array(list(map(verifier.is_right, texts, records)), np.float32)


def pass_at_k(is_right: np.ndarray, k: int) -> np.ndarray:
  """Returns [P], the probability that k of a prompt's n completions hold a right one; unbiased.

  `is_right` is [P, n] with n >= k. Mark Chen et al., "Evaluating Large Language Models Trained on
  Code", 2021, equation 1.
  """
  n = is_right.shape[1]
  num_wrong = n - np.count_nonzero(is_right, axis=1)
  return np.array([1 - math.comb(wrong, k) / math.comb(n, k) for wrong in num_wrong.tolist()])


def majority(answers: Sequence[str | None], is_right: Sequence[float]) -> float:
  """Returns 1 if the most frequent answer to a prompt is right, else 0; the mean if several tie.

  None does not vote; without any vote the result is 0. Xuezhi Wang et al., "Self-Consistency
  Improves Chain of Thought Reasoning in Language Models", 2022.
  """
  votes = collections.Counter(answer for answer in answers if answer is not None)
  if not votes:
    return 0.0
  most = max(votes.values())
  # Answers that tie have equally many completions.
  return float(np.mean([x for a, x in zip(answers, is_right, strict=True) if votes[a] == most]))
