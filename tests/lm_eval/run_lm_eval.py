"""The adapter under the real lm-eval, on toy tasks in testdata.

    python -m pytest tests/lm_eval/run_lm_eval.py

needs the extra `lm-eval` (half a gigabyte of packages), so it is no part of
the suite. `adapter_test.py` tests the same code without it.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
TASKS = ("toy_sudoku_generate", "toy_sudoku_choice", "toy_sudoku_perplexity")


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "agrpo_jax.lm_eval", *arguments],
    cwd=ROOT,
    env=dict(os.environ, HF_DATASETS_OFFLINE="1"),
    capture_output=True,
    text=True,
    check=False,
  )


def test_toy_tasks(tmp_path):
  done = run(
    "--model=agrpo_jax",
    "--model_args=path=agrpo_jax/assets/tiny-sudoku,completion_length=16,"
    "block_length=16,num_denoise_steps=16,dtype=float32,num_draws=16,bucket=8",
    f"--tasks={','.join(TASKS)}",
    "--include_path=tests/testdata/lm_eval",
    "--batch_size=4",
    "--apply_chat_template",
    f"--output_path={tmp_path}",
  )
  assert done.returncode == 0, done.stderr
  (file,) = tmp_path.rglob("results_*.json")
  results = json.loads(file.read_text("utf-8"))["results"]
  # The bundled model is careless on every second puzzle, but it knows better.
  assert results[TASKS[0]]["exact_match,none"] == 0.5
  assert results[TASKS[1]]["acc,none"] == 1.0
  assert 1 < results[TASKS[2]]["byte_perplexity,none"] < 256


def test_mistakes_end_without_traceback():
  done = run(
    "--model=agrpo_jax",
    "--model_args=path=nowhere",
    "--tasks=toy_sudoku_choice",
    "--include_path=tests/testdata/lm_eval",
  )
  assert done.returncode == 2
  assert "no folder 'nowhere'" in done.stderr
  assert "Traceback" not in done.stderr
