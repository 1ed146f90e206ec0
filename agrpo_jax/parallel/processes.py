"""The processes of one run: how they join, and what they tell each other.

Every process runs the same program on the same data. Arrays on the mesh belong
to all of them together; what a host computes on its own (texts, grades) is
shared out by row and gathered, so that all take every decision alike.
"""

import ctypes
import hashlib
import json
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from agrpo_jax import errors

_VARIABLES = ("AGRPO_COORDINATOR", "AGRPO_NUM_PROCESSES", "AGRPO_PROCESS_ID")
_JOIN = ("AGRPO_JOIN_SECONDS", 300)
_HEARTBEAT = ("AGRPO_HEARTBEAT_SECONDS", 60)

LOST = (
  "Another process of the run ended or does not answer; its own output says "
  "why. What was saved is kept: the same command, on all processes, goes on "
  "from there."
)
_leaving = threading.Lock()
_handlers: list[Any] = []  # C keeps none alive


def initialize(
  coordinator: str | None = None,
  num_processes: str | None = None,
  process_id: str | None = None,
) -> None:
  """Joins the other processes of the run; must come before any use of JAX.

  With AGRPO_DISTRIBUTED=auto, JAX finds them itself: on TPU pods, under SLURM
  and on GKE. Otherwise the arguments name them, or in their place the
  environment variables AGRPO_COORDINATOR (host:port of process 0),
  AGRPO_NUM_PROCESSES and AGRPO_PROCESS_ID. With none of these the process is
  alone.

  All must have come within AGRPO_JOIN_SECONDS (300). From then on, one that
  dies, or does not answer for AGRPO_HEARTBEAT_SECONDS (60), ends the others:
  they `leave`.

  Raises:
    UserError: the variables contradict each other.
  """
  arguments = (coordinator, num_processes, process_id)
  given = {
    name: value or os.environ.get(name)
    for name, value in zip(_VARIABLES, arguments, strict=True)
  }
  is_auto = os.environ.get("AGRPO_DISTRIBUTED") == "auto" and not any(arguments)
  if not is_auto and not any(given.values()):
    return
  settings = {} if is_auto else _settings(given)
  join_seconds = _seconds(*_JOIN)
  heartbeat_seconds = _seconds(*_HEARTBEAT)
  missed = (
    f"The processes of the run did not find each other in {join_seconds} s "
    f"({_JOIN[0]}): not all were started, or they cannot reach process 0."
  )
  # It would catch SIGTERM, from here on until somebody else does.
  jax.config.update("jax_enable_preemption_service", False)
  _when_aborted(missed)
  try:
    jax.distributed.initialize(
      initialization_timeout=join_seconds,
      heartbeat_timeout_seconds=heartbeat_seconds,
      **settings,
    )
  except (RuntimeError, ValueError) as error:
    leave(f"{missed} ({error})")
  _when_aborted(f"This process was aborted. If no line above says why: {LOST}")


def _settings(given: dict[str, str | None]) -> dict:
  said = ", ".join(f"{name}={value}" for name, value in given.items())
  if not all(given.values()):
    raise errors.UserError(
      f"A run of several processes needs all of {', '.join(_VARIABLES)}; "
      f"there are {said}."
    )
  address, num_text, id_text = (str(given[name]) for name in _VARIABLES)
  host, _, port = address.rpartition(":")
  is_address = host and port.isdecimal() and 0 < int(port) < 2**16
  if not (num_text.isdecimal() and id_text.isdecimal() and is_address):
    raise errors.UserError(
      f"{said}: the first is host:port, the others are numbers."
    )
  if int(id_text) >= int(num_text):
    raise errors.UserError(f"{said}: ids go from 0 to the number minus 1.")
  if int(id_text) == 0:
    _check_free(int(port), said)
  return dict(
    coordinator_address=address,
    num_processes=int(num_text),
    process_id=int(id_text),
  )


def _check_free(port: int, said: str) -> None:
  """Refuses a port that is taken; JAX's service would crash on it."""
  try:
    with socket.socket() as probe:
      # Else a port whose last connections ended just now would seem taken.
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(("", port))
  except OSError as error:
    raise errors.UserError(
      f"{said}: process 0 cannot listen on port {port} ({error.strerror}); "
      "give all processes another one."
    ) from error


def _seconds(name: str, default: int) -> int:
  text = os.environ.get(name, str(default))
  if not text.isdecimal() or int(text) < 1:
    raise errors.UserError(f"{name}={text} is no number of seconds, 1 or more.")
  return int(text)


def differences(settings: Mapping[str, Any]) -> list[str]:
  """Returns a line for each of these settings that processes do not share.

  The code and JAX's version count as settings. Processes that differ would
  train something else each, or wait for each other in different places.
  """
  folder = pathlib.Path(__file__).parents[1]
  sources = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
  every = exchange(
    {
      "code": hashlib.sha256(b"".join(sources)).hexdigest()[:12],
      "jax": jax.__version__,
      **_flat(settings),
    }
  )
  lines = []
  for name in sorted({name for one in every for name in one}):
    values = [json.dumps(one.get(name)) for one in every]
    if len({*values}) > 1:
      # Of each value the first process that has it.
      said = [f"{v} (process {values.index(v)})" for v in dict.fromkeys(values)]
      lines.append(f"{name}: {', '.join(said)}")
  return lines


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
  """Returns {"a.b": 1} for {"a": {"b": 1}}."""
  if not isinstance(settings, Mapping):
    return {name: settings}
  return {
    path: leaf
    for key, value in settings.items()
    for path, leaf in _flat(value, f"{name}.{key}" if name else key).items()
  }


def is_lost(error: BaseException) -> bool:
  """Returns whether an error is that another process does not answer.

  So it shows where that process was being waited for. Where nothing was, and
  when process 0 is the one, JAX aborts this process: `_when_aborted`.
  """
  # By its words: JAX raises ValueError where a call fails at once, its own
  # error where a result is waited for.
  signs = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier", "NCCL")
  if not jax.distributed.is_initialized():
    return False
  found: BaseException | None = error
  while found is not None:
    if any(sign in str(found) for sign in signs):
      return True
    # Orbax says of a save only that it took too long.
    found = found.__cause__ or found.__context__
  return False


def leave(message: str) -> NoReturn:
  """Ends this process at once, with code 4: another one is not there."""
  _leaving.acquire()  # for good: the first caller speaks and ends all
  # Neither print nor sys.exit: this may run inside a signal handler, beside
  # threads that wait for ever.
  os.write(2, f"{message}\n".encode())
  os._exit(4)


def _when_aborted(message: str) -> None:
  """Has this process `leave` with a message when JAX aborts it.

  That is how JAX ends it when another one is not there: by a thread of its own
  and no exception. Python runs its own signal handlers only after the signal's
  are done, too late for SIGABRT; hence a handler for C.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: leave(message))
  _handlers.append(handler)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def is_main() -> bool:
  """Returns whether this process writes logs and talks to the terminal."""
  return jax.process_index() == 0


def to_host(array: jax.Array) -> np.ndarray:
  """Returns the whole of an array on the mesh, on every process."""
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own_rows(num_rows: int) -> np.ndarray:
  """Returns int [b]: rows that this process grades, and no other does."""
  return np.arange(jax.process_index(), num_rows, jax.process_count())


def exchange(value: Any) -> list[Any]:
  """Returns the JSON values of all processes, in order; all must take part."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  # Sizes first: what is gathered must have the same shape on all processes.
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: text.size] = text
  texts = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(text[:size].tobytes())
    for text, size in zip(texts, sizes, strict=True)
  ]
