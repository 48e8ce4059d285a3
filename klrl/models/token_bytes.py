"""The bytes of tokens that may be parts of a character.

Tokens of a byte-level BPE are any bytes, written as characters that stand for them. Tokenizers of
SentencePiece have a token for each byte, `<0x00>` to `<0xFF>`, for characters that they lack.
"""

import codecs
import re
from collections.abc import Sequence

import tokenizers

_MAX_BYTES = 4  # of a character in UTF-8


def _byte_level_characters() -> dict[str, int]:
  """Returns {character: the byte that it stands for in the vocabulary of a byte-level BPE}.

  A byte that Latin-1 shows as a character is that character; the others follow from U+0100 on.
  """
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = (byte for byte in range(256) if byte not in shown)
  return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_level_characters()


class TokenBytes:
  """Says what bytes tokens are, and whether a character ends with them.

  `are_tokens` says whether each byte is a token of its own.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    decoder = tokenizer.decoder
    kinds = "" if decoder is None else decoder.__getstate__().decode()
    self.are_tokens = '"ByteFallback"' in kinds
    self._are_characters = not self.are_tokens and '"ByteLevel"' in kinds
    self._tokenizer = tokenizer
    self._added = tokenizer.get_added_tokens_decoder()

  def unfinished(self, ids: Sequence[int]) -> int:
    """Returns how many bytes at the end of `ids` begin a character that they do not finish."""
    if not (self.are_tokens or self._are_characters):
      return 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(b"".join(map(self.of, ids[-_MAX_BYTES:])))
    return len(decoder.getstate()[0])

  def part(self, token_id: int) -> str:
    """Returns the bytes of a token as `<0xE4><0xB8>`; "" if it is made of whole characters."""
    if not (self.are_tokens or self._are_characters):
      return ""
    content = self.of(token_id)
    try:
      content.decode()
    except UnicodeDecodeError:
      return "".join(f"<0x{byte:02X}>" for byte in content)
    return ""

  def of(self, token_id: int) -> bytes:
    """Returns the bytes of a token."""
    token = self._tokenizer.id_to_token(token_id) or ""
    if self.are_tokens:
      byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
      return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
    if token_id in self._added or not self._are_characters:  # It is written as it is.
      return token.encode()
    return b"".join(
      bytes([_BYTES[character]]) if character in _BYTES else character.encode()
      for character in token
    )
