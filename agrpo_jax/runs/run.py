"""What RL and SFT runs share: a claimed work directory that can be continued.

with run_lib.start(config) as run:
  state = run.restore(state, base_model)
  for train_step in range(run.first_step, num_steps):
    ...
    run.finish_step(state, scalars, samples)
"""

import contextlib
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from absl import logging

from agrpo_jax import config as config_lib
from agrpo_jax import config_check
from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.evaluation import records
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import files
from agrpo_jax.runs import metrics
from agrpo_jax.runs import workdir

# Keys that say where and how to log, not what to compute.
_FREE_KEYS = ("workdir", "accept_changed_config", "wandb")


class Run:
  """One run in its work directory."""

  def __init__(
    self, c: config_lib.ConfigDict, folder: pathlib.Path, stop: "StopRequest"
  ):
    self._config = c
    self._stop = stop
    self.folder = folder
    self._checkpoints = checkpoint.Checkpoints(
      folder,
      keep=c.train.keep,
      keep_best=c.train.get("keep_best", 0),
      every=c.train.checkpoint_every,
      # Else the log of a machine that lost its power might end before the
      # checkpoint does.
      before_commit=lambda: self.writer.flush(),
    )
    self._writer: metrics.Writer | None = None
    self._base_model: checkpoint_meta.BaseModel | None = None
    self.first_step = 0

  def restore(
    self, state: types.TrainState, base_model: checkpoint_meta.BaseModel | None
  ) -> types.TrainState:
    """The state to go on from: the newest checkpoint's, or `state` itself."""
    self._base_model = base_model
    found = self._checkpoints.restore(state, base_model=base_model)
    if found is not None:
      state, _ = found
      self.first_step = int(state.train_step)
      print(
        f"Continuing {self.folder} after train step {self.first_step} of "
        f"{self._config.train.num_steps}.",
        flush=True,
      )
    self._writer = metrics.Writer(
      self.folder, self.first_step, wandb_settings=self._wandb()
    )
    return state

  def _wandb(self) -> dict[str, Any] | None:
    c = self._config
    if not c.wandb.project:
      return None
    return {**c.wandb.to_dict(), "config": c.to_dict()}

  @property
  def writer(self) -> metrics.Writer:
    if self._writer is None:
      raise RuntimeError("restore() comes before the first train step")
    return self._writer

  def finish_step(
    self,
    state: types.TrainState,
    train_step: int,
    scalars: Mapping[str, float],
    samples: Sequence[Mapping[str, Any]] = (),
  ) -> None:
    """Logs a train step and saves when it is time.

    A save that is due while the one before is still being written is put off to
    the next train step; the last one and that of a stopped run are not.

    A value that is not finite stops the run here, before it can be saved: the
    last checkpoint is from before it.

    All processes of a run call this; when one was asked to stop, all do.

    Raises:
      FloatingPointError: naming the metric, the step and the value.
      Stopped: the run was asked to stop; the step is saved.
    """
    self.writer.scalars(train_step, scalars)
    if samples:
      self.writer.texts(train_step, samples)
    metrics.check_finite(train_step, scalars)
    is_last = train_step + 1 == self._config.train.num_steps
    # Processes get signals, and are done writing, at different times.
    heard = processes.exchange((self._stop.signal, self._checkpoints.is_busy))
    asked = max(number for number, _ in heard)
    self._checkpoints.save(
      state,
      {
        "config": self._config.to_dict(),
        "base_model": self._base_model and self._base_model.to_json(),
      },
      accuracy=scalars.get("eval/accuracy"),
      force=is_last or asked > 0,
      is_busy=any(is_busy for _, is_busy in heard),
    )
    if asked and not is_last:
      self._checkpoints.wait()
      raise errors.Stopped(
        f"Stopped after train step {train_step + 1}, which is saved in "
        f"{self.folder}. The same command goes on from there.",
        code=128 + asked,
      )

  def close(self) -> None:
    self._checkpoints.close()
    if self._writer is not None:
      self._writer.close()


@contextlib.contextmanager
def start(c: config_lib.ConfigDict) -> Iterator[Run]:
  """Checks the config, claims its work directory, and ends both cleanly.

  Raises:
    UserError: a config with mistakes; a directory that cannot be used, is in
      use, or holds a run of another config.
  """
  config_check.check(c)
  with workdir.claim(c.workdir) as folder:
    if processes.is_main():
      _remember(c, folder / "config.json")
    with stop_requests() as stop:
      run = Run(c, folder, stop)
      try:
        yield run
      finally:
        run.close()


class StopRequest:
  """Whether somebody asked the process to stop.

  Attributes:
    signal: the signal's number, 0 if there was none.
  """

  signal = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
  """Notes SIGTERM and Ctrl-C instead of dying of them; a second Ctrl-C kills.

  SIGTERM is how a preempted machine and a job's time limit announce themselves.
  Only a main thread can receive signals; elsewhere nothing is noted.
  """
  request = StopRequest()

  def note(number: int, frame: Any) -> None:
    del frame
    if request.signal and number == signal.SIGINT:
      raise KeyboardInterrupt(
        "Stopped at once. The same command goes on from the newest checkpoint, "
        "or from the start if there is none yet."
      )
    request.signal = number
    print(
      "Stopping after this train step (Ctrl-C again: at once, unsaved).",
      file=sys.stderr,
      flush=True,
    )

  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  watched = (signal.SIGTERM, signal.SIGINT)
  before = [signal.signal(number, note) for number in watched]
  try:
    yield request
  finally:
    for number, handler in zip(watched, before, strict=True):
      signal.signal(number, handler)


def _remember(c: config_lib.ConfigDict, file: pathlib.Path) -> None:
  """Writes the config; refuses one that differs from what is there."""
  text = c.to_json(indent=2, sort_keys=True) + "\n"
  if file.exists() and not c.accept_changed_config:
    before, now = json.loads(file.read_text()), json.loads(text)
    for key in _FREE_KEYS:
      before[key] = now[key]
    changes = records.differences(before, now, "config")
    if changes:
      raise errors.UserError(
        f"The work directory {str(file.parent)!r} holds a run of another "
        "config:\n  " + "\n  ".join(changes) + "\nChoose another with "
        "--config.workdir=..., undo the changes, or go on under them with "
        "--config.accept_changed_config=true."
      )
  with files.rewrite(file) as opened:
    opened.write(text.encode())
  logging.info("config:\n%s", text)
