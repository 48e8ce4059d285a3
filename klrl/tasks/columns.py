"""From the columns of a row to prompts, pairs and texts to train on, in the forms that users have.

A prompt or completion is text, or a chat (see `chats`). `asking` is what the user's flags add.
"""

import pathlib
import re
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from klrl import schema
from klrl.errors import UserError
from klrl.tasks import chats
from klrl.tasks.chats import ASSISTANT, Asking, Text
from klrl.tasks.files import Row, check_columns, first_row, is_text, read_rows

_NOTHING = Asking()
_PROMPT = "{prompt}"
PREFILL = "prefill"  # the column with the beginning of the answer
_CHATS = ("messages", "conversations")
# What opens the assistant's turns in HH-RLHF (Y. Bai et al., "Training a Helpful and Harmless
# Assistant with RLHF", 2022).
_HH_ASSISTANT = "\n\nAssistant:"
_TEXT_FORMS = (
  "text; messages; prompt and completion; instruction and output (Alpaca); or conversations "
  "(ShareGPT)"
)


class Pair(NamedTuple):
  """Two completions of a prompt, and by how much the first is better."""

  prompt: Text
  chosen: Text
  rejected: Text
  margin: float = 1.0


class Texts(NamedTuple):
  """What supervised fine-tuning reads."""

  pairs: list[tuple[Text, Text]]  # (prompt, completion)
  are_documents: bool  # whether they are texts without prompts, which may be cut


CHATS, TEXT, DOCUMENTS = "chats", "text", "documents"


def kind_of(source: str, reader: Callable, template: str = _PROMPT) -> str:
  """Returns which of these the data are: messages, texts that ask something, or texts alone.

  The first row says it.

  Args:
    source: the data.
    reader: what reads them: `read_prompts`, `read_texts` or `read_pairs`.
    template: of prompts; one that is given makes text.

  Raises:
    UserError: the data cannot be read.
  """
  if is_text(source):
    return DOCUMENTS
  record = first_row(source, "rows").record
  if reader is read_texts:
    if _form_of(record) == _DOCUMENT:
      return DOCUMENTS
    names = (*_CHATS, "prompt", "completion")
  elif reader is read_pairs:
    names = ("prompt", "chosen")
  else:
    names = ("prompt",) if "prompt" in record else _CHATS
    names = names if template == _PROMPT else ()
  return CHATS if any(chats.is_chat(record.get(name)) for name in names) else TEXT


def read_prompts(
  path: str | pathlib.Path, template: str = _PROMPT, asking: Asking = _NOTHING
) -> list[dict[str, Any]]:
  r"""Returns the rows of a file, with the filled template as their `prompt`.

  `{question}` in the template stands for the column of that name, a text or number, `{{` for a
  brace, and the two characters `\n` for a new line, which a shell or a file of flags cannot hold.
  Without a template, the prompt is the column `prompt`, which may be a chat, or else what the chat
  in the column `messages`, or `conversations` (ShareGPT), holds before the assistant's last turn.
  The column `prefill`, a text, is how the answer to a row begins, where it has one.

  Raises:
    UserError: as `files.read_rows`; a column of the template is missing; the template names no
      column, or has anything but a name within braces; a chat is none, or ends with a turn of the
      assistant; or some rows are chats, and others are not.
  """
  columns = _columns_of(template)
  rows = read_rows(path, f"JSON lines with {', '.join(columns)}")
  # A column that only some lines have is None on the others, so every batch has the same columns.
  all_columns = dict.fromkeys(column for row in rows for column in row.record)
  prompts = [_prompt(row, template, columns, asking) for row in rows]
  _check_kinds(prompts, rows, asking, "prompts")
  for row in rows:
    if not isinstance(row.record.get(PREFILL) or "", str):
      raise UserError(f"{row.where}: {PREFILL}, with which the answer begins, is no text.")
  return [
    {**all_columns, **row.record, "prompt": prompt}
    for row, prompt in zip(rows, prompts, strict=True)
  ]


def _columns_of(template: str) -> list[str]:
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
  return columns


def _prompt(row: Row, template: str, columns: list[str], asking: Asking) -> Text:
  record = row.record
  if template == _PROMPT and chats.is_chat(record.get("prompt")):
    chat = _asking_chat(record["prompt"], f"{row.where}: prompt")
  elif template == _PROMPT and "prompt" not in record and record.keys() & set(_CHATS):
    chat = chats.until_last_answer(_conversation(row))
    if not chat:
      raise UserError(f"{row.where}: the chat holds nothing that the assistant is asked.")
  else:
    check_columns(row, columns, numbers=True)
    text = template.replace("\\n", "\n").format_map(record)
    if not asking.as_chat:
      return text
    chat = chats.said_by("user", text)
  return chats.opened(chat, asking.system_prompt)


def _check_kinds(texts: list[Text], rows: list[Row], asking: Asking, what: str) -> None:
  """Raises UserError if only some texts are chats, or a system prompt has no place in them."""
  first = chats.is_chat(texts[0])
  for text, row in zip(texts, rows, strict=True):
    if chats.is_chat(text) != first:
      raise UserError(
        f"{row.where} holds {'text' if first else 'messages'}, unlike the first; give {what} of "
        "one kind."
      )
  if asking.system_prompt and not first:
    raise UserError(
      f"--system_prompt opens chats, and these {what} are text; --chat makes them what the user "
      "says."
    )


def read_pairs(path: str | pathlib.Path, asking: Asking = _NOTHING) -> list[Pair]:
  """Returns the preferences of a file; a pair of equal completions is left out.

  A row holds `{"prompt", "chosen", "rejected"}`, texts or chats, or whole dialogues `{"chosen",
  "rejected"}`. Their prompt is what both share, up to the last turn of the assistant that it asks
  for: of chats the messages, of text as in HH-RLHF the part up to the last "\\n\\nAssistant:". A
  number `margin` is kept; either every row has one or none has.

  Raises:
    UserError: as `files.read_rows`; a column is missing, or no text or chat; a prompt ends with a
      turn of the assistant; two dialogues share no prompt, or do not begin with the one beside
      them; a margin is missing or is no finite number; or no pair has two different completions.
  """
  rows = read_rows(path, "JSON lines with chosen, rejected")
  has_margins = "margin" in rows[0].record
  found = []
  for number, row in enumerate(rows, start=1):
    where, record = f"{path}, pair {number}", row.record
    margin = record.get("margin", 1.0)
    if ("margin" in record) != has_margins:
      raise UserError(f"{where}: give every line a margin, or none.")
    schema.check(record, {"margin": schema.number()}, where)
    if chats.is_chat(record.get("chosen")):
      texts = _chat_pair(record, where)
    else:
      check_columns(row, ("chosen", "rejected"))
      texts = _text_pair(record, where, asking)
    if texts[1] != texts[2]:
      found.append((row, Pair(*texts, float(margin))))
  if not found:
    raise UserError(f"{path} holds no pair with two different completions.")
  pairs = [pair for _, pair in found]
  _check_kinds([pair.chosen for pair in pairs], [row for row, _ in found], asking, "pairs")
  if chats.is_chat(pairs[0].chosen):
    return [p._replace(prompt=chats.opened(p.prompt, asking.system_prompt)) for p in pairs]
  return pairs


def _text_pair(record, where: str, asking: Asking) -> tuple[Text, Text, Text]:
  prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
  if "prompt" not in record and asking.as_chat:
    names = "chosen", "rejected"
    return _chat_pair({x: chats.from_hh(record[x], f"{where}: {x}") for x in names}, where)
  if "prompt" not in record and chosen != rejected:
    length = len(_shared(chosen, rejected))
    length = chosen[:length].rfind(_HH_ASSISTANT) + len(_HH_ASSISTANT)
    if length < len(_HH_ASSISTANT):
      raise UserError(
        f"{where} has no prompt, and what its dialogues share holds no {_HH_ASSISTANT!r}. "
        'Write {"prompt": ..., "chosen": ..., "rejected": ...}.'
      )
    prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
  elif chosen == rejected:
    prompt = ""
  if chats.is_chat(prompt):
    prompt = _asking_chat(prompt, f"{where}: prompt")
  elif not isinstance(prompt, str):
    raise UserError(f"{where}: the prompt is no text.")
  elif not asking.as_chat:
    return prompt, chosen, rejected
  else:
    prompt = chats.said_by("user", prompt)
  return prompt, chats.said_by(ASSISTANT, chosen), chats.said_by(ASSISTANT, rejected)


def _chat_pair(record, where: str) -> tuple[Text, Text, Text]:
  chosen, rejected = (
    chats.messages(record.get(name), f"{where}: {name}") for name in ("chosen", "rejected")
  )
  prompt = record.get("prompt")
  if isinstance(prompt, str):
    prompt = chats.said_by("user", prompt)
  elif prompt is not None or chosen[0]["role"] == ASSISTANT:
    prompt = _asking_chat(prompt, f"{where}: prompt")
    if chosen[0]["role"] != ASSISTANT and not all(
      chat[: len(prompt)] == prompt for chat in (chosen, rejected)
    ):
      raise UserError(f"{where}: its dialogues do not begin with the messages of its prompt.")
  if chosen[0]["role"] == ASSISTANT:
    return prompt, chosen, rejected
  # Whole dialogues; a column prompt beside them repeats how they begin. Where the user goes on
  # differently, the turn of the assistant before is the last that both prompts ask for.
  shared = chats.until_last_answer(_shared(chosen, rejected))
  rest = chosen[len(shared) :], rejected[len(shared) :]
  if not shared:
    raise UserError(f"{where} has no prompt, and its dialogues begin with different messages.")
  if chosen != rejected and not all(any(m["role"] == ASSISTANT for m in part) for part in rest):
    raise UserError(f"{where}: after what both share, a dialogue has no turn of the assistant.")
  return shared, *rest


def _asking_chat(value, where: str) -> list[chats.Message]:
  chat = chats.messages(value, where)
  if chat[-1]["role"] == ASSISTANT:
    raise UserError(f"{where} ends with a turn of the assistant, which leaves nothing to ask.")
  return chat


def _shared(first, second):
  """Returns what two texts or chats begin with."""
  differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
  return first[: next(differ, min(len(first), len(second)))]


def read_texts(path: str | pathlib.Path, asking: Asking = _NOTHING) -> Texts:
  """Returns what a file has to fine-tune on, by the columns of its first row.

  These are `messages`, or ShareGPT's `conversations`, all of whose assistant turns are completions;
  `prompt` and `completion`, texts or chats; Alpaca's `instruction`, `input` and `output`; or
  `text`, a document.

  Raises:
    UserError: as `files.read_rows`, or a row has none of these, or others than the first.
  """
  rows = read_rows(path, f"rows with {_TEXT_FORMS}")
  form = _form_of(rows[0].record)
  if form is None:
    raise UserError(
      f"{rows[0].where} has the columns {', '.join(map(str, rows[0].record))}; expected "
      f"{_TEXT_FORMS}."
    )
  pairs = [_FORMS[form](row, asking.as_chat) for row in rows]
  are_documents = form == _DOCUMENT
  if are_documents and asking.as_chat:
    raise UserError(f"--chat: the column text of {path} holds no prompts, so it makes no chats.")
  _check_kinds([completion for _, completion in pairs], rows, asking, "texts")
  if asking.system_prompt:
    pairs = [
      (chats.opened(p, asking.system_prompt), c)
      if p
      else (p, chats.opened(c, asking.system_prompt))
      for p, c in pairs
    ]
  return Texts(pairs, are_documents)


def _conversation(row: Row) -> list[chats.Message]:
  if "messages" in row.record or "conversations" not in row.record:
    return chats.messages(row.record.get("messages"), f"{row.where}: messages")
  return chats.from_sharegpt(row.record.get("conversations"), f"{row.where}: conversations")


def _of_conversation(row: Row, as_chat: bool) -> tuple[Text, Text]:
  del as_chat
  return [], _conversation(row)


def _of_completion(row: Row, as_chat: bool) -> tuple[Text, Text]:
  prompt, completion = row.record.get("prompt"), row.record.get("completion")
  if chats.is_chat(prompt) or chats.is_chat(completion):
    if not isinstance(completion, str):
      completion = chats.messages(completion, f"{row.where}: completion")
    if not isinstance(prompt, str):
      prompt = chats.messages(prompt, f"{row.where}: prompt")
    as_chat = True
  else:
    check_columns(row, ("prompt", "completion"))
  return _pair_of(prompt, completion, as_chat)


def _pair_of(prompt: Text, completion: Text, as_chat: bool) -> tuple[Text, Text]:
  if as_chat:
    prompt = chats.said_by("user", prompt) if isinstance(prompt, str) else prompt
    completion = chats.said_by(ASSISTANT, completion) if isinstance(completion, str) else completion
  return prompt, completion


def _of_alpaca(row: Row, as_chat: bool) -> tuple[Text, Text]:
  check_columns(row, ("instruction", "output"))
  parts = row.record["instruction"], row.record.get("input") or ""
  if not isinstance(parts[1], str):
    raise UserError(f"{row.where}: input is no text.")
  if as_chat:
    return _pair_of("\n\n".join(filter(None, parts)), row.record["output"], as_chat)
  titles = "### Instruction:", "### Input:"
  asked = "".join(f"{t}\n{part}\n\n" for t, part in zip(titles, parts, strict=True) if part)
  return f"{asked}### Response:\n", row.record["output"]


def _of_text(row: Row, as_chat: bool) -> tuple[Text, Text]:
  del as_chat
  check_columns(row, ("text",))
  return "", row.record["text"]


def _form_of(record: dict[str, Any]) -> frozenset | None:
  return next((form for form in _FORMS if form <= record.keys()), None)


_DOCUMENT = frozenset({"text"})
# The columns that a form needs, and what makes (prompt, completion) of a row.
_FORMS = {
  frozenset({"messages"}): _of_conversation,
  frozenset({"conversations"}): _of_conversation,
  frozenset({"prompt", "completion"}): _of_completion,
  frozenset({"instruction", "output"}): _of_alpaca,
  _DOCUMENT: _of_text,
}


def asked(prompt: Text, completion: Text) -> Text:
  """Returns what a text asks: its prompt, or else how a chat begins, or else all of it."""
  if prompt or isinstance(completion, str):
    return prompt or completion
  return completion[: next((i for i, m in enumerate(completion) if m["role"] == ASSISTANT), None)]
