"""Parquet files of a task, read by the library that the suite does without.

pip install pyarrow && python -m pytest tests/tasks/parquet_proof.py
"""

import pyarrow
import pytest
from pyarrow import parquet

from agrpo_jax import errors
from agrpo_jax.tasks import files


def _parquet(tmp_path, **columns):
  path = tmp_path / "a.parquet"
  # Days that Python has no date for, as a column that nobody asks for.
  days = pyarrow.array([2**31 - 1] * len(columns["a"]), pyarrow.date32())
  parquet.write_table(pyarrow.table({**columns, "days": days}), path)
  return str(path)


def test_parquet_rows_have_the_columns_asked_for(tmp_path):
  path = _parquet(tmp_path, a=["x", "y"], b=[1, 2])
  assert files.read(path, "test", ["a"]) == [
    (f"{path}, row 1", {"a": "x"}),
    (f"{path}, row 2", {"a": "y"}),
  ]
  with pytest.raises(errors.UserError, match="found a, b, days, expected c"):
    files.read(path, "test", ["c"])
  with pytest.raises(errors.UserError, match=r"a\.parquet cannot.*days"):
    files.read(path, "test", [])


@pytest.mark.parametrize("bound", ["_MAX_VALUES", "_MAX_CHARS"])
def test_parquet_is_bounded(tmp_path, monkeypatch, bound):
  path = _parquet(tmp_path, a=["x"] * 100)
  monkeypatch.setattr(files, bound, 99)
  with pytest.raises(errors.UserError, match=r"holds more than .*leave rows"):
    files.read(path, "test", ["a"])


def test_what_is_no_parquet(tmp_path):
  path = tmp_path / "a.parquet"
  path.write_bytes(b"PAR1")
  with pytest.raises(errors.UserError, match=r"a\.parquet cannot be read"):
    files.read(str(path), "test", ["a"])
