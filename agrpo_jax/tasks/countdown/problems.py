"""Countdown problems: made, checked and solved."""

import collections
import fractions
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

from agrpo_jax import errors
from agrpo_jax.tasks.verdicts import arithmetic

MAX_NUMBERS = 4
MAX_DIGITS = 4300  # of an integer; Python converts no longer ones
_TEST_SHARE = 1 / 8
_OPERATORS = "+-*/"
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}

Problem = tuple[tuple[int, ...], int]  # numbers, target
# value, text, rank of its operator, the equations that lead to it
_Value = tuple[fractions.Fraction, str, int, tuple[str, ...]]


def is_test(numbers: Sequence[int], target: int) -> bool:
  """Returns whether a generated problem belongs to the test split.

  By a hash of the numbers in any order and the target, so that no seed and no
  version moves a problem across.
  """
  name = f"{sorted(numbers)} {target}".encode()
  draw = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") / 2**32
  return draw < _TEST_SHARE


def problems(
  split: str,
  count: int,
  *,
  num_numbers: int,
  max_number: int,
  max_target: int,
  seed: int,
  or_all: bool = False,
) -> list[Problem]:
  """Returns `count` different solvable problems of `split`.

  Numbers are uniform in 1..max_number; the target is what a random expression
  of them gives, if that is a whole number in 1..max_target. The list for a
  larger count starts with the list for a smaller one. If there are fewer, and
  `or_all`, then nearly all that there are.

  Raises:
    UserError: impossible settings.
  """
  if (
    not 2 <= num_numbers <= MAX_NUMBERS
    or min(max_number, max_target, count) < 1
  ):
    raise errors.UserError(
      f"task 'countdown': {num_numbers=}, {max_number=}, {max_target=}, "
      f"num_examples={count} are impossible: need 2 <= num_numbers <= "
      f"{MAX_NUMBERS} and the others at least 1."
    )
  # Only random() is promised to give the same numbers in every Python.
  draw = random.Random(f"countdown {split} {num_numbers} {seed}").random
  found: dict[tuple, Problem] = {}
  num_misses = 0
  while len(found) < count:
    numbers = tuple(1 + int(draw() * max_number) for _ in range(num_numbers))
    value = _random_value(numbers, draw)
    key = (tuple(sorted(numbers)), value)
    if (
      value is None
      or value.denominator != 1
      or not 1 <= value <= max_target
      or is_test(numbers, int(value)) != (split == "test")
      or key in found
    ):
      num_misses += 1
      if num_misses > 20_000 and found and or_all:
        break
      if num_misses > 20_000:
        raise errors.UserError(
          f"task 'countdown': only about {len(found)} different problems of "
          f"split {split!r} have {num_numbers} numbers up to {max_number} and "
          f"targets up to {max_target}; lower num_examples={count}."
        )
      continue
    num_misses = 0
    found[key] = (numbers, int(value))
  return list(found.values())


def _random_value(
  numbers: Sequence[int], draw: Callable[[], float]
) -> fractions.Fraction | None:
  """Returns the value of a random expression; None if it divides by 0.

  Two values are drawn and joined by a random operator until one is left, so
  every way to put brackets can come up.
  """
  values = [fractions.Fraction(number) for number in numbers]
  while len(values) > 1:
    left = values.pop(int(draw() * len(values)))
    right = values.pop(int(draw() * len(values)))
    operator = _OPERATORS[int(draw() * len(_OPERATORS))]
    if operator == "/" and right == 0:
      return None
    values.append(_apply(operator, left, right))
  return values[0]


def _apply(
  operator: str, left: fractions.Fraction, right: fractions.Fraction
) -> fractions.Fraction:
  if operator == "+":
    return left + right
  if operator == "-":
    return left - right
  return left * right if operator == "*" else left / right


def uses(expression: str, numbers: Sequence[int]) -> bool:
  """Returns whether the integers in `expression` are exactly `numbers`."""
  written = re.findall(r"\d+", expression)
  if any(len(digits) > MAX_DIGITS for digits in written):
    return False
  return collections.Counter(map(int, written)) == collections.Counter(numbers)


def solves(expression: str, numbers: Sequence[int], target: int) -> bool:
  """Returns whether + - * / of each number once give the target, exactly."""
  if "**" in expression or "//" in expression:
    return False
  if not uses(expression, numbers):
    return False
  try:
    return arithmetic.value(expression) == target
  except ValueError:
    return False


def solution(numbers: tuple[int, ...], target: int) -> str | None:
  """Returns an expression that solves the problem; None if there is none.

  The first of an exhaustive search, so always the same one.
  """
  found = _search(numbers, target)
  return None if found is None else found[1]


def equations(numbers: tuple[int, ...], target: int) -> tuple[str, ...]:
  """Returns the operations of `solution` in order, each as in "6*9=54".

  An operand that is no whole number is written as a fraction in parentheses;
  () if there is no solution.
  """
  found = _search(numbers, target)
  return () if found is None else found[3]


def added_up(numbers: Sequence[int]) -> tuple[str, tuple[str, ...]]:
  """Returns the sum of all numbers as an expression, and its equations."""
  add = functools.partial(_join, "+")
  _, expression, _, steps = functools.reduce(add, _alone(numbers))
  return expression, steps


@functools.lru_cache(maxsize=4096)
def _search(numbers: tuple[int, ...], target: int) -> _Value | None:
  found = _combinations(_alone(numbers))
  return next((value for value in found if value[0] == target), None)


def _alone(numbers: Sequence[int]) -> list[_Value]:
  return [(fractions.Fraction(n), str(n), 3, ()) for n in numbers]


def _combinations(values: Sequence[_Value]) -> Iterator[_Value]:
  if len(values) == 1:
    yield values[0]
    return
  for i, j in itertools.permutations(range(len(values)), 2):
    rest = [value for k, value in enumerate(values) if k not in (i, j)]
    for operator in _OPERATORS:
      if (operator in "+*" and i > j) or (
        operator == "/" and values[j][0] == 0
      ):
        continue
      yield from _combinations([*rest, _join(operator, values[i], values[j])])


def _join(operator: str, left: _Value, right: _Value) -> _Value:
  """Returns two expressions joined, with as few parentheses as needed."""
  rank = _RANK[operator]
  left_text = f"({left[1]})" if left[2] < rank else left[1]
  needs = right[2] < rank or (right[2] == rank and operator in "-/")
  right_text = f"({right[1]})" if needs else right[1]
  value = _apply(operator, left[0], right[0])
  equation = f"{_operand(left[0])}{operator}{_operand(right[0])}={value}"
  return (
    value,
    f"{left_text}{operator}{right_text}",
    rank,
    (*left[3], *right[3], equation),
  )


def _operand(value: fractions.Fraction) -> str:
  """Returns a value as it stands in an equation: 12, (-3) or (1/2)."""
  text = str(value)
  return text if text.isdecimal() else f"({text})"
