"""A run goes on from its checkpoint on another mesh and process count."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from agrpo_jax.runs import metrics

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
  "--config=configs/sudoku_tiny.py",
  "--config.accept_changed_config=true",
  "--config.optimizer.schedule=constant",
  "--config.train.checkpoint_every=100",
  "--config.train.log_samples=8",
  "--config.evaluate.every=0",
  "--config.rollout.num_prompts=2",
  "--config.rollout.group_size=4",
  "--config.rollout.batch_size=8",
  "--config.rollout.num_denoise_steps=4",
  "--config.objective.microbatch=16",
  "--config.task.options.num_examples=200",
  "--config.grading.num_workers=1",
)


def train(
  workdir: pathlib.Path, num_steps, mesh, devices=1, num_processes=1
) -> list[str]:
  """Trains up to `num_steps` by the real command; what each process prints."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_NUM_CPU_DEVICES": str(devices),
  }
  words = [f"--config.mesh.{name}={size}" for name, size in mesh.items()]
  words.append(f"--config.train.num_steps={num_steps}")
  processes = []
  for process in range(num_processes):
    if num_processes > 1:
      environment |= {
        "AGRPO_COORDINATOR": f"localhost:{port}",
        "AGRPO_NUM_PROCESSES": str(num_processes),
        "AGRPO_PROCESS_ID": str(process),
      }
    processes.append(
      subprocess.Popen(
        [sys.executable, "-m", "agrpo_jax.main", *FLAGS, *words]
        + [f"--config.workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  outputs = [process.communicate(timeout=400) for process in processes]
  for process, (_, message) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, message[-3000:]
  return [out for out, _ in outputs]


def samples(workdir: pathlib.Path) -> list[str]:
  lines = (workdir / "samples.jsonl").read_text().splitlines()
  return [json.loads(line)["completion"] for line in lines]


def test_one_device_then_eight_then_two_processes_then_one(tmp_path):
  one = dict(data=1, fsdp=1, tensor=1)
  train(tmp_path / "whole", 8, one)
  moved = tmp_path / "moved"
  train(moved, 2, one)
  train(moved, 4, dict(data=2, fsdp=2, tensor=2), devices=8)
  first, second = train(moved, 6, dict(data=1, fsdp=8), 4, num_processes=2)
  assert "step 6/6" in first
  assert "step" not in second  # one process speaks
  assert "after train step 6 of 8" in train(moved, 8, one)[0]
  ours = list(metrics.read(moved / "metrics.jsonl"))
  expected = list(metrics.read(tmp_path / "whole" / "metrics.jsonl"))
  assert [line["train_step"] for line in ours] == list(range(8))
  assert samples(moved) == samples(tmp_path / "whole")
  for name in ("loss", "grad_norm", "reward", "entropy"):
    np.testing.assert_allclose(
      [line[name] for line in ours],
      [line[name] for line in expected],
      rtol=1e-2,
      atol=2e-4,
      err_msg=name,
    )
