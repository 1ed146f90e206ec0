"""A work directory read, also one that is old, broken or being written."""

import dataclasses
import json
import math
import os
import tracemalloc

import pytest

from agrpo_jax import errors
from agrpo_jax.report import figures
from agrpo_jax.report import logs
from agrpo_jax.runs import files
from fixtures import run_logs


def test_what_was_written_is_read(tmp_path):
  written = run_logs.log(
    3,
    reward=[0.1, 0.2, 0.3],
    before={"accuracy": 0.1},
    completions=[run_logs.completion("7")],
    name="mine",
  )
  written.records[2]["eval/accuracy"] = 0.4
  found = logs.read(run_logs.write(tmp_path / "mine", written))
  assert found == dataclasses.replace(written, sessions=[run_logs.SESSION])
  assert (found.num_done, found.num_steps, found.is_finished) == (3, 100, False)
  assert found.values("reward", 2) == [0.2, 0.3]
  assert found.evaluations() == [(0, {"accuracy": 0.1}), (3, {"accuracy": 0.4})]


def test_a_log_that_is_being_written(tmp_path):
  folder = tmp_path / "run"
  run_logs.write(folder, run_logs.log(2, reward=0.5))
  with open(folder / "metrics.jsonl", "a") as file:
    file.write('{"train_step": 2, "reward": null}\nnothing\n')
    file.write('{"train_step": 3, "reward": "none"}\n')
    file.write("[" * 100_000 + '\n{"train_')
  found = logs.read(str(folder))
  assert found.num_done == 3 and math.isnan(found.records[2]["reward"])
  assert found.num_unreadable == 3
  assert any("3 lines" in words for words in figures.missing(found))


def test_a_long_run_takes_little_memory(tmp_path):
  metrics = {f"metric_{i}": 0.5 + i for i in range(70)}
  workdir = run_logs.write(tmp_path / "run", run_logs.log(2000, **metrics))
  tracemalloc.start()
  found = logs.read(workdir)
  size, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(found.records) == 2000
  assert size / 2000 < 1000  # bytes of 71 numbers and what holds them


def test_completions_take_the_memory_of_their_lines(tmp_path):
  texts = [run_logs.completion("7 + 4 is 11. " * 5) for _ in range(500)]
  workdir = run_logs.write(tmp_path / "run", run_logs.log(1, completions=texts))
  on_disk = (tmp_path / "run" / "completions.jsonl").stat().st_size
  tracemalloc.start()
  found = logs.read(workdir)
  size, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert found.completions == texts
  assert size < 1.2 * on_disk


def test_a_run_from_before_there_were_reports(tmp_path):
  folder = tmp_path / "old"
  run_logs.write(folder, run_logs.log(2, reward=0.5, sessions=()))
  (folder / "completions.jsonl").unlink()
  sample = {"train_step": 0, "prompt": "p", "completion": "c", "reward": 1.0}
  (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
  found = logs.read(str(folder))
  assert found.completions == [sample]
  said = " ".join(figures.missing(found))
  assert "Hardware" in said and "none can be played" in said


def test_the_stamp_changes_when_the_log_grows(tmp_path):
  workdir = run_logs.write(tmp_path / "run", run_logs.log(2, reward=0.5))
  before = logs.stamp(workdir)
  assert logs.stamp(workdir) == before
  with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
    file.write("{}\n")
  assert logs.stamp(workdir) != before


def test_a_run_whose_process_is_gone_has_stopped(tmp_path):
  folder = tmp_path / "run"
  workdir = run_logs.write(folder, run_logs.log(2, reward=0.5))
  assert not logs.read(workdir).is_stopped  # older than locks
  with files.lock(folder / "lock.json"):
    held = logs.stamp(workdir)
    assert not logs.read(workdir).has_ended
  assert logs.stamp(workdir) != held
  assert logs.read(workdir).has_ended
  with files.lock(folder / "lock.json"):  # looking leaves nothing behind
    assert not logs.read(workdir).is_stopped
  (folder / "lock.json").write_text('{"host": "another"}')
  assert not logs.read(workdir).is_stopped


def test_pipes_and_links_are_not_read(tmp_path):
  folder = tmp_path / "run"
  workdir = run_logs.write(folder, run_logs.log(2, reward=0.5))
  (folder / "metrics.jsonl").rename(tmp_path / "elsewhere")
  (folder / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl is a link out"):
    logs.read(workdir)
  (folder / "metrics.jsonl").unlink()
  os.mkfifo(folder / "metrics.jsonl")
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl is no file that"):
    logs.read(workdir)


def test_folders_that_are_no_run_are_refused(tmp_path):
  with pytest.raises(errors.UserError, match="not the work directory of a run"):
    logs.read(str(tmp_path))
  page = tmp_path / "report.html"
  page.write_text("")
  with pytest.raises(errors.UserError, match="not the work directory of a run"):
    logs.stamp(str(page))
    logs.read(str(page))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(errors.UserError, match="cannot be read"):
    logs.read(str(tmp_path))
