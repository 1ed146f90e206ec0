"""What a checkpoint says about itself: shapes, checksums, versions, base model.

With it a run can refuse a checkpoint of another model by name, before arrays
are read, and tell one that was damaged from one that was not.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import errors
from agrpo_jax import types

_PACKAGES = ("agrpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_MAX_LISTED = 10


def describe(items: Mapping[str, types.Tree]) -> dict[str, Any]:
  """JSON values about named trees of arrays.

  Returns:
    `arrays`: {name: {path: [shape, dtype]}}; `checksums`: {name: [number per
    array]}; `versions`: {package: version}.
  """
  return {
    "arrays": {name: _arrays(tree) for name, tree in items.items()},
    "checksums": {name: checksums(tree) for name, tree in items.items()},
    "versions": _versions(),
  }


def check_fit(
  checkpoint: str,
  meta: Mapping[str, Any],
  items: Mapping[str, types.Tree],
  base_model: Mapping[str, Any] | None,
) -> None:
  """Raises UserError when a checkpoint is of another model than this run.

  Args:
    checkpoint: its path, for the message.
    meta: its meta; `meta["base_model"]` may be missing.
    items: the trees that this run would fill.
    base_model: this run's base model, or None for no comparison.
  """
  theirs = meta.get("base_model")
  if base_model and theirs and not _same_model(theirs, base_model):
    raise errors.UserError(
      f"The checkpoint {checkpoint!r} was trained from the base model "
      f"{_say_model(theirs)}, but this run has {_say_model(base_model)}. Give "
      "that model or another work directory."
    )
  problems = []
  for name, tree in items.items():
    saved, wanted = meta["arrays"][name], _arrays(tree)
    problems += [
      f"{name}/{array}: {_say_array(saved.get(array))} there, "
      f"{_say_array(wanted.get(array))} here"
      for array in sorted({*saved, *wanted})
      if saved.get(array) != wanted.get(array)
    ]
  if len(problems) > _MAX_LISTED:
    num_more = len(problems) - _MAX_LISTED
    problems = [*problems[:_MAX_LISTED], f"and {num_more} more"]
  if problems:
    raise errors.UserError(
      f"The checkpoint {checkpoint!r} does not fit this run's model or "
      "optimizer. Give the config it was made with or another work directory."
      "\n  " + "\n  ".join(problems)
    )


def _checksum(array: jax.Array) -> jax.Array:
  """The sum of the words, modulo 2^32: equal on any number of devices.

  Storage notices a truncated file, but not a flipped bit in a large one.
  """
  bits = np.dtype(f"uint{8 * array.dtype.itemsize}")
  words = jax.lax.bitcast_convert_type(array, bits)
  if words.ndim > 1:
    # Over the layers first: one sum over everything goes word by word on CPUs,
    # ten times as slow. The barrier keeps the two sums apart.
    layers = jnp.sum(words, axis=0, dtype=jnp.uint32)
    words = jax.lax.optimization_barrier(layers)
  return jnp.sum(words, dtype=jnp.uint32)


def checksums(tree: types.Tree) -> list[int]:
  """A number per array, in the order of the leaves."""
  # One program, and waited for: collectives of several in flight can block each
  # other on CPUs. An accelerator reads its memory once for it, which takes far
  # less than the copy to the host that a save makes.
  sums = _checksums(jax.tree.leaves(tree))
  return [int(value) for value in jax.device_get(sums)]


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(array) for array in arrays]


def _arrays(tree: types.Tree) -> dict[str, list[Any]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      list(leaf.shape),
      str(np.dtype(leaf.dtype)),
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed as a package"
  return found


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """By checksum where both have one, because a model's folder may move."""
  if "checksum" in one and "checksum" in other:
    return one["checksum"] == other["checksum"]
  return dict(one) == dict(other)


def _say_model(base_model: Mapping[str, Any]) -> str:
  return ", ".join(f"{key} {value!r}" for key, value in base_model.items())


def _say_array(entry: list[Any] | None) -> str:
  return "absent" if entry is None else f"{entry[1]} {tuple(entry[0])}"
