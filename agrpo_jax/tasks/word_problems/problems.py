"""Word problems made from templates, and the equations that solve them.

A problem opens with a number of things (a count, bags of a size, days of
picking, or two people who pool) and goes on with what happens to them. Every
event is one equation on what the one before left.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable
from collections.abc import Sequence
from typing import TypeVar

from agrpo_jax import errors

MAX_EQUATIONS = 4
MAX_CHARS = 2000  # of a completion that is looked at
_TEST_SHARE = 1 / 8
_MAX_MISSES = 20_000  # in a row, until a generator gives up

_NAMES = ("Ann", "Ben", "Eva", "Sam", "Mia", "Tom", "Zoe", "Leo")
_THINGS = ("pens", "cups", "eggs", "nuts", "figs", "toys", "caps", "keys")
# What a problem opens with -> the operators of its equations so far.
_OPENINGS = {
  "{name} had {a} {things}": "",
  "{name} had {a} bags of {b} {things}": "*",
  "{name} picked {a} {things} a day for {b} days": "*",
  "{name} had {a} {things}, {other} {b} more. They pooled them": "++",
}
_EVENTS = {
  "+": ("bought {n}", "found {n}", "got {n}"),
  "-": ("sold {n}", "lost {n}", "gave away {n}"),
}
# Their numbers are words, so that not every number of a solution is copied.
_SCALINGS = {
  ("*", 2): "doubled them",
  ("*", 3): "tripled them",
  ("/", 2): "kept half",
  ("/", 3): "kept a third",
}
_SCALING_SHARE = 0.2  # of events

_T = TypeVar("_T")
_Draw = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question and its solution.

  Attributes:
    question: text.
    unit: what is counted.
    equations: as in "7+5=12", one per line of the solution, in order; each goes
      on from the value of the one before.
  """

  question: str
  unit: str
  equations: tuple[str, ...]

  @property
  def answer(self) -> int:
    """What the last equation gives."""
    return int(self.equations[-1].partition("=")[2])


def is_test(equations: Sequence[str]) -> bool:
  """Returns whether problems with this solution belong to the test split.

  By a hash of the equations alone, so that neither other words around the same
  arithmetic nor a seed nor a version moves a problem across.
  """
  name = " ".join(equations).encode()
  draw = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") / 2**32
  return draw < _TEST_SHARE


def problems(
  split: str,
  count: int,
  *,
  min_equations: int,
  max_equations: int,
  max_number: int,
  max_value: int,
  seed: int,
) -> list[Problem]:
  """Returns `count` different problems of `split`.

  Numbers are uniform in 2..max_number; every equation gives a whole number in
  1..max_value. The list for a larger count starts with the list for a smaller
  one.

  Raises:
    UserError: impossible settings.
  """
  if (
    not 1 <= min_equations <= max_equations <= MAX_EQUATIONS
    or max_number < 2
    or min(max_value, count) < 1
  ):
    raise errors.UserError(
      f"task 'word_problems': {min_equations=}, {max_equations=}, "
      f"{max_number=}, {max_value=}, num_examples={count} are impossible: need "
      f"1 <= min_equations <= max_equations <= {MAX_EQUATIONS}, max_number >= "
      "2 and the others at least 1."
    )
  # Only random() is promised to give the same numbers in every Python.
  draw = random.Random(f"word_problems {split} {seed}").random
  found: dict[str, Problem] = {}
  num_misses = 0
  while len(found) < count:
    length = min_equations + int(draw() * (max_equations - min_equations + 1))
    problem = _random_problem(length, max_number, max_value, draw)
    if (
      problem is None
      or is_test(problem.equations) != (split == "test")
      or problem.question in found
    ):
      num_misses += 1
      if num_misses > _MAX_MISSES:
        raise errors.UserError(
          f"task 'word_problems': only about {len(found)} different problems "
          f"of split {split!r} have {min_equations} to {max_equations} "
          f"equations with numbers up to {max_number} and values up to "
          f"{max_value}; lower num_examples={count}."
        )
      continue
    num_misses = 0
    found[problem.question] = problem
  return list(found.values())


def _pick(choices: Sequence[_T], draw: _Draw) -> _T:
  return choices[int(draw() * len(choices))]


def _random_problem(
  length: int, max_number: int, max_value: int, draw: _Draw
) -> Problem | None:
  """Returns a problem of `length` equations; None if a value is not allowed."""
  opening, operators = _pick(
    [one for one in _OPENINGS.items() if len(one[1]) <= length], draw
  )
  a, b = (2 + int(draw() * (max_number - 1)) for _ in range(2))
  name = _pick(_NAMES, draw)
  other = _pick([one for one in _NAMES if one != name], draw)
  unit = _pick(_THINGS, draw)
  text = opening.format(name=name, other=other, a=a, b=b, things=unit)
  # Who has `b` more than `a` has a + b, and both together a + (a + b).
  terms = {"": [], "*": [("*", b)], "++": [("+", b), ("+", a)]}[operators]
  events = []
  while len(terms) < length:
    if draw() < _SCALING_SHARE:
      operator, number = _pick(list(_SCALINGS), draw)
      phrase = _SCALINGS[operator, number]
    else:
      operator = _pick("+-", draw)
      number = 2 + int(draw() * (max_number - 1))
      phrase = _pick(_EVENTS[operator], draw).format(n=number)
    terms.append((operator, number))
    events.append(phrase)
  equations = []
  value = a
  for operator, number in terms:
    after = apply(value, operator, number)
    if after is None or not 1 <= after <= max_value:
      return None
    equations.append(f"{value}{operator}{number}={after}")
    value = after
  if events:
    # The pool's first event stands behind a comma too: "pooled them, sold 2".
    text = " and ".join([", ".join([text, *events[:-1]]), events[-1]])
  return Problem(f"{text}. How many?", unit, tuple(equations))


def careless(problem: Problem) -> Problem:
  """Returns the problem with a solution that adds what the story takes away.

  Where a number is then no whole multiple of what it is divided by, the
  solution stays as it is.
  """
  equations: list[str] = []
  value = 0
  for equation in problem.equations:
    match = _EQUATION.fullmatch(equation)
    if match is None:
      raise ValueError(f"{equation!r} is no equation")
    first, operator, number = match.group(1, 2, 3)
    operator = "+" if operator == "-" else operator
    value = value if equations else int(first)
    after = apply(value, operator, int(number))
    if after is None:
      return problem
    equations.append(f"{value}{operator}{number}={after}")
    value = after
  return dataclasses.replace(problem, equations=tuple(equations))


def apply(left: int, operator: str, right: int) -> int | None:
  """Returns the value of one operation; None if it is not a whole number."""
  if operator == "+":
    return left + right
  if operator == "-":
    return left - right
  if operator == "*":
    return left * right
  return left // right if right and left % right == 0 else None


# ASCII digits, few enough that they are read in no time. It stands free: it is
# no part of a decimal or of a longer chain ("1+2+3=6" holds no equation).
_EQUATION = re.compile(
  r"(?<![^\s,;:])([0-9]{1,6}) ?([-+*/]) ?([0-9]{1,6}) ?= ?([0-9]{1,6})"
  r"(?=[.,;:]?(?:\s|$))"
)
_ANSWER = re.compile(r"\s*(-?[0-9]{1,6})\s*")
MARK = "####"  # stands before the answer, as in GSM8K's solutions


def solution(problem: Problem) -> str:
  """Returns the text to imitate: an equation per line, and the answer."""
  lines = [f"{equation} {problem.unit}" for equation in problem.equations]
  return "\n".join([*lines, f"{MARK} {problem.answer}"])


def find_answer(text: str) -> int | None:
  """Returns the number that stands alone behind the last ####, or None."""
  _, mark, tail = text[:MAX_CHARS].rpartition(MARK)
  match = _ANSWER.fullmatch(tail)
  return int(match[1]) if mark and match else None


def share_right(text: str, equations: Sequence[str]) -> float:
  """Returns the share of the solution's equations that a text has right.

  The k-th equation that is written counts if it is the k-th of the solution,
  operands of + and * in either order: so it is true, and it uses the numbers of
  the problem in their order. More equations than the solution has make the
  share smaller, or else a text that tries everything would have them all.
  """
  written = _equations(text[:MAX_CHARS])
  wanted = _equations("\n".join(equations))
  right = sum(one == other for one, other in zip(written, wanted, strict=False))
  return right / max(len(written), len(wanted), 1)


def _equations(text: str) -> list[tuple[int, str, int, int]]:
  """Returns what is written as an equation, true or not, in order."""
  found = []
  for left, operator, right, value in _EQUATION.findall(text):
    a, b = int(left), int(right)
    if operator in "+*":
      a, b = min(a, b), max(a, b)
    found.append((a, operator, b, int(value)))
  return found
