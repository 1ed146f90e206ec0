"""Adapters in the layout of PEFT, the PyTorch library.

PEFT finds the modules to adapt by the end of their names, which may be shared
with modules that are not adapted: LLaDA's `ff_out` ends both the MLP's output
("down" here) and the language-model head. There `target_modules` is written as
a regular expression of whole names.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import arrays
from agrpo_jax.port import files
from agrpo_jax.port import write

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_ROOT = "base_model.model."

# What changes the arithmetic; only these values compute x W + scale x a b.
_ONLY: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "use_dora": (False, None),
  "use_rslora": (False, None),
  "fan_in_fan_out": (False, None),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "modules_to_save": ([], None),
  "layer_replication": (None,),
  "alora_invocation_tokens": (None,),
}

# (path of the module in our tree, its kernel in the table).
Slot = tuple[tuple[str, ...], arrays.Entry]


def save(
  folder: pathlib.Path,
  shape: base.Shape,
  adapter: types.Tree,
  settings: lora_lib.Lora,
  base_model: str = "",
) -> None:
  """Writes an adapter; `base_model` names the checkpoint that it adapts.

  Raises:
    UserError: if the folder cannot be written.
  """
  tensors = {}
  slots = _slots(shape)
  for target in settings.targets:
    for path, entry in slots[target]:
      pair = adapter
      for name in path:
        pair = pair[name]
      for layer, kernel in enumerate(entry.names):
        for letter in ("a", "b"):
          x = pair[letter][layer] if entry.stacked else pair[letter]
          # PyTorch keeps a projection as [out, in].
          x = np.asarray(x, np.float32).T
          tensors[_name(kernel, letter)] = np.ascontiguousarray(x)
  described = {
    "base_model_name_or_path": base_model or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": settings.alpha,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": settings.rank,
    "target_modules": _target_modules(settings.targets, slots),
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
  }
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write.save_tensors(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(
      json.dumps(described, indent=2) + "\n", encoding="utf-8"
    )
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(
      f"{folder} cannot be written: {error}. Give another folder, or make room."
    ) from error


def load(
  folder: pathlib.Path, shape: base.Shape
) -> tuple[types.Tree, lora_lib.Lora]:
  """Reads an adapter of the network that `shape` describes.

  What is adapted follows from the tensors that are there.

  Raises:
    UserError: naming all that is missing, unexpected, mis-shaped or not finite,
      and settings that would change the arithmetic.
  """
  raw = folder_lib.read_json(folder / CONFIG)
  if not isinstance(raw, dict):
    raise errors.UserError(f"{folder / CONFIG} does not hold a JSON object")
  problems = [
    f"{key}={raw[key]!r}: only {accepted[0]!r} works"
    for key, accepted in _ONLY.items()
    if key in raw and raw[key] not in accepted
  ]
  rank: Any = raw.get("r")
  alpha: Any = raw.get("lora_alpha")
  if not base.is_int(rank) or rank < 1:
    problems.append(f"r={rank!r} is not a whole number above 0")
  if not (base.is_number(alpha) and alpha > 0):
    problems.append(f"lora_alpha={alpha!r} is not a number above 0")
  _raise(folder, problems)
  tensors = files.Tensors(folder, WEIGHTS)
  known = tensors.names()
  targets = []
  adapter: types.Tree = {}
  expected: set[str] = set()
  for target, slots in _slots(shape).items():
    names = {
      _name(kernel, letter)
      for _, entry in slots
      for kernel in entry.names
      for letter in ("a", "b")
    }
    if not names & known:
      continue
    targets.append(target)
    # A target that has any of its tensors must have all.
    expected |= names
    for path, entry in slots:
      fan_out, fan_in = entry.stored_shape
      sizes: Any = {"a": (rank, fan_in), "b": (fan_out, rank)}
      pair = {}
      for letter, size in sizes.items():
        layers = [
          _read(tensors, _name(kernel, letter), size, problems)
          for kernel in entry.names
        ]
        if not problems:
          pair[letter] = np.stack(layers) if entry.stacked else layers[0]
      lora_lib.put(adapter, path, pair)
  problems += [f"{name} is unexpected" for name in sorted(known - expected)]
  if not targets:
    problems.append("nothing in it adapts a projection of this network")
  _raise(folder, problems)
  return adapter, lora_lib.Lora(rank, float(alpha), tuple(targets))


def _slots(shape: base.Shape) -> dict[str, list[Slot]]:
  """Our target -> the modules that it adapts."""
  slots: dict[str, list[Slot]] = {}
  for key_path, entry in jax.tree_util.tree_leaves_with_path(
    arrays.table(shape, models.family_of(shape))
  ):
    *path, array = (key.key for key in key_path)
    if array == "kernel":
      slots.setdefault(path[-1], []).append((tuple(path), entry))
  return slots


def _name(kernel: str, letter: str) -> str:
  """PEFT's name of the adapter's `a` or `b`."""
  module = kernel.removesuffix(".weight")
  return f"{_ROOT}{module}.lora_{letter.upper()}.weight"


def _target_modules(
  targets: Sequence[str], slots: dict[str, list[Slot]]
) -> list[str] | str:
  """The names by which PEFT adapts these targets and nothing else."""

  def modules(target: str) -> list[list[str]]:
    return [
      kernel.removesuffix(".weight").split(".")
      for _, entry in slots[target]
      for kernel in entry.names
    ]

  def ends(targets: Iterable[str]) -> set[str]:
    return {module[-1] for target in targets for module in modules(target)}

  if not ends(targets) & ends(slots.keys() - {*targets}):
    return sorted(ends(targets))
  # Whole names, any layer.
  patterns = {
    r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module)
    for target in targets
    for module in modules(target)
  }
  return rf"(.*\.)?({'|'.join(sorted(patterns))})"


def _read(
  tensors: files.Tensors,
  name: str,
  shape: tuple[int, int],
  problems: list[str],
) -> np.ndarray:
  """A tensor transposed, float32; empty beside a new problem if it is bad."""
  if name not in tensors.names():
    problems.append(f"{name} is missing")
  elif tensors.shape(name) != shape:
    problems.append(f"{name} has shape {tensors.shape(name)}, expected {shape}")
  elif tensors.dtype(name) not in arrays.DTYPES:
    problems.append(f"{name} is {tensors.dtype(name)}, not a float")
  else:
    x = tensors.read(name)
    problems += arrays.check_finite(tensors, name, x)
    return x.T.astype(np.float32)
  # Not zeros of the shape it should have: a wrong rank may be any number.
  return np.zeros((0, 0), np.float32)


def _raise(folder: pathlib.Path, problems: list[str]) -> None:
  if problems:
    raise errors.UserError(
      f"{folder} is not an adapter that can be used:\n  "
      + "\n  ".join(problems)
      + "\nExport it again, with plain LoRA, from this network."
    )
