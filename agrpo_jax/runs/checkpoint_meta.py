"""The meta of a checkpoint: shapes, checksums, versions, base model.

With it a run can refuse a checkpoint of another model by name, before arrays
are read, and tell one that was damaged from one that was not.
"""

import dataclasses
import functools
import hashlib
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


@dataclasses.dataclass(frozen=True)
class BaseModel:
  """The model that a run started from, known by its contents.

  Attributes:
    path: the folder or hub id it was loaded from; it may move.
    revision: on the hub.
    dtype: that its parameters were loaded in.
    checksums: a number per array, of the values as loaded.
    rounded: the same of the values rounded to bfloat16.
  """

  path: str
  revision: str
  dtype: str
  checksums: tuple[int, ...]
  rounded: tuple[int, ...]

  @classmethod
  def from_json(
    cls, raw: Mapping[str, Any], made_with: str = ""
  ) -> "BaseModel":
    """Reads the record of a checkpoint.

    Args:
      raw: the record.
      made_with: what `other_versions` says of the checkpoint.

    Raises:
      UserError: it is not what this version of the package writes.
    """
    try:
      return cls(
        path=raw["path"],
        revision=raw["revision"],
        dtype=raw["dtype"],
        checksums=tuple(raw["checksums"]),
        rounded=tuple(raw["rounded"]),
      )
    except KeyError as error:
      raise errors.UserError(
        f"The checkpoint's record of its base model lacks {error}: another "
        f"version of agrpo_jax made it. Read it with that version.{made_with}"
      ) from error

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {
      "checksums": list(self.checksums),
      "rounded": list(self.rounded),
    }

  def is_same(self, other: "BaseModel") -> bool:
    """Returns whether both hold the same values, wherever they lie.

    Values loaded in two dtypes are compared after rounding to bfloat16. This
    misses a change that rounding hides: less than one part in 256 of a value.
    Both comparisons add up words, so they miss values that trade places.
    """
    if self.dtype == other.dtype:
      return self.checksums == other.checksums
    return self.rounded == other.rounded

  def __str__(self) -> str:
    revision = f" at revision {self.revision!r}" if self.revision else ""
    contents = hashlib.sha256(repr(self.checksums).encode()).hexdigest()[:8]
    return f"{self.path!r}{revision} ({self.dtype}, contents {contents})"


def describe_base(path: str, revision: str, params: types.Tree) -> BaseModel:
  """The record of a base model, made from its loaded parameters."""
  # The dtype of most arrays: folders may keep their norms in another one.
  dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(params)]
  return BaseModel(
    path=path,
    revision=revision,
    dtype=max(sorted(set(dtypes)), key=dtypes.count),
    checksums=tuple(checksums(params)),
    rounded=tuple(checksums(params, jnp.bfloat16)),
  )


def describe(items: Mapping[str, types.Tree]) -> dict[str, Any]:
  """JSON values about named trees of arrays.

  Returns:
    `arrays`: {name: {path: [shape, dtype]}}; `checksums`: {name: [number per
    array]}; `versions`: {package: version}.
  """
  return {
    "arrays": {name: _arrays(tree) for name, tree in items.items()},
    "checksums": {name: checksums(tree) for name, tree in items.items()},
    "versions": versions(),
  }


def check(meta: Any) -> None:
  """Raises ValueError where a meta is not one that this package writes."""
  if not isinstance(meta, dict) or not all(
    isinstance(meta.get(key), dict) for key in ("arrays", "checksums")
  ):
    raise ValueError("the meta does not tell of arrays and checksums")
  accuracy = meta.get("accuracy", 0.0)
  # No comparison holds for NaN.
  if not isinstance(accuracy, int | float) or not -1 < accuracy < 2:
    raise ValueError(f"the meta has accuracy={accuracy!r}")


def check_fit(
  checkpoint: str,
  meta: Mapping[str, Any],
  items: Mapping[str, types.Tree],
  base_model: BaseModel | None,
) -> None:
  """Raises UserError when a checkpoint is of another model than this run.

  Args:
    checkpoint: its path, for the message.
    meta: its meta; `meta["base_model"]` may be missing.
    items: the trees that this run would fill.
    base_model: this run's base model, or None for no comparison.
  """
  made_with = other_versions(meta.get("versions"))
  if base_model and meta.get("base_model"):
    theirs = BaseModel.from_json(meta["base_model"], made_with)
    if not theirs.is_same(base_model):
      raise errors.UserError(
        f"The checkpoint {checkpoint!r} was trained from the base model "
        f"{theirs}, but this run has {base_model}. Give that model, wherever "
        "it lies now, or another work directory."
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
      f"{made_with}\n  " + "\n  ".join(problems)
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


def checksums(tree: types.Tree, dtype: Any = None) -> list[int]:
  """A number per array, in the order of the leaves.

  Args:
    tree: of arrays.
    dtype: that the values are rounded to first; None for no rounding.
  """
  # One program, and waited for: collectives of several in flight can block each
  # other on CPUs. An accelerator reads its memory once for it, which takes far
  # less than the copy to the host that a save makes.
  sums = _checksums(jax.tree.leaves(tree), dtype)
  return [int(value) for value in jax.device_get(sums)]


@functools.partial(jax.jit, static_argnames="dtype")
def _checksums(arrays: list[jax.Array], dtype: Any) -> list[jax.Array]:
  if dtype is not None:
    arrays = [array.astype(dtype) for array in arrays]
  return [_checksum(array) for array in arrays]


def _arrays(tree: types.Tree) -> dict[str, list[Any]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      list(leaf.shape),
      str(np.dtype(leaf.dtype)),
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def versions() -> dict[str, str]:
  """Returns the version of Python, and of each package that matters here."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed as a package"
  return found


def other_versions(made_with: Any) -> str:
  """Says with which versions something was made, where they are not these.

  Args:
    made_with: of `versions`, or whatever stands in its place in a file.

  Returns:
    A sentence that follows another one, or "".
  """
  ours = versions()
  theirs = made_with if isinstance(made_with, Mapping) else {}
  names = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
  if not names:
    return ""
  then, now = (
    ", ".join(f"{name} {of[name]}" for name in names) for of in (theirs, ours)
  )
  return f" It was made with {then}; here are {now}."


def _say_array(entry: list[Any] | None) -> str:
  return "absent" if entry is None else f"{entry[1]} {tuple(entry[0])}"
