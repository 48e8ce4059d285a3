"""The text of a compiled program as data: its computations and their instructions."""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


class Buffer(NamedTuple):
  """One array of a type."""

  bytes: float  # of its numbers
  held: (
    float  # bytes that it takes: a TPU's tiles are whole, so that 64 of 128 columns take as many
  )
  dims: tuple[int, ...]
  is_main: bool  # in the device's main memory rather than a faster one


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  opcode: str
  buffers: list[Buffer]  # what it makes
  operands: list[str]
  attributes: str
  is_root: bool

  def attribute(self, name: str) -> str:
    """Returns the word that stands for an attribute, e.g. the computation for `calls`."""
    return re.search(rf"\b{name}=\{{?%?([\w.\-]+)", self.attributes).group(1)

  @property
  def target(self) -> str:
    """What a custom call does, "" of other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found.group(1) if found else ""


Computations = dict[str, dict[str, Instruction]]


def parse(text: str) -> tuple[Computations, str]:
  """Returns ({computation: {name: instruction}}, the name of the one that runs)."""
  computations: Computations = {}
  entry = ""
  for line in re.sub(r"kernel_metadata=\{\n.*\n\}", "", text).splitlines():
    line = re.sub(r"/\*.*?\*/", "", line).strip()
    left, equals, right = line.partition(" = ")
    if line.endswith("{") and "->" in line and (not equals or "(" in left):
      name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
      current = computations.setdefault(name, {})
      entry = name if line.startswith("ENTRY") else entry
    elif equals and computations and re.fullmatch(r"(ROOT )?%?[\w.\-]+", left):
      end = _balanced(right, 0) if right.startswith("(") else right.index(" ")
      opcode, _, _ = right[end:].strip().partition("(")
      opens = right.index("(", end)
      closes = _balanced(right, opens)
      name = left.removeprefix("ROOT ").lstrip("%")
      current[name] = Instruction(
        name,
        opcode,
        _buffers(right[:end]),
        re.findall(r"%([\w.\-]+)", right[opens:closes]),
        # What stands for a constant's operands is its value, for a parameter's its number.
        right[opens:] if opcode in ("constant", "parameter") else right[closes:],
        left.startswith("ROOT "),
      )
  return computations, entry


def root(computation: dict[str, Instruction]) -> Instruction:
  """Returns the instruction that makes what a computation returns."""
  (found,) = (x for x in computation.values() if x.is_root)
  return found


def number(parameter: Instruction) -> int:
  """Returns which operand of its computation a parameter is."""
  return int(re.match(r"\((\d+)\)", parameter.attributes).group(1))


def integer(computation: dict[str, Instruction], name: str) -> int | None:
  """Returns the number that a value is, None where it is no constant or a copy of one."""
  found = computation[name]
  while found.opcode == "copy":
    found = computation[found.operands[0]]
  value = re.match(r"\((-?\d+)\)", found.attributes) if found.opcode == "constant" else None
  return int(value.group(1)) if value else None


def in_main(buffers: list[Buffer]) -> float:
  """Returns how many bytes of main memory arrays take."""
  return sum(buffer.held for buffer in buffers if buffer.is_main)


def _balanced(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at `start` is closed, exclusive."""
  depth = 0
  for position in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[position], 0)
    if not depth:
      return position + 1
  raise ValueError(f"No closing parenthesis in {text[:200]}")


def _buffers(text: str) -> list[Buffer]:
  """Returns the arrays of a type such as `(bf16[2,8]{1,0:T(2,128)S(1)}, s32[])`."""
  found = []
  for dtype, dims, layout in _SHAPE.findall(text):
    bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype).group())
    sizes = tuple(int(size) for size in dims.split(",") if size)
    is_main = not re.search(r"S\([1-9]\d*\)", layout)
    num_bytes, num_held = (math.prod(x) * bits / 8 for x in (sizes, _tiled(sizes, layout)))
    found.append(Buffer(num_bytes, num_held, sizes, is_main))
  return found


def _tiled(sizes: tuple[int, ...], layout: str) -> list[int]:
  """Returns the sizes up to whole tiles: `1,0:T(8,128)` are 128 along axis 1 by 8 along axis 0."""
  tiled = list(sizes)
  found = re.match(r"([\d,]+):.*?T\(([\d,]+)\)", layout)
  if found:
    order, tile = (list(map(int, group.split(","))) for group in found.groups())
    for axis, size in zip(order, reversed(tile), strict=False):
      tiled[axis] += -tiled[axis] % size
  return tiled
