"""What RL and SFT runs share: a claimed work directory that can be continued.

with run_lib.claim(settings) as claimed:
  ...  # load what the run needs; a mistake that shows here leaves no trace
  run, state = claimed.begin(state, base_model)
  for train_step in range(run.first_step, num_steps):
    ...
    run.finish_step(state, train_step, scalars, samples)
"""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import jax
from absl import logging

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import files
from agrpo_jax.runs import metrics
from agrpo_jax.runs import progress
from agrpo_jax.runs import workdir

# Keys that say where and how to log, not what to compute.
_FREE_KEYS = ("workdir", "accept_changed_config", "wandb", "report")
_REMEDY = (
  "Choose another with --config.workdir=..., undo the changes, or go on under "
  "them with --config.accept_changed_config=true."
)
# Starts of a run that its record of the environment keeps, the newest.
_MAX_SESSIONS = 50


@dataclasses.dataclass(frozen=True)
class Train:
  """The length of a run and what it keeps.

  Attributes:
    num_steps: train steps.
    checkpoint_every: train steps between saves.
    keep: newest checkpoints kept.
    log_samples: completions per train step written to samples.jsonl.
    keep_best: checkpoints kept besides, of the highest eval/accuracy; 0: none.
  """

  num_steps: int
  checkpoint_every: int
  keep: int
  log_samples: int
  keep_best: int = 0


@dataclasses.dataclass(frozen=True)
class Wandb:
  """A run of Weights & Biases; not used if `project` is empty."""

  project: str
  name: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What a run keeps for its report, `agrpo_jax.report`.

  Attributes:
    html: write the page into the work directory when the run ends.
    chip_hour_price: in any currency; 0: not known.
    before: evaluate once before the first train step, if the run evaluates.
    num_completions: held-out problems whose completions are kept, with their
      denoising steps, at every evaluation.
  """

  html: bool
  chip_hour_price: float
  before: bool = False
  num_completions: int = 0


class Settings(Protocol):
  """The part of `settings.Rl` and `settings.Sft` that is read here."""

  @property
  def workdir(self) -> str: ...
  @property
  def accept_changed_config(self) -> bool: ...
  @property
  def train(self) -> Train: ...
  @property
  def wandb(self) -> Wandb: ...
  @property
  def report(self) -> Report: ...
  @property
  def as_json(self) -> Mapping[str, Any]: ...


class Claim:
  """A work directory that this process alone may write to; nothing is yet.

  Attributes:
    folder: the work directory.
  """

  def __init__(
    self,
    settings: Settings,
    folder: pathlib.Path,
    stop: "StopRequest",
    remedy: str,
  ):
    self.folder = folder
    self._settings = settings
    self._stop = stop
    self._run: Run | None = None
    self._note = ""  # for the line that says from where it goes on
    if processes.is_main():
      self._note = _check_config(settings, folder / "config.json", remedy)

  @property
  def has_begun(self) -> bool:
    """True if the directory holds a run, to be continued."""
    return (self.folder / "config.json").exists()

  @property
  def has_checkpoint(self) -> bool:
    """True if there is something to go on from; all processes ask together."""
    return checkpoint_read.Reader(self.folder).latest_step is not None

  @property
  def is_running(self) -> bool:
    """True once `begin` has returned."""
    return self._run is not None

  def begin(
    self,
    state: types.TrainState,
    base_model: checkpoint_meta.BaseModel | None,
    network: Mapping[str, Any] | None = None,
  ) -> tuple["Run", types.TrainState]:
    """Writes the config down and goes on from the newest checkpoint.

    Args:
      state: that of a run from its start.
      base_model: recorded with checkpoints, and compared with what is there.
      network: its shape, JSON values, for the record of the environment.

    Returns:
      The run, and the state to go on from: the newest checkpoint's, or `state`.

    Raises:
      UserError: checkpoints of another model.
    """
    settings = self._settings
    checkpoints = checkpoint.Checkpoints(
      self.folder,
      keep=settings.train.keep,
      keep_best=settings.train.keep_best,
      every=settings.train.checkpoint_every,
    )
    found = checkpoints.restore(state, base_model=base_model)
    first_step = 0
    if found is not None:
      state, _ = found
      first_step = int(state.train_step)
      print(
        f"Continuing {self.folder} after train step {first_step} of "
        f"{settings.train.num_steps}.{self._note}",
        flush=True,
      )
    # Not before the checkpoints were found to fit: with this file a run has
    # begun, and a start that is refused leaves no trace.
    if processes.is_main():
      text = json.dumps(settings.as_json, indent=2, sort_keys=True) + "\n"
      with files.rewrite(self.folder / "config.json") as opened:
        opened.write(text.encode())
      logging.info("config:\n%s", text)
      _record_session(self.folder / "environment.json", first_step, network)
    wandb = None
    if settings.wandb.project:
      wandb = {
        **dataclasses.asdict(settings.wandb),
        "config": settings.as_json,
      }
    self._run = Run(
      folder=self.folder,
      settings=settings,
      stop=self._stop,
      checkpoints=checkpoints,
      writer=metrics.Writer(self.folder, first_step, wandb_settings=wandb),
      base_model=base_model,
      first_step=first_step,
    )
    # Else the log of a machine that lost its power might end before the
    # checkpoint does.
    checkpoints.before_commit = self._run.writer.flush
    return self._run, state

  def close(self) -> None:
    if self._run is not None:
      self._run.close()


@dataclasses.dataclass(frozen=True)
class Run:
  """One run in its work directory.

  Attributes:
    folder: the work directory.
    settings: of the run.
    stop: whether somebody asked it to stop.
    checkpoints: where states are saved.
    writer: where metrics go.
    base_model: recorded with each checkpoint.
    first_step: train steps that are done.
  """

  folder: pathlib.Path
  settings: Settings
  stop: "StopRequest"
  checkpoints: checkpoint.Checkpoints
  writer: metrics.Writer
  base_model: checkpoint_meta.BaseModel | None
  first_step: int

  def finish_step(
    self,
    state: types.TrainState,
    train_step: int,
    scalars: Mapping[str, float],
    samples: Sequence[Mapping[str, Any]] = (),
    completions: Sequence[Mapping[str, Any]] = (),
  ) -> None:
    """Logs a train step and saves when it is time.

    The last train step of a run ends it as if nobody had asked it to stop.

    A save that is due while the one before is still being written is put off to
    the next train step; the last one and that of a stopped run are not.

    A value that is not finite stops the run here, before it can be saved: the
    last checkpoint is from before it.

    All processes of a run call this; when one was asked to stop, all do.

    Raises:
      FloatingPointError: naming the metric, the step and the value.
      Stopped: the run was asked to stop; the step is saved.
    """
    # First, so that the log reaches as far as the checkpoint does, and shows
    # the value that stops a run.
    self.writer.scalars(train_step, scalars)
    if samples:
      self.writer.texts(train_step, samples)
    self.writer.completions(train_step, completions)
    metrics.check_finite(train_step, scalars)
    is_last = train_step + 1 == self.settings.train.num_steps
    # Processes get signals, and are done writing, at different times.
    heard = processes.exchange((self.stop.signal, self.checkpoints.is_busy))
    asked = max(number for number, _ in heard)
    self.checkpoints.save(
      state,
      self._meta(),
      accuracy=scalars.get("eval/accuracy"),
      force=is_last or asked > 0,
      is_busy=any(is_busy for _, is_busy in heard),
    )
    if asked and not is_last:
      self.checkpoints.wait()
      raise errors.Stopped(
        f"Stopped after train step {train_step + 1}, which is saved in "
        f"{self.folder}. The same command goes on from there.",
        # As shells have it of a command that a signal ended.
        code=128 + asked,
      )

  def save_start(self, state: types.TrainState, checkpoint: str) -> None:
    """Saves the state before the first train step, where another run made it.

    From here on this run needs the other one no more.

    Args:
      state: with the weights of the other run.
      checkpoint: which of whose: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP.
    """
    if processes.is_main():
      folder, _ = checkpoint_named.split(checkpoint)
      start = {
        "run": pathlib.Path(folder).expanduser().resolve().name,
        "train_step": checkpoint_named.find_train_step(checkpoint),
      }
      with files.rewrite(self.folder / "start.json") as opened:
        opened.write(json.dumps(start).encode())
    self.checkpoints.save(state, self._meta(), force=True)
    self.checkpoints.wait()

  def _meta(self) -> dict[str, Any]:
    return {
      "config": dict(self.settings.as_json),
      "base_model": self.base_model and self.base_model.to_json(),
    }

  def log_before(
    self,
    scalars: Mapping[str, float],
    completions: Sequence[Mapping[str, Any]],
  ) -> None:
    """Logs an evaluation from before the first train step."""
    self.writer.completions(-1, completions)
    if processes.is_main():
      with files.rewrite(self.folder / "before.json") as opened:
        opened.write(json.dumps(scalars).encode())

  def close(self) -> None:
    self.checkpoints.close()
    self.writer.close()


@contextlib.contextmanager
def claim(settings: Settings, remedy: str = _REMEDY) -> Iterator[Claim]:
  """Claims the work directory of a run, and ends the run cleanly.

  Args:
    settings: of the run.
    remedy: what to do where the directory holds a run of another config.

  Raises:
    UserError: a directory that cannot be used, is in use, or holds a run of
      another config.
  """
  with workdir.claim(settings.workdir) as folder, stop_requests() as stop:
    claimed = Claim(settings, folder, stop, remedy)
    try:
      yield claimed
    finally:
      claimed.close()


class StopRequest:
  """A note that somebody asked the process to stop, which signals call.

  Attributes:
    signal: the signal's number, 0 if there was none.
  """

  signal = 0

  def __call__(self, number: int, frame: Any) -> None:
    del frame
    if self.signal and number == signal.SIGINT:
      raise KeyboardInterrupt(
        "Stopped at once. The same command goes on from the newest checkpoint, "
        "or from the start if there is none yet."
      )
    self.signal = number
    # To who pressed it, wherever else a run's words go to (`lab train`).
    progress.say(
      "Stopping after this train step (Ctrl-C again: at once, unsaved).",
      sys.__stderr__,
    )


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
  """Notes SIGTERM and Ctrl-C instead of dying of them; a second Ctrl-C kills.

  SIGTERM is how a preempted machine and a job's time limit announce themselves.
  Only a main thread can receive signals; elsewhere nothing is noted. Within
  another such context the note is that one's: who starts runs hears of it too.
  """
  outer = signal.getsignal(signal.SIGTERM)
  if isinstance(outer, StopRequest):
    yield outer
    return
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  watched = (signal.SIGTERM, signal.SIGINT)
  before = [signal.signal(number, request) for number in watched]
  try:
    yield request
  finally:
    for number, handler in zip(watched, before, strict=True):
      signal.signal(number, handler)


def _record_session(
  file: pathlib.Path, first_step: int, network: Mapping[str, Any] | None
) -> None:
  """Adds a start of the run to the record of where it ran.

  Those from `first_step` on came to nothing: their steps are done again.
  """
  before = []
  if file.exists():
    before = files.read_json(file, "where this run ran")["sessions"]
  device = jax.devices()[0]
  session = {
    "first_step": first_step,
    "since": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
    "device_kind": device.device_kind,
    "platform": device.platform,
    "num_devices": jax.device_count(),
    "num_processes": jax.process_count(),
    "versions": checkpoint_meta.versions(),
    "network": network,
    "command": _command(),
  }
  kept = [one for one in before if one["first_step"] < first_step]
  with files.rewrite(file) as opened:
    sessions = [*kept, session][-_MAX_SESSIONS:]
    opened.write(json.dumps({"sessions": sessions}, indent=2).encode())


def _command() -> list[str]:
  """Returns the words that started this process, a module by its name."""
  spec = sys.modules["__main__"].__spec__
  if spec is None:
    return ["python", *sys.argv]
  return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _check_config(settings: Settings, file: pathlib.Path, remedy: str) -> str:
  """Raises UserError if the directory holds a run of another config.

  It may be made longer, save at other times, and be graded by more processes.
  A setting that the run's version did not have was what its default is.

  Returns:
    What is to be said of a run that was made longer, or that an earlier version
    began, "" of others.
  """
  if not file.exists() or settings.accept_changed_config:
    return ""
  before = files.read_json(file, "the config of the run in this work directory")
  now = dict(settings.as_json)
  for key in _FREE_KEYS:
    before[key] = now[key]
  # That a model is the same is told by its contents, when it is loaded.
  source = {key: now["model"][key] for key in ("path", "revision")}
  before["model"] = {**before.get("model", {}), **source}
  length, num_before = now["train"]["num_steps"], _length(before)
  is_longer = num_before is not None and num_before < length
  # Where SFT writes what it made, and how much is evaluated at once.
  for part, key in (("sft", "output"), ("evaluate", "batch_size")):
    if part in now and part in before:
      before[part] = {**before[part], key: now[part][key]}
  # All else there says when to save, and what to keep.
  before["train"] = {
    **now["train"],
    "num_steps": length if is_longer else num_before,
  }
  if "grading" in now:
    workers = {"num_workers": now["grading"]["num_workers"]}
    before["grading"] = {**before.get("grading", {}), **workers}
  default = config_lib.sft() if now.get("kind") == "sft" else config_lib.rl()
  num_new = _add_new_settings(before, now, json.loads(default.to_json()))
  changes = files.differences(before, now, "config")
  if changes:
    raise errors.UserError(
      f"The work directory {str(file.parent)!r} holds a run of another "
      f"config.{_made_with(file.parent)}\n  "
      + "\n  ".join(changes)
      + f"\n{remedy}"
    )
  note = ""
  if num_new:
    note = (
      f" An earlier version began it, without {num_new} of the settings, which "
      "have their defaults."
    )
  if not is_longer:
    return note
  if now["optimizer"]["schedule"] == "constant":
    return f"{note} It was of {num_before}."
  return (
    f"{note} It was of {num_before}: the learning rate, which ends at zero, "
    "goes on as in a run of the new length."
  )


def _add_new_settings(
  before: dict[str, Any], now: Mapping[str, Any], default: Mapping[str, Any]
) -> int:
  """Adds the settings of today that a recorded config lacks; how many."""
  num_new = 0
  for key, value in default.items():
    if key not in now:  # another objective's
      continue
    if key not in before:
      before[key] = value
      num_new += 1
    elif all(isinstance(one[key], Mapping) for one in (before, now, default)):
      num_new += _add_new_settings(before[key], now[key], value)
  return num_new


def _made_with(folder: pathlib.Path) -> str:
  """Says which versions a run began with, where they are not these."""
  file = folder / "environment.json"
  if not file.exists():
    return ""
  sessions = files.read_json(file, "where this run ran")["sessions"]
  return checkpoint_meta.other_versions(sessions[-1].get("versions"))


def _length(config: Mapping[str, Any]) -> int | None:
  """Returns the train steps of a recorded config, None if they are not told."""
  train = config.get("train")
  found = train.get("num_steps") if isinstance(train, Mapping) else None
  return found if isinstance(found, int) else None
