"""The parent's side of one grading worker: its process and the socket to it."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

START_SECONDS = 120.0
KILL_SECONDS = 10.0
MAX_STARTS = 3  # failed starts in a row before it gives up
_SLICE_SECONDS = 1.0


class WorkerProcess:
  """A process that runs `worker`, and its successors when it goes bad."""

  def __init__(self, start: Mapping[str, Any], seconds: float):
    """Starts the process without waiting for it.

    Args:
      start: the first message, which names the task.
      seconds: by the clock, to wait for one reply.
    """
    self._start = json.dumps(start).encode() + b"\n"
    self._seconds = seconds
    self._is_hung_up = False
    self._spawn()

  def _spawn(self) -> None:
    self._socket, theirs = socket.socketpair()
    self._received = b""
    self._is_ready = False
    root = str(pathlib.Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    with theirs:
      self._process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "agrpo_jax.grading.worker",
          str(theirs.fileno()),
        ],
        stdin=subprocess.DEVNULL,
        stdout=2,  # what a task prints goes where the log goes
        pass_fds=[theirs.fileno()],
        env={
          **os.environ,
          "PYTHONPATH": os.pathsep.join(filter(None, paths)),
          "PYTHONUNBUFFERED": "1",
          "OPENBLAS_NUM_THREADS": "1",  # the cores are for the workers
        },
        start_new_session=True,  # Ctrl-C reaches the parent alone
      )
      self.send([self._start])  # it loads its task while nobody waits

  def ensure_ready(self) -> None:
    """Waits until the worker has loaded its task, replacing it if need be.

    Raises:
      ConnectionError: that fails again and again, or `hang_up` was called.
    """
    for _ in range(MAX_STARTS):
      if self._is_hung_up:
        break
      if self._is_ready and not self._has_ended():
        return
      if self._has_ended():
        self.kill()
        self._spawn()
        if self._is_hung_up:  # on the socket of the worker before
          break
      try:
        self._is_ready = "ready" in self.receive(START_SECONDS)
      except OSError:  # closed, or TimeoutError
        self.kill()
    if self._is_ready and not self._is_hung_up:
      return
    raise ConnectionError(
      f"the grading worker failed to start {MAX_STARTS} times; see the log "
      "above for its own message."
    )

  def _has_ended(self) -> bool:
    return self._process.poll() is not None

  def send(self, lines: Iterable[bytes]) -> None:
    """Sends messages, each a line.

    Raises:
      TimeoutError: the worker does not take them.
      ConnectionError: it is gone.
    """
    self._socket.settimeout(self._seconds)
    self._socket.sendall(b"".join(lines))

  def receive(self, seconds: float | None = None) -> dict[str, Any]:
    """Returns the next reply.

    Raises:
      TimeoutError: there is none within `seconds`.
      ConnectionError: the worker is gone.
    """
    left = seconds or self._seconds
    while b"\n" not in self._received:
      # In slices: the clock of a machine that is paused runs on, and a worker
      # that stands still together with this process is not slow.
      length = min(left, _SLICE_SECONDS)
      self._socket.settimeout(length)
      try:
        chunk = self._socket.recv(65_536)
      except TimeoutError:
        left -= length
        if left <= 0:
          raise
        continue
      if not chunk:
        raise ConnectionError("the worker closed its socket")
      self._received += chunk
    line, _, self._received = self._received.partition(b"\n")
    return json.loads(line)

  def hang_up(self) -> None:
    """Makes a `receive` that waits in another thread end, for good."""
    self._is_hung_up = True
    try:
      self._socket.shutdown(socket.SHUT_RDWR)
    except OSError:
      pass  # closed already

  def kill(self) -> None:
    """Ends the process at once, all that it started, and leaves no zombie."""
    self._is_ready = False
    self._socket.close()
    self._process.terminate()  # its guard, who kills the rest and ends
    try:
      self._process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
      os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
