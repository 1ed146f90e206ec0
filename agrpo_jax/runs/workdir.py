"""The work directory of a run, which one run at a time may write to."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

import jax
from absl import logging

from agrpo_jax import errors

_LOCK = "lock.json"
# No space, no quota, a file longer than allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def claim(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Makes the directory and keeps other runs out until the context ends.

  The claim is a lock that the operating system holds for this process, so it
  ends with the process however that dies, `kill -9` included. Of a run on
  several hosts only process 0 holds it: that process alone writes files other
  than checkpoints.

  Raises:
    UserError: the directory cannot be made or written, another run has it, or
      its disk is full, now or by what the caller writes.
  """
  directory = pathlib.Path(path).expanduser()
  if "://" in str(path):
    raise errors.UserError(
      f"The work directory {str(path)!r} is not a local path. Mount the bucket "
      "and give the path it has here."
    )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / _LOCK, "a+", encoding="utf-8")
  except OSError as error:
    raise errors.UserError(
      f"Cannot write to the work directory {str(directory)!r}: "
      f"{error.strerror}. Choose another with --config.workdir=..."
    ) from error
  with lock:
    try:
      if jax.process_index() == 0:
        _take(lock, directory)
      yield directory
    except Exception as error:
      reason = _full(error)
      if reason is None:
        raise
      raise errors.UserError(
        f"There is no room to write to the work directory {str(directory)!r} "
        f"({reason}). Its complete checkpoints are intact. Make room, or move "
        "the directory to a larger disk; the same command then goes on from "
        "the newest of them."
      ) from error


def _full(error: BaseException) -> str | None:
  """Which of _FULL an error is about; libraries wrap the system's errors."""
  reasons = [os.strerror(number) for number in _FULL]
  return next((reason for reason in reasons if reason in str(error)), None)


def _take(lock: TextIO, directory: pathlib.Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
      # Some network file systems are mounted without locks.
      logging.warning(
        "%s has no file locks (%s); make sure that no other run uses it.",
        directory,
        error.strerror,
      )
      return
    raise errors.UserError(
      f"The work directory {str(directory)!r} is in use by {_owner(lock)}. "
      "Stop that run or choose another directory with --config.workdir=..."
    ) from None
  lock.truncate(0)
  owner = {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "since": datetime.datetime.now().isoformat(" ", "seconds"),
  }
  # Past the buffer: what finds no room in it would be tried again by close().
  os.write(lock.fileno(), f"{json.dumps(owner)}\n".encode())


def _owner(lock: TextIO) -> str:
  """Who holds the lock; the file may be empty for an instant."""
  lock.seek(0)
  try:
    owner = json.loads(lock.read())
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
  except (ValueError, KeyError, TypeError):
    return "another run"
