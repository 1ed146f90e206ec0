"""Devices in a mesh, and where on it the arrays go.

Three mesh axes. `data` holds copies of the parameters and splits the rows of a
batch. `fsdp` splits the rows too, and each parameter as well: a layer gathers
its weights when it runs. `tensor` splits the work inside a layer: its heads,
its MLP and the vocabulary. The compiler inserts the communication.

A dimension of a parameter has a logical axis, a word such as `embed`; `RULES`
says which mesh axis, if any, splits it. Nothing else in the package names a
mesh axis for a parameter.
"""

import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from agrpo_jax import errors

Mesh = jax.sharding.Mesh
NamedSharding = jax.sharding.NamedSharding
PartitionSpec = jax.sharding.PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
"""The mesh axes that split the rows of a batch."""

RULES: Mapping[str, str | None] = {
  "layers": None,  # the scanned dimension: splitting it would stop the scan
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
  "norm": None,  # a few kilobytes each
  "rank": None,  # the small dimension of an adapter
}
"""Logical axis -> mesh axis that splits it, None for whole on every device."""


def make(
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of all `devices` (default: all of this run, on every host).

  Args:
    data: size of the axis that splits rows over copies of the parameters.
    fsdp: size of the axis that splits rows and parameters.
    tensor: size of the axis that splits the inside of a layer.
    devices: which devices, in order.

  At most one size may be -1: it takes what the others leave.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
  fills = [name for name, size in sizes.items() if size == -1]
  if len(fills) > 1:
    raise errors.UserError(
      f"At most one mesh axis can be -1 (the rest of the devices): {asked}."
    )
  if any(size < 1 for size in sizes.values() if size != -1):
    raise errors.UserError(
      f"A mesh axis is a positive number of devices, or -1: {asked}."
    )
  given = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(devices) % given or (not fills and given != len(devices)):
    raise errors.UserError(
      f"{asked} needs {'a multiple of ' if fills else ''}{given} devices, but "
      f"there are {len(devices)} ({devices[0].platform}). Change the sizes so "
      "that their product is the number of devices, or set one to -1."
    )
  for name in fills:
    sizes[name] = len(devices) // given
  return jax.make_mesh(
    tuple(sizes[name] for name in AXES),
    AXES,
    # The default is Explicit in new versions of JAX, which wants a sharding on
    # every matmul; we leave the choice to the compiler.
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def platform(mesh: Any) -> str:
  """Returns what the devices of a mesh are: "cpu", "gpu" or "tpu".

  They may be described only, as those of a plan; then they are not what
  `jax.default_backend` names.
  """
  return mesh.devices.flat[0].platform


def memory_bytes(mesh: Any) -> int | None:
  """Returns the memory of a device, None where it does not tell.

  CPUs do not, nor do devices that are described only.
  """
  device = mesh.devices.flat[0]
  if platform(mesh) != jax.default_backend():
    return None
  # Those of one mesh are alike; others than its own a process cannot ask.
  here = [d for d in jax.local_devices() if d.platform == device.platform]
  return (here[0].memory_stats() or {}).get("bytes_limit")


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes of a tree of arrays on one of the devices they are on."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def partition_spec(
  axes: tuple[str | None, ...], rules: Mapping[str, str | None] = RULES
) -> PartitionSpec:
  """The mesh axis of each dimension of an array with these logical axes.

  Raises:
    ValueError: an axis is not in `rules`, or two dimensions of the array would
      be split by one mesh axis.
  """
  unknown = [axis for axis in axes if axis is not None and axis not in rules]
  if unknown:
    raise ValueError(
      f"No rule for the logical axes {unknown}; known: {sorted(rules)}."
    )
  mesh_axes = [None if axis is None else rules[axis] for axis in axes]
  used = [axis for axis in mesh_axes if axis is not None]
  if len(used) != len(set(used)):
    raise ValueError(
      f"The logical axes {axes} map to the mesh axes {tuple(mesh_axes)}, but a "
      "mesh axis can split only one dimension of an array."
    )
  return PartitionSpec(*mesh_axes)


def shardings(mesh: Mesh, axes_tree: Any, shapes_tree: Any) -> Any:
  """Returns where each array of a tree goes.

  Args:
    mesh: from `make`.
    axes_tree: a tree of tuples, a logical axis name (or None) per dimension.
    shapes_tree: the same tree of arrays, or anything else with a `shape`.

  Returns:
    The same tree of `NamedSharding`.

  Raises:
    UserError: dimensions that their mesh axis does not divide, all in one
      message.
  """
  problems: list[str] = []

  def one(path: Any, axes: tuple[str | None, ...], leaf: Any) -> NamedSharding:
    if len(axes) != len(leaf.shape):
      raise ValueError(
        f"{jax.tree_util.keystr(path)} has shape {leaf.shape} but the logical "
        f"axes {axes}."
      )
    spec = partition_spec(axes)
    for axis, mesh_axis, size in zip(axes, spec, leaf.shape, strict=True):
      if mesh_axis is not None and size % mesh.shape[mesh_axis]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        problems.append(
          f"  {name}: dimension {axis!r} of size {size} over "
          f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}"
        )
    return NamedSharding(mesh, spec)

  # A tuple of axes belongs to one array; JAX would walk into it.
  tree = jax.tree_util.tree_map_with_path(
    one, axes_tree, shapes_tree, is_leaf=lambda node: isinstance(node, tuple)
  )
  if problems:
    raise errors.UserError(
      "The mesh does not divide these arrays evenly; choose sizes that do:\n"
      + "\n".join(problems)
    )
  return tree


class Shardings(NamedTuple):
  """How a weight is split over the mesh.

  Attributes:
    kept: between its uses, split over `fsdp` and `tensor`.
    used: while a layer multiplies by it: whole over `fsdp`, which splits it
      only to save memory.
  """

  kept: NamedSharding
  used: NamedSharding


def weight_shardings(rows: NamedSharding, axes: tuple[str, ...]) -> Shardings:
  """Returns how a weight with these logical axes is split."""
  kept = partition_spec(axes)
  used = PartitionSpec(*[None if axis == "fsdp" else axis for axis in kept])
  return Shardings(
    NamedSharding(rows.mesh, kept), NamedSharding(rows.mesh, used)
  )


def rows(mesh: Mesh) -> NamedSharding:
  """For arrays whose first dimension is the rows of a batch."""
  return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def vmap_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.vmap` over the rows of a batch, for a function of one row.

  The mapped axis keeps the rows' place on the mesh. A plain `vmap` says nothing
  of it, and where the function has a `shard_map` inside, as the top-k of a
  split vocabulary has, the rows would be gathered on every device for it.
  """
  return jax.vmap(function, spmd_axis_name=ROW_AXES)


def num_row_shards(mesh: Mesh) -> int:
  """Returns what must divide the rows of a batch that `rows` places."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_rows(mesh: Mesh, key: str, num_rows: int) -> None:
  """Raises UserError when rows do not divide over the mesh.

  Args:
    mesh: from `make`.
    key: what the reader of the message knows their number by.
    num_rows: of a batch.
  """
  shards = num_row_shards(mesh)
  if num_rows % shards:
    raise errors.UserError(
      f"{key}={num_rows} rows do not divide over the {shards} devices of the "
      "mesh axes data and fsdp; make it a multiple."
    )


def shard_rows(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns what puts the leading axes of a tree on the mesh, inside jit."""
  if num_row_shards(mesh) == 1:
    return lambda tree: tree
  sharding = rows(mesh)
  return lambda tree: jax.lax.with_sharding_constraint(tree, sharding)


def replicated(mesh: Mesh) -> NamedSharding:
  """For arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
