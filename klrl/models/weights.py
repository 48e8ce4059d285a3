"""The tensors of a model directory: read from safetensors files part by part, written one by one.

Names and layouts are those of the files. Only safetensors is read, since a pickle can run code.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from klrl import schema
from klrl.devices import processes
from klrl.errors import UserError
from klrl.models.directory import INDEX, WEIGHTS, advice, write_json

# As safetensors names them; JAX has no float64 unless it is asked.
DTYPES = {
  "F64": np.dtype("float32"),
  "F32": np.dtype("float32"),
  "F16": np.dtype("float16"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "F64"}
_MAX_SHARD_BYTES = 5 * 10**9
_BLOCK_BYTES = 2**25
_SafetensorError = safetensors.SafetensorError


class Delta(NamedTuple):
  """What an adapter adds to a tensor: `left [rows, rank] @ right [rank, columns]`, in float32."""

  left: np.ndarray
  right: np.ndarray


class Tensors:
  """The tensors of a model directory by name; nothing is read before it is asked for.

  The files stay open, so that a directory which is written anew is still read as it was.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._files = {name: (file, name) for name, file in _tensor_files(directory).items()}
    self._deltas: dict[str, Delta] = {}

  @classmethod
  def of_file(cls, file: pathlib.Path) -> "Tensors":
    """Returns the tensors of one safetensors file."""
    tensors = cls.__new__(cls)
    tensors.directory, tensors._deltas = file.parent, {}
    tensors._files = {name: (opened, name) for name, opened in open_tensors(file).items()}
    return tensors

  @property
  def names(self) -> set[str]:
    """The names of all tensors."""
    return set(self._files)

  def rename(self, old: str, new: str | None) -> None:
    """Gives a tensor another name; None leaves it aside.

    Raises:
      UserError: another tensor has the new name.
    """
    found = self._files.pop(old)
    if new in self._files:
      raise UserError(
        f"{self.directory}: the tensors {old} and {self._files[new][1]} are the same part of the"
        " model; leave one of them out."
      )
    if new is not None:
      self._files[new] = found

  def add(self, name: str, delta: Delta) -> None:
    """Has a tensor read with what an adapter adds to it."""
    self._deltas[name] = delta

  def take(self, name: str, other: "Tensors", stored: str) -> None:
    """Has a tensor, which may be a new one, read from another file."""
    self._files[name] = other._files[stored]

  def where(self, name: str) -> str:
    """Returns what a message calls a tensor."""
    return f"{self.directory}: tensor {self._files[name][1]}"

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""
    return tuple(self._view(name).get_shape())

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype in which a tensor is read; UserError where it holds no floats."""
    dtype = self._view(name).get_dtype()
    if dtype not in DTYPES:
      raise UserError(
        f"{self.where(name)} holds {dtype}, but must hold one of {', '.join(DTYPES)}; save the"
        " model's weights unquantized."
      )
    return DTYPES[dtype]

  def parts(
    self, name: str, index: Sequence[np.ndarray | range]
  ) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the tensor at the rows, columns, ... of `index`, a few rows at a time.

    Each item is (which of the rows of `index`, the numbers as they are in the file, with what an
    adapter adds).
    """
    view, delta = self._view(name), self._deltas.get(name)
    num_rows = len(index[0])
    row_bytes = 8 * int(np.prod([len(axis) for axis in index[1:]], dtype=np.int64))
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, step):
      rows = slice(start, min(start + step, num_rows))
      places = [index[0][rows], *index[1:]]
      try:
        values = view[tuple(map(_span, places))]
      except _SafetensorError as error:
        raise UserError(f"{self.where(name)} cannot be read: {error}") from None
      for i, axis in enumerate(places):
        if not isinstance(axis, range):  # Some rows of a fused tensor.
          values = np.take(values, axis - axis.min(), axis=i)
      if delta is not None:
        left, right = (np.asarray(axis) for axis in places)
        added = delta.left[left] @ delta.right[:, right]
        values = (values.astype(np.float32) + added).astype(values.dtype)
      yield rows, values

  def whole(self, name: str) -> np.ndarray:
    """Returns a tensor as float32; for small ones."""
    index = [range(size) for size in self.shape(name)]
    return np.concatenate([part.astype(np.float32) for _, part in self.parts(name, index)])

  def equal(self, name: str, other: str) -> bool:
    """Returns whether two tensors hold the same numbers."""
    if self.shape(name) != self.shape(other):
      return False
    index = [range(size) for size in self.shape(name)]
    both = zip(self.parts(name, index), self.parts(other, index), strict=True)
    return all(np.array_equal(left, right) for (_, left), (_, right) in both)

  def _view(self, name):
    file, stored = self._files[name]
    try:
      return file.get_slice(stored)
    except _SafetensorError as error:
      raise UserError(f"{self.where(name)} cannot be read: {error}") from None


def _span(axis) -> slice:
  if isinstance(axis, range):
    return slice(axis.start, axis.stop)
  return slice(int(axis.min()), int(axis.max()) + 1)


def _tensor_files(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the open safetensors file of each tensor, by the tensor's name."""
  if (directory / WEIGHTS).is_file():
    names = [WEIGHTS]
  elif (directory / INDEX).is_file():
    names = _shards(directory / INDEX)
  elif pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")]):
    raise UserError(
      f"{pickles[0]} is a pickle, which can run code and is not read; convert it to safetensors."
    )
  else:
    raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}.{advice(directory)}")
  tensor_files = {}
  for name in names:
    if not (directory / name).is_file():
      raise UserError(f"{directory} lacks the shard {name}.")
    found = open_tensors(directory / name)
    if twice := sorted(tensor_files.keys() & found):
      raise UserError(
        f"{directory / name}: the tensor {twice[0][:200]} is in another shard too, so that nobody "
        "knows which one counts. Fetch or save the model again."
      )
    tensor_files |= found
  return tensor_files


def open_tensors(path: pathlib.Path) -> dict[str, Any]:
  """Returns the open file of each tensor in a safetensors file; UserError where it is none."""
  try:
    # Pages of a mapped file would count as memory of this process.
    file = safetensors.safe_open(path, framework="np", backend="pread")
  except (_SafetensorError, OSError) as error:
    # It repeats what it did not expect, which may be of any length.
    raise UserError(f"{path} is not a safetensors file: {str(error)[:300]}") from None
  return dict.fromkeys(file.keys(), file)


def _shards(file: pathlib.Path) -> list[str]:
  shard = schema.Rule(
    "the name of a .safetensors file in the same directory",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", value),
  )
  index = schema.check(
    schema.read(file), {"weight_map": schema.object_of(shard)}, file, required=("weight_map",)
  )
  return sorted(set(index["weight_map"].values()))


class Planned(NamedTuple):
  """A tensor that will be written; `parts()` makes it, some rows after the other."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  parts: Callable[[], Iterable[np.ndarray]]

  @property
  def nbytes(self) -> int:
    """The size in bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_weights(directory: pathlib.Path, tensors: Sequence[Planned]) -> None:
  """Writes the weights of a model in one file or several, one tensor after the other.

  All processes call it and make every tensor, which may be a collective; the writer alone writes.
  Each file appears whole or not at all.
  """
  shards: list[list[Planned]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.nbytes > _MAX_SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  if len(shards) == 1:
    write_tensors(directory / WEIGHTS, tensors)
    _unlink(directory / INDEX)
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    write_tensors(directory / file, shard)
    weight_map |= {tensor.name: file for tensor in shard}
  total_size = sum(tensor.nbytes for tensor in tensors)
  index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
  processes.on_writer(write_json)(directory / INDEX, index)
  _unlink(directory / WEIGHTS)


@processes.on_writer
def _unlink(path):
  path.unlink(missing_ok=True)


def write_tensors(path: pathlib.Path, tensors: Sequence[Planned]) -> None:
  """Writes one safetensors file, as `write_weights` does.

  The format is the length of a header, the header in JSON, and the tensors' bytes one after the
  other (github.com/huggingface/safetensors, "Format"). The library's own writer takes all tensors
  at once.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor in tensors:
    begin, end = end, end + tensor.nbytes
    header[tensor.name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": tensor.shape,
      "data_offsets": [begin, end],
    }
  data = json.dumps(header).encode()
  data += b" " * (-len(data) % 8)
  temporary = path.with_name(f".{path.name}.tmp")
  file = failure = None
  if processes.is_writer():
    try:
      file = temporary.open("wb")
      file.write(len(data).to_bytes(8, "little") + data)
    except OSError as error:
      failure = error
  for tensor in tensors:
    written = 0
    for part in tensor.parts():  # Also after a failure, since other processes take part in it.
      data = np.ascontiguousarray(part, dtype=tensor.dtype)
      written += data.nbytes
      if file is not None and failure is None:
        try:
          file.write(data.view(np.uint8).data)
        except OSError as error:
          failure = error
      del part, data
    if written != tensor.nbytes:
      raise ValueError(f"{tensor.name} has {written} bytes, and not {tensor.nbytes} as planned.")

  def finish():
    try:
      if file is not None:
        file.close()
      if failure is not None:
        raise failure
      os.replace(temporary, path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise

  processes.on_writer(finish)()
