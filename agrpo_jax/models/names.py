"""Names of LLaDA's tensors in Hugging Face checkpoints and in our tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from agrpo_jax.models import base
from agrpo_jax.models import llada

_ROOT = "model.transformer."

# (module, array) of our layer -> name within a block. Kernels are stored
# [out, in] there and [in, out] here.
_IN_BLOCK = {
  "attn_norm": "attn_norm",
  "q": "q_proj",
  "k": "k_proj",
  "v": "v_proj",
  "attn_out": "attn_out",
  "mlp_norm": "ff_norm",
  "gate": "ff_proj",
  "up": "up_proj",
  "down": "ff_out",
}
_OUTSIDE = {"embed": "wte", "final_norm": "ln_f", "head": "ff_out"}
_ARRAYS = {
  "kernel": "weight",
  "bias": "bias",
  "scale": "weight",
  "table": "weight",
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one of our arrays lives in a checkpoint.

  Attributes:
    names: the tensors; more than one (or `stacked`) are the layers in order.
    spec: our shape and axes.
    stacked: whether our array has a leading axis of layers.
    transposed: whether the tensors are our kernel transposed.
  """

  names: tuple[str, ...]
  spec: base.Spec
  stacked: bool
  transposed: bool

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Shape of each tensor in the checkpoint."""
    shape = self.spec.shape[1:] if self.stacked else self.spec.shape
    return shape[::-1] if self.transposed else shape


def module_name(path: tuple[str, ...], layer: int | None = None) -> str:
  """The original's name of one of our modules, e.g. ("layers", "q"), 3."""
  if path[0] in ("layers", "last_layer"):
    return f"{_ROOT}blocks.{layer}.{_IN_BLOCK[path[1]]}"
  return _ROOT + _OUTSIDE[path[0]]


def order(name: str) -> tuple[int, int, str]:
  """Sorts tensors as the network uses them: embedding, layers, the rest."""
  rest = name.removeprefix(_ROOT)
  if rest.startswith("blocks."):
    return (1, int(rest.split(".")[1]), name)
  return (0 if rest.startswith("wte") else 2, 0, name)


def table(config: llada.Config) -> Any:
  """The parameters' tree with an `Entry` per array."""

  def entry(key_path: Any, spec: base.Spec) -> Entry:
    path = tuple(key.key for key in key_path)
    layers: list[int | None] = [None]
    if path[0] == "layers":
      layers = list(range(config.num_layers - 1))
    elif path[0] == "last_layer":
      layers = [config.num_layers - 1]
    suffix = _ARRAYS[path[-1]]
    return Entry(
      names=tuple(f"{module_name(path, layer)}.{suffix}" for layer in layers),
      spec=spec,
      stacked=path[0] == "layers",
      transposed=path[-1] == "kernel",
    )

  return jax.tree_util.tree_map_with_path(
    entry,
    base.specs(config),
    is_leaf=lambda node: isinstance(node, base.Spec),
  )
