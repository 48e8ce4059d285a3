"""Chat templates: from messages to the text that a model reads, and what ends its turn.

A message is {"role": ..., "content": ...}, as a template takes it. `chat_worker` renders.
"""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from klrl.errors import UserError
from klrl.models.chat_worker import CLOSE, OPEN
from klrl.models.tokenizer import DEFAULT_TEMPLATE, TokenizerInfo
from klrl.run import progress

_WORKER = pathlib.Path(__file__).with_name("chat_worker.py")
_MAX_TEMPLATE = 2**20  # bytes
_MAX_LEN = 2**22  # characters of a rendered chat
_MAX_BYTES = 2**32  # of the worker's memory
_SECONDS = 10.0  # of the processor, and the share of each text
_SECONDS_PER_TEXT = 0.02
_TEMPLATE_FILE = "chat_template.jinja"
_GENERATION = "generation_config.json"

Message = dict[str, Any]


class Job(NamedTuple):
  """What to render: the first messages of a chat, and whether the assistant is asked to go on."""

  chat: int
  num_messages: int
  asks: bool


class Rendered(NamedTuple):
  """A chat as text; `spans` are the characters of its `generation` blocks, (first, behind)."""

  text: str
  spans: list[tuple[int, int]]


def with_template(info: TokenizerInfo, given: str) -> TokenizerInfo:
  """Returns the tokenizer with `given`, a file or the name of a template of its own, as template.

  It is saved with the models that are trained.

  Raises:
    UserError: there is no such file or name, or the file is no UTF-8 text of at most 1 MiB.
  """
  if given in info.chat_templates:
    source = info.chat_templates[given]
  else:
    source = _read(given, info.chat_templates)
  files = dict(info.files)
  if files:
    files[_TEMPLATE_FILE] = source.encode()
  return dataclasses.replace(info, chat_templates={DEFAULT_TEMPLATE: source}, files=files)


def _read(given: str, names: Iterable[str]) -> str:
  path = pathlib.Path(given)
  others = f" The model's own templates are {', '.join(names)}." if names else ""
  try:
    if not path.is_file():
      raise UserError(f"--chat_template={given}: there is no such file.{others}")
    with path.open("rb") as file:
      content = file.read(_MAX_TEMPLATE + 1)
    if len(content) > _MAX_TEMPLATE:
      raise UserError(f"--chat_template={given} has more than {_MAX_TEMPLATE} bytes.")
    return content.decode()
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"--chat_template={given} cannot be read: {error}") from error


def template_of(info: TokenizerInfo) -> str:
  """Returns the template; UserError if the tokenizer has none, or only some by other names."""
  templates = info.chat_templates
  if DEFAULT_TEMPLATE in templates:
    return templates[DEFAULT_TEMPLATE]
  if templates:
    raise UserError(
      f"The model has chat templates named {', '.join(templates)}, and none named "
      f"{DEFAULT_TEMPLATE}; choose one, e.g. --chat_template={next(iter(templates))}."
    )
  raise UserError(
    "The data are chats (messages, or text with --chat), but the model has no chat template. Give "
    "one by --chat_template=FILE, e.g. experiments/templates/plain.jinja, or take a model that was "
    "trained to chat."
  )


def render(
  info: TokenizerInfo, chats: Sequence[Sequence[Message]], jobs: Sequence[Job]
) -> list[Rendered]:
  """Returns the text of each job.

  Raises:
    UserError: there is no template, it is broken, it refuses or fails at a chat, or it takes more
      time or memory than any template needs. The message has the number of the chat.
  """
  source = template_of(info)
  request = {
    "template": source,
    "variables": dict(info.special_tokens),
    "chats": [list(map(_with_reasoning, chat)) for chat in chats],
    "jobs": jobs,
    "max_len": _MAX_LEN,
    "max_bytes": _MAX_BYTES,
    "seconds": round(_SECONDS + _SECONDS_PER_TEXT * len(jobs)),
  }
  reply = _answer(json.dumps(request, default=str).encode(), request["seconds"])
  if "error" in reply:
    number = reply["chat"]
    at = "cannot be used" if number is None else f"cannot render chat {number + 1}"
    shown = "" if number is None else f" The chat begins {_beginning(chats[number])}."
    raise UserError(f"The chat template {at}: {reply['error'].rstrip('.')}.{shown}")
  if "strftime_now" in source:
    progress.warn_once(
      "The chat template can write today's date, as transformers lets it. A run that goes on "
      "tomorrow may then read other prompts."
    )
  return [_without_marks(text) for text in reply["texts"]]


def _with_reasoning(message: Message) -> Message:
  """Returns the message with its reasoning under the names that templates know."""
  names = ("reasoning_content", "thinking", "reasoning")
  found = next((message[name] for name in names if message.get(name) is not None), None)
  return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _answer(request: bytes, seconds: int) -> dict[str, Any]:
  try:
    done = subprocess.run(
      [sys.executable, "-P", str(_WORKER)],
      input=request,
      capture_output=True,
      # The limit is of processor time; a machine that is busy may take a lot longer.
      timeout=60 + 10 * seconds,
    )
  except subprocess.TimeoutExpired as error:
    raise UserError(f"The chat template takes more than {60 + 10 * seconds} seconds.") from error
  if done.returncode == -getattr(signal, "SIGXCPU", 0):
    raise UserError(
      f"The chat template takes more than {seconds} seconds of processor time; it may never end."
    )
  if done.returncode:
    said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    raise UserError(
      f"The process that renders the chat template ended with status {done.returncode}"
      f"{': ' + said[0][:200] if said else ''}. Its memory is limited to {_MAX_BYTES} bytes."
    )
  return json.loads(done.stdout)


def _beginning(chat: Sequence[Message]) -> str:
  turns = [f"{m.get('role')}: {str(m.get('content'))[:40]!r}" for m in chat[:2]]
  return ", ".join(turns)[:200]


def _without_marks(marked: str) -> Rendered:
  spans, text = [], ""
  for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
    if piece == OPEN:
      spans.append((len(text), len(text)))
    elif piece == CLOSE:
      spans[-1] = (spans[-1][0], len(text))
    else:
      text += piece
  return Rendered(text, spans)


def with_end_of_turn(info: TokenizerInfo) -> TokenizerInfo:
  """Returns the tokenizer, with the token that ends the assistant's turn among its EOS.

  A model that has learnt the template writes this token and then the turns of others, so it has to
  end a completion. If the model's files do not say so, the console does.

  Raises:
    UserError: there is no template.
  """
  turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
  rendered = _tried(info, turns) or _tried(info, [{"role": "system", "content": "Begin"}, *turns])
  if rendered is None:
    template_of(info)
    return info  # What is wrong is said of a chat of the user's.
  _, found, behind = rendered.text.rpartition("Answer")
  ids = info.tokenizer.encode(behind.lstrip(), add_special_tokens=False).ids if found else []
  if not ids or ids[0] in info.eos_ids or ids[0] not in info.tokenizer.get_added_tokens_decoder():
    return info
  progress.warn_once(
    f"The chat template ends a turn with {info.tokenizer.id_to_token(ids[0])}, which the model's "
    "files do not call an end-of-sequence. It ends completions from here on, as "
    "--stop_tokens would have it, and the trained model's generation_config.json says so."
  )
  return with_eos_ids(info, ids[:1])


def _tried(info: TokenizerInfo, chat: list[Message]) -> Rendered | None:
  try:
    return render(info, [chat], [Job(0, len(chat), False)])[0]
  except UserError:
    return None


def with_stop_tokens(info: TokenizerInfo, given: str) -> TokenizerInfo:
  r"""Returns the tokenizer with more tokens that end a completion.

  `given` lists them with commas between: the text of a token, in which `\n` is a new line, or an
  id. The trained model's `generation_config.json` has them too.

  Raises:
    UserError: one of them is no single token of the vocabulary.
  """
  ids = [_token_id(info, item.strip()) for item in given.split(",")]
  return with_eos_ids(info, ids)


def _token_id(info: TokenizerInfo, item: str) -> int:
  known = info.tokenizer
  if re.fullmatch("[0-9]{1,9}", item):
    if known.id_to_token(int(item)) is None:
      raise UserError(f"--stop_tokens: there is no token with the id {item}.")
    return int(item)
  text = item.replace("\\n", "\n")
  if not text:
    raise UserError("--stop_tokens has an empty item; write e.g. '<end_of_turn>,106'.")
  ids = known.encode(text, add_special_tokens=False).ids
  # A text alone may begin with a blank of the tokenizer's, and a name may stand for other bytes.
  named = (known.token_to_id(name) for name in (text, text.replace(" ", "▁")))
  for token_id in (*named, *ids[: len(ids) == 1]):
    if token_id is not None and info.spells(token_id, text):
      return token_id
  names = ", ".join(info.name(i) for i in ids)
  raise UserError(
    f"--stop_tokens: {item!r} is no token of the model; it is made of {names[:200]}. Give one "
    "token, by its text or its id."
  )


def with_eos_ids(info: TokenizerInfo, ids: Sequence[int]) -> TokenizerInfo:
  """Returns the tokenizer with more ids that end a completion, also in the files that are saved."""
  eos_id, *others = dict.fromkeys([*info.eos_ids, *ids])
  files = dict(info.files)
  if files:
    saved = json.loads(files.get(_GENERATION, b"{}")) or _ids_of(info.config_ids or {})
    saved["eos_token_id"] = [eos_id, *others]
    files[_GENERATION] = (json.dumps(saved, indent=2) + "\n").encode()
  return dataclasses.replace(info, eos_id=eos_id, other_eos_ids=tuple(others), files=files)


def _ids_of(config: Mapping[str, Any]) -> dict[str, Any]:
  # transformers reads these from the config only where there is no generation_config.json.
  return {
    name: config[name]
    for name in ("bos_token_id", "pad_token_id")
    if config.get(name) not in (None, -1)
  }
