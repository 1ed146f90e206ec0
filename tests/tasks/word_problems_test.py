"""word_problems: the generator, the split, the answer checks."""

import builtins
import dataclasses
import random
import re

import pytest

from agrpo_jax import errors
from agrpo_jax.tasks import base
from agrpo_jax.tasks import contract
from agrpo_jax.tasks import word_problems
from agrpo_jax.tasks.verdicts import arithmetic
from agrpo_jax.tasks.word_problems import problems as problems_lib

_FIELDS = {
  "question": "Ann had 7 pens, bought 5, lost 4 and doubled them. How many?",
  "unit": "pens",
  "equations": ["7+5=12", "12-4=8", "8*2=16"],
  "gold": 16,
}
_RIGHT = "7+5=12 pens\n12-4=8 pens\n8*2=16 pens\n#### 16"


def _examples(split, **options):
  return word_problems.examples(split, options=options)


def _chains(split, **options):
  return {tuple(e.fields["equations"]) for e in _examples(split, **options)}


def test_generated_problems_are_different_and_solved():
  examples = _examples("train", num_examples=500)
  assert len({e.fields["question"] for e in examples}) == 500
  assert {len(e.fields["equations"]) for e in examples} == {2, 3, 4}
  for example in examples:
    value = None
    for equation in example.fields["equations"]:
      left, _, result = equation.partition("=")
      assert value in (None, re.match(r"\d+", left)[0])  # goes on from there
      assert arithmetic.value(left) == int(result)
      assert 1 <= int(result) <= 99
      value = result
    assert example.fields["gold"] == int(value)


def test_a_solution_uses_the_numbers_of_the_text_in_their_order():
  """Save for the words: doubled, tripled, half, a third, pooled."""
  words = "pooled|doubled|tripled|half|third"
  for example in _examples("test", num_examples=200):
    question = example.fields["question"]
    numbers = [
      int(word) if word.isdigit() else word
      for word in re.findall(rf"\d+|{words}", question)
    ]
    first = example.fields["equations"][0]
    used = [int(re.match(r"\d+", first)[0])]
    for equation in example.fields["equations"]:
      used.append(int(re.search(r"[-+*/](\d+)", equation)[1]))
    spoken = {"doubled": 2, "tripled": 3, "half": 2, "third": 3}
    spoken["pooled"] = numbers[0]
    assert used == [spoken.get(word, word) for word in numbers]


@pytest.mark.parametrize(
  "options",
  [
    {"num_examples": 3000},
    # Few chains, so that each is met again and again in other words.
    {"num_examples": 1500, "max_equations": 2, "max_number": 5},
  ],
)
def test_no_solution_stands_in_both_splits(options):
  train = _chains("train", **options) | _chains("train", **options, seed=1)
  test = _chains("test", **options) | _chains("test", **options, seed=1)
  assert train and test
  assert not train & test
  assert all(map(problems_lib.is_test, test))
  assert not any(map(problems_lib.is_test, train))


def test_generator_is_deterministic_and_prefix_stable():
  few = _examples("test", num_examples=10)
  assert few == _examples("test", num_examples=30)[:10]
  assert few != _examples("test", num_examples=10, seed=1)
  # The same on every machine.
  assert few[0].fields["equations"] == ["5+4=9", "9+6=15", "15+7=22"]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"min_equations": 0}, "min_equations=0"),
    ({"max_equations": 5}, "max_equations=5"),
    ({"min_equations": 4, "max_equations": 3}, "min_equations=4"),
    ({"max_number": 1}, "max_number=1"),
    ({"max_value": 0}, "max_value=0"),
    ({"num_examples": -1}, "num_examples=-1"),
    ({"max_number": 2, "max_value": 1}, "only about 0"),
    ({"protocol": "bare"}, "'protocol' is unknown"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.UserError, match=message):
    word_problems.examples("train", options=options)


def test_reads_no_file_and_knows_two_splits():
  with pytest.raises(errors.UserError, match="reads no file"):
    word_problems.examples("train", path="x.jsonl")
  with pytest.raises(errors.UserError, match="train, test"):
    word_problems.examples("dev")


def test_sizes_of_prompts_and_demonstrations():
  """Prompts in 96 bytes and solutions in 64, whatever the options allow."""
  options = {"num_examples": 4000, "min_equations": 4}
  examples = contract.examples(word_problems, "train", options=options)
  for example in examples:
    assert len(example.messages[0]["content"].encode()) <= 96
    text = word_problems.demonstration(example, random.Random(0), options)
    assert len(text.encode()) <= 64


def test_demonstrations_are_right():
  for example in _examples("test", num_examples=100):
    text = word_problems.demonstration(example, random.Random(0))
    parts = word_problems.reward(text, example.fields)
    assert parts == {"correct": 1.0, "equations": 1.0}
    assert word_problems.reward_weights({}).keys() == parts.keys()
    grades = word_problems.grade(text, example.fields)
    assert grades == {"accuracy": 1.0, "equations": 1.0}
    assert word_problems.answer(text, {}) == str(example.fields["gold"])


def test_careless_demonstrations_add_what_is_taken_away():
  problem = problems_lib.Problem(
    _FIELDS["question"], "pens", tuple(_FIELDS["equations"])
  )
  wrong = problems_lib.careless(problem)
  assert wrong.equations == ("7+5=12", "12+4=16", "16*2=32")
  assert wrong.answer == 32
  halved = dataclasses.replace(problem, equations=("9-3=6", "6-4=2", "2/2=1"))
  assert problems_lib.careless(halved).equations == (
    *("9+3=12", "12+4=16", "16/2=8"),
  )
  # 7 has no whole half.
  odd = dataclasses.replace(problem, equations=("5-2=3", "3+1=4", "4/3=1"))
  assert problems_lib.careless(odd) == odd

  options = {"demonstration": "careless", "num_examples": 400}
  rng = random.Random(0)
  num_takes, num_careless = 0, 0
  for example in _examples("train", **options):
    takes = any("-" in equation for equation in example.fields["equations"])
    text = word_problems.demonstration(example, rng, options)
    is_right = word_problems.reward(text, example.fields)["correct"]
    assert is_right or takes
    num_takes += takes
    num_careless += not is_right
  # 0.6, less those whose solution carelessness cannot change.
  assert 0.45 < num_careless / num_takes < 0.65


@pytest.mark.parametrize(
  "completion, correct, equations",
  [
    (_RIGHT, 1, 3),
    ("7+5=12\n12-4=8\n8*2=16\n#### 16\n\n", 1, 3),
    ("5 + 7 = 12. 12 - 4 = 8. 2 * 8 = 16. #### 16", 1, 3),
    ("#### 16", 1, 0),  # the answer alone is worth its part
    ("7+5=12 12-4=8 8*2=16", 0, 3),  # no answer
    ("7+5=13\n12-4=8\n8*2=16\n#### 16", 1, 2),
    ("7+5=12\n4-12=8\n8*2=16\n#### 16", 1, 2),  # 12-4, and not 4-12
    ("12-4=8\n7+5=12\n8*2=16\n#### 16", 1, 1),  # out of order
    ("7+5=12\n12-4=8\n8*2=17\n#### 17", 0, 2),
    ("7+5=12 #### 15 #### 16", 1, 1),  # the last mark counts
    ("7+5=12 #### 16 #### 15", 0, 1),
    ("#### 16 pens", 0, 0),
    ("#### 16 or 17", 0, 0),
    ("#### 1 6", 0, 0),
    ("####16", 1, 0),
    ("#### 16.0", 0, 0),
    ("#### --16", 0, 0),
    ("#### ", 0, 0),
    ("16", 0, 0),
    ("", 0, 0),
  ],
)
def test_parts(completion, correct, equations):
  parts = word_problems.reward(completion, _FIELDS)
  assert parts["correct"] == correct
  assert parts["equations"] == pytest.approx(equations / 3)
  assert word_problems.grade(completion, _FIELDS)["accuracy"] == correct


def test_trying_everything_is_worth_little():
  everything = "\n".join(
    f"{a}+{b}={a + b}" for a in range(10) for b in range(10)
  )
  text = f"{everything}\n12-4=8\n8*2=16\n#### 16"
  assert word_problems.reward(text, _FIELDS)["equations"] <= 3 / 100
  text = "7+5=12 12-4=8 8*2=16 8*2=16 8*2=16 8*2=16"
  assert word_problems.reward(text, _FIELDS)["equations"] == 3 / 6


@pytest.mark.parametrize(
  "completion",
  [
    "#### " + "1" * 5000,
    "#### " + "0" * 100_000 + "16",
    "1" * 100_000 + "+5=12",
    "9" * 50_000 + "*" + "9" * 50_000 + "=1",
    "7+5=1" + "2" * 5000,
    "7+5=12" * 20_000,  # no gap between them: chains, not equations
    "+".join(["7"] * 50_000) + "=12",
    "7**5=12 12--4=8 8*=16",
    "7+5=12=12-4=8=8*2=16",  # nested in one another
    "(7+5)=12 (12-4)=8 ((8*2))=(16)",
    "7.5+5=12.5 x7+5=12 7+5=12x 7+5=12.5",
    "١+٢=٣ #### ١٦",  # digits of another script
    "７+５=１２ #### １６",
    "7²+5=12 #### 16²",
    "7+5=12" + "\u200b" + "5 #### 1\u200b6",
    "7\x00+5=12 #### 1\x006",
    "####" * 25_000,
    " " * 100_000 + "#### 16",
    "#### __import__('os').getpid()",
    "#### 8*2",
    "\ud800 #### x",
  ],
)
def test_hostile_completions_are_worth_nothing(completion, monkeypatch):
  def fail(*unused_args, **unused_kwargs):
    raise AssertionError("executed")

  monkeypatch.setattr(builtins, "eval", fail)
  monkeypatch.setattr(builtins, "exec", fail)
  parts = word_problems.reward(completion, _FIELDS)
  assert parts == {"correct": 0.0, "equations": 0.0}
  assert word_problems.grade(completion, _FIELDS)["accuracy"] == 0.0
  assert word_problems.answer(completion, _FIELDS) == ""


def test_equal_answers_are_equal_texts():
  assert word_problems.answer("#### 016", _FIELDS) == "16"
  assert word_problems.answer("#### -4", _FIELDS) == "-4"
  assert base.is_text(word_problems.answer(_RIGHT, _FIELDS))
