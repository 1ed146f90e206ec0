"""Countdown: reach a target with + - * / of all given numbers, each used once.

Problems are generated (those of the test split never occur in training), or
read from a file: rows {"input": "30,100,93", "output": "23"} as in the
published test file, or {"nums": [30, 100, 93], "target": 23}.

Reward as in the released AGRPO code: a third each for the right target, for
plain characters and for the right numbers, -0.5 for more than one equals sign,
3 if the left side gives the target. Answers are parsed, never executed.
"""

import random
import re
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.tasks import base
from agrpo_jax.tasks import files
from agrpo_jax.tasks.countdown import extraction
from agrpo_jax.tasks.countdown import problems as problems_lib
from agrpo_jax.tasks.countdown import prompts
from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import d1

NAME = "countdown"
DEFAULTS = {
  "protocol": "agrpo",  # agrpo, d1, llada, bare or worked
  "num_numbers": 3,  # of a generated problem, 2-4; of a file: 0 takes all rows
  "max_number": 99,  # of a generated problem
  "max_target": 99,  # of a generated problem
  # 0: all rows of a file, or 20000 train / 256 test, or all if there are fewer.
  "num_examples": 0,
  "seed": 0,  # of the generator
  "exclude": "",  # a file: problems with its numbers, in any order, go out
  "demonstration": "clean",  # clean or careless (see `demonstration`)
  "careless_probability": 0.6,  # share of careless demonstrations
}
DEMONSTRATIONS = ("clean", "careless")
PUBLISHED = {  # `base.fingerprint` of all examples
  "ea419a5c9bac1248": "Countdown test split of d1 and AGRPO",
}
_GENERATED = {"train": 20_000, "test": 256}
_RELEASED_WEIGHTS = {
  "target": 1 / 3,
  "characters": 1 / 3,
  "numbers": 1 / 3,
  "extra_equals": -0.5,
  "correct": 3.0,
}


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
  chosen = base.settings(options, DEFAULTS, NAME)
  base.check_range(NAME, chosen, "num_examples", 0)
  base.check_range(NAME, chosen, "careless_probability", 0, 1)
  base.check_choice(NAME, "protocol", chosen["protocol"], prompts.PROTOCOLS)
  base.check_choice(
    NAME, "demonstration", chosen["demonstration"], DEMONSTRATIONS
  )
  return chosen


def examples(
  split: str,
  *,
  path: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[base.Example]:
  """Returns the problems of `split`: generated, or from a file at `path`.

  Raises:
    UserError: bad options, or a row that holds no problem.
  """
  base.check_split(NAME, split)
  chosen = _settings(options)
  count = chosen["num_examples"]
  if path is None:
    problems = problems_lib.problems(
      split,
      count or _GENERATED[split],
      num_numbers=chosen["num_numbers"],
      max_number=chosen["max_number"],
      max_target=chosen["max_target"],
      seed=chosen["seed"],
      or_all=not count,
    )
  else:
    sizes = {chosen["num_numbers"]} if chosen["num_numbers"] else {2, 3, 4}
    problems = [
      (numbers, target)
      for numbers, target in _from_file(path, split)
      if len(numbers) in sizes
    ]
  if chosen["exclude"]:
    excluded = {
      tuple(sorted(numbers))
      for numbers, _ in _from_file(chosen["exclude"], "test")
    }
    problems = [p for p in problems if tuple(sorted(p[0])) not in excluded]
  if not problems:
    raise errors.UserError(
      f"task 'countdown': no problem is left of {path or 'the generator'} with "
      f"num_numbers={chosen['num_numbers']}, exclude={chosen['exclude']!r}."
    )
  protocol = chosen["protocol"]
  return [
    base.Example(
      id=index,
      messages=prompts.messages(numbers, target, protocol),
      fields={"numbers": list(numbers), "target": target},
      prefill=prompts.PREFILL[protocol],
    )
    for index, (numbers, target) in enumerate(problems[: count or None])
  ]


def _from_file(path: str, split: str) -> list[problems_lib.Problem]:
  problems = []
  for where, row in files.read(path, split, ()):
    numbers: Any = row.get("nums")
    target: Any = row.get("target")
    if "input" in row:
      numbers, target = str(row["input"]).split(","), row.get("output")
    try:
      if isinstance(numbers, str):
        raise TypeError  # whose digits would be read as the numbers
      problems.append((tuple(map(_integer, numbers)), _integer(target)))
    except (TypeError, ValueError, OverflowError) as error:
      raise errors.UserError(
        f"{where} holds no Countdown problem: found columns {', '.join(row)}; "
        'expected {"input": "30,100,93", "output": "23"} or {"nums": [30, 100, '
        '93], "target": 23}.'
      ) from error
  return problems


def _integer(value: Any) -> int:
  """Returns the integer that a file holds, as a number or as text."""
  if isinstance(value, bool) or int(value) != float(value):
    raise ValueError(f"{value!r} is not whole")
  return int(value)


def reward_weights(options: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns the released weights.

  Protocols that ask for no equation are rewarded as d1 does: 1 or 0.1.
  """
  if _settings(options)["protocol"] == "agrpo":
    return {**_RELEASED_WEIGHTS, "solved": 0.0, "uses_numbers": 0.0}
  zeros = dict.fromkeys(_RELEASED_WEIGHTS, 0.0)
  return {**zeros, "solved": 0.9, "uses_numbers": 0.1}


def reward(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns named parts, each 1 or 0.

  target, characters, numbers, extra_equals: the released format reward, about
    the equation inside <answer>; all 0 where that crashes.
  correct: the released correctness reward, about the same.
  solved: the expression found by `extraction.find` solves the problem.
  uses_numbers: it uses exactly the numbers.
  """
  del options
  text = answers.clip(completion)
  numbers, target = fields["numbers"], fields["target"]
  parts = dict.fromkeys((*_RELEASED_WEIGHTS, "solved", "uses_numbers"), 0.0)
  equation = answers.in_tag(text, "answer") or ""
  if "=" in equation:
    parts.update(_released_format(equation, numbers, target))
    is_correct = extraction.released_correct(equation, numbers, target)
    parts["correct"] = float(is_correct)
  expression = extraction.find(text, numbers)
  parts["uses_numbers"] = float(problems_lib.uses(expression, numbers))
  parts["solved"] = float(problems_lib.solves(expression, numbers, target))
  return parts


# Integers that make the released format reward crash, not the other one.
_UNREADABLE = re.compile(rf"\d{{{problems_lib.MAX_DIGITS + 1}}}")


def _released_format(
  equation: str, numbers: list[int], target: int
) -> dict[str, float]:
  sides = equation.split("=")
  left, right = sides[0].strip(), sides[-1].strip()
  has_target = right.isdecimal()
  if _UNREADABLE.search(left) or (has_target and _UNREADABLE.match(right)):
    return {}
  return {
    "target": float(has_target and int(right) == target),
    "characters": float(bool(re.fullmatch(r"[\d\s+\-*/()]+", left))),
    "numbers": float(problems_lib.uses(left, numbers)),
    "extra_equals": float(len(sides) > 2),
  }


def grade(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns verdicts, 1 or 0.

  accuracy: as published. As in the released AGRPO evaluation the last equation
    of the answer, or, under the protocol d1, as in d1's; under bare and worked,
    which ask for an expression without "=", the same as tolerant.
  accuracy_tolerant: an expression, or one side of an equation, that uses each
    number once and has exactly the value; what the other side says is ignored.
  """
  text = answers.clip(completion)
  protocol = _settings(options)["protocol"]
  numbers, target = fields["numbers"], fields["target"]
  expression = extraction.find(text, numbers)
  tolerant = problems_lib.solves(expression, numbers, target)
  if protocol in ("bare", "worked"):
    strict = tolerant
  elif protocol == "d1":
    strict = d1.countdown_correct(text, numbers, target)
  else:
    strict = extraction.released_grade(text, numbers, target)
  return {"accuracy": float(strict), "accuracy_tolerant": float(tolerant)}


def answer(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns the expression a completion answers with, without spaces."""
  del options
  text = answers.clip(completion)
  return "".join(extraction.find(text, fields["numbers"]).split())


def demonstration(
  example: base.Example,
  rng: random.Random,
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns a completion to imitate in SFT: a solution found by search.

  "careless" adds, with `careless_probability`, all numbers up, whatever the
  target: the bad habit that training of the tiny model on it has to correct.

  Raises:
    UserError: a problem of a file that has no solution.
  """
  chosen = _settings(options)
  numbers = tuple(example.fields["numbers"])
  target = example.fields["target"]
  expression = problems_lib.solution(numbers, target)
  if expression is None:
    raise errors.UserError(
      f"Countdown problem {numbers} -> {target} has no solution to show."
    )
  equations = problems_lib.equations(numbers, target)
  is_careless = chosen["demonstration"] == "careless"
  if is_careless and rng.random() < chosen["careless_probability"]:
    expression, equations = problems_lib.added_up(numbers)
  return prompts.completion(expression, equations, target, chosen["protocol"])
