"""Tasks whose answers can be checked, and figures of several completions of one prompt."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from klrl import ops
from klrl.errors import UserError
from klrl.models import TokenizerInfo


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


def answer_tokens(
  records: list[dict[str, Any]], tokenizer: TokenizerInfo, *, max_completion_len: int
) -> np.ndarray:
  """Returns [N, T] int32, the column `answer` of each record and an end-of-sequence, padded to T.

  Raises:
    UserError: T is shorter than an answer.
  """
  texts = [tokenizer.tokenizer.encode(x["answer"], add_special_tokens=False).ids for x in records]
  longest = max(map(len, texts), default=0) + 1
  if max_completion_len < longest:
    raise UserError(
      f"--max_completion_len={max_completion_len}: the embedded task needs {longest}, its longest "
      "answer and the end-of-sequence."
    )
  answers = np.full((len(records), max_completion_len), tokenizer.pad_id, np.int32)
  for row, ids in zip(answers, texts, strict=True):
    row[: len(ids) + 1] = [*ids, tokenizer.eos_id]
  return answers


def accuracy(completions, completion_mask, answers, *, pad_id: int):
  """Returns [B] float32: 1 where the completion is exactly the answer and ends there, else 0.

  Args:
    completions: [B, T] int32 tokens.
    completion_mask: [B, T] bool, those that the policy chose.
    answers: [B, T] int32 rows of `answer_tokens`.
    pad_id: the padding token of `answers`.
  """
  is_answer = jnp.where(ops.until_last(completion_mask), completions, pad_id) == answers
  return jnp.all(is_answer, axis=1).astype(jnp.float32)


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
