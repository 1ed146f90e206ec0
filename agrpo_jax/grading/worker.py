"""One grading worker: reads completions from a socket, answers with parts.

Started by `pool` as `python -m agrpo_jax.grading.worker FD`, in a
process of its own that never imports jax: what a completion makes a grader do
can then be bounded, and ended, from outside. Lines of JSON both ways:

  {"task", "path", "options", "parts", "timeout_seconds"}  ->  {"ready": true}
  {"completion", "fields"}  ->  {"parts": {...}, "grades": {...}, "answer"}
                            or  {"error": text} or {"mistake": text}

"parts" of the first are the names that the reward must have. An "error" costs
its completion; a "mistake" is one of the task's that other completions will not
escape. A reply has "timed_out" in addition, or instead, where time was up.

It ends when the other side closes the socket.
"""

import json
import math
import resource
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

MAX_BYTES = 4 << 30  # of memory, for the tasks of this package
MAX_ANSWER_CHARS = 1000


class _Timer:
  """Raises `base.OutOfTime` after some processor time.

  Processor time, so that a machine busy with compiling does not decide what a
  completion earns. It fires again and again, in case a bare `except` swallows
  the first. What never returns to Python is left to the parent, which kills.
  """

  def __init__(self) -> None:
    self.has_fired = False
    signal.signal(signal.SIGPROF, self._fire)

  def start(self, seconds: float) -> None:
    self.has_fired = False
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)

  def stop(self) -> None:
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


def serve(connection: socket.socket) -> None:
  """Answers every line until the other side closes."""
  lines = connection.makefile("r", encoding="utf-8", newline="\n")

  def send(reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")

  timer = _Timer()
  first = lines.readline()
  if not first:
    return
  start = json.loads(first)
  task = tasks.get(start["task"], start["path"])
  if not start["path"]:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, hard))
  send({"ready": True})
  for line in lines:
    send(_bounded_answer(task, start, json.loads(line), timer))


def main(argv: list[str]) -> None:
  # Ctrl-C in the terminal is for the parent; it ends us by closing the socket.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with socket.socket(fileno=int(argv[1])) as connection:
    try:
      serve(connection)
    except ConnectionError:
      pass  # the parent is gone, and with it anyone to tell


if __name__ == "__main__":
  main(sys.argv)
