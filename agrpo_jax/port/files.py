"""A folder of safetensors, opened without trusting it.

Only headers are read until a tensor is asked for. Nothing in the folder is
executed; weights in formats that could be are refused by name.
"""

import os
import pathlib
from collections.abc import Set
from typing import Any

import numpy as np
import safetensors

from agrpo_jax import errors
from agrpo_jax.models import folder as folder_lib

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in formats that can run code when they are loaded.
UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensors:
  """The tensors of a folder by name, read lazily.

  Args:
    folder: of the checkpoint.
    single: the file that holds everything when there is no index of shards.

  Raises:
    UserError: naming every file that is missing, truncated or not safetensors,
      and every tensor that the index and the files disagree about.
  """

  def __init__(self, folder: pathlib.Path, single: str = SINGLE):
    self._files: dict[str, Any] = {}
    self._where: dict[str, str] = {}
    problems: list[str] = []
    listed = _listed(folder, single, problems)
    for name in sorted(set(listed.values())) or [single]:
      path = folder / name
      # A path's own method raises for a name longer than names can be.
      if not os.path.isfile(path):
        problems.append(f"{name:.200} is missing")
        continue
      if found := folder_lib.problem(path):
        problems.append(f"{name} {found}")
        continue
      try:
        self._files[name] = safetensors.safe_open(path, framework="numpy")
      # No memory: the file is mapped, and may be longer than that is allowed.
      except (OSError, MemoryError, safetensors.SafetensorError) as error:
        problems.append(
          f"{name} is truncated or not a safetensors file ({error})"
        )
        continue
      for tensor in self._files[name].keys():
        if listed and listed.get(tensor) != name:
          problems.append(f"{tensor} is in {name} but the index says otherwise")
        self._where[tensor] = name
    readable = {t for t, name in listed.items() if name in self._files}
    for tensor in sorted(readable - set(self._where)):
      problems.append(f"{tensor} is not in {listed[tensor]} as the index says")
    if problems:
      raise errors.UserError(
        f"{folder}: " + "; ".join(problems) + ". Download or copy these files "
        "again."
      )

  def names(self) -> Set[str]:
    return self._where.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """The dtype in the spelling of safetensors, e.g. "BF16"."""
    return self._slice(name).get_dtype()

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The tensor, or the part of it that `index` says."""
    if not index:
      return self._files[self._where[name]].get_tensor(name)
    return self._slice(name)[index]

  def _slice(self, name: str) -> Any:
    return self._files[self._where[name]].get_slice(name)


def _listed(
  folder: pathlib.Path, single: str, problems: list[str]
) -> dict[str, str]:
  """Tensor -> file as the index lists them; empty without an index."""
  if not (folder / INDEX).exists():
    if not (folder / single).exists():
      unsafe = sorted(f.name for one in UNSAFE for f in folder.glob(one))
      if unsafe:
        problems.append(
          f"only {', '.join(unsafe)}: such files can run code when loaded; "
          "convert them to safetensors first"
        )
    return {}
  index = folder_lib.read_json(folder / INDEX)
  listed = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(listed, dict) or not all(
    isinstance(name, str) and pathlib.PurePath(name).name == name
    for name in listed.values()
  ):
    raise errors.UserError(
      f"{folder / INDEX}: weight_map must map each tensor to a file name"
    )
  return listed
