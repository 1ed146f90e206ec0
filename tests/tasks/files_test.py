"""files: rows with their places, and messages that name them."""

import builtins
import os
import sys
import tracemalloc
import types

import pytest

from agrpo_jax import errors
from agrpo_jax.tasks import files

_HUB = files.Hub("owner/name", revision="abc", config="main")


def test_jsonl_rows_carry_their_line(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"a": 1}\n\n{"a": 2}\n')
  rows = files.read(str(path), "test", ["a"])
  assert rows == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": 2})]


@pytest.mark.parametrize(
  "name, content",
  [("a.jsonl", b'\xef\xbb\xbf{"a": "1"}\n'), ("a.csv", b"\xef\xbb\xbfa\n1\n")],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content)
  assert [row for _, row in files.read(str(path), "test", ["a"])] == [
    {"a": "1"}
  ]


def test_lines_end_at_line_feeds_only_and_characters_may_be_escaped(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"a": "x\u2028y\x85z"}\n{"a": "\\ud83d\\ude00"}\n', "utf-8")
  rows = [row for _, row in files.read(str(path), "test", ["a"])]
  assert rows == [{"a": "x\u2028y\x85z"}, {"a": "\U0001f600"}]


def test_folder_holds_a_file_per_split(tmp_path):
  (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
  (tmp_path / "test.csv").write_text("a\n2\n")
  assert files.read(str(tmp_path), "train", ["a"])[0][1] == {"a": 1}
  assert files.read(str(tmp_path), "test", ["a"])[0][1] == {"a": "2"}
  (tmp_path / "test.csv").unlink()
  with pytest.raises(errors.UserError, match=r"split 'test': expected test\.j"):
    files.read(str(tmp_path), "test", ["a"])


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.jsonl", b"", "holds no rows"),
    ("a.jsonl", b"\n\n", "holds no rows"),
    ("a.csv", b"a,b\n", "holds no rows"),
    ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2 is not JSON"),
    ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl, line 2 is no JSON object"),
    ("a.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
    ("a.jsonl", b'{"b": 1}\n', r"line 1: column a is missing.*found b, expec"),
    ("a.jsonl", b'{"a": 1}\n{"a": null}\n', r"line 2: column a is missing"),
    ("a.csv", b"b,c\n1,2\n", r"column a is missing or empty; found b, c"),
    ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
    ("a.csv", b"b,a\n1\n", "line 2: column a is missing or empty; found b"),
    ("a.csv", b"a,b\n1,2,3\n", "line 2 has more values than there are col"),
    ("a.jsonl", b'{"a": 1}\n{"a": "x\\ud800"}\n', "line 2 escapes half of"),
    ("a.jsonl", b'{"a": [{"b\\uDFFF": 1}]}\n', "line 1 escapes half of"),
    ("a.json", b"{}", r"must end in \.jsonl, \.csv, \.parquet"),
  ],
)
def test_bad_file(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=message):
    files.read(str(path), "test", ["a"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_without_end(tmp_path, name):
  path = tmp_path / name
  path.write_text('{"a": 1}\n')
  os.truncate(path, 2**36)  # takes no room on the disk
  with pytest.raises(errors.UserError, match="line 2 has more than 33,554,432"):
    files.read(str(path), "test", [])


def test_a_csv_row_takes_what_its_line_does(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text(
    ",".join(f"c{i}" for i in range(100_000)) + "\n\n" + "1\n" * 9
  )
  tracemalloc.start()
  rows = files.read(str(path), "test", ["c0"])
  size, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert rows[-1] == (f"{path}, line 11", {"c0": "1"})
  assert len(rows) == 9 and size < 100_000


def test_missing_file(tmp_path):
  with pytest.raises(errors.UserError, match="nowhere does not exist"):
    files.read(str(tmp_path / "nowhere"), "test", ["a"])


def _forbid(monkeypatch, package):
  original = builtins.__import__

  def missing(name, *args, **kwargs):
    if name.partition(".")[0] == package:
      raise ImportError(name)
    return original(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", missing)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
  _forbid(monkeypatch, "pyarrow")
  path = tmp_path / "a.parquet"
  path.write_bytes(b"PAR1")
  with pytest.raises(errors.UserError, match=r"pyarrow.*agrpo_jax\[hub\]"):
    files.read(str(path), "test", ["a"])


def test_hub_needs_datasets(monkeypatch):
  _forbid(monkeypatch, "datasets")
  with pytest.raises(errors.UserError, match="needs the datasets package"):
    files.from_hub(_HUB, "test", ["a"])


def _fake_datasets(monkeypatch, load_dataset):
  module = types.ModuleType("datasets")
  module.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_is_asked_for_the_pinned_revision(monkeypatch):
  asked = []

  def load_dataset(*args, **kwargs):
    asked.append((args, kwargs))
    return [{"a": 1}]

  _fake_datasets(monkeypatch, load_dataset)
  rows = files.from_hub(_HUB, "test", ["a"])
  assert rows == [("owner/name, split test, row 1", {"a": 1})]
  expected = (("owner/name", "main"), {"split": "test", "revision": "abc"})
  assert asked == [expected]


def test_offline_hub_is_a_user_error(monkeypatch):
  def load_dataset(*unused_args, **unused_kwargs):
    raise ConnectionError("no network")

  _fake_datasets(monkeypatch, load_dataset)
  with pytest.raises(errors.UserError, match=r"no network.*config\.data\.path"):
    files.from_hub(_HUB, "test", ["a"])


def test_hub_data_of_other_columns(monkeypatch):
  _fake_datasets(monkeypatch, lambda *unused, **unused_too: [{"b": 1}])
  with pytest.raises(errors.UserError, match="row 1: column a is missing"):
    files.from_hub(_HUB, "test", ["a"])
