"""One grading worker: reads completions from a socket, answers with parts.

Started by `pool` as `python -m agrpo_jax.grading.worker FD`, in a
process of its own that never imports jax: what a completion makes a grader do
can then be bounded, and ended, from outside. Lines of JSON both ways:

  {"task", "path", "options", "parts",
   "timeout_seconds", "memory_bytes"}  ->  {"ready": true}
  {"completion", "fields"}  ->  {"parts": {...}, "grades": {...}, "answer"}
                            or  {"error": text} or {"mistake": text}

"parts" of the first are the names that the reward must have. An "error" costs
its completion; a "mistake" is one of the task's that other completions will not
escape. A reply has "timed_out" in addition, or instead, where time was up.

It ends when the other side closes the socket, whatever it is doing, and with it
all processes that a task has started: see `_guard`.
"""

import ctypes
import json
import math
import os
import pathlib
import resource
import select
import signal
import socket
import sys
import types
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.tasks import base
from agrpo_jax.tasks import contract

MAX_ANSWER_CHARS = 1000
_SUBREAPER = 36  # options of Linux's prctl
_PARENT_DEATH = 1


class _Timer:
  """An alarm that raises `base.OutOfTime` after some processor time.

  Processor time, so that a machine busy with compiling does not decide what a
  completion earns. It fires again and again, in case a bare `except` swallows
  the first. What never returns to Python is left to the parent, which kills.
  """

  def __init__(self) -> None:
    self.has_fired = False
    signal.signal(signal.SIGPROF, self._fire)

  def start(self, seconds: float) -> None:
    """Sets the alarm to so much processor time from now."""
    self.has_fired = False
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)

  def stop(self) -> None:
    """Ends the alarm, fired or not."""
    signal.setitimer(signal.ITIMER_PROF, 0)

  def _fire(self, signum: int, frame: types.FrameType | None) -> None:
    del signum, frame
    self.has_fired = True
    raise base.OutOfTime


def _finite(values: Mapping[str, float]) -> Mapping[str, float]:
  for name, value in values.items():
    if not math.isfinite(value):
      raise ValueError(f"{name} is {value}")
  return values


def _fill(
  reply: dict[str, Any],
  task: types.ModuleType,
  start: Mapping[str, Any],
  item: Mapping[str, Any],
) -> None:
  """Puts into `reply` one thing after the other, so that none is lost."""
  given = (item["completion"], item["fields"], start["options"])
  parts = contract.parts(task, task.reward(*given), start["parts"])
  reply["parts"] = _finite(parts)
  reply["grades"] = _finite(contract.grades(task, task.grade(*given)))
  if hasattr(task, "answer"):
    reply["answer"] = str(task.answer(*given))[:MAX_ANSWER_CHARS]


def _bounded_answer(
  task: types.ModuleType,
  start: Mapping[str, Any],
  item: Mapping[str, Any],
  timer: _Timer,
) -> dict[str, Any]:
  """Returns what the task says within its time, whatever it raises.

  What it had said by then is kept, also where it catches OutOfTime itself; the
  reply says all the same that time was up.
  """
  reply: dict[str, Any] = {}
  try:
    try:
      timer.start(start["timeout_seconds"])
      _fill(reply, task, start, item)
    finally:
      timer.stop()
  except base.OutOfTime:
    timer.stop()
  except errors.UserError as error:
    reply["mistake"] = str(error)
  except (Exception, SystemExit) as error:
    reply["error"] = f"raised {type(error).__name__}: {error}"[:500]
  return {**reply, "timed_out": True} if timer.has_fired else reply


def _limit_memory(num_bytes: int) -> None:
  """Lets this process map so much more than it has mapped by now.

  Not so much in all: a task may import a library that maps a lot and uses none
  of it.
  """
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  statm = pathlib.Path("/proc/self/statm")
  if statm.exists():
    num_pages = int(statm.read_text().split()[0])
    num_bytes += num_pages * resource.getpagesize()
  if hard != resource.RLIM_INFINITY:
    num_bytes = min(num_bytes, hard)
  resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))


def _guard(connection: socket.socket) -> None:
  """Forks. The child returns, to grade; the parent stays to end it.

  A worker that hangs in a grader cannot look at its socket, and the processes
  that a task has started have their own ways. So this process does nothing but
  wait: until the other side closes the socket (its death does so too), it is
  told to end, or the worker has ended. Then it kills whatever is left below it.
  """
  woken, wake = os.pipe()
  os.set_blocking(wake, False)
  signal.set_wakeup_fd(wake)
  # Only to be woken. Before the fork: a signal must not find neither of us.
  for number in (signal.SIGCHLD, signal.SIGTERM):
    signal.signal(number, lambda *unused: None)
  # Whose parent ends becomes our child, and not that of the machine's init.
  _prctl(_SUBREAPER, 1)
  worker = os.fork()
  if worker == 0:
    signal.set_wakeup_fd(-1)
    os.close(woken)
    os.close(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM):
      signal.signal(number, signal.SIG_DFL)
    _prctl(_PARENT_DEATH, signal.SIGKILL)
    return
  poll = select.poll()
  poll.register(connection, 0)  # that the other side closed is always told
  poll.register(woken, select.POLLIN)
  is_over = False
  while not is_over:
    is_over = connection.fileno() in dict(poll.poll())
    if not is_over:
      is_over = signal.SIGTERM in os.read(woken, 512) or worker in _ended()
  _kill_children()
  os._exit(0)  # without the clean-up of what the fork has copied


def _prctl(option: int, value: int) -> None:
  """Sets an attribute of this process, where the system is Linux."""
  if hasattr(library := ctypes.CDLL(None), "prctl"):
    library.prctl(option, value, 0, 0, 0)


def _ended() -> list[int]:
  """Returns the children that have ended since the last call."""
  ended = []
  try:
    while pid := os.waitpid(-1, os.WNOHANG)[0]:
      ended.append(pid)
  except ChildProcessError:
    pass
  return ended


def _kill_children() -> None:
  children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
  if not children.exists():
    os.killpg(0, signal.SIGKILL)  # this process included
  try:
    while True:  # the children of what is killed become ours
      for pid in children.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
      os.waitpid(-1, 0)
  except ChildProcessError:
    pass  # none left


def serve(connection: socket.socket) -> None:
  """Answers every line of a connection until the other side closes it."""
  lines = connection.makefile("r", encoding="utf-8", newline="\n")

  def send(reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")

  timer = _Timer()
  first = lines.readline()
  if not first:
    return
  start = json.loads(first)
  task = tasks.get(start["task"], start["path"])
  _limit_memory(start["memory_bytes"])
  send({"ready": True})
  for line in lines:
    send(_bounded_answer(task, start, json.loads(line), timer))


def main(argv: list[str]) -> None:
  # Ctrl-C in the terminal is for the parent; it ends us by closing the socket.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with socket.socket(fileno=int(argv[1])) as connection:
    _guard(connection)
    try:
      serve(connection)
    except ConnectionError:
      pass  # the parent is gone, and with it anyone to tell


if __name__ == "__main__":
  main(sys.argv)
