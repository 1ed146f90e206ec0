"""math: which problems are left, and the three verdicts."""

import json
import sys
import types

import pytest

from agrpo_jax import errors
from agrpo_jax.tasks import math


def _row(problem, level="Level 3", solution="It is $\\boxed{\\frac{1}{2}}$."):
  return {"problem": problem, "level": level, "solution": solution}


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


_TRAIN = [
  _row("a"),
  _row("b", level="Level 5"),
  _row("c", level="Level ?"),
  _row("d", solution="no box"),
  _row("e", level="4"),
  _row("held out"),
]


def test_training_problems(tmp_path):
  path = _write(tmp_path / "train.jsonl", _TRAIN)
  test = [{"problem": "held out", "answer": "1"}]
  exclude = _write(tmp_path / "test.jsonl", test)

  def problems(**options):
    examples = math.examples("train", path=path, options=options)
    return [example.fields["question"] for example in examples]

  assert problems(exclude=exclude) == ["a", "e"]
  assert problems() == ["a", "e", "held out"]
  assert problems(max_level=5) == ["a", "b", "e", "held out"]
  assert problems(num_examples=1) == ["a"]
  examples = math.examples("train", path=path)
  assert examples[0].fields["gold"] == "\\frac{1}{2}"
  assert [example.id for example in examples] == [0, 1, 2]


def test_a_folder_holds_its_own_test_split(tmp_path):
  _write(tmp_path / "train.jsonl", _TRAIN)
  _write(tmp_path / "test.jsonl", [{"problem": "held out", "answer": "1"}])
  train = math.examples("train", path=str(tmp_path))
  assert [e.fields["question"] for e in train] == ["a", "e"]
  test = math.examples("test", path=str(tmp_path))
  assert [e.fields for e in test] == [{"question": "held out", "gold": "1"}]


def test_hub_training_leaves_out_math_500(monkeypatch):
  data = {
    "qwedsacf/competition_math": _TRAIN,
    "HuggingFaceH4/MATH-500": [{"problem": "held out", "answer": "1"}],
  }
  module = types.ModuleType("datasets")
  module.load_dataset = lambda name, *unused, **unused_too: data[name]
  monkeypatch.setitem(sys.modules, "datasets", module)
  train = math.examples("train")
  assert [e.fields["question"] for e in train] == ["a", "e"]


def test_nothing_left_is_a_user_error(tmp_path):
  path = _write(tmp_path / "train.jsonl", [_row("b", level="Level 5")])
  with pytest.raises(errors.UserError, match="none of the 1 rows"):
    math.examples("train", path=path)


@pytest.mark.parametrize("level", [0, 6])
def test_bad_level(level):
  with pytest.raises(
    errors.UserError, match=f"max_level={level} must be 1 to 5"
  ):
    math.examples("train", options={"max_level": level})


def test_an_answer_may_be_a_number(tmp_path):
  path = _write(tmp_path / "test.jsonl", [{"problem": "a", "answer": 5}])
  (example,) = math.examples("test", path=path)
  assert example.fields["gold"] == "5"
  _write(tmp_path / "test.jsonl", [{"problem": "a", "answer": {"b": 5}}])
  with pytest.raises(errors.UserError, match="line 1: column answer must hold"):
    math.examples("test", path=path)


def test_wrong_columns(tmp_path):
  path = _write(tmp_path / "test.jsonl", [{"question": "a", "answer": "b"}])
  with pytest.raises(errors.UserError, match="column problem is missing"):
    math.examples("test", path=path)


@pytest.mark.parametrize(
  "completion, gold, strict, tolerant, string",
  [
    ("<answer>\\boxed{\\frac12}</answer>", "\\frac{1}{2}", 1, 1, 1),
    ("<answer>\\boxed{0.5}</answer>", "\\frac{1}{2}", 1, 1, 1),
    ("<answer>\\boxed{0.50}</answer>", "\\frac{1}{2}", 1, 1, 0),
    ("<answer>\\boxed{\\frac{2}{4}}</answer>", "\\frac{1}{2}", 1, 1, 0),
    ("\\boxed{1} no, \\boxed{2}", "2", 0, 1, 1),
    ("<answer>\\boxed{3}", "3", 1, 1, 1),
    ("<answer>3", "3", 0, 1, 0),
    ("\\boxed{2\\pi}", "2", 0, 0, 0),
    ("\\boxed{(1,2)}", "(1, 2)", 1, 1, 1),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1, 1, 1),
    ("\\boxed{5 or 6}", "6", 0, 0, 0),
    ("\\boxed{x=5}", "5", 1, 1, 1),
    ("", "5", 0, 0, 0),
  ],
)
def test_verdicts(completion, gold, strict, tolerant, string):
  fields = {"gold": gold}
  grades = math.grade(completion, fields)
  assert grades == {
    "accuracy": strict,
    "accuracy_tolerant": tolerant,
    "accuracy_string": string,
  }
  assert (
    math.grade(completion, fields, {"protocol": "d1"})["accuracy"] == string
  )


def test_reward():
  completion = "<think>x</think><answer>\\boxed{\\frac{2}{4}}</answer>"
  parts = math.reward(completion, {"gold": "\\frac{1}{2}"})
  assert parts == {"think_tag": 1.0, "answer_tag": 1.0, "correct": 1.0}
  assert set(math.reward_weights({})) == set(parts)
