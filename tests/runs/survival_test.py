"""Disks that fill up, checkpoints that rot: what a run does about them."""

import errno
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest

from agrpo_jax import errors
from agrpo_jax.runs import metrics
from fixtures import commands
from fixtures import runs

patient = runs.patient


def checkpoints(c) -> list[str]:
  folder = pathlib.Path(c.workdir) / "checkpoints"
  return sorted(path.name for path in folder.iterdir())


def sample_lines(c) -> str:
  return (pathlib.Path(c.workdir) / "samples.jsonl").read_text()


def biggest_file(folder: pathlib.Path) -> pathlib.Path:
  files = [path for path in folder.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_a_save_without_room_stops_the_run_which_can_go_on(
  tmp_path, monkeypatch, patient
):
  def save(self, train_step, *args, **kwargs):
    if train_step == 4:
      # What tensorstore raises, from the thread that writes.
      raise ValueError(
        "RESOURCE_EXHAUSTED: Error writing ...: Failed to write 9 bytes: "
        + os.strerror(errno.ENOSPC)
      )
    return original(self, train_step, *args, **kwargs)

  manager = ocp.CheckpointManager
  original = manager.save
  monkeypatch.setattr(manager, "save", save)
  c = runs.varied(tmp_path)
  c.train.update(num_steps=5, checkpoint_every=2)
  with pytest.raises(errors.UserError) as error:
    runs.train(c)
  assert c.workdir in str(error.value)
  assert "No space left on device" in str(error.value)
  assert "Make room" in str(error.value)
  assert checkpoints(c) == ["2"]
  monkeypatch.setattr(manager, "save", original)
  runs.train(c)
  assert [step for step, *_ in runs.losses(c)] == list(range(5))
  assert checkpoints(c) == ["2", "4", "5"]


def test_a_file_that_may_not_grow_costs_one_message(tmp_path):
  """Many arrays are being written when the first fails; no other says so."""

  def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

  done = subprocess.run(
    [
      *(sys.executable, *commands.TINY),
      f"--config.workdir={tmp_path / 'run'}",
      "--config.train.num_steps=5",
      "--config.train.checkpoint_every=1",
    ],
    cwd=commands.ROOT,
    env=commands.environment(1),
    preexec_fn=limit_files,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  assert "There is no room to write" in done.stderr
  assert "File too large" in done.stderr
  assert "Traceback" not in done.stderr
  assert "closed" not in done.stderr


def test_a_log_without_room_stops_the_run(tmp_path, monkeypatch):
  def write_line(file, record):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(metrics, "_write_line", write_line)
  c = runs.small(tmp_path)
  with pytest.raises(errors.UserError, match="No space left on device"):
    runs.train(c)


def test_a_damaged_checkpoint_costs_its_steps_alone(tmp_path, patient, caplog):
  c = runs.varied(tmp_path)
  c.train.num_steps = 3
  runs.train(c)
  expected, samples = runs.losses(c), sample_lines(c)
  backup = tmp_path / "backup"
  shutil.copytree(c.workdir, backup)
  for damage in ("truncated", "flipped"):
    shutil.rmtree(c.workdir)
    shutil.copytree(backup, c.workdir)
    file = biggest_file(pathlib.Path(c.workdir) / "checkpoints" / "3")
    data = bytearray(file.read_bytes())
    if damage == "truncated":
      del data[len(data) // 2 :]
    else:
      data[len(data) // 2] ^= 1
    file.write_bytes(data)
    caplog.clear()
    runs.train(c)
    assert "checkpoints/3 is unreadable" in caplog.text
    assert "Restored train step 2 instead" in caplog.text
    # The lines of the lost step were dropped and are written again.
    assert runs.losses(c) == expected
    assert sample_lines(c) == samples
    assert checkpoints(c) == ["1", "2", "3"]
    aside = pathlib.Path(c.workdir) / "unreadable_checkpoints"
    assert [path.name for path in aside.iterdir()] == ["3"]
