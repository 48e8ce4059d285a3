"""Reads JSON lines and plain text, and makes padded token arrays of them.

Prompts are left-padded, so that a completion starts right after them. Examples, which hold a prompt
and its completion, are right-padded, and end with the tokenizer's end-of-sequence token. A file
whose name ends in .gz is decompressed.
"""

import contextlib
import gzip
import itertools
import pathlib
import re
import string
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from klrl import schema
from klrl.errors import UserError
from klrl.models import TokenizerInfo
from klrl.tasks.texts import Encoded as Encoded
from klrl.tasks.texts import completion_texts as completion_texts
from klrl.tasks.texts import decode_continuation as decode_continuation
from klrl.tasks.texts import encode_texts as encode_texts
from klrl.tasks.texts import token_ids as token_ids

MAX_LINE = 2**20  # A line of 10 MB took a tokenizer 1.4 GiB.
MAX_TEXT = 2**28
# How files begin that people take for JSON lines.
_NO_LINES = {
  b"[": "is a JSON array. Write its objects as lines, one on each.",
  b"PAR1": "is a Parquet file. Export it as JSON lines, one object on each.",
  b"\xff\xfe": "is UTF-16. Save it as UTF-8.",
  b"\xfe\xff": "is UTF-16. Save it as UTF-8.",
}


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


class Pair(NamedTuple):
  """Two completions of a prompt, and by how much the first is better."""

  prompt: str
  chosen: str
  rejected: str
  margin: float = 1.0


def read_records(path: str | pathlib.Path, required: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the objects of a JSON-lines file, each with the `required` string columns.

  Raises:
    UserError: there is no such file, it has no line, or a line is broken, has more than `MAX_LINE`
      bytes, or lacks a column. The message has the number of the line.
  """
  path = pathlib.Path(path)
  what = f"JSON lines with {', '.join(required)}"
  records = []
  with _opened(path, what) as file:
    for number, line in _lines(file, path):
      record = schema.parse(line, f"{path} line {number}")
      for column in required:
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
          has = f"; it has {', '.join(record)}" if isinstance(record, dict) and record else ""
          raise UserError(f"{path} line {number} has no text column {column!r}{has}.")
      records.append(record)
  if not records:
    raise UserError(f"{path} is empty; expected {what}.")
  return records


def read_prompts(path: str | pathlib.Path, template: str = "{prompt}") -> list[dict[str, Any]]:
  r"""Returns the objects of a JSON-lines file, with the filled template as their `prompt`.

  `{question}` in the template stands for the text column of that name, `{{` for a brace, and the
  two characters `\n` for a new line, which a shell or a file of flags cannot hold.

  Raises:
    UserError: as `read_records`, for the columns of the template; or the template names no column,
      or has anything but a name within braces.
  """
  advice = 'Write e.g. "Question: {question}\\nAnswer:", with {{ and }} for braces.'
  try:
    fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
  except ValueError as error:
    raise UserError(f"--prompt_template={template!r}: {error}. {advice}") from error
  columns = list(dict.fromkeys(name for _, name, _, _ in fields))
  # Formats, conversions, attributes and indices would reach into the objects of the row.
  if any(spec or conversion for _, _, spec, conversion in fields) or not all(
    re.fullmatch(r"[^\W\d][\w -]*", column) for column in columns
  ):
    raise UserError(f"--prompt_template={template!r}: only names may be in braces. {advice}")
  if not columns:
    raise UserError(f"--prompt_template={template!r} names no column. {advice}")
  template = template.replace("\\n", "\n")
  records = read_records(path, columns)
  # A column that only some lines have is None on the others, so every batch has the same columns.
  all_columns = dict.fromkeys(column for record in records for column in record)
  return [{**all_columns, **record, "prompt": template.format_map(record)} for record in records]


# What opens the assistant's turns in HH-RLHF (Y. Bai et al., "Training a Helpful and Harmless
# Assistant with RLHF", 2022).
_ASSISTANT = "\n\nAssistant:"


def read_pairs(path: str | pathlib.Path) -> list[Pair]:
  """Returns the preferences of a JSON-lines file; a pair of equal completions is left out.

  A line holds `{"prompt", "chosen", "rejected"}`, or whole dialogues `{"chosen", "rejected"}` as in
  HH-RLHF. The prompt is then the part that both share, up to the last "\\n\\nAssistant:" in it. A
  number `margin` is kept; either every line has one or none has.

  Raises:
    UserError: as `read_records`; two dialogues without a prompt share none; a margin is missing or
      is no finite number; or no pair has two different completions.
  """
  records = read_records(path, ("chosen", "rejected"))
  pairs = []
  for number, record in enumerate(records, start=1):
    where = f"{path}, pair {number}"
    margin = record.get("margin", 1.0)
    if ("margin" in record) != ("margin" in records[0]):
      raise UserError(f"{where}: give every line a margin, or none.")
    schema.check(record, {"margin": schema.number()}, where)
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if chosen == rejected:
      continue
    if "prompt" not in record:
      differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
      shared = chosen[: next(differ, min(len(chosen), len(rejected)))]
      length = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
      if length < len(_ASSISTANT):
        raise UserError(
          f"{where} has no prompt, and what its dialogues share holds no {_ASSISTANT!r}. "
          'Write {"prompt": ..., "chosen": ..., "rejected": ...}.'
        )
      prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not isinstance(prompt, str):
      raise UserError(f"{where}: the prompt is no text.")
    pairs.append(Pair(prompt, chosen, rejected, float(margin)))
  if not pairs:
    raise UserError(f"{path} holds no pair with two different completions.")
  return pairs


def is_text(path: str) -> bool:
  """Returns whether a data file is plain text, packed or not, rather than JSON lines."""
  return path.removesuffix(".gz").endswith(".txt")


def read_documents(path: str | pathlib.Path) -> list[str]:
  """Returns the documents of a plain text file, without the blank space around them.

  They are separated by `<|endoftext|>` if the file has it, and by blank lines otherwise.

  Raises:
    UserError: there is no such file, it is empty, has more than `MAX_TEXT` bytes, or is not UTF-8.
  """
  path = pathlib.Path(path)
  with _opened(path, "plain text") as file:
    content = file.read(MAX_TEXT + 1)
  if len(content) > MAX_TEXT:
    raise UserError(f"{path} holds more than {MAX_TEXT} bytes of text; take a part of it.")
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8: {error}.") from error
  separator = re.escape("<|endoftext|>") if "<|endoftext|>" in text else r"\n\s*\n"
  documents = [document.strip() for document in re.split(separator, text)]
  documents = [document for document in documents if document]
  if not documents:
    raise UserError(f"{path} is empty; expected plain text.")
  return documents


@contextlib.contextmanager
def _opened(path: pathlib.Path, what: str) -> Iterator[BinaryIO]:
  """Yields the file, decompressed as it is read, since a small one may hold gigabytes of zeros."""
  try:
    if not path.is_file():
      raise UserError(f"There is no file {path}; expected {what}.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
      yield file
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} cannot be read: {error}.") from error


def _lines(file: BinaryIO, path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields (number, line) of all lines that are not blank."""
  for number in itertools.count(1):
    line = file.readline(MAX_LINE + 1)
    if not line:
      return
    if number == 1:
      for beginning, advice in _NO_LINES.items():
        if line.lstrip().startswith(beginning):
          raise UserError(f"{path} {advice}")
    if len(line) > MAX_LINE:
      raise UserError(
        f"{path} line {number} has more than {MAX_LINE} bytes, more than any model reads. Cut it."
      )
    if line.strip():
      yield number, line


def encode_prompts(
  records: list[dict[str, Any]], tokenizer: TokenizerInfo, *, max_prompt_len: int
) -> Prompts:
  """Returns the left-padded prompts of `records` (column `prompt`).

  Raises:
    UserError: a prompt has no token, or more than `max_prompt_len` tokens.
  """
  rows = [row.ids for row in tokenizer.encode_batch(record["prompt"] for record in records)]
  for number, row in enumerate(rows, start=1):
    if not row:
      raise UserError(f"Prompt {number} is empty and the tokenizer adds no beginning-of-sequence.")
    if len(row) > max_prompt_len:
      raise UserError(
        f"Prompt {number} has {len(row)} tokens; at most {max_prompt_len} fit into the model's "
        "context beside the completion. Leave longer ones out (--max_prompt_len, of pairs "
        "--max_len), or lower --max_completion_len. "
        f"It begins {records[number - 1]['prompt'][:60]!r}."
      )
  tokens, mask = pad(rows, tokenizer.pad_id, left=True)
  return Prompts(tokens, mask, records)


def short_prompts(
  records: list[dict[str, Any]], tokenizer: TokenizerInfo, *, max_prompt_len: int
) -> list[dict[str, Any]]:
  """Returns the records whose prompt has at most `max_prompt_len` tokens; UserError if none has."""
  encoded = tokenizer.encode_batch(record["prompt"] for record in records)
  kept = [
    record for record, row in zip(records, encoded, strict=True) if len(row.ids) <= max_prompt_len
  ]
  if not kept:
    raise UserError(f"--max_prompt_len={max_prompt_len}: every prompt is longer. Raise it.")
  return kept


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
      pieces.append(Encoded(text.tokens[start : start + max_len], 0))
  return pieces


def examples_of(texts: Sequence[Encoded], pad_id: int) -> Examples:
  """Returns one right-padded row per text."""
  tokens, mask = pad([text.tokens for text in texts], pad_id, left=False)
  num_prompt_tokens = np.array([text.num_prompt_tokens for text in texts])
  in_completion = np.arange(tokens.shape[1]) >= num_prompt_tokens[:, None]
  return Examples(tokens, mask, mask & in_completion, mask.astype(np.int32))


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
  position = iteration * batch_size + np.arange(batch_size)
  epochs = position // num_rows
  orders = {
    epoch: np.random.default_rng((seed, epoch)).permutation(num_rows) for epoch in set(epochs)
  }
  return np.array(
    [orders[epoch][p % num_rows] for epoch, p in zip(epochs, position, strict=True)], np.int32
  )
