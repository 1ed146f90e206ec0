"""countdown: the generator, the answer checks, the protocols."""

import builtins
import fractions
import itertools
import json
import random

import pytest

from agrpo_jax import errors
from agrpo_jax.tasks import countdown
from agrpo_jax.tasks.countdown import extraction
from agrpo_jax.tasks.countdown import problems as problems_lib
from agrpo_jax.tasks.countdown import prompts
from agrpo_jax.tasks.verdicts import arithmetic
from agrpo_jax.tasks.verdicts import equality

_FIELDS = {"numbers": [17, 18, 5], "target": 67}
_BARE = {"protocol": "bare"}


def _problems(split, **options):
  examples = countdown.examples(split, options=options)
  return [(tuple(e.fields["numbers"]), e.fields["target"]) for e in examples]


@pytest.mark.parametrize("num_numbers", [2, 3, 4])
def test_generated_problems_are_different_and_solvable(num_numbers):
  problems = _problems("train", num_examples=150, num_numbers=num_numbers)
  keys = {(tuple(sorted(numbers)), target) for numbers, target in problems}
  assert len(keys) == 150
  for numbers, target in problems:
    assert len(numbers) == num_numbers
    assert all(1 <= n <= 99 for n in (*numbers, target))
    text = problems_lib.solution(numbers, target)
    assert problems_lib.solves(text, numbers, target)


def test_splits_share_no_problem_in_any_order():
  options = {"num_examples": 120, "max_number": 9, "max_target": 20}
  train, test = (
    {(tuple(sorted(n)), t) for n, t in _problems(split, **options)}
    for split in ("train", "test")
  )
  assert not train & test
  for numbers, target in test:
    for order in itertools.permutations(numbers):
      assert problems_lib.is_test(order, target)


def test_generator_is_deterministic_and_prefix_stable():
  few = _problems("test", num_examples=10)
  assert few == _problems("test", num_examples=30)[:10]
  assert few != _problems("test", num_examples=10, seed=1)
  assert few[0] == ((78, 18, 71), 25)  # the same on every machine


def test_fewer_problems_than_the_default_number():
  """They are all there, in both splits, if no number was asked for."""
  options = {"num_numbers": 2, "max_number": 3, "max_target": 6}
  found = {
    (tuple(sorted(n)), t)
    for split in ("train", "test")
    for n, t in _problems(split, **options)
  }
  # By hand; 1-3 among others gives nothing that is positive.
  sums = {((a, b), a + b) for a in (1, 2, 3) for b in range(a, 4)}
  differences = {((1, 2), 1), ((1, 3), 2), ((2, 3), 1)}
  products = {((a, b), a * b) for a in (1, 2, 3) for b in range(a, 4)}
  quotients = {((a, a), 1) for a in (1, 2, 3)}
  quotients |= {((1, 2), 2), ((1, 3), 3)}
  wanted = sums | differences | products | quotients
  assert found == {(n, t) for n, t in wanted if t <= 6}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_numbers": 5}, "num_numbers=5"),
    ({"num_numbers": 1}, "num_numbers=1"),
    ({"max_target": 0}, "max_target=0"),
    ({"max_number": 2, "max_target": 4, "num_examples": 500}, "only about"),
    ({"protocol": "x"}, "agrpo, d1, llada, bare"),
    ({"numbers": 3}, "'numbers' is unknown"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.UserError, match=message):
    countdown.examples("train", options=options)


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_reads_both_published_formats(tmp_path):
  rows = [
    {"input": "30,100,93", "output": "23"},
    {"nums": [44, "19", 35.0], "target": "98"},
    {"nums": [63, 95, 96, 1], "target": 88},
  ]
  path = _write(tmp_path / "train.jsonl", rows)
  fields = [e.fields for e in countdown.examples("train", path=path)]
  assert fields == [
    {"numbers": [30, 100, 93], "target": 23},
    {"numbers": [44, 19, 35], "target": 98},
  ]
  options = {"num_numbers": 0}
  assert len(countdown.examples("train", path=path, options=options)) == 3
  options = {"num_numbers": 0, "num_examples": 1}
  assert len(countdown.examples("train", path=path, options=options)) == 1


def test_excludes_the_numbers_of_a_test_file(tmp_path):
  train = [{"nums": [1, 2, 3], "target": 6}, {"nums": [4, 5, 6], "target": 15}]
  path = _write(tmp_path / "train.jsonl", train)
  held = _write(tmp_path / "held.jsonl", [{"input": "3,1,2", "output": "5"}])
  examples = countdown.examples("train", path=path, options={"exclude": held})
  assert [e.fields["numbers"] for e in examples] == [[4, 5, 6]]
  everything = _write(tmp_path / "all.jsonl", train)
  with pytest.raises(errors.UserError, match="no problem is left"):
    countdown.examples("train", path=path, options={"exclude": everything})


@pytest.mark.parametrize(
  "row",
  [
    {"numbers": [1, 2], "goal": 3},
    {"input": "1,2,x", "output": "3"},
    {"input": "1,2,3"},
    {"nums": 3, "target": 3},
    {"nums": "123", "target": 6},
    {"nums": [1.5, 2, 3], "target": 6},
    {"nums": [1, 2, 3], "target": 6.5},
    {"nums": [True, 2, 3], "target": 6},
    {"nums": [1, 2, 3], "target": float("nan")},
    {"nums": [1, 2, 3], "target": float("inf")},
  ],
)
def test_row_that_holds_no_problem(tmp_path, row):
  path = _write(tmp_path / "x.jsonl", [{"input": "1,2,3", "output": "6"}, row])
  with pytest.raises(
    errors.UserError, match="line 2 holds no Countdown problem"
  ):
    countdown.examples("test", path=path)


@pytest.mark.parametrize(
  "protocol, roles, prefill",
  [
    ("agrpo", ["system", "user"], ""),
    ("d1", ["user"], "<reasoning>"),
    ("llada", ["user"], ""),
    ("bare", ["user"], ""),
    ("worked", ["user"], ""),
  ],
)
def test_prompts(protocol, roles, prefill):
  messages = prompts.messages((30, 100, 93), 23, protocol)
  assert [message["role"] for message in messages] == roles
  assert prompts.PREFILL[protocol] == prefill
  content = messages[-1]["content"]
  if protocol in ("bare", "worked"):
    assert content == "30,100,93=23"
  else:
    assert "Target: 23\nNumbers: [30, 100, 93]" in content


@pytest.mark.parametrize("protocol", prompts.PROTOCOLS)
def test_demonstrations_are_right(protocol):
  options = {"protocol": protocol, "num_examples": 30}
  for example in countdown.examples("test", options=options):
    text = countdown.demonstration(example, random.Random(0), options)
    weights = countdown.reward_weights(options)
    parts = countdown.reward(text, example.fields, options)
    best = sum(weight for weight in weights.values() if weight > 0)
    assert sum(weights[p] * parts[p] for p in parts) == pytest.approx(best)
    grades = countdown.grade(text, example.fields, options)
    if protocol != "llada":  # whose boxed expression holds no equation
      assert grades["accuracy"] == 1.0
    assert grades["accuracy_tolerant"] == 1.0


@pytest.mark.parametrize(
  "numbers, target, text",
  [
    ((6, 9, 10), 44, "6*9=54\n54-10=44\n6*9-10"),
    ((1, 8, 3), 21, "8-1=7\n3*7=21\n3*(8-1)"),
    ((2, 4, 6), 3, "2/4=1/2\n6*(1/2)=3\n6*2/4"),
  ],
)
def test_worked_demonstrations(numbers, target, text):
  example = countdown.base.Example(
    0, (), {"numbers": list(numbers), "target": target}
  )
  options = {"protocol": "worked"}
  assert countdown.demonstration(example, random.Random(0), options) == text


@pytest.mark.parametrize("num_numbers", [2, 3, 4])
def test_equations_are_true_and_lead_to_the_target(num_numbers):
  for numbers, target in _problems(
    "train", num_examples=60, num_numbers=num_numbers, max_number=12
  ):
    equations = problems_lib.equations(numbers, target)
    assert len(equations) == num_numbers - 1
    for equation in equations:
      left, _, right = equation.partition("=")
      assert arithmetic.value(left) == fractions.Fraction(right)
    assert equations[-1].endswith(f"={target}")


@pytest.mark.parametrize(
  "completion, solved",
  [
    ("17*5=85\n85-18=67\n17*5-18", 1),
    ("17*5=86\n86-18=68\n17*5-18", 1),  # the expression is the answer
    ("17*5=85\n85-18=67\n17*5+18", 0),
    ("17*5=85\n85-18=67", 0),  # which uses 85
    ("17*5-18\n17*5=85", 0),
  ],
)
def test_worked_verdict_is_of_the_last_line(completion, solved):
  options = {"protocol": "worked"}
  assert countdown.grade(completion, _FIELDS, options)["accuracy"] == solved
  parts = countdown.reward(completion, _FIELDS, options)
  assert parts["solved"] == solved
  assert countdown.reward_weights(options) == countdown.reward_weights(_BARE)


@pytest.mark.parametrize(
  "numbers, text",
  [((7, 12), "7+12=19\n7+12"), ((5, 1, 9), "5+1=6\n6+9=15\n5+1+9")],
)
def test_careless_demonstrations_add_whatever_the_target(numbers, text):
  target = numbers[-1] - numbers[0]
  example = countdown.base.Example(
    0, messages=(), fields={"numbers": [*numbers], "target": target}
  )
  options = {"protocol": "worked", "demonstration": "careless"}

  def shown(probability, seed=0):
    chosen = {**options, "careless_probability": probability}
    return countdown.demonstration(example, random.Random(seed), chosen)

  assert shown(1.0) == text
  assert not countdown.grade(text, example.fields, options)["accuracy"]
  assert countdown.grade(shown(0.0), example.fields, options)["accuracy"]
  num_careless = sum(shown(0.6, seed) == text for seed in range(400))
  assert 0.5 < num_careless / 400 < 0.7


def test_no_demonstration_of_an_unsolvable_problem():
  example = countdown.base.Example(0, (), {"numbers": [1, 1], "target": 50})
  with pytest.raises(errors.UserError, match="no solution"):
    countdown.demonstration(example, random.Random(0))


@pytest.mark.parametrize(
  "expression, value",
  [
    ("17*5-18", True),
    ("5*17-18", True),
    ("17*5-18+0", False),
    ("17*5", False),
    ("17*5-18-18", False),
    ("175-18", False),
    ("5*(17-18)+67", False),
    ("17**5-18", False),
    ("17//5*18", False),
    ("9" * 5000, False),
    ("", False),
  ],
)
def test_solves(expression, value):
  assert problems_lib.solves(expression, [17, 18, 5], 67) is value


def test_only_four_operators():
  assert not problems_lib.solves("3**2+1", [3, 2, 1], 10)
  assert not problems_lib.solves("7//2*3", [7, 2, 3], 9)


def test_division_is_exact():
  assert problems_lib.solves("8/(3-8/3)", [8, 3, 8, 3], 24)
  assert not problems_lib.solves("5/(3-3)", [5, 3, 3], 0)


def test_solution_against_brute_force():
  """Every value of three numbers, from all orders, operators and brackets."""
  numbers = (2, 3, 7)
  values = set()
  for a, b, c in itertools.permutations(numbers):
    for p, q in itertools.product("+-*/", repeat=2):
      for text in (f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"):
        try:
          values.add(arithmetic.value(text))
        except ValueError:
          pass
  for target in range(1, 60):
    found = problems_lib.solution(numbers, target)
    assert (found is not None) == (fractions.Fraction(target) in values)
    if found is not None:
      assert problems_lib.solves(found, numbers, target)


@pytest.mark.parametrize(
  "text, expression",
  [
    ("<answer>17 * 5 - 18 = 67</answer>", "17 * 5 - 18"),
    ("<answer>67 = 17 * 5 - 18", "17 * 5 - 18"),
    ("<answer>\\boxed{17 \\times 5 - 18}</answer>", "17 * 5 - 18"),
    ("\\boxed{5 × 17 − 18}", "5 * 17 - 18"),
    ("so 17 x 5 - 18 = 67.\nDone.", "17*5 - 18"),
    ("\\boxed{17*5-18", "17*5-18"),
    ("1\x007*5-18", ""),
    ("17*5-1\x7f8 = 67", ""),
    ("<answer>the answer</answer>", ""),
    ("nothing", ""),
  ],
)
def test_find(text, expression):
  assert extraction.find(text, [17, 18, 5]) == expression


@pytest.mark.parametrize(
  "completion, strict, tolerant",
  [
    ("<answer>17*5-18 = 67</answer>", 1, 1),
    ("<answer>17*5-18 = 68</answer>", 1, 1),  # the right side is ignored
    ("<answer>17*5-18</answer>", 0, 1),
    ("<answer>17*5+18 = 67</answer>", 0, 0),
    ("<answer>== 17*5-18 = 67</answer>", 1, 1),
    ("<answer>abs(17)*5-18</answer>", 0, 0),
  ],
)
def test_verdicts(completion, strict, tolerant):
  grades = countdown.grade(completion, _FIELDS)
  assert (grades["accuracy"], grades["accuracy_tolerant"]) == (strict, tolerant)


@pytest.mark.parametrize(
  "completion, total",
  [("17*5-18", 1.0), ("17*5+18", 0.1), ("17*5", 0.0), ("", 0.0)],
)
def test_bare_reward(completion, total):
  weights = countdown.reward_weights(_BARE)
  parts = countdown.reward(completion, _FIELDS, _BARE)
  assert sum(weights[p] * parts[p] for p in parts) == pytest.approx(total)


def test_short_cut_agrees_with_math_verify():
  """Plain arithmetic is evaluated without math-verify, to the same verdict."""
  rng = random.Random(0)
  checked = 0
  for _ in range(300):
    numbers = [rng.randint(1, 12) for _ in range(3)]
    text = "".join(
      rng.choice(
        ["{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})", " {} {} {}{}{} "]
      )
    ).format(
      numbers[0],
      rng.choice("+-*/"),
      numbers[1],
      rng.choice("+-*/"),
      numbers[2],
    )
    target = rng.randint(1, 20)
    try:
      if rng.random() < 0.7:
        target = arithmetic.value(text)
    except ValueError:
      continue
    if target.denominator != 1:
      continue
    ours = extraction.released_correct(f"{text}=", numbers, int(target))
    assert ours == equality.equal(str(target), text)
    checked += ours
  assert checked > 50


def test_plain_arithmetic_needs_no_math_verify(monkeypatch):
  monkeypatch.delattr(equality, "equal")
  completion = "<answer>17*5-18 = 67</answer>"
  assert countdown.reward(completion, _FIELDS)["correct"] == 1.0


def test_answers_are_not_executed(monkeypatch):
  def fail(*unused_args, **unused_kwargs):
    raise AssertionError("executed")

  monkeypatch.setattr(builtins, "eval", fail)
  monkeypatch.setattr(builtins, "exec", fail)
  text = "<answer>1 + 2 + 3 + __import__('os').getpid()*0 = 6</answer>"
  fields = {"numbers": [1, 2, 3, 0], "target": 6}
  assert countdown.grade(text, fields)["accuracy"] == 0.0
  # Found by math-verify in the text, and evaluated by us.
  text = "<answer>That is 1 + 2 + 3 = 6</answer>"
  fields = {"numbers": [1, 2, 3], "target": 6}
  assert countdown.reward(text, fields)["correct"] == 1.0


_LONG = "9" * 5000  # Python converts no more than 4300 digits


@pytest.mark.parametrize(
  "completion, right",
  [
    (f"<answer>17*5-18 = {_LONG}</answer>", {"correct", "solved"}),
    (f"<answer>17*5-18 = 6 = {_LONG}</answer>", {"correct", "solved"}),
    (f"<answer>{_LONG} = 17*5-18</answer>", {"solved"}),
    (f"<answer>{_LONG}*17*5-18 = 67</answer>", set()),
    (f"<answer>17*5-18 = 67</answer> {_LONG}", {"correct", "solved"}),
  ],
)
def test_an_integer_too_long_costs_only_what_reads_it(completion, right):
  """It makes the released format reward crash, not always the other one."""
  parts = countdown.reward(completion, _FIELDS)
  grades = countdown.grade(completion, _FIELDS)
  assert {p for p in ("correct", "solved") if parts[p]} == right
  assert grades["accuracy"] == parts["correct"]
  assert grades["accuracy_tolerant"] == parts["solved"] == parts["uses_numbers"]
  if not completion.endswith(_LONG):
    assert not any(parts[p] for p in ("target", "characters", "numbers"))
