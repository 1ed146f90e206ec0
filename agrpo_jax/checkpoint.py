"""Checkpoints of what training changes, written in the background.

`<workdir>/checkpoints/<train step>/` holds three items:

  trainable   the adapters, or all parameters in full fine-tuning,
  optimizer   the optimizer's state and the train step,
  meta        JSON: what the caller gave (config, base model, metrics), shapes
              and checksums of the arrays above, the versions that wrote them.

A frozen base is not saved; `meta` says which one it was. Arrays are restored
to the shardings asked for, so the number of devices may change in between. A
checkpoint appears under its name only when it is complete. Evaluation and
export read it with `checkpoint_read`.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from agrpo_jax import checkpoint_meta
from agrpo_jax import checkpoint_read
from agrpo_jax import errors
from agrpo_jax import types


class Checkpoints:
  """The checkpoints of a run, which holds the directory's claim.

  Args:
    workdir: the run's directory, the same for all hosts.
    keep: how many checkpoints to keep, the newest.
    every: `save` acts on train steps that this divides.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int = 2,
    every: int = 1,
  ):
    self._reader = checkpoint_read.Reader(workdir)
    options = ocp.CheckpointManagerOptions(
      save_decision_policy=checkpoint_managers.AnySavePolicy(
        [
          checkpoint_managers.FixedIntervalPolicy(every),
          checkpoint_managers.PreemptionCheckpointingPolicy(),
        ]
      ),
      preservation_policy=checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
    )
    directory = self._reader.directory
    try:
      self._manager = ocp.CheckpointManager(directory, options=options)
    except OSError as error:
      raise errors.UserError(
        f"Cannot use {str(directory)!r} for checkpoints: {error}. "
        "Choose another work directory with --config.workdir=..."
      ) from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

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

    Newer ones, which could not be read, are moved to `unreadable_checkpoints`:
    the run will save their train steps again.

    Args:
      train_state: the state to fill; see `checkpoint_read.Reader.read`.
        `params` are returned as they are when there are adapters.
      base_model: what `meta["base_model"]` must be.

    Returns:
      The restored state and the checkpoint's meta.

    Raises:
      UserError: the checkpoint is of another base model or of arrays of other
        shapes, or none of the checkpoints can be read.
    """
    found = self._reader.read(_items(train_state), base_model)
    if found is None:
      return None
    items, meta = found
    filled = train_state.with_trainable(items["trainable"])
    filled = dataclasses.replace(filled, **items["optimizer"])
    self._set_aside_after(int(jax.device_get(filled.train_step)))
    return filled, meta

  def wait(self) -> None:
    """Returns when all that was saved is complete."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    self._manager.close()

  def _set_aside_after(self, restored: int) -> None:
    steps = [step for step in self._reader.steps() if step > restored]
    if not steps:
      return
    if jax.process_index() == 0:
      directory = self._reader.directory
      aside = directory.parent / "unreadable_checkpoints"
      aside.mkdir(parents=True, exist_ok=True)
      for train_step in steps:
        name, number = str(train_step), 1
        while (aside / name).exists():
          number += 1
          name = f"{train_step}-{number}"
        (directory / str(train_step)).rename(aside / name)
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
