"""Tensors of a checkpoint <-> arrays of our parameters.

`table` says which tensors an array is. Ours are stacked over layers and
transposed; they are read part by part, as the devices that hold them ask.
"""

import dataclasses
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import parameters
from agrpo_jax.models import quantized
from agrpo_jax.port import files
from agrpo_jax.runs import checkpoint_meta

DTYPES: dict[str, Any] = {
  "F32": jnp.float32,
  "BF16": jnp.bfloat16,
  "F16": jnp.float16,
}
# The bits of the exponent: all ones mean infinite or not a number.
_EXPONENT: dict[str, Any] = {
  "F32": np.uint32(0x7F800000),
  "BF16": np.uint16(0x7F80),
  "F16": np.uint16(0x7C00),
}
# Rows moved at once when a matrix is transposed: both sides stay in cache.
_TRANSPOSE_ROWS = 32


# Our array -> its name within the original's module. Kernels are stored
# [out, in] there and [in, out] here.
_ARRAYS = {
  "kernel": "weight",
  "bias": "bias",
  "scale": "weight",
  "table": "weight",
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """The place of one of our arrays in a checkpoint.

  Attributes:
    names: the tensors; more than one (or `stacked`) are the layers in order.
    spec: our shape and axes.
    stacked: whether our array has a leading axis of layers.
    transposed: whether the tensors are our kernel transposed.
  """

  names: tuple[str, ...]
  spec: parameters.Spec
  stacked: bool
  transposed: bool

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Shape of each tensor in the checkpoint."""
    shape = self.spec.shape[1:] if self.stacked else self.spec.shape
    return shape[::-1] if self.transposed else shape


def table(shape: base.Shape, family: base.Family) -> types.Tree:
  """Returns the parameters' tree with an `Entry` per array."""

  def entry(key_path: Any, spec: parameters.Spec) -> Entry:
    path = tuple(key.key for key in key_path)
    layers: list[int | None] = [None]
    if path[0] == "layers":
      layers = list(range(shape.num_layers - 1))
    elif path[0] == "last_layer":
      layers = [shape.num_layers - 1]
    suffix = _ARRAYS[path[-1]]
    return Entry(
      names=tuple(
        f"{family.module_name(path[:-1], layer)}.{suffix}" for layer in layers
      ),
      spec=spec,
      stacked=path[0] == "layers",
      transposed=path[-1] == "kernel",
    )

  return jax.tree_util.tree_map_with_path(
    entry,
    parameters.specs(shape),
    is_leaf=lambda node: isinstance(node, parameters.Spec),
  )


def head_copy(
  shape: base.Shape, family: base.Family, stored: Collection[str]
) -> Entry | None:
  """Returns where a head lies that is the embedding table, stored again.

  Tiny-A2D's checkpoints have one, though their config.json calls it tied. None
  for a network with a head of its own, and where there is none among the names
  `stored`.
  """
  name = f"{family.module_name(('head',), None)}.{_ARRAYS['kernel']}"
  if not shape.tied_head or name not in stored:
    return None
  spec = parameters.specs(shape)["embed"]["table"]
  return Entry((name,), spec, stacked=False, transposed=False)


def ordered(table: types.Tree) -> list[str]:
  """The tensors as the network uses them: embedding, layers, the rest."""
  groups = {"embed": 0, "layers": 1, "last_layer": 2}
  keyed = [
    (groups.get(key_path[0].key, 3), layer, name)
    for key_path, entry in jax.tree_util.tree_leaves_with_path(table)
    for layer, name in enumerate(entry.names)
  ]
  return [name for _, _, name in sorted(keyed)]


def misfits(
  tensors: files.Tensors, table: types.Tree, copy: Entry | None, dtype: Any
) -> list[str]:
  """Everything that is wrong, if the headers show anything.

  Values are looked at then of tensors that are what the network has: a header
  may speak of more than any memory holds.

  Args:
    tensors: of the checkpoint.
    table: of what the network has.
    copy: of the embedding table, where the checkpoint has one besides.
    dtype: that the arrays are read in; None for the stored one.
  """
  problems = []
  expected: set[str] = set()
  sound = []
  for entry in jax.tree.leaves([table, copy]):
    stored = {}
    for name in entry.names:
      expected.add(name)
      if name not in tensors.names():
        problems.append(f"{name} is missing")
        continue
      stored[name] = tensors.dtype(name)
      found = []
      if tensors.shape(name) != entry.stored_shape:
        found.append(
          f"{name} has shape {tensors.shape(name)}, expected "
          f"{entry.stored_shape}"
        )
      if stored[name] not in DTYPES:
        found.append(
          f"{name} is {stored[name]}, expected one of {', '.join(DTYPES)}"
        )
      if not found:
        sound.append(name)
      problems += found
    if dtype is None and len(set(stored.values())) > 1:
      listed = ", ".join(f"{name} {one}" for name, one in stored.items())
      problems.append(
        f"the layers of one array differ in dtype ({listed}); ask for one dtype"
      )
  problems += [
    f"{name} is unexpected" for name in sorted(tensors.names() - expected)
  ]
  if problems:
    for name in sound:
      problems += check_finite(tensors, name, tensors.read(name))
  return problems


def check_copy(
  tensors: files.Tensors, table: types.Tree, copy: Entry
) -> list[str]:
  """Returns what is wrong with a stored copy of the embedding table."""
  (name,), (original,) = copy.names, table["embed"]["table"].names
  num_rows = copy.stored_shape[0]
  for row in range(0, num_rows, _TRANSPOSE_ROWS):
    rows = (slice(row, min(row + _TRANSPOSE_ROWS, num_rows)),)
    one, other = (tensors.read(x, rows) for x in (name, original))
    if one.dtype != other.dtype or one.tobytes() != other.tobytes():
      return [
        f"{name} differs from {original}, though the config calls the head "
        "tied to the embedding table; if it is not, say so there"
      ]
  return []


def check_finite(tensors: files.Tensors, name: str, x: np.ndarray) -> list[str]:
  """Returns what is wrong with x, of the tensor `name`: not all numbers."""
  bits = _EXPONENT[tensors.dtype(name)]
  if np.any((x.view(bits.dtype) & bits) == bits):
    return [f"{name} has values that are NaN or infinite"]
  return []


def read_onto(
  tensors: files.Tensors,
  entry: Entry,
  sharding: jax.sharding.Sharding | None,
  dtype: Any,
  problems: dict[str, None],
) -> jax.Array:
  """Reads one of our arrays onto the devices that hold it.

  What is wrong is added to `problems`, as keys: a tensor that is read for
  several devices is still one problem.
  """
  if dtype is None:
    dtype = DTYPES[tensors.dtype(entry.names[0])]
  dtype = jnp.dtype(dtype)
  shape = entry.spec.shape
  done: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

  def read(index: Any) -> np.ndarray:
    bounds = tuple(
      one.indices(size) for one, size in zip(index, shape, strict=True)
    )
    # Devices that hold the same part ask one after the other.
    if bounds not in done:
      done[bounds] = _read_part(tensors, entry, bounds, dtype, problems)
    return done[bounds]

  if sharding is None:
    return jnp.asarray(read((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, sharding, read)


def read_quantized(
  tensors: files.Tensors,
  entry: Entry,
  sharding: quantized.Kernel,
  dtype: Any,
  problems: dict[str, None],
) -> tuple[quantized.Kernel, list[int]]:
  """Reads a kernel in int8; of the float one a layer at a time is in memory.

  Args:
    tensors: of the checkpoint.
    entry: the kernel's place in it.
    sharding: where values and scales go.
    dtype: that each layer is read in.
    problems: what is wrong is added, as keys.

  Returns:
    The kernel, and both checksums of a `BaseModel`, of the values as read.
  """
  spec = entry.spec
  if entry.stacked:
    spec = parameters.Spec(spec.shape[1:], spec.axes[1:])
  # Layers are never split over devices: the other axes say where one goes.
  mesh, axes = sharding.values.mesh, sharding.values.spec
  of_layer = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes[-2:])
  )
  sums = []

  def read(name: str) -> jax.Array:
    one = Entry((name,), spec, stacked=False, transposed=entry.transposed)
    x = read_onto(tensors, one, of_layer, dtype, problems)
    sums.append(
      [
        checkpoint_meta.checksums(x, rounding)[0]
        for rounding in (None, jnp.bfloat16)
      ]
    )
    return x

  if not entry.stacked:
    place = jax.jit(quantized.quantize, out_shardings=sharding)
    kernel = place(read(*entry.names))
  else:
    abstract = jax.eval_shape(
      quantized.quantize, jax.ShapeDtypeStruct(entry.spec.shape, dtype)
    )
    kernel = jax.jit(
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract),
      out_shardings=sharding,
    )()

    def put(kernel: Any, x: jax.Array, layer: jax.Array) -> Any:
      return jax.tree.map(
        lambda stack, one: stack.at[layer].set(one),
        kernel,
        quantized.quantize(x),
      )

    place = jax.jit(put, out_shardings=sharding, donate_argnums=0)
    for layer, name in enumerate(entry.names):
      kernel = place(kernel, read(name), layer)
  # Sums of words add up over layers, modulo 2^32.
  return kernel, [sum(column) % 2**32 for column in zip(*sums, strict=True)]


def _read_part(
  tensors: files.Tensors,
  entry: Entry,
  bounds: tuple[tuple[int, int, int], ...],
  dtype: Any,
  problems: dict[str, None],
) -> np.ndarray:
  """The part of one of our arrays within `bounds`, on the host."""
  part = np.empty([stop - start for start, stop, _ in bounds], dtype)
  layers: Sequence[int] = (0,)
  within, into = bounds, [part]
  if entry.stacked:
    layers, within, into = range(*bounds[0]), bounds[1:], list(part)
  stored = tuple(slice(*one) for one in within)
  if entry.transposed:
    stored = stored[::-1]
  for layer, target in zip(layers, into, strict=True):
    x = tensors.read(entry.names[layer], stored)
    problems.update(dict.fromkeys(check_finite(tensors, entry.names[layer], x)))
    with np.errstate(over="ignore"):
      if entry.transposed:
        _transpose(x, target)
      else:
        target[...] = x
    # Only float16 cannot hold what the other two can.
    if dtype == np.float16 and not np.isfinite(target).all():
      problems[f"{entry.names[layer]} does not fit into float16"] = None
  return part


def _transpose(x: np.ndarray, target: np.ndarray) -> None:
  for row in range(0, len(x), _TRANSPOSE_ROWS):
    rows = slice(row, row + _TRANSPOSE_ROWS)
    target[:, rows] = x[rows].T


def stored(array: jax.Array, entry: Entry, layer: int) -> np.ndarray:
  """The tensor that a checkpoint stores for (a layer of) one of our arrays."""
  one = array[layer] if entry.stacked else array
  if isinstance(one, jax.Array) and not one.is_fully_addressable:
    one = multihost_utils.process_allgather(one, tiled=True)
  x = np.asarray(one)
  if not entry.transposed:
    return np.ascontiguousarray(x)
  tensor = np.empty(x.shape[::-1], x.dtype)
  _transpose(x, tensor)
  return tensor
