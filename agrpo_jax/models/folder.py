"""Reads the small files of a model's folder, whoever has packed it."""

import json
import os
import pathlib
import re
import stat
from typing import Any

from agrpo_jax import errors

MAX_BYTES = 1 << 28  # of a file that is read whole; released ones: 1 << 25
# Of one that Python parses, into 24 times as much; released ones: 1 << 22.
_MAX_JSON_BYTES = 1 << 25
_LFS = b"version https://git-lfs"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def problem(path: pathlib.Path, max_bytes: int | None = None) -> str:
  """Returns what speaks against opening a file that is there; "" if nothing.

  Args:
    path: of the file.
    max_bytes: that it may have.
  """
  home = path.parent.resolve()
  homes = [home]
  if home.parent.name == "snapshots":  # the hub's cache, where all are links
    homes.append(home.parents[1] / "blobs")
  # Not `resolve`, which raises for links in a circle.
  real = pathlib.Path(os.path.realpath(path))
  if not any(real.is_relative_to(one) for one in homes):
    return (
      f"is a link out of its folder, to {str(real)!r}: put the file itself in "
      "its place, or give the folder that it is in"
    )
  try:
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):
      return "is no file that can be read to an end: put one in its place"
    if max_bytes is not None and status.st_size > max_bytes:
      return f"has {status.st_size:,} bytes, more than {max_bytes:,}"
    with real.open("rb") as file:
      is_pointer = file.read(len(_LFS)) == _LFS
  except OSError as error:
    return f"cannot be read: {error.strerror}"
  if is_pointer:
    return (
      "is only git-lfs's pointer to the file: run `git lfs pull` in its "
      "folder, or download the file itself"
    )
  return ""


def check(path: pathlib.Path, max_bytes: int | None = MAX_BYTES) -> None:
  """Raises UserError where `problem` finds one."""
  found = problem(path, max_bytes)
  if found:
    raise errors.UserError(f"{path} {found}.")


def read_text(path: pathlib.Path, max_bytes: int = MAX_BYTES) -> str:
  """Reads a text file; UserError names it if it is missing or is none."""
  if not path.exists():
    raise errors.UserError(
      f"{path.parent} has no {path.name}: is it the folder of a model, and did "
      "its download finish?"
    )
  check(path, max_bytes)
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise unreadable(path, error) from error


def read_json(path: pathlib.Path) -> Any:
  """Parses a JSON file; UserError names it if it is missing or malformed."""
  text = read_text(path, _MAX_JSON_BYTES)
  try:
    found = json.loads(text)
    if _SURROGATE.search(text):  # half of a character is no text anywhere
      json.dumps(found, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    raise unreadable(path, error) from error
  return found


def unreadable(path: pathlib.Path, error: BaseException) -> errors.UserError:
  """Returns the error of a file that is not what it should be."""
  return errors.UserError(
    f"{path} cannot be read: {error}. Download or copy it again."
  )
