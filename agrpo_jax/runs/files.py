"""Files that survive kills: one process's at a time, whole or not at all."""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import BinaryIO

import filelock
from absl import logging

from agrpo_jax import errors
from agrpo_jax.models import folder as folder_lib

# Some network file systems are mounted without locks.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUse(Exception):
  """Another process has the lock; as text, which one."""


@contextlib.contextmanager
def lock(file: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out until the context ends.

  The operating system holds the lock for this process, so it ends with the
  process however that dies, `kill -9` included. A line in the file names the
  process, for those who are refused; the file stays.

  Args:
    file: of the lock, in a folder that exists.

  Raises:
    InUse: another process has it.
    OSError: the file cannot be written.
  """
  # The library's other kind of lock is a file, which `kill -9` would leave.
  held = filelock.FileLock(file, blocking=False, fallback_to_soft=False)
  try:
    try:
      held.acquire()
    except filelock.Timeout:
      raise InUse(_owner(file)) from None
    except OSError as error:
      if error.errno not in _WITHOUT_LOCKS:
        raise
      logging.warning(
        "%s has no file locks (%s); make sure that no other run uses it.",
        file.parent,
        error.strerror,
      )
    owner = {
      "pid": os.getpid(),
      "host": socket.gethostname(),
      "since": datetime.datetime.now().isoformat(" ", "seconds"),
    }
    file.write_text(f"{json.dumps(owner)}\n")
    yield
  finally:
    held.release()


def _owner(file: pathlib.Path) -> str:
  """Returns who holds the lock; the file may be empty for an instant."""
  try:
    owner = json.loads(file.read_text())
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
  except (OSError, ValueError, KeyError, TypeError):
    return "another process"


@contextlib.contextmanager
def rewrite(
  file: pathlib.Path, *, is_shared: bool = False
) -> Iterator[BinaryIO]:
  """Opens a file to write it anew; until all is written it is what it was.

  What interrupts the writing leaves the old file, and perhaps FILE.tmp beside
  it.

  Args:
    file: to write.
    is_shared: with other processes that write it meanwhile; the last one wins.
  """
  own = f".{os.getpid()}" if is_shared else ""
  temporary = file.with_name(f"{file.name}{own}.tmp")
  try:
    with open(temporary, "wb") as opened:
      yield opened
      opened.flush()
      os.fsync(opened.fileno())  # a renamed file may be empty after power loss
    os.replace(temporary, file)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def read_json(
  file: pathlib.Path,
  what: str,
  remedy: str = "Put a copy back, or remove the file.",
) -> dict[str, Any]:
  """Reads a JSON object that this package wrote.

  Args:
    file: that exists.
    what: it is, for the message.
    remedy: for the message, where it holds something else.

  Raises:
    UserError: it cannot be read, or holds something else.
  """
  if problem := folder_lib.problem(file, folder_lib.MAX_BYTES):
    raise errors.UserError(f"{str(file)!r}, {what}, {problem}.")
  try:
    found = json.loads(file.read_text("utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{str(file)!r}, {what}, cannot be read ({error}). {remedy}"
    ) from error
  if not isinstance(found, dict):
    raise errors.UserError(
      f"{str(file)!r}, {what}, does not hold a JSON object. {remedy}"
    )
  return found


def differences(before: Any, now: Any, name: str = "") -> list[str]:
  """Returns a line for every value that two trees of JSON do not share."""
  if isinstance(before, Mapping) and isinstance(now, Mapping):
    return [
      line
      for key in sorted({*before, *now})
      for line in differences(
        before.get(key), now.get(key), f"{name}.{key}" if name else key
      )
    ]
  return [] if before == now else [f"{name}: {before!r} before, {now!r} now"]
