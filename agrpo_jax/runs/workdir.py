"""The work directory of a run, which one run at a time may write to."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

import jax

from agrpo_jax import errors
from agrpo_jax.runs import files

_LOCK = "lock.json"
# No space, no quota, a file longer than allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a system makes of a disk on which it found errors, for one.
_READ_ONLY = (errno.EROFS,)


@contextlib.contextmanager
def claim(
  path: str | os.PathLike[str], flag: str = "--config.workdir"
) -> Iterator[pathlib.Path]:
  """Makes the directory and keeps other runs out until the context ends.

  Of a run on several hosts only process 0 holds the lock: that process alone
  writes files other than checkpoints. A directory that this made is removed
  again if nothing was written to it.

  Args:
    path: of the directory.
    flag: that gave it, for messages.

  Raises:
    UserError: the directory cannot be made or written, another run has it, or
      its disk is full or read-only, now or when the caller writes.
  """
  directory = pathlib.Path(path).expanduser()
  if "://" in str(path):
    raise errors.UserError(
      f"The work directory {str(path)!r} is not a local path. Mount the bucket "
      "and give the path it has here."
    )
  is_new = not directory.exists()
  with contextlib.ExitStack() as stack:
    try:
      directory.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        if is_new:
          stack.callback(_remove_unused, directory)
        stack.enter_context(files.lock(directory / _LOCK))
    except files.InUse as owner:
      raise errors.UserError(
        f"The work directory {str(directory)!r} is in use by {owner}. Stop "
        f"that run or choose another directory with {flag}=..."
      ) from None
    except OSError as error:
      _raise_when_unwritable(error, directory, flag)
      raise errors.UserError(
        f"Cannot write to the work directory {str(directory)!r}: "
        f"{error.strerror}. Choose another with {flag}=..."
      ) from error
    try:
      yield directory
    except Exception as error:
      _raise_when_unwritable(error, directory, flag)
      raise


def _raise_when_unwritable(
  error: Exception, directory: pathlib.Path, flag: str
) -> None:
  """Passes an error on as a UserError where the disk takes no more."""
  name = repr(str(directory))
  for numbers, problem, remedy in (
    (
      _FULL,
      f"There is no room to write to the work directory {name}",
      "Make room, or move the directory to a larger disk",
    ),
    (
      _READ_ONLY,
      f"The work directory {name} cannot be written to",
      f"Make it writable, or copy it and give that with {flag}=...",
    ),
  ):
    for reason in map(os.strerror, numbers):
      # By its words: libraries wrap the system's errors.
      if reason in str(error):
        raise errors.UserError(
          f"{problem} ({reason}). Its complete checkpoints are intact. "
          f"{remedy}; the same command then goes on from the newest of them."
        ) from error


def _remove_unused(directory: pathlib.Path) -> None:
  """Removes a work directory that holds nothing but its lock."""
  if [path.name for path in directory.iterdir()] == [_LOCK]:
    (directory / _LOCK).unlink()
    directory.rmdir()
