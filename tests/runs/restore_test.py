"""A run goes on from its checkpoint on another mesh and process count."""

import json
import pathlib

import numpy as np

from agrpo_jax.runs import metrics
from fixtures import commands

FLAGS = (
  *("-m", "agrpo_jax.main"),
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


def train(workdir: pathlib.Path, num_steps, mesh, devices=1) -> str:
  """Trains up to `num_steps` by the real command; what it prints."""
  return commands.alone(*words(workdir, num_steps, mesh), devices=devices)


def words(workdir, num_steps, mesh):
  return [
    *FLAGS,
    *(f"--config.mesh.{name}={size}" for name, size in mesh.items()),
    f"--config.train.num_steps={num_steps}",
    f"--config.workdir={workdir}",
  ]


def samples(workdir: pathlib.Path) -> list[str]:
  lines = (workdir / "samples.jsonl").read_text().splitlines()
  return [json.loads(line)["completion"] for line in lines]


def test_one_device_then_eight_then_two_processes_then_one(tmp_path):
  one = dict(data=1, fsdp=1, tensor=1)
  train(tmp_path / "whole", 8, one)
  moved = tmp_path / "moved"
  train(moved, 2, one)
  train(moved, 4, dict(data=2, fsdp=2, tensor=2), devices=8)
  both = words(moved, 6, dict(data=1, fsdp=8))
  with commands.Pair(tmp_path, *both, devices=4) as pair:
    assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
    assert "step 6/6" in pair.said(0)
    assert "step" not in pair.said(1)  # one process speaks
  assert "after train step 6 of 8" in train(moved, 8, one)
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
