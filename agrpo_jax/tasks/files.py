"""Rows of a data set: from JSONL, CSV or parquet files, or from the hub."""

import csv
import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from agrpo_jax import errors
from agrpo_jax.tasks import base

SUFFIXES = (".jsonl", ".csv", ".parquet")
_ENCODING = "utf-8-sig"  # some editors put a byte-order mark before the text
_MAX_LINE = 1 << 25  # characters
# Of parquet, where equal values take no room in the file.
_MAX_VALUES = 4_000_000
_MAX_CHARS = 1 << 32
_BATCH_ROWS = 64  # in memory before their characters are counted
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Row = dict[str, Any]


def read(
  path: str, split: str, columns: Sequence[str]
) -> list[tuple[str, Row]]:
  """Returns the rows of a data file, each with where it stands, for messages.

  Args:
    path: a file, used for whichever split is asked for, or a folder that holds
      {split}.jsonl, {split}.csv or {split}.parquet.
    split: train or test.
    columns: what every row must have; of parquet, if there are any, nothing
      else is read. Values of a CSV file are strings.

  Raises:
    UserError: a missing or empty file, an unknown suffix, a malformed line
      (file and line named), missing columns (found and expected named).
  """
  file = _find(pathlib.Path(path).expanduser(), split)
  readers = {".jsonl": _jsonl, ".csv": _csv}
  readers[".parquet"] = functools.partial(_parquet, columns=columns)
  try:
    rows = list(readers[file.suffix](file))
  except UnicodeDecodeError as error:
    raise errors.UserError(f"{file} is not UTF-8 text: {error}.") from error
  except OSError as error:
    raise errors.UserError(f"{file} cannot be read: {error}.") from error
  if not rows:
    raise errors.UserError(f"{file} holds no rows.")
  check_columns(rows, columns)
  return rows


def check_columns(
  rows: Sequence[tuple[str, Row]], columns: Sequence[str]
) -> None:
  """Checks that no row lacks one of `columns`.

  Raises:
    UserError: naming the first that does.
  """
  for where, row in rows:
    missing = [name for name in columns if row.get(name) is None]
    if missing:
      raise errors.UserError(
        f"{where}: column {', '.join(missing)} is missing or empty; found "
        f"{', '.join(map(str, row))}, expected {', '.join(columns)}."
      )


def text(where: str, row: Row, column: str) -> str:
  """Returns a row's value as text; a number is one without its quotes.

  Raises:
    UserError: a value of another kind.
  """
  value = row[column]
  if isinstance(value, bool) or not isinstance(value, (str, int, float)):
    raise errors.UserError(
      f"{where}: column {column} must hold text, not {value!r:.60}."
    )
  return str(value)


def _find(path: pathlib.Path, split: str) -> pathlib.Path:
  if path.is_dir():
    for suffix in SUFFIXES:
      if (path / f"{split}{suffix}").is_file():
        return path / f"{split}{suffix}"
    raise errors.UserError(
      f"folder {path} holds no data for split {split!r}: expected "
      f"{' or '.join(split + suffix for suffix in SUFFIXES)}."
    )
  if not path.is_file():
    raise errors.UserError(f"data file {path} does not exist.")
  if path.suffix not in SUFFIXES:
    raise errors.UserError(
      f"data file {path} must end in {', '.join(SUFFIXES)}."
    )
  return path


def _lines(file: pathlib.Path, newline: str | None = None) -> Iterator[str]:
  with file.open(encoding=_ENCODING, newline=newline) as opened:
    for number in itertools.count(1):
      line = opened.readline(_MAX_LINE + 1)
      if not line:
        return
      if len(line) > _MAX_LINE:
        raise errors.UserError(
          f"{file}, line {number} has more than {_MAX_LINE:,} characters; a "
          "row is a line."
        )
      yield line


def _jsonl(file: pathlib.Path) -> Iterator[tuple[str, Row]]:
  for number, line in enumerate(_lines(file), start=1):
    if not line.strip():
      continue
    where = f"{file}, line {number}"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise errors.UserError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict):
      raise errors.UserError(f"{where} is no JSON object: {line[:60]!r}.")
    if _SURROGATE.search(line) and not base.is_text(
      json.dumps(row, ensure_ascii=False)
    ):
      raise errors.UserError(
        f"{where} escapes half of a character, as in \\ud83d without a "
        "\\ude00 behind it; write the whole character, or leave it out."
      )
    yield where, row


def _csv(file: pathlib.Path) -> Iterator[tuple[str, Row]]:
  reader = csv.reader(_lines(file, newline=""))
  try:
    names = next(reader, [])
    for values in reader:
      where = f"{file}, line {reader.line_num}"
      if len(values) > len(names):
        raise errors.UserError(
          f"{where} has more values than there are columns; put quotes around "
          "a value that holds a comma."
        )
      if values:
        # As long as its line: a header may name any number of columns.
        yield where, dict(zip(names, values, strict=False))
  except csv.Error as error:
    raise errors.UserError(
      f"{file}, line {reader.line_num} is not CSV: {error}."
    ) from error


def _parquet(
  file: pathlib.Path, columns: Sequence[str]
) -> Iterator[tuple[str, Row]]:
  try:
    import pyarrow.parquet  # an optional extra
  except ImportError as error:
    raise errors.UserError(
      f"reading {file} needs pyarrow: pip install 'agrpo_jax[hub]', or convert "
      "it to JSONL."
    ) from error
  try:
    with pyarrow.parquet.ParquetFile(file) as opened:
      names = opened.schema_arrow.names
      check_columns([(str(file), dict.fromkeys(names, ""))], columns)
      num_values = opened.metadata.num_rows * len(columns or names)
      num_chars = 0
      batches = opened.iter_batches(_BATCH_ROWS, columns=columns or None)
      rows = itertools.chain.from_iterable(b.to_pylist() for b in batches)
      for number, row in enumerate(rows, start=1):
        num_chars += len(str(row))
        if num_values > _MAX_VALUES or num_chars > _MAX_CHARS:
          raise errors.UserError(
            f"{file} holds more than {_MAX_VALUES:,} values or {_MAX_CHARS:,} "
            "characters; leave rows out, or convert it to JSONL."
          )
        yield f"{file}, row {number}", row
  except errors.UserError:  # which is a ValueError
    raise
  except (pyarrow.ArrowException, ValueError, OverflowError) as error:
    raise errors.UserError(f"{file} cannot be read: {error}.") from error


@dataclasses.dataclass(frozen=True)
class Hub:
  """A data set on the Hugging Face hub, at one revision."""

  repository: str
  revision: str
  config: str | None = None


def from_hub(
  hub: Hub, split: str, columns: Sequence[str]
) -> list[tuple[str, Row]]:
  """Returns the rows of one split of a hub data set.

  Raises:
    UserError: the `datasets` package is missing, or the data set can neither be
      downloaded nor found in the local cache.
  """
  try:
    import datasets  # an optional extra
  except ImportError as error:
    raise errors.UserError(
      f"loading {hub.repository!r} from the hub needs the datasets package: "
      "pip install 'agrpo_jax[hub]'; or give a local file by config.data.path."
    ) from error
  try:
    table = datasets.load_dataset(
      hub.repository, hub.config, split=split, revision=hub.revision
    )
  except Exception as error:  # network, cache and format errors of many kinds
    raise errors.UserError(
      f"data set {hub.repository!r} (revision {hub.revision}) could not be "
      f"loaded from the hub: {type(error).__name__}: {error}. Without network "
      "give a local JSONL file by config.data.path."
    ) from error
  rows = [
    (f"{hub.repository}, split {split}, row {number}", row)
    for number, row in enumerate(table, start=1)
  ]
  check_columns(rows, columns)
  return rows
