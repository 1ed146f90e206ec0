"""Checkpoints of what training changes, written in the background.

`<workdir>/checkpoints/<train step>/` holds three items:

  trainable   the adapters, or all parameters in full fine-tuning,
  optimizer   the optimizer's state and the train step,
  meta        JSON: what the caller gave (config, base model), the accuracy
              if the state was evaluated, shapes and checksums of the arrays
              above, the versions that wrote them.

A frozen base is not saved; `meta` says which one it was. Arrays are restored
to the shardings asked for, so the number of devices may change in between. A
checkpoint appears under its name only when it is complete. Evaluation and
export read it with `checkpoint_read`.
"""

import dataclasses
import os
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_read


class Checkpoints:
  """The checkpoints of a run, which holds the directory's claim.

  Args:
    workdir: the run's directory, the same for all hosts.
    keep: how many checkpoints to keep, the newest.
    keep_best: how many to keep besides, the most accurate; of equal ones the
      earlier.
    every: `save` acts on train steps that this divides.

  Attributes:
    before_commit: called when a checkpoint is written and just before it gets
      its name, by a thread of process 0.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int = 2,
    keep_best: int = 0,
    every: int = 1,
  ):
    self._reader = checkpoint_read.Reader(workdir)
    self._keep_best = keep_best
    self._every = every
    self._is_due = False
    self.before_commit: Callable[[], None] = lambda: None
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(keep), _Only(self._best_steps)]
      ),
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(
        # Looked up when it is called: the run sets it later.
        post_finalization_callback=lambda: self.before_commit()
      ),
    )
    directory = self._reader.directory
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(directory, options=options)
    except OSError as error:
      raise errors.UserError(
        f"Cannot use {str(directory)!r} for checkpoints: {error}. "
        "Choose another work directory with --config.workdir=..."
      ) from error
    # By train step; of all that were saved since, so deleted ones may be there.
    self._accuracies = self._reader.accuracies() if keep_best else {}

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def is_busy(self) -> bool:
    """True while a checkpoint is being written; processes may differ in it."""
    return self._manager.is_saving_in_progress()

  def save(
    self,
    train_state: types.TrainState,
    meta: Mapping[str, Any],
    *,
    accuracy: float | None = None,
    force: bool = False,
    is_busy: bool = False,
  ) -> bool:
    """Starts saving when it is time to; the arrays may be donated afterwards.

    The caller is held while the arrays are copied to the host. A save that has
    to be, by `force` or as a new best, also waits for the one before it.

    Args:
      train_state: what to save.
      meta: JSON values. `meta["base_model"]`, when there, is that of a
        `BaseModel`; `restore` compares it.
      accuracy: of this very state, if it was evaluated, the same on all
        processes. One of the `keep_best` highest is saved in any case.
      force: save although `every` does not divide the train step.
      is_busy: whether a checkpoint is still being written on any process: a
        save that is due then waits for the next call without.

    Returns:
      Whether this train step was or is being saved by this call.
    """
    train_step = int(jax.device_get(train_state.train_step))
    if train_step in self._manager.all_steps():
      return False
    # Remembered: a save that is put off is due until it is made.
    self._is_due |= train_step % self._every == 0
    must = force or self._is_best(accuracy)
    if not must and (is_busy or not self._is_due):
      return False
    self._is_due = False
    if accuracy is not None:
      # Only of what is saved: another would take the place of a checkpoint
      # among the best.
      self._accuracies[train_step] = accuracy
      meta = {**meta, "accuracy": accuracy}
    items = _items(train_state)
    return self._manager.save(
      train_step,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave({**meta, **checkpoint_meta.describe(items)}),
        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
      ),
      # Decided above, by all processes alike; orbax has no say in it.
      force=True,
    )

  def restore(
    self,
    train_state: types.TrainState,
    *,
    base_model: checkpoint_meta.BaseModel | None = None,
  ) -> tuple[types.TrainState, dict[str, Any]] | None:
    """Returns the newest readable checkpoint, or None when there is none.

    Newer ones, which could not be read, are moved to `unreadable_checkpoints`:
    the run will save their train steps again.

    Args:
      train_state: the state to fill; see `checkpoint_read.Reader.read`.
        `params` are returned as they are when there are adapters.
      base_model: that `meta["base_model"]` must be the same as.

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

  def _is_best(self, accuracy: float | None) -> bool:
    if accuracy is None:
      return False
    no_worse = [one for one in self._accuracies.values() if one >= accuracy]
    return len(no_worse) < self._keep_best

  def _best_steps(self) -> list[int]:
    accuracies = self._accuracies
    best_first = sorted(accuracies, key=lambda s: (-accuracies[s], s))
    return best_first[: self._keep_best]

  def _set_aside_after(self, restored: int) -> None:
    steps = [step for step in self._reader.steps() if step > restored]
    if not steps:
      return
    for train_step in steps:
      self._accuracies.pop(train_step, None)
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
    # Nobody lists the folder anew before process 0 has moved them.
    multihost_utils.sync_global_devices("checkpoints set aside")
    self._manager.reload()


class _Only(checkpoint_managers.PreservationPolicy):
  """Keeps the checkpoints of the train steps that a function returns."""

  def __init__(self, steps_fn: Callable[[], Sequence[int]]):
    self._steps_fn = steps_fn

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    del context
    kept = self._steps_fn()
    return [info.step in kept for info in checkpoints]


def _items(train_state: types.TrainState) -> dict[str, types.Tree]:
  return {
    "trainable": train_state.trainable,
    "optimizer": {
      "opt_state": train_state.opt_state,
      "train_step": train_state.train_step,
    },
  }
