"""Numbers and sample completions of a run, for files and dashboards.

`<workdir>/metrics.jsonl` has a line per call of `Writer.scalars`,
`samples.jsonl` a line per sample, `tensorboard/` the same for TensorBoard;
Weights & Biases gets them when asked. `completions.jsonl` has those that a
report plays step by step. Names follow TRL's where it has the same
quantity: `reward`, `reward_std`, `frac_reward_zero_std`,
`completions/mean_length`, `kl`, `entropy`, `clip_ratio/low_mean`,
`clip_ratio/high_mean`, `loss`, `grad_norm`, `learning_rate`.

What people read counts train steps that are done: the console, dashboards,
messages and the names of checkpoints. `train_step` in the two files, and in
the code, is instead the index, from 0, of the train step that the values are
of: the line with `train_step` = k is of step k + 1 on the console, and tells
what led to checkpoint k + 1.

A run that restores the state after k train steps goes on with index k, so lines
from k on are dropped when it opens the files: none appears twice. For none to
be missing, the values of a train step must be written before the state after it
is saved.
"""

import json
import math
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tensorboardX import record_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2

from agrpo_jax import errors
from agrpo_jax.runs import files

_FLUSH_SECONDS = 60


class Writer:
  """Writes metrics and samples; on processes other than 0 it does nothing.

  Args:
    workdir: an existing directory that this run has claimed.
    resume_step: train steps done in the restored state, 0 for a fresh start.
    wandb_settings: arguments of `wandb.init` (project, name, mode, config ...),
      or None for no Weights & Biases. A run that goes on in its work directory
      goes on in its Weights & Biases run.

  Raises:
    UserError: Weights & Biases is asked for but not installed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    resume_step: int = 0,
    *,
    wandb_settings: Mapping[str, Any] | None = None,
  ):
    self._backends: list[Any] = []
    if jax.process_index() != 0:
      return
    directory = pathlib.Path(workdir)
    if wandb_settings is not None:  # the one that can refuse comes first
      self._backends.append(_Wandb(directory, wandb_settings))
    self._backends.append(_JsonLines(directory, resume_step))
    self._backends.append(_TensorBoard(directory, resume_step))

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def scalars(self, train_step: int, values: Mapping[str, Any]) -> None:
    """Writes one number per name; arrays must have one element.

    A value that is not finite stands as null in `metrics.jsonl`. `train_step`,
    here and below, is an index from 0.
    """
    if not self._backends:
      return
    numbers = to_floats(values)
    for backend in self._backends:
      backend.scalars(int(train_step), numbers)

  def texts(
    self, train_step: int, samples: Sequence[Mapping[str, Any]]
  ) -> None:
    """Writes sample completions: one dict of JSON values each."""
    for backend in self._backends:
      backend.texts(int(train_step), samples)

  def completions(
    self, train_step: int, records: Sequence[Mapping[str, Any]]
  ) -> None:
    """Writes completions for a report; -1 is before the first train step."""
    for backend in self._backends:
      backend.completions(int(train_step), records)

  def flush(self) -> None:
    """Sends what is held back; lines of JSON then outlive a loss of power."""
    for backend in self._backends:
      backend.flush()

  def close(self) -> None:
    """Flushes, and closes the files. A second call does nothing."""
    backends, self._backends = self._backends, []
    for backend in backends:
      backend.close()


def to_floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Returns Python floats, in one transfer from the device.

  Raises:
    ValueError: a value is not one number.
  """
  found = {}
  # As a list: JAX would sort the names of a dict.
  on_host = jax.device_get(list(values.values()))
  for name, value in zip(values, on_host, strict=True):
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSU":
      raise ValueError(f"The metric {name!r} is not one number: {value!r}.")
    found[name] = float(array.reshape(()))
  return found


def check_finite(train_step: int, values: Mapping[str, Any]) -> None:
  """Stops a run at the first value that is not finite.

  Raises:
    FloatingPointError: naming train step, metrics and their values.
  """
  wrong = {
    name: value
    for name, value in to_floats(values).items()
    if not math.isfinite(value)
  }
  if wrong:
    listed = ", ".join(f"{name}={value}" for name, value in wrong.items())
    raise FloatingPointError(
      f"Not finite in train step {train_step + 1} (the line of metrics.jsonl "
      f"with train_step {train_step}): {listed}"
    )


class _JsonLines:
  """Each line is handed to the operating system before the call returns."""

  def __init__(self, directory: pathlib.Path, resume_step: int):
    self._metrics = _open_at(directory / "metrics.jsonl", resume_step)
    self._samples = _open_at(directory / "samples.jsonl", resume_step)
    self._completions = _open_at(directory / "completions.jsonl", resume_step)

  def scalars(self, train_step: int, numbers: Mapping[str, float]) -> None:
    _write_line(self._metrics, {"train_step": train_step, **numbers})

  def texts(
    self, train_step: int, samples: Sequence[Mapping[str, Any]]
  ) -> None:
    for sample in samples:
      _write_line(self._samples, {"train_step": train_step, **sample})

  def completions(
    self, train_step: int, records: Sequence[Mapping[str, Any]]
  ) -> None:
    for record in records:
      _write_line(self._completions, {"train_step": train_step, **record})

  def flush(self) -> None:
    for file in (self._metrics, self._samples, self._completions):
      os.fsync(file.fileno())

  def close(self) -> None:
    self._metrics.close()
    self._samples.close()
    self._completions.close()


def _open_at(path: pathlib.Path, resume_step: int) -> Any:
  """Opens a file for appending, without the lines of `resume_step` and later.

  A killed process may leave half a line at the end; it goes too.
  """
  if path.exists():
    num_dropped = 0
    with open(path, "rb") as old, files.rewrite(path) as new:
      for line in old:
        if _is_before(line, resume_step):
          # A whole record at the end of the file may lack its line's end alone.
          new.write(line.removesuffix(b"\n") + b"\n")
        else:
          num_dropped += 1
    if num_dropped:
      logging.info(
        "Dropped %d lines of %s: the run goes on after train step %d.",
        num_dropped,
        path,
        resume_step,
      )
  # Completions may have half characters, see `_encodable`.
  return open(path, "a", encoding="utf-8", errors="backslashreplace")


def _is_before(line: bytes, resume_step: int) -> bool:
  try:
    # From the start, what was logged before the first train step goes too.
    return resume_step > 0 and json.loads(line)["train_step"] < resume_step
  except (ValueError, KeyError, TypeError):
    return False


def _write_line(file: Any, record: Mapping[str, Any]) -> None:
  line = json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False)
  file.write(line + "\n")
  file.flush()


def _jsonable(value: Any) -> Any:
  """Returns the value with null for NaN and infinity, which JSON lacks."""
  if isinstance(value, Mapping):
    return {str(key): _jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_jsonable(item) for item in value]
  if isinstance(value, np.generic | np.ndarray):
    return _jsonable(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _encodable(text: str) -> str:
  """Returns the text with escapes for half characters.

  A byte tokenizer can give those, and UTF-8 has none.
  """
  return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _TensorBoard:
  """Writes events in the caller's thread.

  tensorboardX's own writer has a thread for it, which a full disk kills; the
  caller would then wait for it for ever.
  """

  def __init__(self, directory: pathlib.Path, resume_step: int):
    folder = directory / "tensorboard"
    folder.mkdir(exist_ok=True)
    # TensorBoard reads on by names, which have seconds in them: a later file
    # comes later, also when the clock was set back meanwhile.
    parts = [path.name.split(".") for path in folder.glob("*.tfevents.*.*")]
    seconds = [int(one[3]) + 1 for one in parts if one[3].isdecimal()]
    # A quick restart must not overwrite.
    name = ".".join(
      [
        "events.out.tfevents",
        str(max([int(time.time()), *seconds])),
        socket.gethostname(),
        str(resume_step),
        secrets.token_hex(4),
      ]
    )
    self._file = record_writer.RecordWriter(str(folder / name))
    self._flushed = time.monotonic()
    self._write(file_version="brain.Event:2")
    # TensorBoard hides what an earlier process wrote from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=resume_step + 1, session_log=start)

  def _write(self, **fields: Any) -> None:
    event = event_pb2.Event(wall_time=time.time(), **fields)
    self._file.write(event.SerializeToString())

  def scalars(self, train_step: int, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
      if math.isfinite(number):  # it would warn on the terminal every time
        self._write(step=train_step + 1, summary=summary.scalar(name, number))
    # For those who watch a run whose checkpoints are far apart.
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self.flush()

  def texts(
    self, train_step: int, samples: Sequence[Mapping[str, Any]]
  ) -> None:
    for index, sample in enumerate(samples):
      # Four spaces: markdown shows the text as it is.
      lines = [
        f"    {line}"
        for key, value in sample.items()
        for line in _encodable(f"{key}: {value}").splitlines()
      ]
      text = summary.text(f"sample/{index}", "\n".join(lines))
      self._write(step=train_step + 1, summary=text)

  def completions(
    self, train_step: int, records: Sequence[Mapping[str, Any]]
  ) -> None:
    pass

  def flush(self) -> None:
    self._flushed = time.monotonic()
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class _Wandb:
  def __init__(self, directory: pathlib.Path, settings: Mapping[str, Any]):
    try:
      import wandb
    except ImportError as error:
      raise errors.UserError(
        "Weights & Biases is asked for but not installed: "
        "pip install 'agrpo_jax[wandb]', or take it out of the config."
      ) from error
    name = directory / "wandb_id.txt"
    if not name.exists():
      # Kept in the work directory: a run that goes on there asks for it again.
      name.write_text(secrets.token_hex(8))
    self._wandb = wandb
    self._run = wandb.init(
      dir=str(directory),
      id=name.read_text().strip(),
      resume="allow",
      **settings,
    )

  def scalars(self, train_step: int, numbers: Mapping[str, float]) -> None:
    self._run.log(dict(numbers), step=train_step + 1)

  def texts(
    self, train_step: int, samples: Sequence[Mapping[str, Any]]
  ) -> None:
    if samples:
      columns = list(samples[0])
      rows = [
        [_encodable(str(sample[key])) for key in columns] for sample in samples
      ]
      table = self._wandb.Table(columns=columns, data=rows)
      self._run.log({"samples": table}, step=train_step + 1)

  def completions(
    self, train_step: int, records: Sequence[Mapping[str, Any]]
  ) -> None:
    pass

  def flush(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish()


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """Yields the records of a `metrics.jsonl` or `samples.jsonl`, null as NaN."""
  with open(path, encoding="utf-8") as file:
    for line in file:
      record = json.loads(line)
      yield {k: math.nan if v is None else v for k, v in record.items()}
