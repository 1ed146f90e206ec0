"""Tensors of a checkpoint <-> arrays of our parameters.

Ours are stacked over layers and transposed; they are read part by part, as
the devices that hold them ask.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from agrpo_jax import types
from agrpo_jax.port import files
from agrpo_jax.port import layout

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


def misfits(tensors: files.Tensors, table: types.Tree, dtype: Any) -> list[str]:
  """Everything that the headers show to be wrong."""
  problems = []
  expected: set[str] = set()
  for entry in jax.tree.leaves(table):
    stored = {}
    for name in entry.names:
      expected.add(name)
      if name not in tensors.names():
        problems.append(f"{name} is missing")
        continue
      stored[name] = tensors.dtype(name)
      if tensors.shape(name) != entry.stored_shape:
        problems.append(
          f"{name} has shape {tensors.shape(name)}, expected "
          f"{entry.stored_shape}"
        )
      if stored[name] not in DTYPES:
        problems.append(
          f"{name} is {stored[name]}, expected one of {', '.join(DTYPES)}"
        )
    if dtype is None and len(set(stored.values())) > 1:
      listed = ", ".join(f"{name} {one}" for name, one in stored.items())
      problems.append(
        f"the layers of one array differ in dtype ({listed}); ask for one dtype"
      )
  problems += [
    f"{name} is unexpected" for name in sorted(tensors.names() - expected)
  ]
  return problems


def check_finite(
  tensors: files.Tensors, name: str, x: np.ndarray, problems: list[str]
) -> None:
  """Adds a problem if x, from the tensor `name`, is not all numbers."""
  bits = _EXPONENT.get(tensors.dtype(name))
  if bits is None:  # a dtype that is refused anyway
    return
  if np.any((x.view(bits.dtype) & bits) == bits):
    _add(problems, f"{name} has values that are NaN or infinite")


def place(
  tensors: files.Tensors,
  entry: layout.Entry,
  sharding: jax.sharding.Sharding | None,
  dtype: Any,
  problems: list[str],
) -> jax.Array:
  """One of our arrays, read where it goes."""
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


def _read_part(
  tensors: files.Tensors,
  entry: layout.Entry,
  bounds: tuple[tuple[int, int, int], ...],
  dtype: Any,
  problems: list[str],
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
    check_finite(tensors, entry.names[layer], x, problems)
    with np.errstate(over="ignore"):
      if entry.transposed:
        _transpose(x, target)
      else:
        target[...] = x
    # Only float16 cannot hold what the other two can.
    if dtype == np.float16 and not np.isfinite(target).all():
      _add(problems, f"{entry.names[layer]} does not fit into float16")
  return part


def _add(problems: list[str], problem: str) -> None:
  # A tensor that is read for several devices is still one problem.
  if problem not in problems:
    problems.append(problem)


def _transpose(x: np.ndarray, target: np.ndarray) -> None:
  for row in range(0, len(x), _TRANSPOSE_ROWS):
    rows = slice(row, row + _TRANSPOSE_ROWS)
    target[:, rows] = x[rows].T


def stored(array: jax.Array, entry: layout.Entry, layer: int) -> np.ndarray:
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
