"""Writes down what a Python does outside of one folder; see `fuzz_files`.

Every Python that is started with this file's folder on PYTHONPATH imports it
before anything else, so that what it starts in turn is watched too. A line of
JSON per event goes to the file $WATCHED_LOG: files opened outside of the folder
$WATCHED_FOLDER and of Python's own ones, changes of files elsewhere, programs
started, sockets, pickles.
"""

import json
import os
import sys
from typing import Any

_OURS = [sys.prefix, sys.base_prefix, "/proc", "/dev", "/sys"]
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_ALWAYS = (*_STARTS, "socket.connect", "socket.bind", "pickle.find_class")
_CHANGES = (
  "os.chmod",
  "os.link",
  "os.mkdir",
  "os.remove",
  "os.rename",
  "os.rmdir",
  "os.symlink",
  "os.truncate",
)


def _watch(folder: str, log: int, ours: list[str]) -> None:
  def is_in(path: str, folders: list[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == one or real.startswith(f"{one}/") for one in folders)

  def hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
      path, mode, flags = args
      if not isinstance(path, str | bytes):
        return  # a descriptor that was opened before
      path = os.fsdecode(path)
      is_read = not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
      if is_in(path, [folder, *(ours if is_read else ["/dev"])]):
        return
      said = [path, mode]
    elif event in _CHANGES:
      said = [os.fsdecode(one) for one in args if isinstance(one, str | bytes)]
      if all(is_in(path, [folder]) for path in said):
        return
    elif event in _ALWAYS:
      said = [repr(one)[:200] for one in args[:2]]
    else:
      return
    os.write(log, json.dumps([event, *said]).encode() + b"\n")

  sys.addaudithook(hook)


if "WATCHED_LOG" in os.environ:
  _watch(
    os.path.realpath(os.environ["WATCHED_FOLDER"]),
    os.open(os.environ["WATCHED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    [*map(os.path.realpath, [*_OURS, *filter(None, sys.path)])],
  )
