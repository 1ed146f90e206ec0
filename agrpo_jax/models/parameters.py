"""The one table of a network's parameters: shapes, axes, initial scales.

The network declares its arrays from it; `init`, sharding and the port of
checkpoints read it. Layers are stacked along a leading axis, except the last.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from agrpo_jax.models import base


@dataclasses.dataclass(frozen=True)
class Spec:
  """One array of the parameters.

  Attributes:
    shape: its shape.
    axes: a logical axis name per dimension; `mesh.RULES` maps them.
    stddev: of the truncated normal it starts from; 0 means constant `fill`.
    fill: the constant it starts from when `stddev` is 0.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  stddev: float = 0.0
  fill: float = 0.0

  def initial(self, key: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """A fresh array; the key is consumed."""
    if not self.stddev:
      return jnp.full(self.shape, self.fill, dtype)
    # In float32 first: the same draw in every dtype, but for rounding.
    draw = jax.random.truncated_normal(key, -3.0, 3.0, self.shape, jnp.float32)
    return (draw * self.stddev).astype(dtype)

  def stacked(self, size: int) -> "Spec":
    """The array of `size` layers, on a leading axis."""
    return dataclasses.replace(
      self, shape=(size, *self.shape), axes=("layers", *self.axes)
    )


def _is_spec(node: Any) -> bool:
  return isinstance(node, Spec)


def _norm_spec(size: int) -> dict[str, Spec]:
  return {"scale": Spec((size,), ("norm",), fill=1.0)}


def layer_specs(shape: base.Shape) -> dict[str, dict[str, Spec]]:
  """The arrays of one layer."""
  width, mlp = shape.width, shape.mlp_width
  heads = shape.num_heads * shape.head_dim
  kv = shape.num_kv_heads * shape.head_dim
  std = width**-0.5
  # The outputs that add to the residual stream shrink with its depth.
  depth = (2 * shape.num_layers) ** -0.5

  def kernel(fan_in, fan_out, axes, stddev):
    return {"kernel": Spec((fan_in, fan_out), axes, stddev)}

  specs = {
    "attn_norm": _norm_spec(width),
    "q": kernel(width, heads, ("embed", "heads"), std),
    "k": kernel(width, kv, ("embed", "kv_heads"), std),
    "v": kernel(width, kv, ("embed", "kv_heads"), std),
    "attn_out": kernel(heads, width, ("heads", "embed"), heads**-0.5 * depth),
    "mlp_norm": _norm_spec(width),
    "gate": kernel(width, mlp, ("embed", "mlp"), std),
    "up": kernel(width, mlp, ("embed", "mlp"), std),
    "down": kernel(mlp, width, ("mlp", "embed"), mlp**-0.5 * depth),
  }
  if shape.qkv_bias:
    for name in ("q", "k", "v"):
      one = specs[name]["kernel"]
      specs[name]["bias"] = Spec(one.shape[1:], one.axes[1:])
  if shape.qk_norm:
    for name in ("q_norm", "k_norm"):
      specs[name] = _norm_spec(shape.head_dim)
  return specs


def specs(shape: base.Shape) -> dict[str, Any]:
  """Every array of the parameters, as a tree of `Spec`."""
  width, rows = shape.width, shape.embedding_size
  layer = layer_specs(shape)
  tree: dict[str, Any] = {
    "embed": {"table": Spec((rows, width), ("vocab", "embed"), width**-0.5)},
    "last_layer": layer,
    "final_norm": _norm_spec(width),
  }
  if shape.num_layers > 1:
    tree["layers"] = jax.tree.map(
      lambda one: one.stacked(shape.num_layers - 1), layer, is_leaf=_is_spec
    )
  if not shape.tied_head:
    kernel = Spec((width, rows), ("embed", "vocab"), width**-0.5)
    tree["head"] = {"kernel": kernel}
  return tree


def logical_axes(shape: base.Shape) -> dict[str, Any]:
  """The parameters' tree with a tuple of logical axis names per array."""
  return jax.tree.map(lambda one: one.axes, specs(shape), is_leaf=_is_spec)


def abstract_params(
  shape: base.Shape, dtype: Any = jnp.float32
) -> dict[str, Any]:
  """The parameters' tree with shapes and `dtype`, without memory."""
  return jax.tree.map(
    lambda one: jax.ShapeDtypeStruct(one.shape, dtype),
    specs(shape),
    is_leaf=_is_spec,
  )


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def init(
  shape: base.Shape, key: jax.Array, dtype: Any = jnp.float32
) -> dict[str, Any]:
  """Random parameters; traceable, so that they can be born sharded."""
  leaves, treedef = jax.tree.flatten(specs(shape), is_leaf=_is_spec)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(
    treedef,
    [one.initial(key, dtype) for one, key in zip(leaves, keys, strict=True)],
  )
