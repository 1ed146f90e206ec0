"""Hostile completions: graded fast, nothing executed, nothing hung."""

import os
import pathlib
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
_SECONDS = 20.0


def _children_seconds():
  """Processor time of all child processes that ended and were waited for."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def test_2_000_hostile_completions():
  """In less than what two cores have in twenty seconds.

  Processor time, not the clock: what else runs on the machine must not decide.
  `benchmarks/fuzz_graders.py` grades any number.
  """
  begin = _children_seconds()
  done = subprocess.run(
    [sys.executable, "benchmarks/fuzz_graders.py", "--completions=2000"],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count("hostile") == 5, done.stdout
  assert _children_seconds() - begin < 2 * _SECONDS
