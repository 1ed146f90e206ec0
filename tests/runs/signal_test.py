"""A run that is told to stop finishes its step, saves, and can go on."""

import pathlib
import signal
import subprocess
import sys

import pytest

from agrpo_jax.runs import metrics
from agrpo_jax.runs import run as run_lib

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir: pathlib.Path, num_steps: int) -> subprocess.Popen:
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "agrpo_jax.main",
      "--config=configs/sudoku_tiny.py",
      f"--config.workdir={workdir}",
      f"--config.train.num_steps={num_steps}",
      "--config.optimizer.schedule=constant",
      "--config.evaluate.every=0",
      "--config.train.checkpoint_every=1000",
      "--config.rollout.num_prompts=2",
      "--config.rollout.group_size=4",
      "--config.rollout.batch_size=8",
      "--config.objective.microbatch=16",
      "--config.task.options.num_examples=200",
      "--config.grading.num_workers=1",
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
  number = signal.SIGTERM
  run = start(tmp_path / "run", 2000)
  for line in run.stdout:
    if line.startswith("step") and " 3/2000" in line:
      run.send_signal(number)
      break
  _, message = run.communicate(timeout=120)
  assert run.returncode == 128 + number
  assert "goes on from there" in message
  assert "Traceback" not in message
  done = len(list(metrics.read(tmp_path / "run" / "metrics.jsonl")))
  assert f"Stopped after train step {done}," in message

  again = start(tmp_path / "run", 2000)
  said = "".join(again.stdout.readline() for _ in range(3))
  assert "config.train" not in said
  assert f"after train step {done} of 2000" in said
  for line in again.stdout:
    if line.startswith("step"):
      break
  again.kill()
  again.wait()
  assert f" {done + 1}/2000" in line


def test_ctrl_c_is_noted_once_and_obeyed_twice():
  before = signal.getsignal(signal.SIGINT)
  with run_lib.stop_requests() as stop:
    assert stop.signal == 0
    signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) == before
