"""JSON lines in, padded token arrays out.

Prompts are left-padded (a completion starts right after them); examples, which hold a prompt and
its completion, are right-padded. Every example ends with the tokenizer's end-of-sequence token.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.models import TokenizerInfo


class Prompts(NamedTuple):
  """Prompts ready to sample from; `records` keeps every column of the file for reward functions."""

  tokens: np.ndarray  # [N, P] int32, left-padded
  mask: np.ndarray  # [N, P] bool
  records: list[dict[str, Any]]
  answers: np.ndarray | None = None  # [N, T] int32, the right completions where there are any


class Examples(NamedTuple):
  """Whole texts to train on."""

  tokens: np.ndarray  # [N, S] int32, right-padded
  mask: np.ndarray  # [N, S] bool, real tokens
  completion_mask: np.ndarray  # [N, S] bool, tokens of the completion with its end-of-sequence


def read_records(path: str | pathlib.Path, required: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the objects of a JSON-lines file, each with the `required` string columns.

  Raises:
    UserError: no such file, no line in it, or a line that is broken or lacks a column (its number
      is in the message).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"There is no file {path}; expected JSON lines with {', '.join(required)}.")
  records = []
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path} line {number} is not JSON: {error}.") from error
      for column in required:
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
          raise UserError(f"{path} line {number} has no text column {column!r}.")
      records.append(record)
  if not records:
    raise UserError(f"{path} is empty; expected JSON lines with {', '.join(required)}.")
  return records


def encode_prompts(
  records: list[dict[str, Any]], tokenizer: TokenizerInfo, *, max_prompt_len: int
) -> Prompts:
  """Returns the left-padded prompts of `records` (column `prompt`).

  Raises:
    UserError: a prompt has no token, or more than `max_prompt_len`.
  """
  rows = [tokenizer.tokenizer.encode(record["prompt"]).ids for record in records]
  for number, row in enumerate(rows, start=1):
    if not row:
      raise UserError(f"Prompt {number} is empty and the tokenizer adds no beginning-of-sequence.")
    if len(row) > max_prompt_len:
      raise UserError(
        f"Prompt {number} has {len(row)} tokens; at most {max_prompt_len} fit into the model's "
        f"context beside the completion. Shorten it or lower --max_completion_len. "
        f"It begins {records[number - 1]['prompt'][:60]!r}."
      )
  tokens, mask = pad(rows, tokenizer.pad_id, left=True)
  return Prompts(tokens, mask, records)


def encode_examples(
  texts: Sequence[tuple[str, str]], tokenizer: TokenizerInfo, *, max_len: int
) -> Examples:
  """Returns right-padded (prompt, completion) texts, each closed with end-of-sequence.

  The text is encoded as a whole and split by character offsets, so that a completion has the same
  tokens as when the model writes it.

  Raises:
    UserError: an example is longer than `max_len` tokens, or the tokenizer has no EOS.
  """
  if tokenizer.eos_id is None:
    raise UserError("The tokenizer names no EOS token; completions could not be closed.")
  rows, num_prompt_tokens = [], []
  encodings = tokenizer.tokenizer.encode_batch(
    [prompt + completion for prompt, completion in texts]
  )
  for number, ((prompt, _), encoding) in enumerate(zip(texts, encodings, strict=True), start=1):
    row = [*encoding.ids, tokenizer.eos_id]
    if len(row) > max_len:
      raise UserError(
        f"Example {number} has {len(row)} tokens, the model's context holds {max_len}. Shorten it."
      )
    rows.append(row)
    num_prompt_tokens.append(sum(end <= len(prompt) for _, end in encoding.offsets))
  tokens, mask = pad(rows, tokenizer.pad_id, left=False)
  position = np.arange(tokens.shape[1])
  return Examples(tokens, mask, mask & (position >= np.array(num_prompt_tokens)[:, None]))


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


def split_held_out(arrays: NamedTuple, seed: int, *, share: float = 0.05, at_most: int = 512):
  """Returns (training, held out) parts of a named tuple of arrays; each has at least one row.

  Raises:
    UserError: there are fewer than two rows.
  """
  num_rows = len(arrays[0])
  if num_rows < 2:
    raise UserError("The data has a single row; one to train on and one to hold out are needed.")
  num_held_out = min(at_most, max(1, int(share * num_rows)))
  order = np.random.default_rng((seed, 3)).permutation(num_rows)
  return take(arrays, order[num_held_out:]), take(arrays, order[:num_held_out])


def batch_rows(seed: int, iteration: int, batch_size: int, num_rows: int) -> np.ndarray:
  """Returns which rows iteration `iteration` uses, [batch_size] int32.

  The data is walked through in a fresh random order each epoch, without gaps between epochs. A
  pure function of its arguments, so a resumed run needs no saved cursor.
  """
  position = iteration * batch_size + np.arange(batch_size)
  epochs = position // num_rows
  orders = {
    epoch: np.random.default_rng((seed, epoch)).permutation(num_rows) for epoch in set(epochs)
  }
  return np.array(
    [orders[epoch][p % num_rows] for epoch, p in zip(epochs, position, strict=True)], np.int32
  )


def completion_texts(tokenizer: TokenizerInfo, rollout) -> list[str]:
  """Returns the text of each completion of a rollout (host arrays), without special tokens.

  Prompt and completion are decoded together and then cut: decoders treat the first token of a text
  differently (SentencePiece ones drop its space).
  """
  prompt_len = rollout.prompt_mask.shape[1]
  texts = []
  for tokens, prompt_mask, completion_mask in zip(
    np.asarray(rollout.tokens),
    np.asarray(rollout.prompt_mask),
    np.asarray(rollout.completion_mask),
    strict=True,
  ):
    prompt = tokens[:prompt_len][prompt_mask].tolist()
    completion = tokens[prompt_len:][completion_mask].tolist()
    texts.append(decode_continuation(tokenizer, prompt, completion))
  return texts


def decode_continuation(tokenizer: TokenizerInfo, prompt: list[int], completion: list[int]) -> str:
  """Returns the text that `completion` adds to `prompt`."""
  decode = tokenizer.tokenizer.decode
  before, whole = decode(prompt), decode(prompt + completion)
  # A prompt that ends inside a multi-byte character decodes differently once it is complete.
  return whole[len(before) :] if whole.startswith(before) else decode(completion)
