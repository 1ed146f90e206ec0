"""Sweeps: the grid, what is refused, what is repeated, what comes out."""

import csv
import pathlib
import shutil
import subprocess
import sys

import pytest
import safetensors

import agrpo_jax
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import sweep
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import table

ROOT = pathlib.Path(__file__).parents[2]
MODEL = pathlib.Path(agrpo_jax.__file__).parent / "assets" / "tiny-sudoku"


def config() -> config_lib.ConfigDict:
  c = config_lib.rl()
  c.workdir = "unused"
  c.model.path = str(MODEL)
  c.model.dtype = "float32"
  config_lib.use_task(c, "sudoku", protocol="bare", num_examples=4)
  c.data.max_prompt_length = 64
  c.data.bucket = 8
  c.grading.num_workers = 1
  c.evaluate.update(
    completion_length=16, block_length=16, num_denoise_steps=4, batch_size=4
  )
  return c


def test_every_combination_is_a_cell(tmp_path):
  axes = {"num_denoise_steps": [2, 4, 2], "temperature": [0.0, 0.5]}
  (group,) = sweep.cells(config(), [], [], axes, str(tmp_path))
  found = [
    (
      cell.settings.evaluate.sampling.completion_length,
      cell.settings.evaluate.sampling.num_denoise_steps,
      cell.settings.evaluate.sampling.unmask_rule,
      cell.settings.evaluate.sampling.temperature,
    )
    for cell in group
  ]
  assert found == [
    (16, 2, "confidence", 0.0),
    (16, 2, "confidence", 0.5),
    (16, 4, "confidence", 0.0),
    (16, 4, "confidence", 0.5),
  ]
  assert {cell.model for cell in group} == {"tiny-sudoku"}
  assert len({cell.output for cell in group}) == 4


def test_models_have_names_of_their_own(tmp_path):
  groups = sweep.cells(
    config(), ["a/model", "b/model"], ["runs/one"], {}, str(tmp_path)
  )
  assert [group[0].model for group in groups] == [
    "a_model",
    "b_model",
    "runs_one",
  ]
  assert groups[2][0].checkpoint == "runs/one"
  assert groups[2][0].settings.model.path == str(MODEL)
  groups = sweep.cells(config(), ["a/x", "b/y"], [], {}, str(tmp_path))
  assert [group[0].model for group in groups] == ["x", "y"]


def test_all_that_is_wrong_at_once(tmp_path):
  axes = {
    "completion_length": [16, 40, 5008],
    "unmask_rule": ["confidence", "greedy"],
    "temperature": [0.0, -1.0],
  }
  grid = sweep.cells(
    config(), [str(MODEL), "./nowhere"], ["./no-run"], axes, str(tmp_path)
  )
  with pytest.raises(errors.UserError) as error:
    list(sweep.run(grid))
  message = str(error.value)
  assert message.startswith("Nothing was run.")
  for part in (
    "completion_length=40 is not a multiple of block_length=16\n  (in 12 of 36",
    "'greedy' is not one of random, confidence, entropy, threshold\n  (in 18",
    "temperature=-1.0 is negative\n  (in 18 of 36 cells; the first is tiny-sud",
    "make 5072 tokens, more than the model's 4096; lower one of them.",
    "./nowhere",
    "--checkpoint='./no-run' is not a work directory",
  ):
    assert part in message, part
  assert not list(tmp_path.iterdir())


def test_done_once_and_continued_cell_by_cell(tmp_path, monkeypatch):
  other = tmp_path / "other"
  shutil.copytree(MODEL, other)
  loads = []

  def opened(path, *args, **kwargs):
    loads.append(str(path.parent))
    return safe_open(path, *args, **kwargs)

  safe_open = safetensors.safe_open
  monkeypatch.setattr(safetensors, "safe_open", opened)
  axes = {"num_denoise_steps": [1, 2]}
  output = tmp_path / "sweep"
  grid = sweep.cells(config(), [str(MODEL), str(other)], [], axes, str(output))

  # Stopped within the second cell of four.
  rows = sweep.run(grid)
  first = next(rows)
  monkeypatch.setattr(accuracy, "evaluate", None)
  with pytest.raises(TypeError):
    next(rows)
  monkeypatch.undo()
  monkeypatch.setattr(safetensors, "safe_open", opened)
  assert loads == [str(MODEL)]

  rows = list(sweep.run(grid))
  assert loads == [str(MODEL), str(MODEL), str(other)]
  assert rows[0] == first
  assert [row["model"] for row in rows] == ["tiny-sudoku"] * 2 + ["other"] * 2
  # The same weights in another folder.
  figures = ("accuracy", "accuracy_tolerant", "mean_length", "num_disagree")
  for mine, theirs in zip(rows[:2], rows[2:], strict=True):
    assert [mine[k] for k in figures] == [theirs[k] for k in figures]
  assert [row["mean_denoise_steps"] for row in rows] == [1, 2, 1, 2]

  assert list(sweep.run(grid)) == rows
  assert len(loads) == 3
  c = config()
  c.seed = 1
  grid = sweep.cells(c, [str(MODEL)], [], axes, str(output))
  with pytest.raises(errors.UserError) as error:
    list(sweep.run(grid))
  assert str(error.value).count("config.seed: 0 before, 1 now") == 2


def row(model: str, steps: int, rule: str, accuracy: float) -> dict:
  return {
    "model": model,
    "completion_length": 256,
    "num_denoise_steps": steps,
    "unmask_rule": rule,
    "temperature": 0.0,
    "num_problems": 100,
    "accuracy": accuracy,
    "accuracy_standard_error": 0.05,
    "accuracy_tolerant": None,
    "mean_length": 200.25,
    "seconds": 12.0,
    "tokens_per_second": 1000.0,
  }


ROWS = [
  row("base", 64, "confidence", 0.7),
  row("base", 32, "confidence", 0.5),
  row("base", 32, "random", 0.25),
  row("trained", 32, "random", 0.5),
]


def test_curves_name_what_differs():
  found = table.curves(ROWS)
  assert list(found) == [
    "base, confidence",
    "base, random",
    "trained, random",
  ]
  steps = [line["num_denoise_steps"] for line in found["base, confidence"]]
  assert steps == [32, 64]
  assert list(table.curves(ROWS[:1])) == ["base"]


def test_line_by_hand():
  head, line = table.line(), table.line(ROWS[0])
  assert head.split() == [
    *("model", "length", "steps", "unmask_rule", "temp", "accuracy"),
    *("±", "error", "tolerant", "tokens", "seconds", "tokens/s"),
  ]
  assert line.split() == [
    *("base", "256", "64", "confidence", "0.0", "70.0", "%"),
    *("5.0", "%", "-", "200.2", "12.0", "1000.0"),
  ]
  assert len(head) == len(line)


def test_long_and_wide_names_keep_the_columns():
  """By hand: 24 columns for the model, a character may take two of them."""
  plain = table.line(ROWS[0])
  for name, first, second in (
    ("a" * 30, "a" * 24, "a" * 6),
    ("[b]", "[b]" + 21 * " ", None),
    ("模" * 13, "模" * 12, "模"),
  ):
    got = table.line({**ROWS[0], "model": name}).splitlines()
    assert got[0] == first + plain[24:]
    assert got[1:] == ([] if second is None else [second])


def test_csv_and_picture(tmp_path):
  table.write_csv(tmp_path / "sweep.csv", ROWS)
  with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
    found = list(csv.DictReader(file))
  assert [line["accuracy"] for line in found] == ["0.7", "0.5", "0.25", "0.5"]
  assert found[0]["accuracy_tolerant"] == ""
  table.plot(ROWS, tmp_path / "sweep.png")
  assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "agrpo_jax.sweep"),
      f"--config={ROOT / 'configs' / 'sudoku_tiny.py'}",
      "--config.task.options.num_examples=8",
      "--config.grading.num_workers=1",
      "--config.evaluate.batch_size=8",
      "--num_denoise_steps=1,2",
      "--unmask_rule=random",
      f"--output={tmp_path}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0].startswith("problems: not a published split")
  assert [line.split()[:5] for line in lines[2:4]] == [
    ["tiny-sudoku", "16", "1", "random", "0.0"],
    ["tiny-sudoku", "16", "2", "random", "0.0"],
  ]
  assert {path.name for path in tmp_path.iterdir()} == {
    "cells",
    "sweep.csv",
    "sweep.png",
  }
