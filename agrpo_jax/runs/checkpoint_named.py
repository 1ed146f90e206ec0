"""A checkpoint by name: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP."""

import pathlib
from typing import Any

from agrpo_jax import errors
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import files

HELP = (
  "Work directory of a run, for its newest checkpoint; WORKDIR:best for the "
  "most accurate one, WORKDIR:TRAIN_STEP for that of a train step."
)


def split(checkpoint: str) -> tuple[str, str]:
  """The work directory, and "best", a number, or "" for the newest."""
  folder, _, which = checkpoint.rpartition(":")
  if _holds_checkpoints(checkpoint):
    return checkpoint, ""  # a work directory of such a name, as gsm8k-14:05
  if which == "best" or (folder and which.isdecimal()):
    return folder, which
  return checkpoint, ""


def _holds_checkpoints(folder: str) -> bool:
  return (pathlib.Path(folder).expanduser() / "checkpoints").is_dir()


def exists(workdir: str) -> bool:
  """Returns whether a run has saved anything; "" is no run."""
  return bool(workdir) and bool(checkpoint_read.Reader(workdir).steps())


def find(checkpoint: str) -> tuple[checkpoint_read.Reader, int | None]:
  """Finds a checkpoint without reading its arrays.

  Args:
    checkpoint: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP.

  Returns:
    The run's checkpoints, and the train step of the one that is meant; None
    for the newest, which a run beside this process may still replace.

  Raises:
    UserError: there is no such checkpoint.
  """
  folder, which = split(checkpoint)
  if not _holds_checkpoints(folder):
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} is not a work directory with checkpoints/; "
      "give a run's config.workdir, with :best or :TRAIN_STEP behind it if you "
      "want another than the newest."
    )
  reader = checkpoint_read.Reader(folder)
  steps = reader.steps()
  if not steps:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} holds no checkpoint yet: the run saves one "
      "every config.train.checkpoint_every train steps, and at its end."
    )
  if not which:
    return reader, None
  train_step = reader.best_step if which == "best" else int(which)
  if train_step is None:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r}: the run evaluated none of its checkpoints "
      f"{steps}. Give one of those numbers instead of 'best'; a run "
      "with config.evaluate.every and config.train.keep_best keeps its best."
    )
  if train_step not in steps:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r}: there are checkpoints of the train steps "
      f"{steps}, not of {train_step}."
    )
  return reader, train_step


def find_train_step(checkpoint: str) -> int | None:
  """The train step that a name means at this moment; None for "" (no name).

  Raises:
    UserError: see `find`.
  """
  if not checkpoint:
    return None
  reader, train_step = find(checkpoint)
  return reader.latest_step if train_step is None else train_step


def pinned(checkpoint: str) -> str:
  """The name WORKDIR:TRAIN_STEP of what a name means at this moment.

  Raises:
    UserError: see `find`.
  """
  folder, _ = split(checkpoint)
  return f"{pathlib.PurePath(folder)}:{find_train_step(checkpoint)}"


def read_config(checkpoint: str) -> dict[str, Any]:
  """The config that a run recorded in its work directory, as plain JSON.

  Raises:
    UserError: there is no such file, or it is damaged.
  """
  folder, _ = split(checkpoint)
  file = pathlib.Path(folder).expanduser() / "config.json"
  if not file.exists():
    raise errors.UserError(
      f"--checkpoint={checkpoint!r}: there is no {str(file)!r}. Give a run's "
      "config.workdir as a whole, with the config.json that the run wrote."
    )
  return files.read_json(file, "the config of the run")
