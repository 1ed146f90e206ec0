"""Reads the checkpoints of a work directory: a run's own, or beside a run.

Nothing in here waits for other processes in the middle of reading: each reads
its part, then all agree on whether everybody could (`_on_all`).
"""

import math
import os
import pathlib
import re
import stat
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint_meta

_STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a checkpoint
# Network folders show what another host wrote after a while.
_PATIENCE_SECONDS = 10


class Reader:
  """The checkpoints of a work directory, as they are at each call.

  All processes of a run call the methods together.

  Args:
    workdir: the run's directory, the same for all processes.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self.directory = epath.Path(workdir).expanduser().resolve() / "checkpoints"

  def steps(self) -> list[int]:
    """Returns the train steps of complete checkpoints, the newest first.

    Raises:
      UserError: the processes see different ones.
    """
    seen: list[list[int]] = []
    for _ in range(_PATIENCE_SECONDS):
      seen = processes.exchange(self._own_steps())
      if all(steps == seen[0] for steps in seen):
        return seen[0]
      time.sleep(1)
    listed = "; ".join(f"process {i}: {own}" for i, own in enumerate(seen))
    raise errors.UserError(
      f"The processes see different checkpoints in {str(self.directory)!r}: "
      f"{listed}. The work directory must be one folder that all hosts share; "
      "mount it on all of them and start again."
    )

  def _own_steps(self) -> list[int]:
    if not self.directory.exists():
      return []
    names = [path.name for path in self.directory.iterdir()]
    return sorted((int(n) for n in names if _STEP.fullmatch(n)), reverse=True)

  @property
  def latest_step(self) -> int | None:
    """The newest checkpoint's train step, or None; it may prove unreadable."""
    return next(iter(self.steps()), None)

  def meta(self) -> dict[str, Any] | None:
    """Returns the newest meta that can be read, or None."""
    return next((meta for _, meta in self._metas()), None)

  def accuracies(self) -> dict[int, float]:
    """Returns train step -> accuracy of the checkpoints that were evaluated."""
    return {
      step: meta["accuracy"]
      for step, meta in self._metas()
      if "accuracy" in meta
    }

  @property
  def best_step(self) -> int | None:
    """The train step of the highest accuracy, the earliest of equal ones."""
    accuracies = self.accuracies()
    return min(accuracies, key=lambda s: (-accuracies[s], s), default=None)

  def _metas(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the train steps and metas that can be read, the newest first."""
    for train_step in self.steps():
      try:
        yield train_step, self._meta(train_step)
      except Exception as error:
        if train_step in self.steps():  # else a run beside us deleted it
          self._warn(train_step, error)

  def read(
    self,
    items: Mapping[str, types.Tree],
    base_model: checkpoint_meta.BaseModel | None = None,
    train_step: int | None = None,
  ) -> tuple[dict[str, types.Tree], dict[str, Any]] | None:
    """Returns the newest readable checkpoint, or None when there is none.

    Args:
      items: name of a tree -> the tree to fill. Its leaves say shape, dtype
        and sharding (arrays, or `jax.ShapeDtypeStruct` with a sharding).
      base_model: that `meta["base_model"]` must be the same as.
      train_step: of the one checkpoint to read instead of the newest.

    Returns:
      The filled trees and the checkpoint's meta.

    Raises:
      UserError: the checkpoint is of another base model or of arrays of other
        shapes, or none of the checkpoints, or not the one that is asked for,
        can be read.
    """
    if train_step is not None:
      return self._read_named(train_step, items, base_model)
    unreadable: dict[int, Exception] = {}
    while left := [s for s in self.steps() if s not in unreadable]:
      try:
        found = self._read(left[0], items, base_model)
      except errors.UserError:
        raise
      # A damaged checkpoint shows as any of a dozen exceptions.
      except Exception as error:
        if left[0] in self.steps():
          self._warn(left[0], error)
          unreadable[left[0]] = error
        # Else a run beside this process deleted it: it has newer ones.
        continue
      if unreadable:
        logging.warning("Restored train step %d instead.", left[0])
      return found
    if not unreadable:
      return None
    raise errors.UserError(
      f"None of the checkpoints in {str(self.directory)!r} can be read; "
      "remove the directory to start from the beginning.\n  "
      + "\n  ".join(f"{s}: {_short(e)}" for s, e in unreadable.items())
    )

  def _read_named(
    self,
    train_step: int,
    items: Mapping[str, types.Tree],
    base_model: checkpoint_meta.BaseModel | None,
  ) -> tuple[dict[str, types.Tree], dict[str, Any]]:
    try:
      return self._read(train_step, items, base_model)
    except errors.UserError:
      raise
    except Exception as error:
      raise errors.UserError(
        f"The checkpoint {str(self._path(train_step))!r} is damaged, or was "
        f"deleted by a run for a newer one ({_short(error)}). Now there are "
        f"those of the train steps {self.steps()}."
      ) from error

  def _path(self, train_step: int) -> epath.Path:
    return self.directory / str(train_step)

  def _meta(self, train_step: int) -> dict[str, Any]:
    """Returns the meta as process 0 reads it, so that all judge it alike.

    It gets the `train_step` that it is of.
    """
    path = self._path(train_step)
    handler = ocp.JsonCheckpointHandler()

    def read() -> dict[str, Any] | None:
      if not processes.is_main():
        return None
      _refuse_strange(path)
      meta = handler.restore(path / "meta")
      checkpoint_meta.check(meta)
      return meta

    return {**processes.exchange(_on_all(read))[0], "train_step": train_step}

  def _read(
    self,
    train_step: int,
    items: Mapping[str, types.Tree],
    base_model: checkpoint_meta.BaseModel | None,
  ) -> tuple[dict[str, types.Tree], dict[str, Any]]:
    """Returns one checkpoint.

    Raises:
      UserError: it does not fit.
      Exception: of any kind, for damage.
    """
    path = self._path(train_step)
    meta = self._meta(train_step)
    checkpoint_meta.check_fit(str(path), meta, items, base_model)
    # Orbax's managers meet at a barrier after reading. A process that raised
    # would not come; so each item is read by its handler, which has none.
    handler = ocp.StandardCheckpointHandler()

    def restore(name: str, tree: types.Tree) -> types.Tree:
      _refuse_chunks(handler.metadata(path / name))
      return handler.restore(
        path / name, args=ocp.args.StandardRestore(_abstract(tree))
      )

    found = _on_all(
      lambda: {name: restore(name, tree) for name, tree in items.items()}
    )
    for name, tree in found.items():
      if checkpoint_meta.checksums(tree) != meta["checksums"][name]:
        raise OSError(f"the arrays of {name!r} are not what was saved")
    return found, meta

  def _warn(self, train_step: int, error: Exception) -> None:
    logging.warning(
      "The checkpoint %s is unreadable: %s",
      self._path(train_step),
      _short(error),
    )


def _refuse_strange(path: epath.Path) -> None:
  """Raises OSError for what orbax makes none of, and cannot be trusted with.

  Links lead out of the checkpoint, and pipes are waited for without end. All
  but the arrays' values, which lie under "d", is read whole: where memory for
  it is not to be had, the process aborts.
  """
  # What is in a folder is not the folder, which may be a link as well.
  for one in (pathlib.Path(path), *pathlib.Path(path).rglob("*")):
    status = one.lstat()
    if stat.S_ISLNK(status.st_mode):
      raise OSError(f"{str(one)!r} is a link")
    if stat.S_ISDIR(status.st_mode):
      continue
    if not stat.S_ISREG(status.st_mode):
      raise OSError(f"{str(one)!r} is no file")
    if one.parent.name != "d" and status.st_size > folder_lib.MAX_BYTES:
      raise OSError(f"{str(one)!r} has {status.st_size:,} bytes")


def _refuse_chunks(arrays: Any) -> None:
  """Raises OSError for an array whose chunks are larger than it is.

  A chunk is in memory as a whole, whatever part of it the array is.

  Args:
    arrays: orbax's metadata of an item.
  """
  for one in jax.tree.leaves(arrays):
    chunk = one.storage.chunk_shape
    if math.prod(chunk) > max(math.prod(one.shape), 1):
      raise OSError(f"{one.name!r} of shape {one.shape} has chunks of {chunk}")


def _on_all(read: Callable[[], Any]) -> Any:
  """Returns what `read` does; raises on all processes when it raised on one.

  Else one would go on to another checkpoint and the others wait for it.
  """
  own, result = None, None
  try:
    result = read()
  except Exception as error:
    own = error
  for process, text in enumerate(processes.exchange(own and _short(own))):
    if text is not None:
      raise own or RuntimeError(f"on process {process}: {text}")
  return result


def _abstract(tree: types.Tree) -> types.Tree:
  def one(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding orbax would look for the devices that wrote the array.
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(one, tree)


def _short(error: Exception) -> str:
  """Returns an error's first line; tensorstore's messages run to pages."""
  first = (str(error).splitlines() or [""])[0]
  return f"{type(error).__name__}: {first[:200]}"
