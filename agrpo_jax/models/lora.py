"""Low-rank adapters (LoRA, arXiv:2106.09685) on named projections.

The adapter is a tree beside the parameters, with the same module names where
it adapts: {"a": [.., in, R], "b": [.., R, out]}, float32. The adapted
projection computes x W + scale (x a) b.
"""

import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agrpo_jax import errors
from agrpo_jax import types

LAYER_TARGETS = ("q", "k", "v", "attn_out", "gate", "up", "down")
TARGETS = (*LAYER_TARGETS, "head")


@dataclasses.dataclass(frozen=True)
class Lora:
  """The projections that are adapted, and how.

  Attributes:
    rank: R, columns of `a` and rows of `b`.
    alpha: the adapter's output is multiplied by alpha / rank.
    targets: names out of `TARGETS`.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = LAYER_TARGETS

  def __post_init__(self) -> None:
    found = setting_problems(self.rank, self.alpha, self.targets)
    if found:
      raise errors.UserError("LoRA settings: " + "; ".join(found) + ".")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def setting_problems(
  rank: int, alpha: float, targets: Sequence[str]
) -> list[str]:
  """Returns what makes these no fields of `Lora`, one sentence each."""
  found = []
  if rank < 1:
    found.append(f"rank={rank} must be at least 1")
  if not 0 < alpha < math.inf:
    found.append(f"alpha={alpha} must be a number above 0")
  if not targets or set(targets) - set(TARGETS):
    found.append(
      f"targets={tuple(targets)} must be some of {', '.join(TARGETS)}"
    )
  return found


def problems(settings: Lora, params_abstract: types.Tree) -> list[str]:
  """Everything that rules an adapter out for a network, one sentence each.

  Args:
    settings: rank and targets.
    params_abstract: the network's parameters, or their shapes.
  """
  found = []
  kernels = dict(_kernels(params_abstract, settings.targets))
  missing = set(settings.targets) - {path[-1] for path in kernels}
  if missing:
    why = (
      " (the head of this network is its embedding table, which cannot be "
      "adapted)"
      if "head" in missing
      else ""
    )
    found.append(
      f"LoRA targets {sorted(missing)} match no projection of this "
      f"network{why}; remove them from the targets"
    )
  # The largest decides: beside it a small projection may get more rank than it
  # has, and computes what it should.
  full = max((min(kernel.shape[-2:]) for kernel in kernels.values()), default=0)
  if kernels and settings.rank > full:
    found.append(
      f"LoRA rank {settings.rank} is above {full}, the full rank of the "
      "largest projection that it adapts; lower it"
    )
  return found


def init(
  settings: Lora, params_abstract: types.Tree, key: jax.Array
) -> types.Tree:
  """A fresh adapter, which changes nothing: `b` is zero.

  `a` is uniform in +-1/sqrt(in), which is PEFT's kaiming-uniform with
  a = sqrt(5).

  Args:
    settings: rank and targets.
    params_abstract: the parameters, or their shapes.
    key: a random key, consumed.

  Raises:
    UserError: if a target matches nothing in the parameters, or the rank is
      above that of all that it adapts.
  """
  if found := problems(settings, params_abstract):
    raise errors.UserError("; ".join(found) + ".")
  kernels = dict(_kernels(params_abstract, settings.targets))

  def draw(key: jax.Array) -> types.Tree:
    adapter: types.Tree = {}
    keys = jax.random.split(key, len(kernels))
    for (path, kernel), a_key in zip(kernels.items(), keys, strict=True):
      *stack, fan_in, fan_out = kernel.shape
      bound = 1 / math.sqrt(fan_in)
      a = jax.random.uniform(
        a_key, (*stack, fan_in, settings.rank), jnp.float32, -bound, bound
      )
      b = jnp.zeros((*stack, settings.rank, fan_out), jnp.float32)
      put(adapter, path, {"a": a, "b": b})
    return adapter

  return jax.jit(draw)(key)


def logical_axes(settings: Lora, params_axes: types.Tree) -> types.Tree:
  """The adapter's tree with a tuple of logical axis names per array.

  Args:
    settings: targets.
    params_axes: `transformer.logical_axes` of the network.
  """
  axes: types.Tree = {}
  for path, kernel_axes in _kernels(params_axes, settings.targets):
    *stack, fan_in, fan_out = kernel_axes
    ab = {"a": (*stack, fan_in, "rank"), "b": (*stack, "rank", fan_out)}
    put(axes, path, ab)
  return axes


def merge(
  params: types.Tree, adapter: types.Tree, scale: float, dtype: Any = None
) -> types.Tree:
  """Parameters that compute the same without the adapter: W + scale a b.

  The sum is formed in float32 and rounded once.

  Args:
    params: the network's parameters.
    adapter: its adapter.
    scale: of the adapter, `Lora.scale`.
    dtype: of all parameters returned; if None each keeps its own.
  """

  def rounded(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.astype(dtype or like.dtype)

  def walk(node: types.Tree, delta: types.Tree) -> types.Tree:
    if "a" in delta:
      product = jnp.matmul(
        delta["a"].astype(jnp.float32),
        delta["b"].astype(jnp.float32),
        # TPUs multiply float32 in bfloat16 unless asked not to.
        precision=jax.lax.Precision.HIGHEST,
      )
      kernel = node["kernel"]
      merged = kernel.astype(jnp.float32) + scale * product
      others = {name: rounded(x, x) for name, x in node.items()}
      return {**others, "kernel": rounded(merged, kernel)}
    return {
      name: walk(child, delta[name])
      if name in delta
      else jax.tree.map(lambda x: rounded(x, x), child)
      for name, child in node.items()
    }

  return walk(params, adapter)


def count(tree: types.Tree) -> int:
  """Returns how many numbers the arrays of a tree hold."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _kernels(
  tree: types.Tree, targets: tuple[str, ...], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  """(path of the module, its kernel) for every target in a params tree."""
  # In one order however the tree was built: the order deals out the keys.
  for name in sorted(tree):
    node = tree[name]
    if not isinstance(node, dict):
      continue
    if "kernel" in node:
      if name in targets:
        yield (*path, name), node["kernel"]
    else:
      yield from _kernels(node, targets, (*path, name))


def put(tree: types.Tree, path: tuple[str, ...], value: types.Tree) -> None:
  """Sets `tree[path[0]][path[1]]... = value`, making the dicts between."""
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value
