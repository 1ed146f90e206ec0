"""Renders chat templates in a process whose time and memory are bounded.

A template is a program that came with a model. Jinja's sandbox keeps it from
files and attributes, but not from running forever or filling the memory; so a
process of its own runs it, one for all tokenizers, `chat_template_worker`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from agrpo_jax import errors

SECONDS = 10  # for a request, by the clock
_START_SECONDS = 120.0
# Chats per request: a round trip takes as long as rendering some of them.
_CHATS = 64


class _Worker:
  """The process, started when it is first needed and after it died."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None
    self._socket: socket.socket | None = None

  def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to a request; {"error"} where the process did not live."""
    with self._lock:
      if self._process is None or self._process.poll() is not None:
        self._start()
      try:
        return self._exchange(json.dumps(request).encode() + b"\n")
      except OSError:
        return {"error": self._end()}
      except BaseException:
        self._end()  # else the next request would read this one's reply
        raise

  def _start(self) -> None:
    root = str(pathlib.Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    self._socket, theirs = socket.socketpair()
    with theirs:
      self._process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "agrpo_jax.models.chat_template_worker",
          *(str(theirs.fileno()), str(SECONDS)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={
          **os.environ,
          "PYTHONPATH": os.pathsep.join(filter(None, paths)),
          "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
          "OPENBLAS_NUM_THREADS": "1",  # each thread would reserve memory
        },
        start_new_session=True,  # Ctrl-C reaches the parent alone
      )

  def _exchange(self, line: bytes) -> dict[str, Any]:
    if self._socket is None:
      raise ConnectionError
    # The process ends by itself in SECONDS, this is for one that cannot.
    end = time.monotonic() + _START_SECONDS + SECONDS
    self._socket.settimeout(_START_SECONDS + SECONDS)
    self._socket.sendall(line)
    received = [b""]
    while not received[-1].endswith(b"\n"):
      self._socket.settimeout(max(end - time.monotonic(), 0))
      received.append(self._socket.recv(65_536))
      if not received[-1]:
        raise ConnectionError
    return json.loads(b"".join(received))

  def _end(self) -> str:
    """Ends the process; why it gave no answer."""
    process, self._process = self._process, None
    if self._socket is not None:
      self._socket.close()
    if process is None:
      return "it could not be started"
    try:
      code = process.wait(1)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      code = -signal.SIGALRM
    if code == -signal.SIGALRM:
      return f"it does not end within {SECONDS} seconds"
    return f"the process that ran it ended with code {code}"


_WORKER = _Worker()


def render(
  template: str,
  names: Mapping[str, str],
  chats: Sequence[Sequence[Mapping[str, Any]]],
) -> list[str]:
  """Returns chats as texts, each up to where the next turn begins.

  Args:
    template: in Jinja's language.
    names: of special tokens, e.g. {"bos_token": "<s>"}.
    chats: messages of "role" and "content".

  Raises:
    UserError: the template is wrong, refuses the messages, or needs more time
      or memory than a template should.
  """
  texts: list[str] = []
  for at in range(0, len(chats), _CHATS):
    some = [[*messages] for messages in chats[at : at + _CHATS]]
    reply = _WORKER.ask(
      {"template": template, "names": dict(names), "chats": some}
    )
    if "error" in reply:
      raise errors.UserError(
        "The tokenizer's chat template cannot write these messages: "
        f"{reply['error']}. Correct the template, or set model.tokenizer to a "
        "folder with another one."
      )
    texts += reply["texts"]
  return texts
