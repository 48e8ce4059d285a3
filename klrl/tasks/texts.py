"""Encodes texts and decodes completions, always with the prompt before them.

Tokenizers drop or add a blank at the beginning of a text, so a word has other tokens there than
further on. A completion is therefore encoded and decoded behind its prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from klrl.errors import UserError
from klrl.models import TokenizerInfo
from klrl.run import progress

_NUM_CHECKED = 1000  # prompts that are also encoded alone, for a warning


class Encoded(NamedTuple):
  """One text as tokens."""

  tokens: list[int]
  num_prompt_tokens: int  # the first ones; the others are the completion with its end-of-sequence


def encode_texts(texts: Sequence[tuple[str, str]], tokenizer: TokenizerInfo) -> list[Encoded]:
  """Returns (prompt, completion) texts as tokens, each closed with the end-of-sequence.

  The text is encoded as a whole and split by character offsets, so that a completion has the same
  tokens as when the model writes it. The tokenizer's own EOS closes it, unless the text of the
  completion already ends with an EOS. If a prompt has other tokens alone than before its
  completion, the console says so, since the policy will be asked to complete it alone.

  Raises:
    UserError: the tokenizer has no EOS, or fails at a text.
  """
  if tokenizer.eos_id is None:
    raise UserError("The tokenizer names no EOS token; completions could not be closed.")
  whole = tokenizer.encode_batch(prompt + completion for prompt, completion in texts)
  encoded = []
  for (prompt, _), (ids, ends) in zip(texts, whole, strict=True):
    num_prompt_tokens = sum(end <= len(prompt) for end in ends)
    is_closed = ids[num_prompt_tokens:][-1:] and ids[-1] in tokenizer.eos_ids
    encoded.append(Encoded(ids if is_closed else [*ids, tokenizer.eos_id], num_prompt_tokens))
  _warn_of_other_tokens([prompt for prompt, _ in texts], encoded, tokenizer)
  return encoded


def _warn_of_other_tokens(prompts, encoded, tokenizer) -> None:
  """Warns if some of the first prompts have other tokens alone than before their completions."""
  pairs = [(prompt, ids[:n]) for prompt, (ids, n) in zip(prompts, encoded, strict=True) if prompt][
    :_NUM_CHECKED
  ]
  alone = tokenizer.encode_batch(prompt for prompt, _ in pairs)
  other = [prompt for (prompt, ids), found in zip(pairs, alone, strict=True) if found.ids != ids]
  if other:
    progress.warn_once(
      f"{len(other)} of {len(pairs)} prompts have other tokens alone than before a completion,"
      f" such as the one that ends {other[0][-20:]!r}. A model that is asked to complete them sees"
      " what it was not trained on. Begin the completion with the blank that ends the prompt."
    )


def completion_texts(tokenizer: TokenizerInfo, rollout) -> list[str]:
  """Returns the text of each completion of a rollout (host arrays), without special tokens.

  Prompt and completion are decoded together and then cut, since decoders treat the first token of a
  text differently (those of SentencePiece drop its space).
  """
  pairs = zip(*token_ids(rollout), strict=True)
  return [decode_continuation(tokenizer, prompt, completion) for prompt, completion in pairs]


def token_ids(rollout) -> tuple[list[list[int]], list[list[int]]]:
  """Returns (prompts, completions) of a rollout (host arrays) as tokens, without padding."""
  prompt_mask, completion_mask = map(np.asarray, (rollout.prompt_mask, rollout.completion_mask))
  prompts, completions = np.split(np.asarray(rollout.tokens), [prompt_mask.shape[1]], axis=1)
  return tuple(
    [row[mask].tolist() for row, mask in zip(tokens, masks, strict=True)]
    for tokens, masks in ((prompts, prompt_mask), (completions, completion_mask))
  )


def decode_continuation(tokenizer: TokenizerInfo, prompt: list[int], completion: list[int]) -> str:
  """Returns the text that `completion` adds to `prompt`."""
  decode = tokenizer.decode
  before, whole = decode(prompt), decode(prompt + completion)
  # A prompt that ends inside a multi-byte character decodes differently once it is complete.
  return whole[len(before) :] if whole.startswith(before) else decode(completion)
