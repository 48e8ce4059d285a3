"""Bytes that an instruction reads from and writes to a device's main memory.

One rule holds for all. What a fusion does is seen as if nothing were fused. Of an operand that is
read which somebody looks at: of what is sliced the slice. Of a result that is written which is new:
where an operand is updated in place, the update, and nothing of what is only passed on.
"""

import collections
import re
from collections.abc import Callable

from klrl.cost import program
from klrl.cost.program import Computations, Instruction

# They move nothing, or what they do is counted elsewhere.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
  *("after-all", "partition-id", "replica-id", "optimization-barrier", "add-dependency"),
  *("async-update", "async-done"),
)
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
_SLICES = ("dynamic-slice", "slice", "gather")
# Which of their operands is written into the first.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}

Value = tuple[str, str]  # A computation and an instruction of it, which makes the value.


def moved(
  computations: Computations, name: str, instruction: Instruction, is_step: Callable[[Value], bool]
) -> float:
  """Returns the bytes of main memory that an instruction moves, which is not fused.

  Args:
    computations: the program.
    name: the computation in which the instruction stands.
    instruction: it.
    is_step: whether a value is made by a collective of which all bytes are counted elsewhere.
  """
  if instruction.opcode in _FREE or instruction.target in _FREE_TARGETS:
    return 0.0
  if instruction.opcode.endswith("-done"):
    return program.in_main(instruction.buffers)
  work = _Work(computations, name, instruction, is_step)
  # The type of a start has the operands too. What it writes is counted where it is done.
  return work.read() + (0.0 if instruction.opcode.endswith("-start") else work.written())


class _Work:
  """What an instruction does, as values that are made of each other, without fusions."""

  def __init__(self, computations, name, instruction, is_step):
    self._computations, self._instruction, self._is_step = computations, instruction, is_step
    self._sources = [(name, operand) for operand in instruction.operands]
    self._made: dict[Value, list[Value]] = {}  # of which others
    self._outputs = self._resolved(name, instruction, [[source] for source in self._sources])
    self._users: dict[Value, list[tuple[Value, int]]] = collections.defaultdict(list)
    for user, operands in self._made.items():
      for position, operand in enumerate(operands):
        self._users[operand].append((user, position))
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    aliases = re.findall(r"\{(\d*)\}: \(", found.group(1)) if found else []
    self._aliased = {int(output or 0) for output in aliases}

  def _resolved(self, name: str, instruction: Instruction, given: list[list[Value]]) -> list[Value]:
    """Returns what an instruction makes of what is given, and notes of what it is made."""
    values = [value for operand in given for value in operand]
    if instruction.opcode in ("bitcast", "tuple"):
      return values
    if instruction.opcode == "get-tuple-element":
      return [values[int(instruction.attribute("index"))]]
    if instruction.opcode != "fusion":
      self._made[name, instruction.name] = values
      return [(name, instruction.name)] * len(instruction.buffers)
    called = instruction.attribute("calls")
    inside: dict[str, list[Value]] = {}
    for x in self._computations[called].values():
      if x.opcode == "parameter":
        inside[x.name] = given[program.number(x)]
      else:
        inside[x.name] = self._resolved(called, x, [inside[operand] for operand in x.operands])
    return inside[program.root(self._computations[called]).name]

  def read(self) -> float:
    """Returns how many bytes of the operands are read."""
    sizes = {x: program.in_main(self._at(x).buffers) for x in self._sources}
    return sum(min(size, self._seen(source)) for source, size in sizes.items())

  def written(self) -> float:
    """Returns how many bytes of the results are written."""
    buffers = self._instruction.buffers
    return sum(self._new(i) for i, buffer in enumerate(buffers) if buffer.is_main)

  def _seen(self, value: Value) -> float:
    """Returns how many bytes of a value are looked at."""
    is_whole = any(x == value and self._in_place(i) is None for i, x in enumerate(self._outputs))
    found = self._size(value) if is_whole else 0.0
    for user, position in self._users[value]:
      opcode = self._at(user).opcode
      if position == 0 and opcode in (*_SLICES, *_UPDATES):
        # A scatter adds to what is there.
        found += self._seen(user) + (self._size(self._update(user)) if opcode == "scatter" else 0)
      elif not self._is_free(user):
        found += self._size(value)
    return min(found, self._size(value))

  def _new(self, output: int) -> float:
    """Returns how many bytes of a result are new."""
    size, updates = self._instruction.buffers[output].held, self._in_place(output)
    return size if updates is None else min(size, updates)

  def _in_place(self, output: int) -> float | None:
    """Returns the bytes of the updates of which a result consists, None where all of it is new."""
    value, updates = self._outputs[output], 0.0
    while value in self._made and self._at(value).opcode in _UPDATES:
      updates += self._size(self._update(value))
      value = self._made[value][0]
    if value in self._made:
      is_there = self._is_free(value)
    else:
      is_there = self._at(value).buffers[0].is_main == self._instruction.buffers[output].is_main
    return updates if is_there and (updates or output in self._aliased) else None

  def _update(self, value: Value) -> Value:
    return self._made[value][_UPDATES[self._at(value).opcode]]

  def _at(self, value: Value) -> Instruction:
    return self._computations[value[0]][value[1]]

  def _size(self, value: Value) -> float:
    return sum(buffer.held for buffer in self._at(value).buffers)

  def _is_free(self, value: Value) -> bool:
    return self._at(value).target in _FREE_TARGETS or self._is_step(value)
