"""The fault drill, in short: mid-rollout, mid-save, mid-log."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_three_kills_change_nothing(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "benchmarks/fault_drill.py",
      "--kills=3",
      f"--folder={tmp_path}",
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "3 kills: " in done.stdout
  assert "bit for bit" in done.stdout
