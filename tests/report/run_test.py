"""Runs that keep what their report needs, and the command that makes it."""

import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import time
import types

import pytest

from agrpo_jax.report import __main__ as report
from agrpo_jax.report import logs
from agrpo_jax.report import page
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import files
from agrpo_jax.runs import progress
from fixtures import commands
from fixtures import run_logs
from fixtures import runs

patient = runs.patient


def evaluating(tmp_path):
  c = runs.varied(tmp_path)
  c.evaluate.every = 3  # and after the last
  c.report.num_completions = 3
  return c


def test_a_run_keeps_it_and_goes_on_with_the_same(tmp_path, patient, capsys):
  c = evaluating(tmp_path)
  c.train.keep = c.train.num_steps
  runs.train(c)
  folder = pathlib.Path(c.workdir)
  log = logs.read(c.workdir)
  by_step = {}
  for one in log.completions:
    if one["source"] == "held out":
      by_step.setdefault(one["train_step"], []).append(one["id"])
  assert [*by_step] == [-1, 2, 3]
  assert {tuple(ids) for ids in by_step.values()} == {(0, 1, 2)}
  # Before the first train step all of them are evaluated, not only the kept.
  assert log.before.keys() >= {"accuracy", "accuracy_low", "accuracy_high"}
  assert [step for step, _ in log.evaluations()] == [0, 3, 4]
  (session,) = log.sessions
  assert (session["first_step"], session["num_devices"]) == (0, 1)
  assert session["versions"]["jax"]
  assert session["command"][0] == "python"
  assert all("unmasking" in one for one in log.completions)
  assert all(record["prompts/mean_length"] > 100 for record in log.records)
  assert "MFU" in (folder / "report.html").read_text()
  assert f"Wrote {folder / 'report.html'}" in capsys.readouterr().out

  kept = (folder / "completions.jsonl").read_text()
  whole = runs.losses(c)
  for step in checkpoint_read.Reader(c.workdir).steps():
    if step > 2:
      shutil.rmtree(folder / "checkpoints" / str(step))
  runs.train(c)
  assert runs.losses(c) == whole
  assert (folder / "completions.jsonl").read_text() == kept
  starts = [one["first_step"] for one in logs.read(c.workdir).sessions]
  assert starts == [0, 2]


def test_what_is_kept_changes_nothing_of_a_run(tmp_path):
  c = evaluating(tmp_path)
  c.train.num_steps = 2
  runs.train(c)
  whole = runs.losses(c)
  shutil.rmtree(c.workdir)
  c.report.update(before=False, num_completions=0, html=False)
  runs.train(c)
  assert runs.losses(c) == whole
  folder = pathlib.Path(c.workdir)
  assert not (folder / "report.html").exists()
  assert not (folder / "before.json").exists()
  log = logs.read(c.workdir)
  assert {one["source"] for one in log.completions} == {"training"}
  # How a run is reported may change while it goes on.
  c.report.num_completions = 2
  runs.train(c)


def test_a_report_that_fails_costs_the_run_nothing(
  tmp_path, monkeypatch, capsys
):
  def fail(*unused, **unused_too):
    raise ValueError("no page today")

  monkeypatch.setattr(page, "render", fail)
  c = runs.varied(tmp_path)
  c.train.num_steps = 1
  runs.train(c)
  said = capsys.readouterr().err
  assert "could not be written (no page today)" in said
  assert logs.read(c.workdir).is_finished


class Dead(io.StringIO):
  """A pipe whose reader has ended."""

  def flush(self):
    raise BrokenPipeError


def test_lines_that_nobody_reads_cost_the_run_nothing(tmp_path, monkeypatch):
  folder = tmp_path / "run"
  run_logs.write(folder, run_logs.log(1, reward=0.5))
  settings = types.SimpleNamespace(report=types.SimpleNamespace(html=True))
  for name in ("stdout", "stderr"):
    monkeypatch.setattr(sys, name, Dead())
  for where in (folder, tmp_path / "nowhere"):
    claimed = types.SimpleNamespace(folder=where, is_running=True)
    with page.at_end(settings, claimed):
      progress.Progress(1).step(0, {"reward": 0.5}, {}, 16)
      progress.bar(1, "waiting").update()
  assert (folder / "report.html").exists()
  assert "step 1/1  reward 0.500" in sys.stdout.getvalue()
  assert "could not be written" in sys.stderr.getvalue()


def test_the_command_makes_one_page_of_several_runs(tmp_path):
  workdirs = [
    run_logs.write(tmp_path / name, run_logs.log(3, reward=0.5))
    for name in ("first", "second")
  ]
  file = tmp_path / "both.html"
  (tmp_path / "link").symlink_to(workdirs[0])
  again = (f"{workdirs[0]}/", tmp_path / "link")  # the first one, and no third
  said = commands.alone(
    *("-m", "agrpo_jax.report", *workdirs, *again, f"--html={file}")
  )
  assert f"Wrote {file}" in said
  assert "first 3/100, second 3/100" in said
  assert "<title>first, second</title>" in file.read_text()


@pytest.mark.parametrize(
  "words,part",
  [
    ([], "Give the work directory of a run"),
    (["nowhere"], "'nowhere' is not the work directory of a run"),
    ([*map(str, range(13))], "These are 13 runs; a page holds at most 12."),
    (["nowhere", "--chip_hour_price=-1"], "--chip_hour_price=-1 must be 0"),
    (["nowhere", "--chip_hour_price=inf"], "--chip_hour_price=inf must be 0"),
    (["nowhere", "--html=."], "--html='.' is a folder"),
    (["nowhere", "--watch", "--watch_seconds=0"], "--watch_seconds=0 must be"),
  ],
)
def test_mistakes_are_told(words, part):
  done = commands.run("-m", "agrpo_jax.report", *words)
  assert done.returncode == 2
  assert part in done.stderr and "Traceback" not in done.stderr


@contextlib.contextmanager
def watching_of(workdir, file):
  """A process that watches a run."""
  watching = subprocess.Popen(
    [
      *(sys.executable, "-m", "agrpo_jax.report", workdir, f"--html={file}"),
      *("--watch", "--watch_seconds=0.1"),
    ],
    cwd=commands.ROOT,
    env=commands.environment(1),
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    yield watching
  finally:
    watching.kill()
    watching.wait()


def test_watching_a_run_until_it_is_killed(tmp_path):
  folder = tmp_path / "run"
  workdir = run_logs.write(folder, run_logs.log(2, reward=0.5))
  with contextlib.ExitStack() as run:
    run.enter_context(files.lock(folder / "lock.json"))
    with watching_of(workdir, tmp_path / "page.html") as watching:
      assert "run 2/100" in watching.stdout.readline()
      run.close()
      said = watching.stdout.readline()
      assert "run stopped after train step 2/100" in said
      assert watching.wait(30) == 0


def test_watching_a_run_until_it_ends(tmp_path):
  config = {**run_logs.CONFIG, "train": {"num_steps": 3}}
  folder = tmp_path / "run"
  workdir = run_logs.write(folder, run_logs.log(1, config=config, reward=0.5))
  file = tmp_path / "page.html"
  with watching_of(workdir, file) as watching:
    assert "run 1/3" in watching.stdout.readline()
    assert '"seconds":0.1' in file.read_text()
    for step in (1, 2):
      time.sleep(0.3)
      assert watching.poll() is None
      with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"train_step": step, "reward": 0.6}) + "\n")
      assert f"run {step + 1}/3" in watching.stdout.readline()
    assert watching.wait(30) == 0
    assert '"seconds":0,' in file.read_text()


def test_watching_leaves_nine_tenths_of_a_core(tmp_path, monkeypatch):
  folder = tmp_path / "run"
  config = {**run_logs.CONFIG, "train": {"num_steps": 4}}
  workdir = run_logs.write(folder, run_logs.log(1, config=config, reward=0.5))
  now, rests, write = [0.0], [], page.write

  def slow(*args, **kwargs):
    """Takes as many seconds as the run has train steps, and it goes on."""
    read = write(*args, **kwargs)
    done = read[0].num_done
    now[0] += done
    run_logs.write(folder, run_logs.log(done + 1, config=config, reward=0.5))
    return read

  monkeypatch.setattr(page, "write", slow)
  clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=rests.append)
  monkeypatch.setattr(report, "time", clock)
  for name, value in (
    *(("_HTML", str(tmp_path / "page.html")), ("_WATCH", True)),
    *(("_SECONDS", 10.0), ("_PRICE", 0.0)),
  ):
    monkeypatch.setattr(report, name, types.SimpleNamespace(value=value))
  report.main(["report", workdir])
  assert rests == [10.0, 18.0, 27.0]
