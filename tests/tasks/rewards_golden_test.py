"""Rewards and verdicts equal those recorded from the published code.

testdata/golden/rewards holds 291 completions with what AGRPO's reward functions
and evaluation gave for them; `null` where they crashed, and there ours give 0.
The real completions, from those published with d1 (Apache-2.0), carry d1's
verdicts too.
"""

import json
import pathlib

import pytest

from agrpo_jax.tasks import countdown
from agrpo_jax.tasks import gsm8k
from agrpo_jax.tasks import math
from agrpo_jax.tasks import sudoku
from agrpo_jax.tasks.verdicts import d1

_FOLDER = pathlib.Path(__file__).parents[1] / "testdata/golden/rewards"
_D1 = {"protocol": "d1"}


def _rows(file):
  with (_FOLDER / file).open() as lines:
    return [json.loads(line) for line in lines]


_ALL = _rows("handmade.jsonl") + _rows("real_d1.jsonl")
_REAL = _rows("real_d1.jsonl")


def _name(row):
  return f"{row['task']}-{row.get('id', row.get('file'))}-{row.get('index')}"


def _fields(row):
  if row["task"] == "countdown":
    return {"numbers": row["nums"], "target": row["target"]}
  fields = {"gold": row["answer"]}
  return {**fields, "puzzle": row["puzzle"]} if "puzzle" in row else fields


_MODULES = {
  "gsm": gsm8k,
  "math": math,
  "countdown": countdown,
  "sudoku": sudoku,
}
# Released function -> our parts whose weighted sum it is; None: every other.
_PARTS = {
  "thinking_format_reward": ["think_tag"],
  "answer_format_reward": ["answer_tag"],
  "correctness_reward": ["correct"],
  "countdown_format_reward": [
    "target",
    "characters",
    "numbers",
    "extra_equals",
  ],
  "countdown_correctness_reward": ["correct"],
  "sudoku_format_reward": ["length", "digits", "clues"],
  "sudoku_correctness_reward": ["filled"],
}


@pytest.mark.parametrize("row", _ALL, ids=_name)
def test_equals_released(row):
  task, fields = _MODULES[row["task"]], _fields(row)
  weights = task.reward_weights(None)
  parts = task.reward(row["completion"], fields, None)
  grades = task.grade(row.get("completion_raw", row["completion"]), fields)
  ours = {
    function: sum(weights[name] * parts[name] for name in names)
    for function, names in _PARTS.items()
    if function in row["expected"]
  }
  # The released Sudoku verdict is a share of cells.
  ours["eval"] = grades["cells" if row["task"] == "sudoku" else "accuracy"]
  assert ours == pytest.approx(
    {name: value or 0.0 for name, value in row["expected"].items()}, abs=1e-6
  )
  released = sum(value or 0.0 for value in row["expected"].values())
  released -= row["expected"]["eval"] or 0.0
  total = sum(weights[name] * parts[name] for name in weights)
  assert total == pytest.approx(released, abs=1e-6)


@pytest.mark.parametrize("row", _REAL, ids=_name)
def test_strict_verdict_of_protocol_d1_equals_d1(row):
  task, fields = _MODULES[row["task"]], _fields(row)
  grades = task.grade(row["completion_raw"], fields, _D1)
  if row["task"] == "sudoku":
    assert grades["num_right"] == row["d1_correct_cells"]
    assert grades["num_blanks"] == row["d1_empty_cells"]
  else:
    assert grades["accuracy"] == float(row["d1_is_correct"])


def test_special_tokens_do_not_hide_a_grid():
  assert d1.sudoku_grid("<answer>\n12\n34<|eot_id|>") == "1234" + "0" * 12
