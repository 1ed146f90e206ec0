"""The cost of running a compiled program once.

XLA's own cost analysis counts the body of a loop once. Ours are nested: the
layers inside the denoising steps, the layers inside the microbatches. Here a
loop's body counts as often as it runs: read from the loop's condition where
that compares a counter with a constant, else (denoising steps end early,
microbatches depend on the draws) given by the caller.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from collections.abc import Sequence

from agrpo_jax.plan import hlo

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

# Instructions that move no data, or whose parts are counted instead.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "conditional", "call", "partition-id", "replica-id", "iota"),
  *("after-all", "opt-barrier", "async-start", "async-update", "async-done"),
  *("copy-done", "slice-done", "custom-call"),
  *(f"{kind}-done" for kind in COLLECTIVES),
}

# A kernel that JAX compiled; other custom calls move nothing.
_KERNEL = 'custom_call_target="tpu_custom_call"'

# Products of queries by keys in a kernel of splash attention: scores and
# mixture; scores and the gradients of weights and q; scores and the gradients
# of weights, v and k.
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Collective:
  """A kind of communication: what, how large, among how many devices."""

  kind: str
  shape: str
  group: int
  bytes: int  # of its result; of a reduce-scatter, of what it adds up
  source: str

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device receives, in a ring."""
    share = (self.group - 1) / max(1, self.group)
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(
      self.kind, share
    )
    return self.bytes * factor


@dataclasses.dataclass
class Cost:
  """The cost of one run of a program on one device.

  Attributes:
    flops: of matrix products.
    bytes: read from and written to HBM.
    collectives: how often each runs.
    buffers: the largest results that are not fused away: bytes, shape, source.
  """

  flops: float = 0.0
  bytes: float = 0.0
  collectives: dict[Collective, float] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(float)
  )
  buffers: set[tuple[int, str, str]] = dataclasses.field(default_factory=set)

  @property
  def wire_bytes(self) -> float:
    return sum(n * one.wire_bytes for one, n in self.collectives.items())


def of(
  program: hlo.Program,
  trips: Sequence[float],
  shares: Mapping[str, Sequence[float]] | None = None,
) -> Cost:
  """Returns the cost of everything that one run of a program does.

  Of the branches of a conditional each is taken as often.

  Args:
    program: of one device.
    trips: how often loops run that do not say so themselves, from the outermost
      to those inside of it; those further inside run once.
    shares: how often the branches of a conditional run, of how often it does,
      by a part of its JAX name; those of others are all as frequent.
  """
  cost, seen = Cost(), set()

  def visit(
    name: str,
    times: float,
    is_fused: bool,
    depth: int,
    inside: hlo.Instruction | None = None,
  ) -> None:
    for one in program.computations[name]:
      kind = one.opcode.removesuffix("-start")
      is_kernel = _KERNEL in one.attributes
      if one.opcode in ("dot", "convolution"):
        cost.flops += times * _flops(program, one)
      elif is_kernel:
        cost.flops += times * _kernel_flops(program, one)
      if kind in COLLECTIVES:
        # One that runs beside other work appears in all of its pieces.
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        if channel and channel.group() in seen:
          continue
        seen.add(channel.group() if channel else None)
        cost.collectives[_collective(kind, one, inside)] += times
      if not is_fused and (is_kernel or one.opcode not in _FREE):
        cost.bytes += times * _bytes(program, one)
        cost.buffers.update(
          (s.hbm_bytes, str(s), one.source) for s in one.shapes
        )
      # What a loop or a call does is counted inside of it.
      if one.opcode == "while":
        known = program.trip_count(one)
        laps = known or (trips[depth] if depth < len(trips) else 1)
        for body in one.called:
          visit(body, times * laps, False, depth + (known is None))
      elif one.opcode == "conditional":
        num = len(one.called)
        parts = one.source.split("/")
        told = [
          share for part, share in (shares or {}).items() if part in parts
        ]
        each = told[0] if told else [1 / num] * num
        for branch, share in zip(one.called, each, strict=True):
          visit(branch, times * share, False, depth)
      else:
        for called in one.called:
          fused = is_fused or one.opcode == "fusion"
          visit(called, times, fused, depth, one)

  visit(program.entry, 1, False, 0)
  return cost


def _flops(program: hlo.Program, one: hlo.Instruction) -> float:
  left, right = (program.instructions[name].shapes[0] for name in one.operands)
  result = one.shapes[0].dims
  if one.opcode == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    dims = found.group(1).split(",") if found else []
    contracted = math.prod(left.dims[int(i)] for i in dims if i)
    return 2.0 * math.prod(result) * contracted
  return _convolution_flops(left.dims, right.dims, result, one.attributes)


def _kernel_flops(program: hlo.Program, one: hlo.Instruction) -> float:
  """Returns the FLOPs of a kernel of splash attention; others are unknown.

  Raises:
    ValueError: another kernel, whose cost would be missing from the plan.
  """
  phase = _SPLASH.search(one.attributes)
  if phase is None:
    raise ValueError(f"a kernel of unknown cost: {one.source}")
  operands = [program.instructions[name].shapes[0] for name in one.operands]
  q, k, *_ = (x for x in operands if not x.dtype.startswith("s"))  # no indices
  products = _SPLASH_PRODUCTS[phase.group(1)]
  # The gradient of q, if it has no kernel of its own: a sum over blocks of
  # keys is left to do, an axis more than q's.
  products += any(len(shape.dims) > len(q.dims) for shape in one.shapes)
  return 2.0 * products * math.prod(q.dims) * k.dims[-2]


def _bytes(program: hlo.Program, one: hlo.Instruction) -> float:
  # These touch a part of their operand alone: it is read, and written again.
  if one.opcode in ("dynamic-slice", "slice", "gather"):
    return 2.0 * one.hbm_bytes
  # In place: what is read and written is the update.
  if one.opcode == "dynamic-update-slice":
    return 2.0 * program.instructions[one.operands[1]].hbm_bytes
  # These move data on to the chip or off it, beside other work.
  if one.opcode == "copy-start":
    return float(sum(shape.hbm_bytes for shape in one.shapes[:2]))
  if one.opcode == "slice-start":
    whole, part = one.shapes[:2]
    return float(part.hbm_bytes + (0 if whole.is_fast else part.bytes))
  if one.opcode.endswith("-start"):
    return sum(program.instructions[name].hbm_bytes for name in one.operands)
  if one.opcode != "fusion":
    read = sum(program.instructions[name].hbm_bytes for name in one.operands)
    return read + one.hbm_bytes
  root = program.root(one.called[0])
  results = [root] * len(one.shapes)
  if root.opcode == "tuple":
    results = [program.instructions[name] for name in root.operands]
  return sum(_read(program, one, i) for i in range(len(one.operands))) + sum(
    _written(program, result, shape)
    for result, shape in zip(results, one.shapes, strict=True)
  )


def _written(
  program: hlo.Program, result: hlo.Instruction, shape: hlo.Shape
) -> int:
  """Returns the bytes that a fusion writes of one of its results."""
  if result.opcode == "dynamic-update-slice":  # in place
    return program.instructions[result.operands[1]].hbm_bytes
  if result.opcode in ("parameter", *COLLECTIVES):  # passes by
    return 0
  return shape.hbm_bytes


def _read(program: hlo.Program, fusion: hlo.Instruction, index: int) -> int:
  """Returns the bytes that a fusion reads of an operand, or of its slice."""
  whole = program.instructions[fusion.operands[index]].hbm_bytes
  body = program.computations[fusion.called[0]]
  inside = next(
    one.name
    for one in body
    if one.opcode == "parameter" and one.arguments == str(index)
  )
  return min(whole, _read_within(program, body, inside, whole))


def _read_within(
  program: hlo.Program,
  body: Sequence[hlo.Instruction],
  inside: str,
  whole: int,
) -> int:
  """Returns the bytes that a fusion's body reads of `inside`, one of it."""
  read = 0
  for user in (one for one in body if inside in one.operands):
    if user.opcode in ("dynamic-slice", "slice", "gather"):
      read += sum(shape.bytes for shape in user.shapes)
    elif user.opcode == "fusion" and _is_view(program, user):
      read += _read_within(program, body, user.name, whole)
    elif user.opcode == "fusion":
      read += _read(program, user, user.operands.index(inside))
    elif user.opcode in ("tuple", *COLLECTIVES) or (
      user.opcode == "dynamic-update-slice" and user.operands[0] == inside
    ):
      continue  # passes by, or is written in place
    else:
      return whole
  return read


def _is_view(program: hlo.Program, fusion: hlo.Instruction) -> bool:
  """Returns whether the result is the operand itself, in other tiles.

  So libtpu looks at int8 before it takes a slice of it.
  """
  is_same_memory = "output_to_operand_aliasing" in fusion.attributes
  return is_same_memory and program.root(fusion.called[0]).opcode == "copy"


def _collective(
  kind: str, one: hlo.Instruction, inside: hlo.Instruction | None
) -> Collective:
  """Returns the communication of an instruction, itself maybe in a fusion."""
  # An asynchronous start returns its operand, its result and some counters.
  is_start = one.opcode.endswith("-start") and kind != "all-reduce"
  sizes = [shape.bytes for shape in one.shapes]
  text = ",".join(str(shape) for shape in one.shapes)
  if is_start and len(sizes) > 1:
    text, sizes = str(one.shapes[1]), sizes[1:2]
  if len(text) > 60:
    text = f"{len(one.shapes)} arrays"
  group, size = _group(one.attributes), sum(sizes)
  if kind == "reduce-scatter":
    size *= group
  # libtpu writes a reduce-scatter as an all-reduce with a slice behind it.
  called = "".join(inside.called) if inside else ""
  if kind == "all-reduce" and called.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  source = one.source or (inside.source if inside else "")
  return Collective(kind, text, group, size, source)


def _group(attributes: str) -> int:
  """Returns how many devices take part."""
  # XLA writes groups in three ways: by mesh axes, as [number, size], as lists.
  if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    axes = re.findall(r"'(\w+)'", found.group(2))
    return math.prod(int(sizes[axis]) for axis in axes)
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(found.group(1))
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return found.group(1).count(",") + 1
  return 2


def _convolution_flops(
  left: tuple[int, ...],
  right: tuple[int, ...],
  result: tuple[int, ...],
  attributes: str,
) -> float:
  """Returns the FLOPs of a convolution, as TPUs write matrix products.

  Batches are dilated spatial dimensions there, and most taps of the kernel meet
  a hole: only those that meet an element of the input are counted.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  window = re.search(r"window=\{([^}]*)\}", attributes)
  if labels is None:
    raise ValueError(f"a convolution without dim_labels: {attributes[:200]!r}")
  inputs, kernel, output = labels.groups()
  settings = dict(
    item.split("=") for item in (window.group(1).split() if window else [])
  )

  def setting(name: str, axis: int, default: str) -> str:
    return settings[name].split("x")[axis] if name in settings else default

  flops = 2.0 * right[kernel.index("i")]
  flops *= result[output.index("b")] * result[output.index("f")]
  for axis in range(len(kernel) - 2):
    label = str(axis)
    size = left[inputs.index(label)]
    stride = int(setting("stride", axis, "1"))
    holes = int(setting("lhs_dilate", axis, "1"))
    low = int(setting("pad", axis, "0_0").split("_")[0])
    gap = int(setting("rhs_dilate", axis, "1"))
    flops *= sum(
      0 <= at <= (size - 1) * holes and at % holes == 0
      for out in range(result[output.index(label)])
      for tap in range(right[kernel.index(label)])
      for at in [out * stride + tap * gap - low]
    )
  return flops
