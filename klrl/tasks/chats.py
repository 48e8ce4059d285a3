"""Chats: messages as data files have them, and the assistant's turns in what a template writes.

A chat is a list of messages, {"role": ..., "content": ...}.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from klrl import schema
from klrl.errors import UserError
from klrl.models import TokenizerInfo
from klrl.models.chat import Job, Message, Rendered, render, template_of
from klrl.models.chat_worker import CLOSE, OPEN
from klrl.run import progress

ASSISTANT = "assistant"
_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", ASSISTANT, "tool")
# What the turns of ShareGPT's conversations are called.
_SHAREGPT = {
  "system": "system",
  "human": "user",
  "user": "user",
  "tool": "tool",
  "gpt": ASSISTANT,
  "assistant": ASSISTANT,
  "chatgpt": ASSISTANT,
  "model": ASSISTANT,
}
_FORM = 'Write {"role": "user", "content": "..."}.'


Text = str | list[Message]  # plain text, or a chat


class Asking(NamedTuple):
  """What the user adds to the data.

  as_chat: a prompt that is text is what the user says, and a completion is the assistant's answer.
  system_prompt: the first message of chats that have none of the system's; "" for none.
  """

  as_chat: bool = False
  system_prompt: str = ""


def is_chat(value: Any) -> bool:
  """Returns whether a column holds messages rather than text."""
  return isinstance(value, list)


def beginning(text: Text) -> str:
  """Returns how a text, or the last message of a chat, begins, for a message to the user."""
  return repr((text[-1]["content"] if is_chat(text) else text)[:80])


def messages(value: Any, where: str) -> list[Message]:
  """Returns the messages of a column, each with its content as one text and without empty fields.

  Raises:
    UserError: it is no list of messages with a known role and text; what is said begins with
      `where`.
  """
  if not is_chat(value) or not value:
    raise UserError(f"{where} is {schema.show(value)}, and no list of messages. {_FORM}")
  return [_message(item, f"{where}, message {i}") for i, item in enumerate(value, start=1)]


def _message(item: Any, where: str) -> Message:
  if not isinstance(item, dict) or not isinstance(item.get("role"), str):
    raise UserError(f"{where} is {schema.show(item)}, which has no role. {_FORM}")
  if item["role"] not in _ROLES:
    raise UserError(
      f"{where} has the role {schema.show(item['role'])}; roles are {', '.join(_ROLES)}."
    )
  # Tables give every message the fields of all; templates ask which are there.
  kept = {name: field for name, field in item.items() if field is not None}
  content = kept.get("content", "" if kept.get("tool_calls") else None)
  if isinstance(content, list):
    parts = [part.get("text") if isinstance(part, dict) else None for part in content]
    if not all(isinstance(part, str) for part in parts):
      raise UserError(f"{where} holds other content than text, {schema.show(content)}.")
    content = "".join(parts)
  if not isinstance(content, str):
    raise UserError(f"{where} has no text as content: {schema.show(item)}. {_FORM}")
  if OPEN in content or CLOSE in content:
    raise UserError(f"{where} holds U+10FFFE or U+10FFFF, which are no characters. Remove them.")
  return {**kept, "content": content}


def from_sharegpt(value: Any, where: str) -> list[Message]:
  """Returns the messages of ShareGPT's turns, {"from": ..., "value": ...}.

  Raises:
    UserError: as `messages`.
  """
  if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
    raise UserError(f"{where} is {schema.show(value)}, and no list of turns.")
  turns = []
  for number, turn in enumerate(value, start=1):
    if "from" not in turn:  # Some name the column so and hold messages.
      turns.append(turn)
      continue
    if turn["from"] not in _SHAREGPT:
      raise UserError(
        f"{where}, turn {number} is from {schema.show(turn['from'])}; known are "
        f"{', '.join(_SHAREGPT)}."
      )
    turns.append({"role": _SHAREGPT[turn["from"]], "content": turn.get("value")})
  return messages(turns, where)


def from_hh(text: str, where: str) -> list[Message]:
  """Returns the messages of a dialogue of HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ...".

  Raises:
    UserError: the text does not begin like one.
  """
  before, *turns = re.split(r"\n\n(Human|Assistant):", text)
  if before.strip() or not turns:
    raise UserError(f"{where} has no prompt, and is no dialogue of HH-RLHF: {text[:80]!r}.")
  roles = {"Human": "user", "Assistant": ASSISTANT}
  return [
    {"role": roles[who], "content": said.strip()}
    for who, said in zip(turns[::2], turns[1::2], strict=True)
  ]


def said_by(role: str, text: str) -> list[Message]:
  """Returns the chat of one message."""
  return [{"role": role, "content": text}]


def opened(chat: list[Message], system_prompt: str) -> list[Message]:
  """Returns the chat, opened by the system prompt if that is not empty and no message is one."""
  if not system_prompt or any(message["role"] in _SYSTEM for message in chat):
    return chat
  return [*said_by("system", system_prompt), *chat]


def until_last_answer(chat: list[Message]) -> list[Message]:
  """Returns the messages before the assistant's last turn, if the chat ends with that."""
  while chat and chat[-1]["role"] == ASSISTANT:
    chat = chat[:-1]
  return chat


def prompt_texts(chats: Sequence[list[Message]], tokenizer: TokenizerInfo) -> list[str]:
  """Returns the text of each chat, with the beginning of the assistant's turn.

  Raises:
    UserError: as `klrl.models.chat.render`, or the template leaves a message out.
  """
  jobs = [Job(i, len(chat), True) for i, chat in enumerate(chats)]
  texts = [rendered.text for rendered in render(tokenizer, chats, jobs)]
  for number, (chat, text) in enumerate(zip(chats, texts, strict=True), start=1):
    _check_kept(chat, text, number)
  return texts


def answered_texts(
  pairs: Sequence[tuple[list[Message], list[Message]]], tokenizer: TokenizerInfo
) -> list[Rendered]:
  """Returns the text of each (prompt, completion), with the assistant's turns in the completion.

  The spans are the characters of these turns and what the template ends them with. They are the
  `generation` blocks of a template that has some, without the beginning with which the assistant is
  asked. Otherwise they are what a turn adds to the text in which the assistant is asked for it. If
  a template with blocks asks for a turn otherwise than it writes it, the console says so.

  Raises:
    UserError: as `prompt_texts`; the completion has no turn of the assistant; or the template
      writes a turn differently after it is asked for, or before others follow.
  """
  chats = [[*prompt, *completion] for prompt, completion in pairs]
  for number, (chat, (_, completion)) in enumerate(zip(chats, pairs, strict=True), start=1):
    if not any(message["role"] == ASSISTANT for message in completion):
      raise UserError(
        f"Chat {number} has no turn of the assistant to learn: {schema.show(chat[-1])} is its last."
      )
  has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", template_of(tokenizer))
  needed = [
    (_for_blocks if has_blocks else _for_turns)(chat, len(prompt))
    for chat, (prompt, _) in zip(chats, pairs, strict=True)
  ]
  jobs = [Job(i, *job) for i, some in enumerate(needed) for job in some]
  rendered = iter(render(tokenizer, chats, jobs))
  eos = tokenizer.special_tokens.get("eos_token", "")
  answered = []
  for number, (chat, some) in enumerate(zip(chats, needed, strict=True), start=1):
    *parts, whole = [next(rendered) for _ in some]
    _check_kept(chat, whole.text, number)
    texts = [part.text for part in parts]
    if has_blocks:
      num_before = bool(pairs[number - 1][0])
      spans = _in_blocks(texts[:num_before], texts[num_before:], whole, eos, number)
    else:
      spans = _added(texts, whole, eos, number)
    num_turns = sum(message["role"] == ASSISTANT for message in pairs[number - 1][1])
    if len(spans) < num_turns or any(first == behind for first, behind in spans):
      raise UserError(
        f"The chat template writes nothing for a turn of the assistant in chat {number}."
      )
    answered.append(Rendered(whole.text, spans))
  return answered


# What has to be rendered of a chat whose first messages are its prompt: how many messages, and
# whether the assistant is asked to go on. The last is the whole.


def _for_blocks(chat: list[Message], num_prompt: int) -> list[tuple[int, bool]]:
  asked = [(i, True) for i in _turns_of(chat, num_prompt) if i]
  return [*((n, False) for n in (num_prompt,) if n), *asked, (len(chat), False)]


def _for_turns(chat: list[Message], num_prompt: int) -> list[tuple[int, bool]]:
  turns = _turns_of(chat, num_prompt)
  return [*(job for i in turns for job in ((i, True), (i + 1, False))), (len(chat), False)]


def _turns_of(chat: list[Message], num_prompt: int) -> list[int]:
  return [i for i in range(num_prompt, len(chat)) if chat[i]["role"] == ASSISTANT]


def _in_blocks(
  prompt: list[str], asked: list[str], whole: Rendered, eos: str, number: int
) -> list[tuple[int, int]]:
  """Returns the characters of the blocks behind the prompt, without what asks for each turn."""
  # Some templates write an EOS behind everything, and so behind a prompt that stands alone.
  before = prompt[0].removesuffix(eos) if prompt else ""
  if not whole.text.startswith(before):
    raise UserError(
      f"The chat template writes the prompt of chat {number} differently once an answer follows, "
      "so the model would learn to answer what it is never asked."
    )
  spans = [span for span in whole.spans if span[0] < span[1] > len(before)]
  for text in asked:
    # Some blocks hold the header of the turn, which the assistant does not write.
    num, is_kept = len(text), whole.text.startswith(text)
    if is_kept:
      spans = [(num if first < num < behind else first, behind) for first, behind in spans]
    next_turn = min((first for first, _ in spans if first >= num), default=num)
    if not is_kept or whole.text[num:next_turn].strip():
      progress.warn_once(
        f"The chat template asks the assistant to go on with {text[-40:]!r}, but does not write "
        "its turns so. The model is then asked otherwise than it has learnt to answer: what "
        "add_generation_prompt writes has to be what stands before the {% generation %} block."
      )
  return spans


def _added(turns: list[str], whole: Rendered, eos: str, number: int) -> list[tuple[int, int]]:
  """Returns the characters that each turn adds to the text in which the assistant is asked."""
  spans = []
  for before, after in zip(turns[::2], turns[1::2], strict=True):
    if not whole.text.startswith(after):
      after = after.removesuffix(eos)
    if not after.startswith(before):
      raise UserError(
        f"The chat template asks the assistant to go on with {before[-40:]!r}, but writes its turn "
        f"in chat {number} otherwise, so the turn cannot be told apart. Give a template with "
        "{% generation %} blocks around the assistant's turns by --chat_template=FILE."
      )
    if not whole.text.startswith(after):
      raise UserError(
        f"The chat template writes a turn of the assistant in chat {number} differently once "
        "others follow (some leave the thoughts of earlier turns out), so the model would learn "
        "what it is never asked for. End each chat with the turn to learn, or give a template with "
        "{% generation %} blocks around the assistant's turns by --chat_template=FILE."
      )
    spans.append((len(before), len(after)))
  return spans


def _tools_called(message: Message) -> list[str]:
  calls = message.get("tool_calls")
  calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
  functions = (call.get("function", call) for call in calls)
  names = (function.get("name") for function in functions if isinstance(function, dict))
  return [name for name in names if isinstance(name, str)]


def _check_kept(chat: list[Message], text: str, number: int) -> None:
  """Raises UserError if the text lacks what the system or user says, or the assistant at last.

  Templates may leave earlier turns of the assistant out, and what it thought, but no tool that it
  calls.
  """
  words = "".join(text.split())
  for message in chat:
    missing = next((name for name in _tools_called(message) if name not in text), None)
    if missing is not None:
      raise UserError(
        f"The chat template leaves the call of the tool {missing[:80]!r} of chat {number} out. "
        "Give another template by --chat_template=FILE."
      )
    said = message["content"]
    if message["role"] == ASSISTANT:
      said = said.rpartition("</think>")[2] if message is chat[-1] else ""
    elif message["role"] == "tool":
      said = ""
    if "".join(said.split()) not in words:
      advice = "Give another template by --chat_template=FILE."
      if message["role"] in _SYSTEM:
        advice = f"Put it into the user's first message, or give {advice[5:]}"
      raise UserError(
        f"The chat template leaves the {message['role']} message of chat {number} out, "
        f"{message['content'][:80]!r}. {advice}"
      )
