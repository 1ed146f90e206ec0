"""Damaged files of every kind, a few; `benchmarks/fuzz_files.py` has more."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_damaged_files_are_refused_or_read_for_what_they_are(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "benchmarks/fuzz_files.py",
      "--mutations=12",
      "--seed=1",
      f"--folder={tmp_path}",
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count(" 12 ") >= 9, done.stdout
