"""Reads the small files of a model's folder."""

import json
import pathlib
from typing import Any

from agrpo_jax import errors

_LFS = b"version https://git-lfs"


def is_pointer(path: pathlib.Path) -> bool:
  """True for what git leaves of a large file that it did not download."""
  try:
    with path.open("rb") as file:
      return file.read(len(_LFS)) == _LFS
  except OSError:
    return False


def refuse_pointer(path: pathlib.Path) -> None:
  """Raises UserError for what `is_pointer`."""
  if is_pointer(path):
    raise errors.UserError(
      f"{path} is only git-lfs's pointer to the file. Run `git lfs pull` in "
      f"{str(path.parent)!r}, or download the file itself."
    )


def read_json(path: pathlib.Path) -> Any:
  """Parses a JSON file; UserError names it if it is missing or malformed."""
  refuse_pointer(path)
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.UserError(
      f"{path.parent} has no {path.name}: is it the folder of a model, and did "
      "its download finish?"
    ) from None
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(f"{path} cannot be read: {error}") from error
