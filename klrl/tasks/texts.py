"""Encodes texts and decodes completions, always with the prompt before them.

Tokenizers drop or add a blank at the beginning of a text, so a word has other tokens there than
further on. A completion is therefore encoded and decoded behind its prompt.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.models import TokenizerInfo
from klrl.run import progress
from klrl.tasks import chats
from klrl.tasks.chats import Text

_NUM_CHECKED = 1000  # prompts that are also encoded alone, for a warning


class Encoded(NamedTuple):
  """One text as tokens."""

  tokens: list[int]
  in_completion: list[bool]  # of each token: whether the model writes it, its EOS included


def encode_texts(texts: Sequence[tuple[Text, Text]], tokenizer: TokenizerInfo) -> list[Encoded]:
  """Returns (prompt, completion) texts as tokens, each closed with the end-of-sequence.

  The text is encoded as a whole and split by character offsets, so that a completion has the same
  tokens as when the model writes it. The tokenizer's own EOS closes it, unless the text of the
  completion already ends with an EOS. If a prompt has other tokens alone than before its
  completion, the console says so, since the policy will be asked to complete it alone.

  Of chats the assistant's turns in the completion count, each up to the EOS in it: what a template
  writes behind that, such as a new line, the model never does. The text ends with the last of them.

  Raises:
    UserError: the tokenizer has no EOS, or fails at a text; some texts are chats and others are
      not; of chats, as `chats.answered_texts`.
  """
  if tokenizer.eos_id is None:
    raise UserError("The tokenizer names no EOS token; completions could not be closed.")
  if all_chats([completion for _, completion in texts], "examples"):
    return _encode_chats(texts, tokenizer)
  whole = tokenizer.encode_batch(prompt + completion for prompt, completion in texts)
  encoded = []
  for (prompt, _), (ids, ends) in zip(texts, whole, strict=True):
    num_prompt_tokens = sum(end <= len(prompt) for end in ends)
    is_closed = ids[num_prompt_tokens:][-1:] and ids[-1] in tokenizer.eos_ids
    ids = ids if is_closed else [*ids, tokenizer.eos_id]
    in_completion = [False] * num_prompt_tokens + [True] * (len(ids) - num_prompt_tokens)
    encoded.append(Encoded(ids, in_completion))
  _warn_of_other_tokens([prompt for prompt, _ in texts], encoded, tokenizer.encode_batch)
  return encoded


def encode_whole(texts: Sequence[tuple[Text, Text]], tokenizer: TokenizerInfo) -> list[Encoded]:
  """Returns the same texts, of which every token counts, those of the prompt too.

  Raises:
    UserError: as `encode_texts`.
  """
  if all_chats([completion for _, completion in texts], "examples"):
    encoded = encode_texts(texts, tokenizer)
    return [Encoded(tokens, [True] * len(tokens)) for tokens, _ in encoded]
  return encode_texts([("", prompt + completion) for prompt, completion in texts], tokenizer)


def _encode_chats(pairs, tokenizer: TokenizerInfo) -> list[Encoded]:
  rendered = chats.answered_texts(pairs, tokenizer)
  tokens = tokenizer.encode_bare(text for text, _ in rendered)
  encoded = [
    _turns(ids, ends, spans, tokenizer)
    for (ids, ends), (_, spans) in zip(tokens, rendered, strict=True)
  ]
  asked = [text[: spans[0][0]] for text, spans in rendered]
  _warn_of_other_tokens(asked, encoded, tokenizer.encode_bare)
  return encoded


def _turns(ids, ends, spans, tokenizer: TokenizerInfo) -> Encoded:
  """Returns the tokens up to the end of the last of the turns that are at `spans`."""
  eos_ids = tokenizer.eos_ids
  in_completion = np.zeros(len(ids) + 1, bool)
  last = 0
  for first_character, behind in spans:
    turn = [i for i, end in enumerate(ends) if first_character < end <= behind]
    if not turn:
      continue
    behind = turn[-1] + 1
    if behind < len(ids) and ids[behind] in eos_ids:  # A generation block may leave it out.
      behind += 1
    # The turn ends with the first EOS of the blanks and special tokens that are its end.
    end = list(
      itertools.takewhile(
        lambda i: ids[i] in eos_ids or not tokenizer.decode([ids[i]]).strip(),
        reversed(range(turn[0], behind)),
      )
    )
    if len(end) == behind - turn[0] and ids[last] in eos_ids and last:
      continue  # A block of its own, behind the EOS of the turn before.
    last = min((i for i in end if ids[i] in eos_ids), default=turn[-1])
    in_completion[turn[0] : last + 1] = True
  ids = ids[: last + 1]
  if ids[-1] not in eos_ids:
    ids = [*ids, tokenizer.eos_id]
    in_completion[last + 1] = True
  return Encoded(ids, in_completion[: len(ids)].tolist())


def encode_prompt_texts(prompts: Sequence[Text], tokenizer: TokenizerInfo) -> list[list[int]]:
  """Returns the tokens of prompts; a chat ends where the assistant's turn begins.

  A chat has the BOS that its template writes, and no other.

  Raises:
    UserError: the tokenizer fails at a text; some prompts are chats and others are not; of chats,
      as `chats.prompt_texts`.
  """
  if not all_chats(prompts, "prompts"):
    return [row.ids for row in tokenizer.encode_batch(prompts)]
  rows = [row.ids for row in tokenizer.encode_bare(chats.prompt_texts(prompts, tokenizer))]
  before, _ = tokenizer.around
  if before and rows[0][: len(before)] != before:
    progress.warn_once(
      f"The chat template writes no {tokenizer.tokenizer.id_to_token(before[0])}, with which this "
      "tokenizer begins every other text. None is added, as in transformers; a template that "
      "begins with {{ bos_token }} writes it."
    )
  return rows


def all_chats(texts: Sequence[Text], what: str) -> bool:
  """Returns whether the texts are chats; UserError if only some of them are."""
  are_chats = {chats.is_chat(text) for text in texts}
  if len(are_chats) > 1:
    raise UserError(f"Some {what} are messages, and others are text; give one kind.")
  return are_chats == {True}


def _warn_of_other_tokens(prompts: Sequence[str], encoded: Sequence[Encoded], encode) -> None:
  """Warns if some of the first prompts have other tokens alone than before their completions."""
  asked = ((prompt, text) for prompt, text in zip(prompts, encoded, strict=True) if prompt)
  pairs = [
    (prompt, text.tokens[: text.in_completion.index(True)])
    for prompt, text in itertools.islice(asked, _NUM_CHECKED)
  ]
  alone = encode(prompt for prompt, _ in pairs)
  other = [prompt for (prompt, ids), found in zip(pairs, alone, strict=True) if found.ids != ids]
  if other:
    progress.warn_once(
      f"{len(other)} of {len(pairs)} prompts have other tokens alone than before a completion,"
      f" such as the one that ends {other[0][-20:]!r}. A model that is asked to complete them sees"
      " what it was not trained on. Begin the completion with the blank that ends the prompt."
    )


def completion_texts(tokenizer: TokenizerInfo, rollout) -> list[str]:
  """Returns the text of each completion of a rollout (host arrays), without special tokens.

  It is also without the token that ended it, be that special or not.

  Prompt and completion are decoded together and then cut, since decoders treat the first token of a
  text differently (those of SentencePiece drop its space).
  """
  texts = []
  for prompt, completion in zip(*token_ids(rollout), strict=True):
    is_ended = completion and completion[-1] in tokenizer.eos_ids
    written = completion[:-1] if is_ended else completion
    texts.append(decode_continuation(tokenizer, prompt, written))
  return texts


def token_ids(rollout) -> tuple[list[list[int]], list[list[int]]]:
  """Returns (prompts, completions) of a rollout (host arrays) as tokens, without padding.

  A completion goes to the last token that the policy chose, with those that were given before it.
  """
  prompt_mask, chosen = map(np.asarray, (rollout.prompt_mask, rollout.completion_mask))
  prompts, completions = np.split(np.asarray(rollout.tokens), [prompt_mask.shape[1]], axis=1)
  until_last = np.logical_or.accumulate(chosen[:, ::-1], axis=1)[:, ::-1]
  return tuple(
    [row[mask].tolist() for row, mask in zip(tokens, masks, strict=True)]
    for tokens, masks in ((prompts, prompt_mask), (completions, until_last))
  )


def decode_continuation(tokenizer: TokenizerInfo, prompt: list[int], completion: list[int]) -> str:
  """Returns the text that `completion` adds to `prompt`."""
  decode = tokenizer.decode
  before, whole = decode(prompt), decode(prompt + completion)
  # A prompt that ends inside a multi-byte character decodes differently once it is complete.
  return whole[len(before) :] if whole.startswith(before) else decode(completion)
