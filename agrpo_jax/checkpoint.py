"""Checkpoints of what training changes, written in the background.

`<workdir>/checkpoints/<train step>/` holds three items:

  trainable   the adapters, or all parameters in full fine-tuning,
  optimizer   the optimizer's state and the train step,
  meta        JSON: what the caller gave (config, base model, metrics), shapes
              and checksums of the arrays above, the versions that wrote them.

A frozen base is not saved; `meta` says which one it was. Arrays are restored
to the shardings asked for, so the number of devices may change in between. A
checkpoint appears under its name only when it is complete.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from agrpo_jax import checkpoint_meta
from agrpo_jax import errors
from agrpo_jax import types


class Checkpoints:
  """The checkpoints of one work directory.

  A run that writes must hold the directory's claim (`workdir.claim`).

  Args:
    workdir: the run's directory, the same for all hosts.
    keep: how many checkpoints to keep, the newest.
    every: `save` acts on train steps that this divides.
    read_only: for evaluation and export, beside a run or after it.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int = 2,
    every: int = 1,
    read_only: bool = False,
  ):
    self._directory = epath.Path(workdir).resolve() / "checkpoints"
    self._read_only = read_only
    options = ocp.CheckpointManagerOptions(
      save_decision_policy=checkpoint_managers.AnySavePolicy(
        [
          checkpoint_managers.FixedIntervalPolicy(every),
          checkpoint_managers.PreemptionCheckpointingPolicy(),
        ]
      ),
      preservation_policy=checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    try:
      self._manager = ocp.CheckpointManager(self._directory, options=options)
    except OSError as error:
      raise errors.UserError(
        f"Cannot use {str(self._directory)!r} for checkpoints: {error}. "
        "Choose another work directory with --config.workdir=..."
      ) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def latest_step(self) -> int | None:
    """The newest checkpoint's train step, or None; it may prove unreadable."""
    return self._manager.latest_step()

  def save(
    self,
    train_state: types.TrainState,
    meta: Mapping[str, Any],
    *,
    force: bool = False,
  ) -> bool:
    """Starts saving when it is time to; the arrays may be donated afterwards.

    Args:
      train_state: what to save.
      meta: JSON values. `meta["base_model"]`, when there, is compared by
        `restore`.
      force: save although `every` does not divide the train step.

    Returns:
      Whether this train step was or is being saved by this call.
    """
    train_step = int(jax.device_get(train_state.train_step))
    if train_step in self._manager.all_steps() or not (
      force or self._manager.should_save(train_step)
    ):
      return False
    items = _items(train_state)
    return self._manager.save(
      train_step,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave({**meta, **checkpoint_meta.describe(items)}),
        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
      ),
      force=True,
    )

  def restore(
    self,
    train_state: types.TrainState,
    *,
    base_model: Mapping[str, Any] | None = None,
  ) -> tuple[types.TrainState, dict[str, Any]] | None:
    """The newest readable checkpoint, or None when there is no checkpoint.

    Args:
      train_state: the state to fill. Its leaves say shape, dtype and sharding
        (arrays, or `jax.ShapeDtypeStruct` with a sharding); `params` are
        returned as they are when there are adapters.
      base_model: what `meta["base_model"]` must be.

    Returns:
      The restored state and the checkpoint's meta.

    Raises:
      UserError: the checkpoint is of another base model or of arrays of other
        shapes, or none of the checkpoints can be read.
    """
    found = self._restore(_items(train_state), base_model)
    if found is None:
      return None
    items, meta = found
    filled = train_state.with_trainable(items["trainable"])
    return dataclasses.replace(filled, **items["optimizer"]), meta

  def restore_trainable(
    self, trainable: types.Tree, *, base_model: Mapping[str, Any] | None = None
  ) -> tuple[types.Tree, dict[str, Any]] | None:
    """Like `restore`, of the trained arrays alone."""
    found = self._restore({"trainable": trainable}, base_model)
    return found and (found[0]["trainable"], found[1])

  def meta(self) -> dict[str, Any] | None:
    """The meta of the newest checkpoint whose meta can be read, or None."""
    for train_step in self._newest_first():
      try:
        return self._read_meta(train_step)
      except Exception as error:
        self._warn(train_step, error)
    return None

  def wait(self) -> None:
    """Returns when all that was saved is complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    self._manager.close()

  def _newest_first(self) -> list[int]:
    self._manager.reload()  # a run beside this process may have saved more
    return sorted(self._manager.all_steps(), reverse=True)

  def _read_meta(self, train_step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return dict(self._manager.restore(train_step, args=args)["meta"])

  def _read(
    self,
    train_step: int,
    items: Mapping[str, types.Tree],
    base_model: Mapping[str, Any] | None,
  ) -> tuple[dict[str, types.Tree], dict[str, Any]]:
    """One checkpoint; UserError when it does not fit, others for damage."""
    meta = self._read_meta(train_step)
    path = str(self._directory / str(train_step))
    checkpoint_meta.check_fit(path, meta, items, base_model)
    args = {
      name: ocp.args.StandardRestore(_abstract(tree))
      for name, tree in items.items()
    }
    found = self._manager.restore(train_step, args=ocp.args.Composite(**args))
    for name in items:
      sums = checkpoint_meta.checksums(found[name])
      if sums != meta["checksums"][name]:
        raise OSError(f"the arrays of {name!r} are not what was saved")
    return {name: found[name] for name in items}, meta

  def _restore(
    self,
    items: Mapping[str, types.Tree],
    base_model: Mapping[str, Any] | None,
  ) -> tuple[dict[str, types.Tree], dict[str, Any]] | None:
    unreadable: dict[int, Exception] = {}
    for train_step in self._newest_first():
      try:
        found = self._read(train_step, items, base_model)
      except errors.UserError:
        raise
      # A damaged checkpoint shows as any of a dozen exceptions.
      except Exception as error:
        self._warn(train_step, error)
        unreadable[train_step] = error
        continue
      if unreadable:
        logging.warning("Restored train step %d instead.", train_step)
        self._set_aside(unreadable)
      return found
    if not unreadable:
      return None
    raise errors.UserError(
      f"None of the checkpoints in {str(self._directory)!r} can be read; "
      "remove the directory to start from the beginning.\n  "
      + "\n  ".join(f"{step}: {_short(e)}" for step, e in unreadable.items())
    )

  def _warn(self, train_step: int, error: Exception) -> None:
    logging.warning(
      "The checkpoint %s is unreadable: %s",
      self._directory / str(train_step),
      _short(error),
    )

  def _set_aside(self, train_steps: Mapping[int, Any]) -> None:
    """Moves checkpoints away: the run will save these train steps again."""
    if self._read_only:
      return
    if jax.process_index() == 0:
      aside = self._directory.parent / "unreadable_checkpoints"
      aside.mkdir(parents=True, exist_ok=True)
      for train_step in train_steps:
        name, number = str(train_step), 1
        while (aside / name).exists():
          number += 1
          name = f"{train_step}-{number}"
        (self._directory / str(train_step)).rename(aside / name)
        logging.warning("Moved it to %s.", aside / name)
    multihost_utils.sync_global_devices("checkpoints set aside")
    self._manager.reload()


def _items(train_state: types.TrainState) -> dict[str, types.Tree]:
  return {
    "trainable": train_state.trainable,
    "optimizer": {
      "opt_state": train_state.opt_state,
      "train_step": train_state.train_step,
    },
  }


def _abstract(tree: types.Tree) -> types.Tree:
  def one(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding orbax would look for the devices that wrote the array.
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(one, tree)


def _short(error: Exception) -> str:
  """The first line; tensorstore's messages run to pages."""
  first = (str(error).splitlines() or [""])[0]
  return f"{type(error).__name__}: {first[:200]}"
