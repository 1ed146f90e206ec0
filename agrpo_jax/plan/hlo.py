"""A compiled program, read from the text of its HLO."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = re.compile(r"\d+")
_LINE = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)")
_HEAD = re.compile(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"(?:calls|body|true_computation|false_computation|branch_computations|"
  r"called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array. `is_fast`: it lives in on-chip memory, not in HBM."""

  dtype: str
  dims: tuple[int, ...]
  is_fast: bool = False

  @property
  def bytes(self) -> int:
    found = _BITS.findall(self.dtype)  # pred has none and takes a byte
    return math.prod(self.dims) * max(1, int(found[0]) // 8 if found else 1)

  @property
  def hbm_bytes(self) -> int:
    return 0 if self.is_fast else self.bytes

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: name = shapes opcode(operands), attributes."""

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  arguments: str
  attributes: str
  is_root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    return _NAME.findall(self.arguments)

  @functools.cached_property
  def called(self) -> list[str]:
    found = _CALLED.findall(self.attributes)
    if self.opcode == "call":  # elsewhere a scalar function, as of a reduction
      found += re.findall(r"to_apply=(%[\w.\-]+)", self.attributes)
    return [name for group in found for name in _NAME.findall(group)]

  @property
  def hbm_bytes(self) -> int:
    return sum(shape.hbm_bytes for shape in self.shapes)

  @property
  def source(self) -> str:
    """The end of its JAX name, which says where in our code it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    parts = found.group(1).split("/") if found else []
    skip = {"while", "body", "closed_call", "LLaDA"}
    kept = [part for part in parts if part not in skip]
    return "/".join(kept[-4:])


class Program:
  """A parsed HLO module."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.instructions: dict[str, Instruction] = {}
    self.entry = ""
    # What a kernel says of itself is written on lines of its own.
    text = re.sub(r"kernel_metadata=\{\n(.*)\n\}", r"\1", text)
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        current = self.computations.setdefault(head.group(2), [])
        self.entry = head.group(2) if head.group(1) else self.entry
      elif match := _LINE.match(line):
        instruction = _parse(*match.groups())
        current.append(instruction)
        self.instructions[instruction.name] = instruction

  def trip_count(self, loop: Instruction) -> int | None:
    """Returns how often a loop runs, None where that depends on its data."""
    known = re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes)
    if known:
      return int(known.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    if not condition:
      return None
    # The loops of `lax.scan` compare their counter with a constant.
    test = self.root(condition.group(1))
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, limit = (self.instructions[name] for name in test.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    if not index or limit.opcode != "constant":
      return None
    # A pipelined loop may count in larger steps than one.
    step = 1
    root = self.root(loop.called[0])
    update = self.instructions[root.operands[int(index.group(1))]]
    if update.opcode == "add":
      added = self.instructions[update.operands[1]]
      step = int(added.arguments) if added.opcode == "constant" else 1
    return -(-int(limit.arguments) // step)

  def root(self, computation: str) -> Instruction:
    """Returns the instruction whose result is the computation's."""
    return next(one for one in self.computations[computation] if one.is_root)


def _parse(root: str | None, name: str, rest: str) -> Instruction:
  # `f32[2,8]{1,0} add(%a, %b), metadata=...`, or several shapes in parentheses.
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opcode, _, _ = rest[end:].strip().partition("(")
  start = rest.index("(", end)
  close = _closing(rest, start)
  return Instruction(
    name=name,
    shapes=tuple(_shapes(rest[:end])),
    opcode=opcode,
    arguments=rest[start + 1 : close],
    attributes=rest[close + 1 :],
    is_root=bool(root),
  )


def _shapes(text: str) -> Iterator[Shape]:
  for dtype, dims, layout in _SHAPE.findall(text):
    yield Shape(
      dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout
    )


def _closing(text: str, start: int) -> int:
  depth = 0
  for number in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[number], 0)
    if depth == 0:
      return number
  raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
