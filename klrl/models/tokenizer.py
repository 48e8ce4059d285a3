"""A tokenizer with its special tokens, from text to ids and back.

Texts are encoded as `transformers` encodes them, with two exceptions: a text that begins with the
BOS gets no second one, and no EOS is put behind a text. What is decoded never holds half a
character: one that the last tokens begin and do not finish is left out.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from klrl import schema
from klrl.errors import UserError
from klrl.models.blocks import DecoderConfig
from klrl.models.token_bytes import TokenBytes

DEFAULT_TEMPLATE = "default"  # the name of the chat template that is used unless another is named


class Tokens(NamedTuple):
  """One text as tokens; `ends` holds how many of its characters end at or before each token."""

  ids: list[int]
  ends: list[int]


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
  """A tokenizer and its special tokens; `bos_id` and `eos_id` may be None.

  `eos_id` closes the texts that are trained on; it and `other_eos_ids` end a completion. `pad_id`
  fills masked places. `files` are those of the directory that the tokenizer was read from, with the
  `*_token_id` fields of its config.json; a tokenizer made in code has none. `special_tokens` are
  the texts that a chat template knows by names such as `bos_token`, and `chat_templates` the
  templates by their names.
  """

  tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)
  bos_id: int | None
  eos_id: int | None
  pad_id: int
  other_eos_ids: tuple[int, ...] = ()
  cleans_up: bool = False
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
  config_ids: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
  chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """The ids that end a completion."""
    return () if self.eos_id is None else (self.eos_id, *self.other_eos_ids)

  @functools.cached_property
  def num_tokens(self) -> int:
    """The largest id of a token or EOS, plus one; a model predicts no larger id."""
    vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
    return 1 + max([*vocabulary.values(), *self.eos_ids], default=-1)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, with a BOS if the tokenizer adds one."""
    return self.encode_batch([text])[0].ids

  def encode_batch(self, texts: Iterable[str]) -> list[Tokens]:
    """Returns the tokens of texts, each with a BOS if the tokenizer adds one.

    A text that begins with it has it once. An EOS that the tokenizer puts behind each text is left
    out: a prompt that ends leaves nothing to complete.

    Raises:
      UserError: the tokenizer fails at a text.
    """
    texts = list(texts)
    before, after = self.around
    encoded = []
    for text, (ids, ends) in zip(texts, self.encode_bare(texts), strict=True):
      start = [] if ids[: len(before)] == before else before
      ends = [0] * len(start) + ends + [len(text)] * len(after)
      encoded.append(Tokens([*start, *ids, *after], ends))
    return encoded

  def encode_bare(self, texts: Iterable[str]) -> list[Tokens]:
    """Returns the tokens of texts that have all their special tokens, as those of templates do.

    Raises:
      UserError: the tokenizer fails at a text.
    """
    texts = list(texts)
    try:
      encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception:  # The library does not say which of the texts it was.
      for number, text in enumerate(texts, start=1):
        with refusals(f"The tokenizer cannot encode text {number}, {schema.show(text)}"):
          self.tokenizer.encode(text, add_special_tokens=False)
      raise
    return [Tokens(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]

  @functools.cached_property
  def around(self) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text, without the EOS."""
    encoding = self._an_encoding()
    mask = encoding.special_tokens_mask
    first, last = (mask.index(0), mask[::-1].index(0)) if 0 in mask else (len(mask), 0)
    after = encoding.ids[len(mask) - last :]
    while after and after[-1] in self.eos_ids:
      after.pop()
    return encoding.ids[:first], after

  def _an_encoding(self) -> tokenizers.Encoding:
    """Returns an encoding that holds more than what is put around every text, if there is one."""

    def texts():
      yield "a"
      yield from self.tokenizer.get_vocab()  # One may not know the letter; all know their tokens.

    for text in texts():
      with contextlib.suppress(Exception):  # of a vocabulary without its unknown token
        encoding = self.tokenizer.encode(text)
        if 0 in encoding.special_tokens_mask:
          return encoding
    return self.tokenizer.encode("")

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without special tokens and without half a character at the end."""
    kept = [i for i in ids if i not in self._special_ids]
    num_bytes = self._bytes.unfinished(kept)
    if not num_bytes:
      return self.decode_all(ids)
    if self._bytes.are_tokens:  # A run of them decodes as a whole or not at all.
      return self.decode_all(kept[: len(kept) - num_bytes])
    return self.decode_all(ids).removesuffix("\ufffd")

  def decode_marked(self, ids: Sequence[int]) -> str:
    """Returns the text of ids with its special tokens."""
    return self.tokenizer.decode(ids, skip_special_tokens=False)

  def name(self, token_id: int) -> str:
    """Returns what shows a token: its text, or the bytes of a part of a character: `<0xE4>`."""
    token = self.tokenizer.id_to_token(token_id)
    if token is None:
      return f"<{token_id}>"
    return self._bytes.part(token_id) or token

  def spells(self, token_id: int, text: str) -> bool:
    """Returns whether a token is this text."""
    return self._bytes.of(token_id) == text.encode()

  @functools.cached_property
  def _special_ids(self) -> set[int]:
    added = self.tokenizer.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special}

  @functools.cached_property
  def _bytes(self) -> TokenBytes:
    return TokenBytes(self.tokenizer)

  def decode_all(self, ids: Sequence[int]) -> str:
    """Returns the text of ids without special tokens; bytes that are no character are U+FFFD."""
    text = self.tokenizer.decode(ids)
    if self.cleans_up:
      # The list is that of transformers.
      for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1:])
      text = text.replace(" ' ", "'")
      for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def check_tokenizer(info: TokenizerInfo, config: DecoderConfig) -> None:
  """Raises UserError if the tokenizer has ids for which the model has no embedding."""
  before, after = info.around
  special_ids = [info.bos_id, info.pad_id, *info.eos_ids, *before, *after]
  special_ids = [i for i in special_ids if i is not None]
  largest = max([info.num_tokens - 1, *special_ids])
  if largest >= config.vocab_size:
    raise UserError(
      f"the tokenizer's ids go up to {largest}, but the model has vocab_size={config.vocab_size}:"
      " this tokenizer belongs to another model."
    )


def shared_tokens(ours: TokenizerInfo, theirs: TokenizerInfo) -> int | None:
  """Returns how many ids, from 0 on, both tokenizers share; None if their vocabularies differ.

  Equal ids must be equal tokens. Behind them `theirs` may have further added tokens, which then
  never occur, and `ours` a pad token, in place of which theirs may have its own.
  """
  num_shared, vocabularies = _equal_ids(ours, theirs)
  beyond = [{i for i in vocabulary if i >= num_shared} for vocabulary in vocabularies]
  same = (
    beyond[0] <= {ours.pad_id}
    and all(eos_id < num_shared for eos_id in ours.eos_ids)
    and beyond[1] <= set(theirs.tokenizer.get_added_tokens_decoder())
    and beyond[0] & beyond[1] <= {theirs.pad_id}
  )
  return num_shared if same else None


def difference(ours: TokenizerInfo, theirs: TokenizerInfo) -> str:
  """Returns how the vocabularies of two tokenizers differ first, for a message."""
  first, vocabularies = _equal_ids(ours, theirs)
  names = [
    repr(vocabulary[first])[:100] if first in vocabulary else "no token"
    for vocabulary in vocabularies
  ]
  return f"id {first} is {names[1]} there, and {names[0]} in the policy"


def _equal_ids(ours, theirs) -> tuple[int, list[dict[int, str]]]:
  """Returns how many ids, from 0 on, are the same in both, and {id: token} of each."""
  vocabularies = [
    {token_id: token for token, token_id in info.tokenizer.get_vocab().items()}
    for info in (ours, theirs)
  ]
  num = min(info.num_tokens for info in (ours, theirs))
  known = (vocabulary.get for vocabulary in vocabularies)
  pairs = zip(*(map(get, range(num)) for get in known), strict=True)
  return next((i for i, (left, right) in enumerate(pairs) if left != right), num), vocabularies


@contextlib.contextmanager
def refusals(what: str):
  """Turns the errors of the tokenizers library into a UserError that begins with `what`."""
  try:
    yield
  except (KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except (
    BaseException
  ) as error:  # The library raises no class of its own, and panics are no Exception.
    raise UserError(f"{what}: {str(error)[:200]}") from error
