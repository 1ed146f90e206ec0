"""The processes of one run: how they join, and what they tell each other.

Every process runs the same program on the same data. Arrays on the mesh belong
to all of them together; what a host computes on its own (texts, grades) is
shared out by row and gathered, so that all take every decision alike.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from agrpo_jax import errors

_VARIABLES = ("AGRPO_COORDINATOR", "AGRPO_NUM_PROCESSES", "AGRPO_PROCESS_ID")
# A process that stops answering ends the others after this long.
_HEARTBEAT_SECONDS = 60


def initialize() -> None:
  """Joins the other processes of the run; must come before any use of JAX.

  With AGRPO_DISTRIBUTED=auto, JAX finds them itself: on TPU pods, under SLURM
  and on GKE. Otherwise three environment variables name them:
  AGRPO_COORDINATOR (host:port of process 0), AGRPO_NUM_PROCESSES and
  AGRPO_PROCESS_ID. With none of these the process is alone.

  Raises:
    UserError: the variables contradict each other.
    Stopped: the other processes cannot be reached.
  """
  given = {name: os.environ.get(name) for name in _VARIABLES}
  is_auto = os.environ.get("AGRPO_DISTRIBUTED") == "auto"
  if not is_auto and not any(given.values()):
    return
  settings = {}
  if not is_auto:
    settings = _settings(given)
  try:
    jax.distributed.initialize(
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **settings
    )
  except (RuntimeError, ValueError) as error:
    # Not a mistake in the command: a launcher may well try again.
    raise errors.Stopped(
      f"The processes of the run did not find each other: {error}", code=1
    ) from error


def _settings(given: dict[str, str | None]) -> dict:
  said = ", ".join(f"{name}={value}" for name, value in given.items())
  if not all(given.values()):
    raise errors.UserError(
      f"A run of several processes needs all of {', '.join(_VARIABLES)}; "
      f"there are {said}."
    )
  address, num_text, id_text = (str(given[name]) for name in _VARIABLES)
  if not (num_text.isdecimal() and id_text.isdecimal() and ":" in address):
    raise errors.UserError(
      f"{said}: the first is host:port, the others are numbers."
    )
  if int(id_text) >= int(num_text):
    raise errors.UserError(f"{said}: ids go from 0 to the number minus 1.")
  return dict(
    coordinator_address=address,
    num_processes=int(num_text),
    process_id=int(id_text),
  )


def is_lost(error: BaseException) -> bool:
  """Whether an error is that another process of the run does not answer.

  So it shows where that process was being waited for. Where nothing was, and
  when process 0 is the one, JAX ends this process with a message of its own.
  """
  signs = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier", "NCCL")
  return (
    jax.distributed.is_initialized()
    and isinstance(error, jax.errors.JaxRuntimeError)
    and any(sign in str(error) for sign in signs)
  )


def is_main() -> bool:
  """Whether this process writes logs and talks to the terminal."""
  return jax.process_index() == 0


def to_host(array: jax.Array) -> np.ndarray:
  """The whole of an array on the mesh, on every process."""
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own_rows(num_rows: int) -> np.ndarray:
  """int [b]: the rows that this process grades; each row has one process."""
  return np.arange(jax.process_index(), num_rows, jax.process_count())


def exchange(value: Any) -> list[Any]:
  """The JSON values of all processes, in their order; all must take part."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: text.size] = text
  texts = np.asarray(multihost_utils.process_allgather(padded))
  return [
    json.loads(text[:size].tobytes())
    for text, size in zip(texts, sizes, strict=True)
  ]
