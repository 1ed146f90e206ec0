"""What a stopped evaluation leaves behind and goes on from."""

import errno
import json
import os
import subprocess
import sys

import pytest

from agrpo_jax import errors
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import records
from agrpo_jax.runs import files

SETTINGS = {"config": {"seed": 0, "evaluate": {"top_p": 1.0}}, "num_samples": 1}
COUNTS = {"num_tokens": 3, "num_executed_steps": 2, "num_whole_passes": 1}
LINES = [
  {"id": 0, "index": 0, "answer": "", "grades": {"accuracy": 1 / 3}, **COUNTS},
  {"id": 1, "index": 0, "answer": "", "grades": {}, **COUNTS},
]


@pytest.mark.parametrize("name", ["folder", "file.jsonl"])
def test_kept_and_read_again(tmp_path, name):
  output = str(tmp_path / "new" / name)
  with records.start(output, SETTINGS) as kept:
    kept.append(LINES[:1], 2.0)
  assert records.result(output) is None
  with records.start(output, SETTINGS) as kept:
    assert (kept.done, kept.seconds) == (LINES[:1], 2.0)
    kept.append(LINES[1:], 1.0)
    kept.finish({"accuracy": 0.5})
  kept = records.Records(output)
  assert (kept.done, kept.seconds) == (LINES, 3.0)
  assert records.result(output) == {"accuracy": 0.5}
  names = {path.name for path in (tmp_path / "new").rglob("*.json*")}
  if name == "folder":
    assert "examples.jsonl" in names
  else:
    assert names == {"file.jsonl"} | {
      f"file.{what}"
      for what in ("settings.json", "timing.jsonl", "result.json", "lock.json")
    }


def test_without_output_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with records.start("", SETTINGS) as kept:
    kept.append(LINES, 1.0)
    kept.finish({})
  assert kept.done == LINES
  assert not list(tmp_path.iterdir())


def test_a_line_without_its_end_is_cut_off(tmp_path):
  file = tmp_path / "examples.jsonl"
  whole = "".join(json.dumps(line) + "\n" for line in LINES)
  file.write_text(whole + json.dumps(LINES[0])[:-3])
  assert records.Records(str(tmp_path)).done == LINES
  assert file.read_text() == whole


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / "examples.jsonl").write_text('{"id": 0}\n{"id"\n{"id": 2}\n')
  with pytest.raises(errors.UserError, match=r"examples\.jsonl, line 2"):
    records.Records(str(tmp_path))


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("settings.json", b"", "cannot be read .*give another --output"),
    ("settings.json", b"[]", "does not hold a JSON object.*another --output"),
    ("settings.json", b"\xff", "the settings of an evaluation, cannot be read"),
    ("settings.json", b"[" * 100_000, "the settings .*, cannot be read"),
    ("result.json", b"", "the figures .* cannot be read .*remove the file"),
    (
      "timing.jsonl",
      b"{}\n",
      "line 1 is damaged .*no object with 'seconds', float",
    ),
    (
      "timing.jsonl",
      b"1\n",
      "line 1 is damaged .*no object with 'seconds', float",
    ),
    ("examples.jsonl", b"1\n", "line 1 is damaged .*no object with 'id'"),
    ("examples.jsonl", b'{"id": 0}\n', "line 1 .*no object with 'index', int"),
    ("examples.jsonl", b"[" * 100_000 + b"\n", "line 1 is damaged"),
  ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
  output = str(tmp_path)
  with records.start(output, SETTINGS) as kept:
    kept.append(LINES, 1.0)
    kept.finish({"num_problems": 2})
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=f"{name}.*{message}"):
    accuracy.finished(output, SETTINGS, 1)


@pytest.mark.parametrize(
  "figures, num_samples",
  [({"num_problems": 1}, 2), ({"num_completions": 2.0}, 1)],
)
def test_complete_is_what_has_all_its_records(tmp_path, figures, num_samples):
  output = str(tmp_path)
  with records.start(output, SETTINGS) as kept:
    kept.append(LINES, 1.0)
    kept.finish(figures)
  assert accuracy.finished(output, SETTINGS, num_samples).records == LINES
  file = tmp_path / "examples.jsonl"
  file.write_text(json.dumps(LINES[0]) + "\n")  # a damaged line was removed
  assert accuracy.finished(output, SETTINGS, num_samples) is None
  file.unlink()
  assert accuracy.finished(output, SETTINGS, num_samples) is None


def test_figures_come_after_their_records(tmp_path, monkeypatch):
  synced = []
  original = os.fsync

  def fsync(descriptor):
    synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
    original(descriptor)

  with records.start(str(tmp_path), SETTINGS) as kept:
    kept.append(LINES, 1.0)
    monkeypatch.setattr(os, "fsync", fsync)
    kept.finish({})
  assert synced == ["examples.jsonl", "result.json.tmp"]


def test_other_settings_are_refused_with_every_difference(tmp_path):
  with records.start(str(tmp_path), SETTINGS):
    pass
  changed = {
    "config": {"seed": 1, "evaluate": {"top_p": 0.9}},
    "num_samples": 1,
  }
  with (
    pytest.raises(errors.UserError) as error,
    records.start(str(tmp_path), changed),
  ):
    pass
  message = str(error.value)
  assert "config.seed: 0 before, 1 now" in message
  assert "config.evaluate.top_p: 1.0 before, 0.9 now" in message
  assert "num_samples" not in message
  # Groups that are not known yet are not compared.
  records.check(str(tmp_path), {"num_samples": 1})


@pytest.mark.parametrize(
  "output, file",
  [
    ("pairs.jsonl", "pairs.jsonl"),
    ("folder", "folder/examples.jsonl"),
    ("folder", "folder/timing.jsonl"),
    ("folder", "folder/result.json"),
  ],
)
def test_a_file_that_no_evaluation_wrote_is_left_alone(tmp_path, output, file):
  (tmp_path / "folder").mkdir()
  path = tmp_path / file
  path.write_text('{"id": 0}\n{"prompt": "an end without a newline"}')
  before = path.read_text()
  output = str(tmp_path / output)
  there = {*tmp_path.rglob("*")}
  with (
    pytest.raises(errors.UserError, match=f"{file}, which is there already"),
    records.start(output, SETTINGS),
  ):
    pass
  with pytest.raises(errors.UserError, match="Give another --output"):
    accuracy.finished(output, SETTINGS, 1)
  assert path.read_text() == before
  assert {*tmp_path.rglob("*")} == there
  # An empty one, as a program makes it for a name of its own, has no contents.
  path.write_text("")
  with records.start(output, SETTINGS):
    pass


def test_one_process_at_a_time(tmp_path):
  with (
    records.start(str(tmp_path), SETTINGS),
    pytest.raises(errors.UserError, match=f"is writing .* {os.getpid()} on "),
    records.start(str(tmp_path), SETTINGS),
  ):
    pass
  with records.start(str(tmp_path), SETTINGS):
    pass  # free again


def test_a_killed_evaluation_keeps_nobody_out(tmp_path):
  script = """
import sys, time
from agrpo_jax.evaluation import records
from agrpo_jax.runs import files
with records.start(sys.argv[1], {}):
  print("writing", flush=True)
  time.sleep(60)
"""
  command = [sys.executable, "-c", script, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
    try:
      assert first.stdout.readline() == "writing\n"
      with pytest.raises(errors.UserError, match=f"process {first.pid} on "):
        with records.start(str(tmp_path), {}):
          pass
    finally:
      first.kill()  # SIGKILL: the process cleans nothing up
  with records.start(str(tmp_path), {}):
    pass


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with (
    pytest.raises(errors.UserError, match="Cannot write to --output="),
    records.start(str(tmp_path / "file" / "below"), SETTINGS),
  ):
    pass


def test_a_disk_that_fills_up_costs_no_record(tmp_path, monkeypatch):
  def append(file, lines):
    if file.name == "timing.jsonl":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    original(file, lines)

  original = records._append
  monkeypatch.setattr(records, "_append", append)
  with (
    pytest.raises(errors.UserError, match=r"No space left.*goes on"),
    records.start(str(tmp_path), SETTINGS) as kept,
  ):
    kept.append(LINES, 1.0)
  assert records.Records(str(tmp_path)).done == LINES


def test_differences():
  assert files.differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
  assert files.differences({"a": {"b": 1}}, {"c": 2}) == [
    "a: {'b': 1} before, None now",
    "c: None before, 2 now",
  ]
