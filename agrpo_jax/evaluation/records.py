"""The records of an evaluation on disk, which a stopped one goes on from.

An output is a folder, or a file whose name ends in .jsonl:

  FOLDER/examples.jsonl   FILE.jsonl            a line per completion, in order
  FOLDER/settings.json    FILE.settings.json    what the records depend on
  FOLDER/timing.jsonl     FILE.timing.jsonl     seconds per batch
  FOLDER/result.json      FILE.result.json      the figures, when complete
  FOLDER/lock.json        FILE.lock.json        who is writing, or did last

Lines are appended as completions are graded, and a line without its end is cut
off when the file is opened again. Records hold nothing that changes from one
run of the same evaluation to the next: equal settings, equal bytes.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from agrpo_jax import errors
from agrpo_jax.runs import files

_ANY_RECORD: Mapping[str, type] = {"id": int}
_TIMING = {"seconds": float}


class Records:
  """The records that are there already; in memory only without an `output`.

  Attributes:
    done: the records so far.
    seconds: that they took, over all runs.
  """

  def __init__(self, output: str = "", kinds: Mapping[str, type] = _ANY_RECORD):
    """Reads what a folder or file has.

    Args:
      output: the folder or file, or "".
      kinds: what every record has, by key.

    Raises:
      UserError: a record has something else.
    """
    self._output = output
    self.done: list[dict[str, Any]] = []
    self.seconds = 0.0
    if output:
      _path(output, "examples.jsonl").touch()
      self.done = _read_lines(_path(output, "examples.jsonl"), kinds)
      timing = _read_lines(_path(output, "timing.jsonl"), _TIMING)
      self.seconds = sum(line["seconds"] for line in timing)

  def append(
    self, records: Sequence[Mapping[str, Any]], seconds: float
  ) -> None:
    """Adds the records of a batch that took this long."""
    # As if read from the file: a float is a float in both.
    self.done += json.loads(json.dumps(list(records)))
    self.seconds += seconds
    if self._output:
      timing = {"num_records": len(records), "seconds": seconds}
      with _writing(self._output):
        # Before their timing: a kill in between loses seconds, no records.
        _append(_path(self._output, "examples.jsonl"), records)
        _append(_path(self._output, "timing.jsonl"), [timing])

  def finish(self, result: Mapping[str, Any]) -> None:
    """Keeps the figures; they say how many records the evaluation has."""
    if self._output:
      with _writing(self._output):
        # Before them, or a power loss may leave figures without records.
        with _path(self._output, "examples.jsonl").open("ab") as opened:
          os.fsync(opened.fileno())
        _write(_path(self._output, "result.json"), result)


@contextlib.contextmanager
def start(
  output: str,
  settings: Mapping[str, Any],
  kinds: Mapping[str, type] = _ANY_RECORD,
) -> Iterator[Records]:
  """Opens an output, or memory alone for "", for one process at a time.

  Args:
    output: the folder or file, or "".
    settings: what the records depend on.
    kinds: as in `Records`.

  Raises:
    UserError: it cannot be written, is in use, holds records made with other
      settings, or holds a file that no evaluation wrote.
    KeyboardInterrupt: the caller's, which then says that the records are kept.
  """
  if not output:
    yield Records()
    return
  _check_ours(output)  # before the lock, which stays beside the records
  with contextlib.ExitStack() as stack:
    try:
      with _writing(output):
        lock = _path(output, "lock.json")
        lock.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.lock(lock))
    except files.InUse as owner:
      raise errors.UserError(
        f"Another evaluation is writing to --output={output!r}: {owner}. Wait "
        "for its end, or give another --output."
      ) from None
    check(output, settings)
    with _writing(output):
      # Before the first record: of records without it nobody could tell what
      # they were made with.
      _write(_path(output, "settings.json"), settings)
      kept = Records(output, kinds)
    try:
      yield kept
    except KeyboardInterrupt:
      raise KeyboardInterrupt(
        f"Stopped. {len(kept.done)} completions are kept in {output}; the same "
        "command goes on from there."
      ) from None


@contextlib.contextmanager
def _writing(output: str) -> Iterator[None]:
  """Turns what the system says of a place for records into a UserError."""
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f"Cannot write to --output={output!r}: {error.strerror}. Make room, or "
      "make it writable, and the same command goes on; or give another."
    ) from error


def check(output: str, settings: Mapping[str, Any]) -> None:
  """Refuses an output whose records were made with other settings.

  Only the groups (first keys) that `settings` has are compared.

  Raises:
    UserError: with every difference, or naming a file that is not ours.
  """
  if not output:
    return
  _check_ours(output)
  file = _path(output, "settings.json")
  if not file.exists():
    return
  # Nobody is told to remove it: the records would pass for those of any.
  before = files.read_json(
    file,
    "the settings of an evaluation",
    "Put a copy back, or give another --output.",
  )
  before = {group: before.get(group) for group in settings}
  # As if read from the file, where a tuple is a list.
  found = files.differences(before, json.loads(json.dumps(settings)))
  if found:
    raise errors.UserError(
      f"--output={output!r} holds an evaluation with other settings:\n  "
      + "\n  ".join(found)
      + "\nGive another --output or undo the changes."
    )


def _check_ours(output: str) -> None:
  """Refuses what no evaluation wrote: the end of such a file would be cut off.

  Raises:
    UserError: naming a file with contents but without settings beside it, which
      an evaluation writes before everything else.
  """
  settings = _path(output, "settings.json")
  if settings.exists():
    return
  for name in ("examples.jsonl", "timing.jsonl", "result.json"):
    file = _path(output, name)
    if file.exists() and file.stat().st_size:
      raise errors.UserError(
        f"--output={output!r} would write to {file}, which is there already "
        f"and of no evaluation: there is no {settings.name} beside it. Give "
        "another --output, or move that file away."
      )


def result(output: str) -> dict[str, Any] | None:
  """Returns the figures of an evaluation that was complete, else None.

  Raises:
    UserError: the file holds something else.
  """
  file = _path(output, "result.json")
  if not file.exists():
    return None
  return files.read_json(file, "the figures of an evaluation")


def _path(output: str, name: str) -> pathlib.Path:
  path = pathlib.Path(output).expanduser()
  if path.suffix != ".jsonl":
    return path / name
  return path if name == "examples.jsonl" else path.with_suffix(f".{name}")


def _read_lines(
  file: pathlib.Path, kinds: Mapping[str, type]
) -> list[dict[str, Any]]:
  """Returns the complete lines, and cuts off what follows the last.

  Raises:
    UserError: a line is no object with values of these kinds.
  """
  if not file.exists():
    return []
  content = file.read_bytes()
  end = content.rfind(b"\n") + 1
  if end < len(content):
    with file.open("r+b") as opened:
      opened.truncate(end)
  lines = []
  for number, line in enumerate(content[:end].splitlines(), 1):
    try:
      found = json.loads(line)
      for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
          raise ValueError(f"it is no object with {key!r}, {kind.__name__}")
      lines.append(found)
    except (ValueError, RecursionError) as error:
      raise errors.UserError(
        f"{file}, line {number} is damaged ({error}). Remove that line and "
        "those after it; they are made again."
      ) from error
  return lines


def _append(file: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
  with file.open("a", encoding="utf-8") as opened:
    opened.write("".join(json.dumps(record) + "\n" for record in records))


def _write(file: pathlib.Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  with files.rewrite(file) as opened:
    opened.write(text.encode())
