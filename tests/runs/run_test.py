"""Tests of agrpo_jax.run: when a train step is saved."""

import json
import os
import pathlib

import jax.numpy as jnp
import pytest

from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax import types
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import metrics
from agrpo_jax.runs import run as run_lib
from fixtures import runs


def state(train_step):
  lora = {"a": jnp.full((4,), 1.0 * train_step)}
  return types.TrainState(jnp.int32(train_step), {}, lora, ())


def run_steps(c, accuracies=()) -> list[int]:
  """Train steps that do nothing; which of them have a checkpoint then."""
  with run_lib.claim(settings.rl(c)) as claimed:
    run, _ = claimed.begin(state(0), None)
    for train_step in range(run.first_step, c.train.num_steps):
      scalars = {"loss": 0.0}
      if train_step < len(accuracies):
        scalars["eval/accuracy"] = accuracies[train_step]
      run.finish_step(state(train_step + 1), train_step, scalars)
  return checkpoint_read.Reader(c.workdir).steps()


@pytest.fixture
def c(tmp_path):
  c = runs.small(tmp_path)
  c.train.update(num_steps=6, checkpoint_every=2, keep=9)
  return c


def test_a_save_that_another_process_is_still_busy_with_is_put_off(
  c, monkeypatch
):
  """This process is never busy, the other one after train steps 2 to 4."""
  calls = []

  def exchange(value):
    if not isinstance(value, tuple):
      return [value]
    calls.append(value)
    return [value, (0, len(calls) in (2, 3, 4))]

  monkeypatch.setattr(processes, "exchange", exchange)
  monkeypatch.setattr(run_lib.checkpoint.Checkpoints, "is_busy", False)
  assert run_steps(c) == [6, 5]
  assert calls[0] == (0, False)


def test_the_last_train_step_and_a_stop_are_saved_in_any_case(c, monkeypatch):
  monkeypatch.setattr(run_lib.checkpoint.Checkpoints, "is_busy", True)
  c.train.num_steps = 3
  assert run_steps(c) == [3]
  c.accept_changed_config = True
  c.train.num_steps = 6
  monkeypatch.setattr(run_lib.StopRequest, "signal", 15)
  with pytest.raises(errors.Stopped, match="after train step 4"):
    run_steps(c)
  assert checkpoint_read.Reader(c.workdir).steps() == [4, 3]


def test_a_work_directory_that_was_moved_between_two_starts(c, tmp_path):
  c.train.num_steps = 2
  run_steps(c)
  moved = tmp_path / "elsewhere" / "run"
  moved.parent.mkdir()
  pathlib.Path(c.workdir).rename(moved)
  c.workdir = str(moved)
  c.train.num_steps = 6
  assert run_steps(c) == [6, 4, 2]


def earlier(c, *keys, versions=()) -> None:
  """Makes a run look as if a version without these settings had begun it."""
  folder = pathlib.Path(c.workdir)
  config = json.loads((folder / "config.json").read_text())
  for group, key in keys:
    del config[group][key]
  (folder / "config.json").write_text(json.dumps(config))
  ran = json.loads((folder / "environment.json").read_text())
  ran["sessions"][-1]["versions"] |= dict(versions)
  (folder / "environment.json").write_text(json.dumps(ran))


def test_a_setting_newer_than_the_run_is_no_change_at_its_default(c, capsys):
  c.train.num_steps = 4
  run_steps(c)
  keys = ("rollout", "schedule"), ("rollout", "lead_every")
  earlier(c, *keys)
  c.train.num_steps = 6
  assert run_steps(c) == [6, 4, 2]
  said = capsys.readouterr().out
  assert "without 2 of the settings, which have their defaults. It was" in said


def test_a_setting_newer_than_the_run_is_a_change_where_it_is_used(c):
  run_steps(c)
  earlier(
    c,
    ("rollout", "schedule"),
    ("rollout", "num_slots"),
    versions={"agrpo_jax": "0.0.9", "jax": "0.9.1"},
  )
  c.rollout.schedule = "dream"
  with pytest.raises(errors.UserError) as error:
    run_steps(c)
  said = str(error.value)
  assert "\n  config.rollout.schedule: 'equal' before, 'dream' now\n" in said
  assert "num_slots" not in said
  assert "It was made with agrpo_jax 0.0.9, jax 0.9.1; here are " in said


def test_the_best_by_eval_accuracy_stays(c, monkeypatch):
  monkeypatch.setattr(run_lib.checkpoint.Checkpoints, "is_busy", False)
  c.train.update(keep=1, keep_best=1)
  c.evaluate.every = 1
  assert run_steps(c, [0.0, 0.2, 0.5, 0.5]) == [6, 3]


def test_the_log_reaches_the_disk_before_the_checkpoint_its_name(
  c, monkeypatch
):
  reader = checkpoint_read.Reader(c.workdir)
  found = []

  def fsync(number):
    path = c.workdir + "/metrics.jsonl"
    if not os.path.exists(path):
      return  # the config's file, which is synced before there is a log
    if os.path.samestat(os.fstat(number), os.stat(path)):
      lines = [record["train_step"] for record in metrics.read(path)]
      found.append((lines, reader.steps()))

  c.train.num_steps = 2
  monkeypatch.setattr(os, "fsync", fsync)
  run_steps(c)
  assert found == [([0, 1], [])]
