"""Writes a folder of safetensors in the layout that transformers uses."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from agrpo_jax import errors
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.port import files

_PARTIAL = ".partial"
# Copied from the source: tokenizer, generation settings, modelling code.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
_NOT_COPIED = (files.CONFIG, files.INDEX)


def refuse_weights(folder: pathlib.Path) -> None:
  """UserError if the folder holds weights, or is no folder."""
  if folder.exists() and not folder.is_dir():
    raise errors.UserError(f"{folder} is a file; give a folder to write to.")
  patterns = ("*.safetensors", *files.UNSAFE)
  weights = sorted(
    {one.name for pattern in patterns for one in folder.glob(pattern)}
  )
  if weights:
    raise errors.UserError(
      f"{folder} already holds weights ({', '.join(weights)}). Give another "
      "folder, or remove them first."
    )


def write(
  folder: pathlib.Path,
  *,
  sizes: Mapping[str, int],
  read: Callable[[str], np.ndarray],
  config: str,
  source: pathlib.Path | None,
  max_shard_bytes: int,
) -> None:
  """Writes tensors, index, `config.json` and the source's other files.

  Nothing that the folder holds is touched before all tensors are on disk.
  Every process must call this; the first one writes.

  Args:
    folder: made if need be.
    sizes: tensor -> bytes, in the order of the files.
    read: makes a tensor; called in that order, on all processes.
    config: contents of `config.json`.
    source: folder whose tokenizer and code files are copied, or None.
    max_shard_bytes: length of a file, unless a single tensor is longer.
  """
  copied = _copied(source, folder)
  shards = _plan(sizes, max_shard_bytes)
  is_writer = jax.process_index() == 0
  try:
    if is_writer:
      folder.mkdir(parents=True, exist_ok=True)
    for file, names in shards.items():
      tensors = {name: read(name) for name in names}
      if is_writer:
        save_tensors(tensors, folder / (file + _PARTIAL))
    if is_writer:
      _finish(folder, shards, sizes, config, copied)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(
      f"{folder} cannot be written: {error}. Give another folder, or make room."
    ) from error


def save_tensors(tensors: Mapping[str, np.ndarray], file: pathlib.Path) -> None:
  """Writes one file of tensors, with the mode that the umask gives.

  Raises:
    OSError, safetensors.SafetensorError: it cannot be written.
  """
  file.write_bytes(b"")
  mode = file.stat().st_mode
  # The library puts a file of mode 0600 in the place of what is there.
  safetensors.numpy.save_file(dict(tensors), file, metadata={"format": "pt"})
  file.chmod(mode)


def _plan(
  sizes: Mapping[str, int], max_shard_bytes: int
) -> dict[str, list[str]]:
  """File -> its tensors: filled in order, each up to the limit."""
  groups: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if groups[-1] and filled + size > max_shard_bytes:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  if len(groups) == 1:
    return {files.SINGLE: groups[0]}
  return {
    f"model-{at:05d}-of-{len(groups):05d}.safetensors": names
    for at, names in enumerate(groups, start=1)
  }


def _finish(
  folder: pathlib.Path,
  shards: Mapping[str, list[str]],
  sizes: Mapping[str, int],
  config: str,
  copied: Sequence[pathlib.Path],
) -> None:
  """Puts the new files in the place of what was there."""
  # Shards of another number have other names, and would stay beside these.
  for old in folder.glob("*.safetensors"):
    old.unlink()
  (folder / files.INDEX).unlink(missing_ok=True)
  for file in shards:
    os.replace(folder / (file + _PARTIAL), folder / file)
  if len(shards) > 1:
    weight_map = {
      name: file for file, names in shards.items() for name in names
    }
    index = {
      "metadata": {"total_size": sum(sizes.values())},
      "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / files.INDEX).write_text(json_text(index), encoding="utf-8")
  (folder / files.CONFIG).write_text(config, encoding="utf-8")
  for one in copied:
    shutil.copyfile(one, folder / one.name)


def _copied(
  source: pathlib.Path | None, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Returns the files of the source that go into the folder as they are."""
  # To copy a file on to itself is an error.
  if source is None or source.resolve() == folder.resolve():
    return []
  found = [
    file
    for pattern in _COPIED
    for file in sorted(source.glob(pattern))
    if file.is_file() and file.name not in _NOT_COPIED
  ]
  for file in found:
    # What a link leads to would be given away with the copy.
    folder_lib.check(file, max_bytes=None)
  return found


def json_text(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
