"""How many columns a batch of padded rows is read in.

A batch is read in the fewest of a few widths that hold its rows. So its work follows neither the
longest row of a file nor the limit of a completion, and few programs are compiled.
"""

from typing import NamedTuple

import numpy as np

_FEWEST_COLUMNS = 32


def below(widest: int) -> list[int]:
  """Returns the widths: `widest`, halved again and again but not below 32."""
  widths = [widest]
  while (half := -(-widths[-1] // 2)) >= _FEWEST_COLUMNS:
    widths.append(half)
  return widths


def longest(mask: np.ndarray) -> int:
  """Returns how many columns hold what is real in `mask` [..., T], from its start."""
  is_used = mask.reshape(-1, mask.shape[-1]).any(axis=0)
  return len(is_used) - int(np.argmax(is_used[::-1]))


def narrowest(widths: list[int], mask: np.ndarray) -> int:
  """Returns the least of `widths` that holds what is real in `mask` [..., T], from its start."""
  needed = longest(mask)
  return min(width for width in widths if width >= needed)


def without_padding(batch: NamedTuple, short_len: int):
  """Returns rows of examples in the fewest columns that hold their tokens.

  What is cut is padding at the end, False in the `mask` [..., S] of all rows; a batch without a
  mask stays as it is.

  Args:
    batch: named tuple of arrays. Those of the shape of the mask have tokens in columns.
    short_len: of the model. Rows with more columns have other rotations, and keep more.
  """
  mask = getattr(batch, "mask", None)
  if mask is None:
    return batch
  widest = mask.shape[-1]
  width = narrowest([x for x in below(widest) if x > short_len or widest <= short_len], mask)
  return type(batch)(*(x[..., :width] if x.shape == mask.shape else x for x in batch))
