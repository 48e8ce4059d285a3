"""Arrays that are still in their files, of which each device gets the part that it holds.

Parameters of a model directory start as `Unread` leaves. `parallel.put` reads them, so that a
process reads and holds its own shards only, in the dtype in which they are wanted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from klrl.errors import UserError

Index = tuple[slice, ...]


class Block(NamedTuple):
  """A part of an array as it is in the file."""

  name: str  # of the tensor, for messages
  where: Any  # index of the array that is read
  values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
  """An array that has not been read: its shape, the dtype that it gets, and where it is.

  `blocks(index)` yields the parts, each small against the whole, that together are the array at a
  tuple of slices with a start and a stop; `where` then counts from these starts.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  blocks: Callable[[Index], Iterator[Block]] = dataclasses.field(repr=False)
  through: tuple[np.dtype, ...] = ()  # dtypes to which the numbers are rounded first

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """The number of elements."""
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def nbytes(self) -> int:
    """The size in bytes, once it is read."""
    return self.size * self.dtype.itemsize

  def astype(self, dtype) -> "Unread":
    """Returns the array with its numbers rounded to `dtype`; itself where that is its dtype."""
    dtype = np.dtype(dtype)
    if dtype == self.dtype:
      return self
    return dataclasses.replace(self, dtype=dtype, through=(*self.through, self.dtype))

  def read(self, index: Index | None = None) -> np.ndarray:
    """Returns the array, or its part at a tuple of slices of step 1.

    Raises:
      UserError: the file cannot be read, or a number is not finite in the array's dtype.
    """
    index = index or (slice(None),) * self.ndim
    bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
    shape = [stop - start for start, stop, _ in bounds]
    # JAX on a processor keeps a well-aligned array as a buffer, which cannot be donated. This one
    # begins one element after such a place.
    array = np.empty(math.prod(shape) + 1, self.dtype)[1:].reshape(shape)
    for name, where, values in self.blocks(tuple(slice(*bound[:2]) for bound in bounds)):
      with np.errstate(over="ignore", invalid="ignore"):
        for dtype in self.through:
          values = values.astype(dtype, copy=False)
        array[where] = values
      if not np.isfinite(array[where]).all():
        raise UserError(f"{name} holds NaN, infinity, or numbers beyond {self.dtype}.")
    return array

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Returns the whole array, for numpy."""
    return self.read() if dtype is None else self.read().astype(dtype, copy=False)


def is_unread(leaf) -> bool:
  """Returns whether a leaf has yet to be read."""
  return isinstance(leaf, Unread)


def stored_as(tree, dtype: str):
  """Returns `tree` in `dtype`, what is unread still unread; "file" leaves it as it is."""
  if dtype == "file":
    return tree
  return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), tree)


def read(tree):
  """Returns `tree` with numpy arrays in place of what is unread; for small models."""
  return jax.tree.map(lambda leaf: leaf.read() if is_unread(leaf) else leaf, tree)
