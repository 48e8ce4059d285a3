"""Makes padded token arrays of texts, and says which rows of them an iteration uses.

Prompts are left-padded, so that a completion starts right after them. Examples, which hold a prompt
and its completion, are right-padded, and end with the tokenizer's end-of-sequence token. `files`
and `columns` read the texts.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.models import TokenizerInfo
from klrl.run import progress
from klrl.tasks import chats
from klrl.tasks.chats import Asking as Asking
from klrl.tasks.chats import Text
from klrl.tasks.chats import is_chat as is_chat
from klrl.tasks.columns import CHATS as CHATS
from klrl.tasks.columns import DOCUMENTS as DOCUMENTS
from klrl.tasks.columns import PREFILL as PREFILL
from klrl.tasks.columns import TEXT as TEXT
from klrl.tasks.columns import Pair as Pair
from klrl.tasks.columns import asked as asked
from klrl.tasks.columns import kind_of as kind_of
from klrl.tasks.columns import read_pairs as read_pairs
from klrl.tasks.columns import read_prompts as read_prompts
from klrl.tasks.columns import read_texts as read_texts
from klrl.tasks.files import is_text as is_text
from klrl.tasks.files import read_documents as read_documents
from klrl.tasks.files import read_records as read_records
from klrl.tasks.texts import Encoded as Encoded
from klrl.tasks.texts import completion_texts as completion_texts
from klrl.tasks.texts import decode_continuation as decode_continuation
from klrl.tasks.texts import encode_prompt_texts as encode_prompt_texts
from klrl.tasks.texts import encode_texts as encode_texts
from klrl.tasks.texts import encode_whole as encode_whole
from klrl.tasks.texts import token_ids as token_ids


class Prompts(NamedTuple):
  """Prompts as tokens; `records` keeps every column of the file for reward functions."""

  tokens: np.ndarray  # [N, P] int32, left-padded
  mask: np.ndarray  # [N, P] bool
  records: list[dict[str, Any]]
  answers: np.ndarray | None = None  # [N, T] int32, the right completions where there are any


class Examples(NamedTuple):
  """Whole texts to train on; a row holds one text, or several if they are packed."""

  tokens: np.ndarray  # [N, S] int32, right-padded
  mask: np.ndarray  # [N, S] bool, real tokens
  completion_mask: np.ndarray  # [N, S] bool, tokens of the completion with its end-of-sequence
  segment_ids: np.ndarray  # [N, S] int32, which text of the row a token is of, from 1; 0 at padding


def encode_prompts(
  records: list[dict[str, Any]], tokenizer: TokenizerInfo, *, max_prompt_len: int
) -> Prompts:
  """Returns the left-padded prompts of `records`: their column `prompt`, and then `prefill`.

  Raises:
    UserError: a prompt has no token, or more than `max_prompt_len` tokens.
  """
  rows = _prompt_rows(records, tokenizer)
  for number, row in enumerate(rows, start=1):
    if not row:
      raise UserError(f"Prompt {number} is empty and the tokenizer adds no beginning-of-sequence.")
    if len(row) > max_prompt_len:
      raise UserError(
        f"Prompt {number} has {len(row)} tokens; at most {max_prompt_len} fit into the model's "
        "context beside the completion. Leave longer ones out (--max_prompt_len, of pairs "
        "--max_len), or lower --max_completion_len. "
        f"It begins {chats.beginning(records[number - 1]['prompt'])}."
      )
  tokens, mask = pad(rows, tokenizer.pad_id, left=True)
  return Prompts(tokens, mask, records)


def _prompt_rows(records, tokenizer: TokenizerInfo) -> list[list[int]]:
  rows = encode_prompt_texts([record["prompt"] for record in records], tokenizer)
  if not any(record.get(PREFILL) for record in records):
    return rows
  beginnings = tokenizer.encode_bare([record.get(PREFILL) or "" for record in records])
  return [row + list(more.ids) for row, more in zip(rows, beginnings, strict=True)]


def with_prefill(texts: Sequence[str], records: Sequence[dict[str, Any]]) -> list[str]:
  """Returns the texts of completions, each after the `prefill` of its record, if that has one.

  There may be fewer texts than records.
  """
  pairs = zip(texts, records, strict=False)
  return [(record.get(PREFILL) or "") + text for text, record in pairs]


def short_prompts(
  records: list[dict[str, Any]], tokenizer: TokenizerInfo, *, max_prompt_len: int
) -> list[dict[str, Any]]:
  """Returns the records whose prompt has at most `max_prompt_len` tokens; UserError if none has."""
  encoded = _prompt_rows(records, tokenizer)
  kept = [
    record for record, row in zip(records, encoded, strict=True) if len(row) <= max_prompt_len
  ]
  if not kept:
    raise UserError(f"--max_prompt_len={max_prompt_len}: every prompt is longer. Raise it.")
  return kept


def distinct(texts: Sequence[Text]) -> list[Text]:
  """Returns the different texts or chats, in their order."""
  return list({json.dumps(text, default=str): text for text in texts}.values())


def warn_of_shared_prompts(training: Sequence[Text], held_out: Sequence[Text]) -> None:
  """Warns if held-out prompts are trained on too, so that what is held out says less."""
  trained = {json.dumps(prompt, default=str) for prompt in training}
  shared = [prompt for prompt in held_out if json.dumps(prompt, default=str) in trained]
  if shared:
    progress.warn(
      f"{len(shared)} of {len(held_out)} held-out rows have a prompt that is trained on too, such "
      f"as {chats.beginning(shared[0])}. Held-out figures of these say little about new prompts."
    )


def row_len(max_len: int, context: int) -> int:
  """Returns how long texts may be, in tokens: `max_len`, or the model's context if that is 0.

  Raises:
    UserError: `max_len` is more than the context holds, or 1, so that nothing would be predicted.
  """
  if max_len == 1 or max_len > context:
    raise UserError(
      f"--max_len={max_len}: give 2 to {context} tokens, which the model's context holds, or 0."
    )
  return max_len or context


def fitting_rows(*columns: Sequence[Encoded], max_len: int) -> list[int]:
  """Returns the rows in which every column's text has at most `max_len` tokens.

  Raises:
    UserError: there is no such row.
  """
  rows = [
    i
    for i, row in enumerate(zip(*columns, strict=True))
    if all(len(text.tokens) <= max_len for text in row)
  ]
  if not rows:
    raise UserError(f"--max_len={max_len}: every example is longer. Raise it.")
  return rows


def check_lengths(texts: Sequence[Encoded], max_len: int) -> None:
  """Raises UserError if a text has more than `max_len` tokens; the message has its number."""
  for number, text in enumerate(texts, start=1):
    if len(text.tokens) > max_len:
      raise UserError(
        f"Example {number} has {len(text.tokens)} tokens, and the model's context holds {max_len}. "
        f"Shorten it, or leave out what is too long by --max_len={max_len}."
      )


def windows(texts: Sequence[Encoded], max_len: int) -> list[Encoded]:
  """Returns the texts, without prompts, cut into pieces of at most `max_len` tokens.

  A piece begins with the last token of the one before, so every token except the first of a text is
  predicted exactly once.
  """
  pieces = []
  for text in texts:
    for start in range(0, max(1, len(text.tokens) - 1), max_len - 1):
      tokens = text.tokens[start : start + max_len]
      pieces.append(Encoded(tokens, [True] * len(tokens)))
  return pieces


def examples_of(texts: Sequence[Encoded], pad_id: int) -> Examples:
  """Returns one right-padded row per text."""
  tokens, mask = pad([text.tokens for text in texts], pad_id, left=False)
  in_completion, _ = pad([text.in_completion for text in texts], False, left=False)
  return Examples(tokens, mask, in_completion > 0, mask.astype(np.int32))


def encode_examples(
  texts: Sequence[tuple[str, str]], tokenizer: TokenizerInfo, *, max_len: int
) -> Examples:
  """Returns right-padded (prompt, completion) texts, each closed with the end-of-sequence.

  Raises:
    UserError: an example is longer than `max_len` tokens, or the tokenizer has no EOS.
  """
  encoded = encode_texts(texts, tokenizer)
  check_lengths(encoded, max_len)
  return examples_of(encoded, tokenizer.pad_id)


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool):
  """Returns (tokens [N, S] int32, mask [N, S] bool) for ragged `rows`."""
  length = max(len(row) for row in rows)
  tokens = np.full((len(rows), length), pad_id, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    where = slice(length - len(row), None) if left else slice(0, len(row))
    tokens[i, where] = row
    mask[i, where] = True
  return tokens, mask


def take(arrays: NamedTuple, rows: np.ndarray):
  """Returns the same named tuple with only `rows` of every array."""
  return type(arrays)(*(array[rows] for array in arrays))


def split_indices(num_rows: int, seed: int, *, share: float = 0.05, at_most: int = 512):
  """Returns (rows to train on, rows to hold out), at least one of each, as arrays of integers.

  Raises:
    UserError: there are fewer than two rows.
  """
  if num_rows < 2:
    raise UserError("The data has a single row; one to train on and one to hold out are needed.")
  num_held_out = min(at_most, max(1, int(share * num_rows)))
  order = np.random.default_rng((seed, 3)).permutation(num_rows)
  return order[num_held_out:], order[:num_held_out]


def split_held_out(arrays: NamedTuple, seed: int):
  """Returns (training, held out) parts of a named tuple of arrays, split by `split_indices`."""
  return tuple(take(arrays, rows) for rows in split_indices(len(arrays[0]), seed))


def batch_rows(seed: int, iteration: int, batch_size: int, num_rows: int) -> np.ndarray:
  """Returns which rows iteration `iteration` uses, [batch_size] int32.

  Each epoch takes the rows in a fresh random order, without gaps between epochs. The result depends
  on the arguments alone, so a resumed run needs no saved cursor.
  """
  epochs, places = np.divmod(iteration * batch_size + np.arange(batch_size), num_rows)
  orders = [_order_of_epoch(seed, int(epoch), num_rows) for epoch in np.unique(epochs)]
  return np.stack(orders)[epochs - epochs[0], places]


@functools.lru_cache(maxsize=8)  # Every iteration of an epoch asks for it.
def _order_of_epoch(seed: int, epoch: int, num_rows: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(num_rows).astype(np.int32)
