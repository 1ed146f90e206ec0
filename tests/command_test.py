"""How commands start and end: help, signals, and what they say then."""

import ast
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  "module,parts",
  [
    ("main", ["configs/gsm8k.py", "--config:", "agrpo_jax/config.py"]),
    ("evaluate", ["--checkpoint:", "--config:", "--num_samples:"]),
    ("sweep", ["--output:", "--config:"]),
    ("show", ["--html:", "--config:"]),
    ("port", ["--from:", "--to:", "--process_id:"]),
    ("tasks", ["python -m agrpo_jax.tasks"]),
  ],
)
def test_help_teaches(module, parts):
  """The first lines say what the command does, then come its flags."""
  done = subprocess.run(
    [sys.executable, "-m", f"agrpo_jax.{module}", "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, "")
  for part in parts:
    assert part in done.stdout
  source = (ROOT / "agrpo_jax" / module).with_suffix(".py")
  if not source.exists():
    source = ROOT / "agrpo_jax" / module / "__main__.py"
  taught = ast.get_docstring(ast.parse(source.read_text()))
  assert done.stdout.startswith(taught)


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_interrupted_evaluation_promises_what_it_keeps(tmp_path, is_kept):
  """Its output is no terminal, and yet it says how far it is."""
  evaluation = subprocess.Popen(
    [
      *(sys.executable, "-m", "agrpo_jax.evaluate"),
      "--config=configs/sudoku_tiny.py",
      "--config.evaluate.batch_size=8",
      "--config.evaluate.num_examples=400",
      "--config.task.options.num_examples=400",
      "--config.grading.num_workers=1",
      *([f"--output={tmp_path}"] if is_kept else []),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  line = next(
    one for one in evaluation.stderr if one.startswith("evaluating: ")
  )
  assert line.startswith("evaluating: 8 of 400 after ")
  evaluation.send_signal(signal.SIGINT)
  _, message = evaluation.communicate(timeout=60)
  assert evaluation.returncode == 130
  assert "Traceback" not in message
  if not is_kept:
    assert message.splitlines()[-1] == "Stopped."
    return
  lines = (tmp_path / "examples.jsonl").read_text().splitlines()
  assert message.splitlines()[-1] == (
    f"Stopped. {len(lines)} completions are kept in {tmp_path}; the same "
    "command goes on from there."
  )
