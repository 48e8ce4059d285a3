"""Packs several texts into one row, so that little of a batch is padding.

Attention stays inside each text and positions count from its start (`segment_ids`, see
`klrl.models.decoder`); no text is cut. The loss is a sum over tokens divided by their number, so
loss and gradient of a set of texts are the same as with one text in each row.
"""

import collections
from collections.abc import Sequence

import numpy as np

from klrl.tasks.data import Encoded, Examples


def pack(texts: Sequence[Encoded], pad_id: int, *, row_len: int) -> Examples:
  """Returns the texts in rows of `row_len` tokens, with several texts in a row where they fit.

  Each text goes, in the order given, into the fullest row that has room for it (best fit). Sorting
  by length first would fill rows a little better, but put texts of like lengths together. Nothing
  predicts the first token of a text, so it is in no completion.

  Raises:
    ValueError: a text is longer than `row_len`.
  """
  rows: list[list[Encoded]] = []
  with_room = collections.defaultdict(list)  # tokens of room -> rows that have as many
  for text in texts:
    if len(text.tokens) > row_len:
      raise ValueError(f"A text has {len(text.tokens)} tokens, a row {row_len}.")
    room = next((n for n in range(len(text.tokens), row_len + 1) if with_room[n]), None)
    if room is None:
      rows.append([])
      row, room = len(rows) - 1, row_len
    else:
      row = with_room[room].pop()
    rows[row].append(text)
    with_room[room - len(text.tokens)].append(row)

  shape = len(rows), row_len
  packed = Examples(
    np.full(shape, pad_id, np.int32), *(np.zeros(shape, t) for t in (bool, bool, np.int32))
  )
  for row, members in enumerate(rows):
    start = 0
    for segment, text in enumerate(members, start=1):
      end = start + len(text.tokens)
      packed.tokens[row, start:end] = text.tokens
      packed.completion_mask[row, start + 1 : end] = text.in_completion[1:]
      packed.segment_ids[row, start:end] = segment
      start = end
  return packed._replace(mask=packed.segment_ids > 0)
