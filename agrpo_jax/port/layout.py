"""The places of our arrays in a checkpoint: tensors by name and layer."""

import dataclasses
from typing import Any

import jax

from agrpo_jax import models
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import parameters

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


def table(shape: base.Shape) -> types.Tree:
  """The parameters' tree with an `Entry` per array."""
  family = models.FAMILIES[shape.model_type]

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


def ordered(table: types.Tree) -> list[str]:
  """The tensors as the network uses them: embedding, layers, the rest."""
  groups = {"embed": 0, "layers": 1, "last_layer": 2}
  keyed = [
    (groups.get(key_path[0].key, 3), layer, name)
    for key_path, entry in jax.tree_util.tree_leaves_with_path(table)
    for layer, name in enumerate(entry.names)
  ]
  return [name for _, _, name in sorted(keyed)]
