"""What a compiled program costs one device, read from its text.

XLA's own cost analysis counts the body of a loop once, whatever its length, so a model whose layers
are scanned would cost one layer. Here every instruction counts as often as it runs. The text is
XLA's after all of its passes, in which loops, collectives and the memory of every buffer stand; how
often a loop runs is read from its condition, or, where that depends on the data, from a scope named
`at_most(N)`.

What a kernel reads and computes is not in the text: that of attention (`models/kernel.py`) is known
by its name, and how many of its blocks are computed by a scope named `blocks(NUMBERxLENGTH)`.

Counted are the floating-point operations of matrix products, two for each multiply-add; the bytes
that instructions read from and write to main memory (`traffic.py`); and the bytes that collectives
send, taking each for a ring (R. Rabenseifner, "Optimization of Collective Reduction Operations",
2004): of n bytes on each of g devices an all-gather sends n (g - 1), an all-reduce 2 n (g - 1) / g,
a reduce-scatter and an all-to-all n (g - 1) / g, a permutation n.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from klrl.cost import program, traffic
from klrl.cost.program import Buffer, Instruction

_SENT = {
  "all-gather": lambda n, g: n * (g - 1),
  "all-reduce": lambda n, g: 2 * n * (g - 1) / g,
  "reduce-scatter": lambda n, g: n * (g - 1) / g,
  "all-to-all": lambda n, g: n * (g - 1) / g,
  "ragged-all-to-all": lambda n, g: n * (g - 1) / g,
  "collective-permute": lambda n, g: n,
  "collective-broadcast": lambda n, g: n,
}
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
# The products of each block of pairs of tokens in the parts of a kernel of attention.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


class Costs(NamedTuple):
  """Of one run of a program on one device."""

  flops: float
  bytes: float
  collectives: dict[tuple[str, str], float]  # (kind, mesh axes as "data,fsdp") -> bytes sent
  unknown_loops: int  # loops of unknown length, which were taken to run once


def costs(text: str, mesh_shape: dict[str, int]) -> Costs:
  """Returns the costs of the program whose compiled text is given.

  Of the branches of a condition the most expensive one counts. Other arithmetic than products of
  matrices is not counted; memory bounds it.

  Args:
    text: `compiled.as_text()`.
    mesh_shape: {axis: size} of the mesh that it was compiled for, in order.
  """
  computations, entry = program.parse(text)
  return _Walk(computations, mesh_shape).costs(entry)


class _Walk:
  def __init__(self, computations, mesh_shape):
    self._computations = computations
    self._mesh_shape = mesh_shape
    # A TPU spreads a collective over the steps of other work. It then stands in the fusion of each
    # step, under one channel, and is sent once, from where it starts.
    self._starts = {
      (name, operand)
      for name, instructions in computations.items()
      for instruction in instructions.values()
      if 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes
      for operand in instruction.operands
    }
    self._spread = {_channel(computations[name][start]) for name, start in self._starts}

  def costs(self, name: str, *, fused: bool = False) -> Costs:
    """Returns the costs of a computation; a fused one moves no bytes of its own."""
    flops, moved, sent, unknown = 0.0, 0.0, Counter(), 0
    for instruction in self._computations[name].values():
      flops += self._flops(name, instruction)
      moved += 0 if fused else self._moved(name, instruction)
      sent.update(self._sent(name, instruction))
      for times, found, is_unknown in self._called(name, instruction, fused):
        flops += times * found.flops
        moved += times * found.bytes
        sent.update({key: times * n for key, n in found.collectives.items()})
        unknown += found.unknown_loops + is_unknown
    return Costs(flops, moved, dict(sent), unknown)

  def _called(self, name, instruction, fused) -> Iterator[tuple[float, Costs, bool]]:
    """Yields (how often, costs, whether that is a guess) of what an instruction calls."""
    if instruction.opcode == "while":
      body, condition = map(instruction.attribute, ("body", "condition"))
      times = self._trips(name, instruction)
      yield times or 1, self.costs(body, fused=fused), times is None
      yield times or 1, self.costs(condition, fused=fused), False
    elif instruction.opcode == "conditional":
      listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
      names = (
        re.findall(r"%?([\w.\-]+)", listed.group(1))
        if listed
        else [instruction.attribute(f"{which}_computation") for which in ("true", "false")]
      )
      branches = [self.costs(branch, fused=fused) for branch in names]
      yield 1, max(branches, key=lambda found: (found.flops, found.bytes)), False
    elif instruction.opcode == "fusion":
      yield 1, self.costs(instruction.attribute("calls"), fused=True), False
    elif body := self._body(name, instruction):
      yield 1, self.costs(body, fused=fused), False

  def _body(self, name: str, instruction: Instruction) -> str | None:
    """Returns the computation that an instruction is, None where it is none."""
    if instruction.opcode in ("call", "async-start"):
      return instruction.attribute("to_apply" if instruction.opcode == "call" else "calls")
    if "called_computations={%" not in instruction.attributes:
      return None
    # A custom call may be given a function of numbers, or be work that other cores do.
    body = instruction.attribute("called_computations")
    taken = [
      x.buffers[0].dims for x in self._computations[body].values() if x.opcode == "parameter"
    ]
    given = [x[0].dims for x in self._operands(name, instruction)]
    return body if sorted(taken) == sorted(given) else None

  def _trips(self, name: str, loop: Instruction) -> int | None:
    """Returns how often a loop runs, None where the text does not say it."""
    known = re.search(r'known_trip_count[^\d]*"(\d+)"', loop.attributes)
    if known:
      return int(known.group(1))
    # The innermost scope is of this loop only where nothing but `while` follows it.
    scope = re.search(r'op_name="[^"]*at_most\((\d+)\)/while"', loop.attributes)
    if scope:
      return int(scope.group(1))
    condition, body = (self._computations[loop.attribute(x)] for x in ("condition", "body"))
    first = self._computations[name][loop.operands[0]]
    last, following = program.root(condition), program.root(body)
    if last.opcode != "compare" or "direction=LT" not in last.attributes:
      return None
    counter, bound = (condition[operand] for operand in last.operands)
    if counter.opcode != "get-tuple-element" or {first.opcode, following.opcode} != {"tuple"}:
      return None
    place = int(counter.attribute("index"))
    added = body[following.operands[place]]
    steps = [program.integer(body, x) for x in added.operands] if added.opcode == "add" else []
    start = program.integer(self._computations[name], first.operands[place])
    end = program.integer(condition, bound.name)
    steps = [step for step in steps if step]
    # A loop over a collective that is passed on while it is multiplied does two steps at once.
    return -(-(end - start) // steps[0]) if steps and None not in (start, end) else None

  def _operands(self, name: str, instruction: Instruction) -> list[list[Buffer]]:
    return [self._computations[name][operand].buffers for operand in instruction.operands]

  def _flops(self, name: str, instruction: Instruction) -> float:
    if kernel := _kernel(instruction):
      part, num_blocks, block = kernel
      *heads, _, width = self._operands(name, instruction)[2][0].dims
      return 2.0 * _PRODUCTS[part] * num_blocks * block**2 * width * math.prod(heads)
    if instruction.opcode not in ("dot", "convolution"):
      return 0.0
    (left,), (right,) = self._operands(name, instruction)
    made = math.prod(instruction.buffers[0].dims)
    if instruction.opcode == "dot":
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
      contracted = [int(axis) for axis in axes.group(1).split(",") if axis] if axes else []
      return 2.0 * made * math.prod(left.dims[axis] for axis in contracted)
    return 2.0 * made * _products_per_output(instruction, left.dims, right.dims)

  def _moved(self, name: str, instruction: Instruction) -> float:
    """Returns bytes read from and written to main memory by an instruction that is not fused."""
    if kernel := _kernel(instruction):
      operands = [x[0] for x in self._operands(name, instruction)]
      return program.in_main(instruction.buffers) + _read_by_kernel(*kernel, operands)
    if self._body(name, instruction):
      return 0.0
    return traffic.moved(self._computations, name, instruction, self._is_step)

  def _sent(self, name: str, instruction: Instruction) -> dict[tuple[str, str], float]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SENT or self._is_step((name, instruction.name)):
      return {}
    if name.startswith("all-reduce-scatter"):  # how a TPU's text says it
      kind = "reduce-scatter"
    axes, size = self._group(instruction.attributes)
    operands = self._operands(name, instruction)
    given = sum(buffer.bytes for operand in operands for buffer in operand)
    return {(kind, axes): _SENT[kind](given, size)} if size > 1 else {}

  def _is_step(self, value: tuple[str, str]) -> bool:
    """Returns whether a value is made by a collective that is sent from elsewhere."""
    name, made = value
    return value not in self._starts and _channel(self._computations[name][made]) in self._spread

  def _group(self, attributes: str) -> tuple[str, int]:
    """Returns (the axes over which a collective goes, how many devices talk to each other)."""
    groups = _groups(attributes, math.prod(self._mesh_shape.values()))
    places = np.stack(np.unravel_index(groups, tuple(self._mesh_shape.values())))
    differs = (places != places[..., :1]).any(axis=(1, 2))
    axes = [axis for axis, crossed in zip(self._mesh_shape, differs, strict=True) if crossed]
    return ",".join(axes), groups.shape[1]


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """Returns [groups, devices of each], ids of the devices that talk to each other."""
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
  if listed:
    groups = re.findall(r"\{([\d,]+)\}", listed.group(1))
    return np.array([group.split(",") for group in groups], int)
  iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes)
  if iota:
    num_groups, size, *order = iota.groups()
    return _iota(*order).reshape(int(num_groups), int(size))
  named = re.search(rf"=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", attributes)
  if named:
    return _groups_of_named_axes(*named.groups(), num_devices)
  if "replica_groups={}" in attributes or "replica_groups" not in attributes:
    return np.arange(num_devices)[None]
  raise ValueError(f"Cannot read the groups of a collective: {attributes[:200]}")


def _groups_of_named_axes(mesh: str, shape, order, axes: str, num_devices: int) -> np.ndarray:
  """Returns the groups along `axes` of XLA's own mesh, e.g. "'a'" or "'b':(1)2" of "'a'=2,'b'=4".

  In the latter, of an axis that is split into three the second is meant: it is as long as the last
  number says, and the first as the one in parentheses.
  """
  sizes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)]
  wanted = {name: part for name, *part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)}
  split, chosen = [], []
  for name, size in sizes:
    before, own = wanted.get(name, ("", ""))
    before, own = (int(before), int(own)) if own else (1, size)
    if name in wanted:
      chosen.append(len(split) + 1)
    split += [before, own, size // (before * own)]
  ids = (_iota(shape, order) if shape else np.arange(num_devices)).reshape(split)
  num_together = math.prod(split[axis] for axis in chosen)
  return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, num_together)


def _iota(shape: str, order: str | None) -> np.ndarray:
  """Returns the ids 0, 1, ... in `shape`, its axes permuted by `order`."""
  sizes = [int(size) for size in shape.split(",")]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose([int(axis) for axis in order.split(",")]) if order else ids


def _products_per_output(instruction: Instruction, left, right) -> float:
  """Returns how many products a convolution sums for each of its outputs, on average.

  A TPU writes products of matrices as convolutions, with batch axes as dilated spatial ones, of
  which all but one place of the window is a hole.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  lhs, rhs, out = labels.groups()
  products = float(right[rhs.index("i")])
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
  spatial = sorted(label for label in rhs if label.isdecimal())
  for i, label in enumerate(spatial):

    def field(name, default, i=i):
      return int(fields[name].split("x")[i]) if name in fields else default

    size, stride = right[rhs.index(label)], field("stride", 1)
    pad = int(fields["pad"].split("x")[i].split("_")[0]) if "pad" in fields else 0
    base, hole = field("lhs_dilate", 1), field("rhs_dilate", 1)
    num_in, num_out = left[lhs.index(label)], instruction.buffers[0].dims[out.index(label)]
    starts = np.arange(num_out)[:, None] * stride + np.arange(size)[None] * hole - pad
    real = (starts % base == 0) & (starts >= 0) & (starts < num_in * base)
    products *= real.sum() / num_out
  return products


def _kernel(instruction: Instruction) -> tuple[str, int, int] | None:
  """Returns (part, number of blocks for a head, tokens of a block) of a kernel of attention."""
  name = re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name)
  if instruction.opcode != "custom-call" or name is None:
    return None
  blocks = re.search(r"blocks\((\d+)x(\d+)\)", instruction.attributes)
  return name.group(1), *map(int, blocks.groups())


def _read_by_kernel(part: str, num_blocks: int, block: int, operands: list[Buffer]) -> float:
  """Returns bytes: each head reads one side of its pairs for each block, and the other side once.

  The operands are two small tables, queries, keys, values, what masks both sides, and more of the
  queries: arrays [..., tokens, n] or [..., n, tokens].
  """
  *heads, num_tokens, _ = operands[2].dims
  of_keys = (3, 4, 6)
  total = 0.0
  for position, buffer in enumerate(operands):
    is_streamed = (position in of_keys) == (part != "dkv")
    times = num_blocks * block / num_tokens if is_streamed else 1.0
    matrix = buffer.held * math.prod(buffer.dims[-2:]) / math.prod(buffer.dims)
    # The gradient of keys and values adds up queries of all heads while it holds their block.
    is_once = position < 2 or (part == "dkv" and position in of_keys)
    size = buffer.held if is_once else math.prod(heads) * matrix * times
    total += size if buffer.is_main else 0.0
  return total


def _channel(instruction: Instruction) -> str:
  found = re.search(r"channel_id=(\d+)", instruction.attributes)
  return found.group(1) if found else instruction.name
