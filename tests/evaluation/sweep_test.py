"""Sweeps: the grid, what is refused, what is repeated, what comes out."""

import csv
import pathlib
import shutil

import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import sweep
from agrpo_jax.evaluation import table
from agrpo_jax.samplers import sampling
from fixtures import commands
from fixtures import sudoku


def config() -> config_lib.ConfigDict:
  return sudoku.config(num_examples=4)


def test_every_combination_is_a_cell(tmp_path):
  axes = {"num_denoise_steps": [2, 4, 2], "temperature": [0.0, 0.5]}
  (group,) = sweep.cells(config(), [], [], axes, str(tmp_path))
  found = [
    (
      s.completion_length,
      s.num_denoise_steps,
      s.unmask_rule,
      s.temperature,
    )
    for s in (cell.settings.evaluate.sampling for cell in group)
  ]
  assert found == [
    (16, 2, "confidence", 0.0),
    (16, 2, "confidence", 0.5),
    (16, 4, "confidence", 0.0),
    (16, 4, "confidence", 0.5),
  ]
  (group,) = sweep.cells(
    config(), [], [], {"cache": ["none", "dual"]}, str(tmp_path)
  )
  caches = [cell.settings.evaluate.sampling.cache for cell in group]
  assert caches == ["none", "dual"]
  assert len({cell.output for cell in group}) == 2


def test_settings_of_a_rule_stay_with_its_cells(tmp_path):
  """And those that no cache has with the cells that have none."""
  c = config()
  config_lib.use_sampler(c, "fast_dllm", ["completion_length", "block_length"])
  axes = {
    "unmask_rule": ["confidence", "threshold"],
    "cache": ["none", "dual"],
    "num_denoise_steps": [16],
  }
  (group,) = sweep.cells(c, [], [], axes, str(tmp_path))
  assert not [problem for cell in group for problem in cell.problems]
  found = [cell.settings.evaluate.sampling for cell in group]
  assert [s.threshold for s in found] == [None, None, 0.9, 0.9]
  assert [s.redraw_mask for s in found] == [True, False, True, False]


def test_every_cell_has_a_folder_of_its_own(tmp_path):
  axes = {"num_denoise_steps": [2, 4, 2], "temperature": [0.0, 0.5]}
  (group,) = sweep.cells(config(), [], [], axes, str(tmp_path))
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
  assert [group[0].settings.model.path for group in groups[:2]] == [
    "a/model",
    "b/model",
  ]
  groups = sweep.cells(config(), ["a/x", "b/y"], [], {}, str(tmp_path))
  assert [group[0].model for group in groups] == ["x", "y"]


def test_all_that_is_wrong_at_once(tmp_path):
  # A model without weights, which cannot be loaded.
  model, output = tmp_path / "tiny-sudoku", tmp_path / "output"
  model.mkdir()
  shutil.copy(sudoku.MODEL / "config.json", model)
  axes = {
    "completion_length": [16, 8, 5008],
    "unmask_rule": ["confidence", "greedy"],
    "temperature": [0.0, -1.0],
  }
  grid = sweep.cells(
    config(), [str(model), "./nowhere"], ["./no-run"], axes, str(output)
  )
  with pytest.raises(errors.UserError) as error:
    list(sweep.run(grid))
  message = str(error.value)
  assert message.startswith("Nothing was run.")
  for part in (
    "block_length=16 is more than completion_length=8; use at most that\n"
    "  (in 12 of 36",
    f"'greedy' is not one of {', '.join(sampling.RULES)}\n  (in 18",
    "temperature=-1.0 is below 0.001; 0 takes the most probable tokens\n"
    "  (in 18 of 36 cells; the first is tiny-sud",
    "make 5072 tokens, more than the model's 4096; lower one of them.",
    "./nowhere",
    "--checkpoint='./no-run' is not a work directory",
  ):
    assert part in message, part
  assert not output.exists()


def test_done_once_and_continued_cell_by_cell(tmp_path):
  models = [tmp_path / "tiny-sudoku", tmp_path / "other"]
  for model in models:
    shutil.copytree(sudoku.MODEL, model)
  axes = {"num_denoise_steps": [1, 2]}
  output = tmp_path / "sweep"
  grid = sweep.cells(config(), [*map(str, models)], [], axes, str(output))

  def hide(model, name="model.safetensors"):
    (model / name).rename(model / "hidden")

  def find(model, name="model.safetensors"):
    (model / "hidden").rename(model / name)

  # A model is loaded once, and the next one when its cells are due.
  rows = sweep.run(grid)
  first = next(rows)
  hide(models[0])
  hide(models[1])
  next(rows)
  with pytest.raises(errors.UserError, match="other"):
    next(rows)
  find(models[1])

  # Stopped within the second cell of four.
  sudoku.cut(pathlib.Path(grid[0][1].output), num_records=2)
  with pytest.raises(errors.UserError, match="tiny-sudoku"):
    list(sweep.run(grid))
  find(models[0])
  rows = list(sweep.run(grid))
  assert rows[0] == first
  assert [row["model"] for row in rows] == ["tiny-sudoku"] * 2 + ["other"] * 2
  # The same weights in another folder.
  figures = ("accuracy", "accuracy_tolerant", "mean_length", "num_disagree")
  for mine, theirs in zip(rows[:2], rows[2:], strict=True):
    assert [mine[k] for k in figures] == [theirs[k] for k in figures]
  assert [row["mean_denoise_steps"] for row in rows] == [1, 2, 1, 2]

  for model in models:
    hide(model)
  assert list(sweep.run(grid)) == rows
  c = config()
  c.seed = 1
  grid = sweep.cells(c, [str(models[0])], [], axes, str(output))
  with pytest.raises(errors.UserError) as error:
    list(sweep.run(grid))
  assert str(error.value).count("config.seed: 0 before, 1 now") == 2


def row(model: str, steps: int, rule: str, accuracy: float) -> dict:
  return {
    "model": model,
    "completion_length": 256,
    "num_denoise_steps": steps,
    "unmask_rule": rule,
    "cache": "none",
    "temperature": 0.0,
    "num_problems": 100,
    "accuracy": accuracy,
    "accuracy_standard_error": 0.05,
    "accuracy_tolerant": None,
    "mean_length": 200.25,
    "mean_denoise_steps": 32.0,
    "mean_whole_passes": 8.0,
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
    *("model", "length", "steps", "unmask_rule", "cache", "temp", "accuracy"),
    *("±", "error", "tolerant", "tokens", "taken", "passes", "seconds"),
    "tokens/s",
  ]
  assert line.split() == [
    *("base", "256", "64", "confidence", "none", "0.0", "70.0", "%"),
    *("5.0", "%", "-", "200.2", "32.0", "8.0", "12.0", "1000.0"),
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
  said = commands.alone(
    *("-m", "agrpo_jax.sweep", "--config=configs/sudoku_tiny.py"),
    "--config.task.options.num_examples=8",
    "--config.grading.num_workers=1",
    "--config.evaluate.batch_size=8",
    "--num_denoise_steps=1,2",
    "--unmask_rule=random",
    f"--output={tmp_path}",
    devices=1,
  )
  lines = said.splitlines()
  assert lines[0].startswith("problems: not a published split")
  assert [line.split()[:6] for line in lines[2:4]] == [
    ["tiny-sudoku", "16", "1", "random", "none", "0.0"],
    ["tiny-sudoku", "16", "2", "random", "none", "0.0"],
  ]
  assert {path.name for path in tmp_path.iterdir()} == {
    "cells",
    "sweep.csv",
    "sweep.png",
  }
