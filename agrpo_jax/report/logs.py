"""What a work directory holds, read while the run may still be writing it."""

from __future__ import annotations

import array
import dataclasses
import fcntl
import json
import math
import pathlib
import socket
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeVar

from agrpo_jax import errors
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.runs import files

_Line = TypeVar("_Line")


class Record(Mapping[str, float]):
  """The metrics of a train step, in the memory that their numbers take.

  A watched run may have a hundred thousand of them; as dicts they would take
  ten times as much.
  """

  __slots__ = ("_place", "_values")

  def __init__(self, place: Mapping[str, int], values: array.array[float]):
    """Takes the numbers, and where that of a name stands: shared by many."""
    self._place, self._values = place, values

  def __getitem__(self, name: str) -> float:
    return self._values[self._place[name]]

  def __contains__(self, name: object) -> bool:
    return name in self._place

  def __iter__(self) -> Iterator[str]:
    return iter(self._place)

  def __len__(self) -> int:
    return len(self._place)


class Completion(Mapping[str, Any]):
  """A completion that a run kept, in the memory that its line takes.

  Few are looked at more than once; as a dict each would take several times as
  much, in pieces.
  """

  __slots__ = ("_line",)

  def __init__(self, line: bytes):
    """Takes its line of the file."""
    self._line = line

  def _record(self) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(self._line)
    return found

  def __getitem__(self, name: str) -> Any:
    return self._record()[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._record())

  def __len__(self) -> int:
    return len(self._record())


@dataclasses.dataclass(frozen=True)
class Log:
  """The files of a run; what an older version did not write is empty.

  Attributes:
    name: what the run is called on the page.
    config: as it was dumped with the run.
    records: of metrics.jsonl, in order; null is NaN.
    before: figures of the held-out evaluation before the first train step.
    completions: of completions.jsonl; where there is none, of samples.jsonl.
    start: of start.json: with whose weights the run began, if a run's.
    sessions: of environment.json, one per start of the run.
    num_unreadable: lines that are no JSON, beside a half one at the end.
    is_stopped: its process is known to be gone.
  """

  name: str
  config: Mapping[str, Any]
  records: Sequence[Mapping[str, float]]
  before: Mapping[str, float] = dataclasses.field(default_factory=dict)
  completions: Sequence[Mapping[str, Any]] = ()
  start: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sessions: Sequence[Mapping[str, Any]] = ()
  num_unreadable: int = 0
  is_stopped: bool = False

  @property
  def num_done(self) -> int:
    """Train steps done."""
    return int(self.records[-1]["train_step"]) + 1 if self.records else 0

  @property
  def num_steps(self) -> int:
    """Train steps of the whole run; 0 if its config does not say."""
    return int(self.setting("train.num_steps", 0))

  @property
  def is_finished(self) -> bool:
    return 0 < self.num_steps <= self.num_done

  @property
  def has_ended(self) -> bool:
    return self.is_finished or self.is_stopped

  def setting(self, key: str, default: Any = None) -> Any:
    """Returns a value of the config, `default` where it has none."""
    found: Any = self.config
    for part in key.split("."):
      if not isinstance(found, Mapping) or found.get(part) is None:
        return default
      found = found[part]
    return found

  def values(self, name: str, last: int | None = None) -> list[float]:
    """Returns a metric, of the last train steps that have it if asked."""
    found = [r[name] for r in self.records if name in r]
    return found if last is None else found[-last:]

  def evaluations(self) -> list[tuple[int, Mapping[str, float]]]:
    """Returns (train steps done, figures) of every held-out evaluation."""
    found: list[tuple[int, Mapping[str, float]]] = []
    if self.before:
      found.append((0, self.before))
    for record in self.records:
      own = {
        name.removeprefix("eval/"): value
        for name, value in record.items()
        if name.startswith("eval/")
      }
      if own:
        found.append((int(record["train_step"]) + 1, own))
    return found


def step_seconds(record: Mapping[str, float]) -> float:
  """Returns the seconds of a train step, all phases together."""
  return sum(v for k, v in record.items() if k.startswith("seconds/"))


def read(workdir: str) -> Log:
  """Reads a work directory.

  Raises:
    UserError: it is none, or its files cannot be read.
  """
  folder = pathlib.Path(workdir).expanduser()
  if not (folder / "config.json").exists():
    raise errors.UserError(
      f"{workdir!r} is not the work directory of a run: it has no "
      "config.json. Give the folder of config.workdir, after the first train "
      "step began."
    )
  # Before the log, which a run that ends meanwhile would complete.
  is_stopped = _is_stopped(folder)
  # Names to places, of every set of names that there is: two or three.
  places: dict[tuple[str, ...], dict[str, int]] = {}

  def metrics(record: dict[str, Any], line: bytes) -> Record:
    del line
    names = tuple(record)
    place = places.setdefault(names, {name: i for i, name in enumerate(names)})
    values = (math.nan if x is None else x for x in record.values())
    return Record(place, array.array("d", values))

  def completion(record: dict[str, Any], line: bytes) -> Completion:
    del record
    return Completion(line)

  records, bad = _lines(folder / "metrics.jsonl", metrics)
  completions, more = _lines(folder / "completions.jsonl", completion)
  if not completions:
    completions, more = _lines(folder / "samples.jsonl", completion)
  return Log(
    name=place(workdir).name,
    config=files.read_json(folder / "config.json", "the config of the run"),
    records=records,
    before=_object(folder / "before.json"),
    completions=completions,
    start=_object(folder / "start.json"),
    sessions=_object(folder / "environment.json").get("sessions", ()),
    num_unreadable=bad + more,
    is_stopped=is_stopped,
  )


def place(workdir: str) -> pathlib.Path:
  """Returns the folder that a path leads to, whichever way."""
  return pathlib.Path(workdir).expanduser().resolve()


def stamp(workdir: str) -> tuple[bool, list[tuple[int, int]]]:
  """Returns what changes when a run logs or stops: its end, sizes and times."""
  folder = pathlib.Path(workdir).expanduser()
  found = []
  for name in ("metrics.jsonl", "completions.jsonl", "before.json"):
    try:
      status = (folder / name).stat()
    except (FileNotFoundError, NotADirectoryError):
      continue
    found.append((status.st_size, status.st_mtime_ns))
  return _is_stopped(folder), found


def _is_stopped(folder: pathlib.Path) -> bool:
  """Says whether nobody holds the lock that a run has for as long as it lives.

  Of a run on another host that is not known, and neither is it where the file
  system has no locks.
  """
  file = folder / "lock.json"
  if folder_lib.problem(file, folder_lib.MAX_BYTES):
    return False
  try:
    with file.open("rb") as lock:
      # Shared, as others may look too; closing the file gives it back.
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
      return bool(json.load(lock)["host"] == socket.gethostname())
  except (OSError, ValueError, KeyError, TypeError):
    return False


def _object(file: pathlib.Path) -> dict[str, Any]:
  if not file.exists():
    return {}
  return files.read_json(file, "a record of the run")


def _lines(
  file: pathlib.Path, kept: Callable[[dict[str, Any], bytes], _Line]
) -> tuple[list[_Line], int]:
  """Returns what is kept of the lines of a file, and how many are no records.

  What follows the last line's end is being written just now.
  """
  found: list[_Line] = []
  bad = 0
  if not file.exists():
    return found, bad
  folder_lib.check(file, max_bytes=None)
  try:
    with file.open("rb") as lines:
      for line in lines:
        if not line.endswith(b"\n"):
          break
        try:
          record = json.loads(line)
          int(record["train_step"])
          found.append(kept(record, line))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
          bad += 1
  except OSError as error:
    raise errors.UserError(
      f"Cannot read {str(file)!r}: {error.strerror}."
    ) from error
  return found, bad
