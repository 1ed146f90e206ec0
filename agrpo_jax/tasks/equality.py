"""Mathematical equality by `math-verify`, as the released AGRPO code asks it.

math-verify finds the expression in a text (LaTeX first), turns it into a sympy
expression and compares by value. Two things are changed. Plain arithmetic
would go through sympy's `parse_expr`, which hands its text to Python's `eval`;
`arithmetic.value` takes its place. And its alarms are off: the time limit is
that of the process that grades (see `grading`), so call this only there, or on
text that you trust.
"""

import functools
import logging

import math_verify
import sympy
from math_verify import parser

from agrpo_jax.tasks import arithmetic

MAX_CHARS = 20_000

logging.getLogger("math_verify").setLevel(logging.ERROR)


def _parse_arithmetic(text: str) -> sympy.Rational:
  value = arithmetic.value(text)
  return sympy.Rational(value.numerator, value.denominator)


if not hasattr(parser, "parse_expr_cached"):
  raise ImportError(
    "this version of math-verify evaluates arithmetic in a place we do not "
    "know; install the one in requirements.txt."
  )
parser.parse_expr_cached = _parse_arithmetic


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> tuple:
  return tuple(math_verify.parse(text, parsing_timeout=None))


def equal(gold: str, text: str) -> bool:
  """Whether math-verify finds the value of `gold` in `text`.

  Text that is too long for its patterns is unequal.
  """
  if len(text) > MAX_CHARS:
    return False
  golds, found = _parsed(gold), _parsed(text)
  if any(map(_is_percentage, golds)) != any(map(_is_percentage, found)):
    golds, found = map(_as_number, golds), map(_as_number, found)
  return math_verify.verify(list(golds), list(found), timeout_seconds=None)


# How math-verify marks a percentage. Newer versions let 18% equal 18; the one
# that AGRPO was measured with, and we, do not, though 18% equals 0.18.
_PERCENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))


def _is_percentage(expression) -> bool:
  return isinstance(expression, sympy.Mul) and _PERCENT in expression.args


def _as_number(expression):
  return expression.doit() if _is_percentage(expression) else expression
