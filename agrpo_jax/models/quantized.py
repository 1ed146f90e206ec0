"""Kernels in int8: a frozen base in half of the memory that bfloat16 takes.

Values are symmetric, with a scale per output channel: the largest magnitude
that a channel has is 127. All of int8 is exact in bfloat16, and the scales of
channels go with the sums of a product, so that the product is that of the
stored numbers, and no float copy of a kernel need exist. Nor does a mesh that
splits what is summed over split blocks of it.

Only the projections of the layers are stored like that. Embedding and head
are one array each, a quarter of LLaDA-8B's memory then, and their errors go
into the logits directly; norms and biases are small.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from agrpo_jax import types

_LARGEST = 127


class Kernel(flax.struct.PyTreeNode):
  """A kernel [.., in, out] in int8, in its place in the parameters.

  Attributes:
    values: int8 [.., in, out], or what is said of that array.
    scale: float32 [.., out], likewise; the kernel is values * scale.
  """

  values: Any
  scale: Any


def quantize(kernel: jax.Array) -> Kernel:
  """Rounds a kernel [.., in, out]; off by at most half of a scale."""
  kernel = kernel.astype(jnp.float32)
  largest = jnp.abs(kernel).max(axis=-2)
  # A channel of zeros has no largest magnitude to divide by.
  scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
  values = jnp.round(kernel / jnp.expand_dims(scale, -2))
  return Kernel(values.astype(jnp.int8), scale)


def dequantize(kernel: Kernel) -> jax.Array:
  """The float32 kernel [.., in, out] that is computed with."""
  scale = jnp.expand_dims(kernel.scale, -2)
  return kernel.values.astype(jnp.float32) * scale


def is_quantized(path: tuple[str, ...]) -> bool:
  """Returns whether int8 takes the place of the array at this path."""
  return path[0] in ("layers", "last_layer") and path[-1] == "kernel"


def map_tree(
  quantized: Callable[..., Any],
  other: Callable[..., Any],
  tree: types.Tree,
  *trees: types.Tree,
  is_leaf: Callable[[Any], bool] | None = None,
) -> types.Tree:
  """Maps a tree like the parameters', kernels by a function of their own.

  Args:
    quantized: of what int8 takes the place of.
    other: of the rest.
    tree: like the parameters without int8.
    *trees: which may go on where `tree` has a leaf.
    is_leaf: as in `jax.tree.map`, of `tree`.
  """

  def one(path: Any, leaf: Any, *leaves: Any) -> Any:
    names = tuple(key.key for key in path)
    return (quantized if is_quantized(names) else other)(leaf, *leaves)

  return jax.tree_util.tree_map_with_path(one, tree, *trees, is_leaf=is_leaf)


def logical_axes(axes: types.Tree) -> types.Tree:
  """The axes of parameters with int8, given those without."""
  return map_tree(
    lambda one: Kernel(one, (*one[:-2], one[-1])),
    lambda one: one,
    axes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def abstract_params(params: types.Tree) -> types.Tree:
  """The shapes of parameters with int8, given those without."""
  return map_tree(
    lambda one: jax.eval_shape(quantize, one), lambda one: one, params
  )
