"""Mathematical equality by `math-verify`, as the released AGRPO code asks it.

math-verify finds the expression in a text (LaTeX first), turns it into a sympy
expression and compares by value. Two things are changed. Plain arithmetic and
numbers would go through sympy's parser, which hands text to Python's `eval`:
`arithmetic.value` and `no_eval` take its place. And what would take too long
is refused beforehand where it can be told (`tame`); what slips through is
stopped by the timer of the process that grades (`worker`), so call this only
there, or on text that you trust. math-verify's own alarms are off: they need
whole seconds and another signal handler.
"""

import functools
import itertools
import logging
import re
from typing import Any

import math_verify
import sympy
from math_verify import parser

from agrpo_jax.tasks import base
from agrpo_jax.tasks.verdicts import arithmetic
from agrpo_jax.tasks.verdicts import no_eval
from agrpo_jax.tasks.verdicts import tame

MAX_CHARS = 20_000  # of a text that is searched
MAX_LATEX_CHARS = 1000  # of one expression
MAX_NESTING = 24
MAX_BOXES = 100

logging.getLogger("math_verify").setLevel(logging.ERROR)


def _parse_arithmetic(text: str) -> sympy.Rational:
  value = arithmetic.value(text)
  return sympy.Rational(value.numerator, value.denominator)


# The parser evaluates binomials at once, unlike everything else.
_LARGE_BINOMIAL = re.compile(r"binom\D{0,9}\d{4}|binom\D{0,9}\d+\D{1,9}\d{4}")
# math-verify's patterns take quadratic time in a run of white space.
_LONG_SPACE = re.compile(r"(\s)\1{99,}")


def _check_latex(latex: str) -> None:
  """Raises ValueError for LaTeX that would take very long to parse."""
  depth = deepest = 0
  for character in latex:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  if deepest > MAX_NESTING or len(latex) > MAX_LATEX_CHARS:
    raise ValueError("the expression is too long or too deep")
  if _LARGE_BINOMIAL.search(latex):
    raise ValueError("the binomial is too large")


for _name in ("parse_expr_cached", "parse_latex_cached"):
  if not hasattr(parser, _name):
    raise ImportError(
      f"this math-verify has no parser.{_name}: install the version that "
      "requirements.txt names."
    )
_parse_latex = parser.parse_latex_cached


def _parse_bounded_latex(latex: str) -> sympy.Basic:
  _check_latex(latex)
  return _parse_latex(latex)


parser.parse_expr_cached = _parse_arithmetic
parser.parse_latex_cached = _parse_bounded_latex


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple:
  text = _LONG_SPACE.sub(lambda match: match[1] * 99, text)
  with no_eval.no_eval():
    return tuple(math_verify.parse(text, parsing_timeout=None))


def equal(gold: str, text: str) -> bool:
  """Whether math-verify finds the value of `gold` in `text`.

  False as well for text too long for its patterns, for an answer that is not
  tame and of another shape than the gold one, and when time is up.
  """
  if len(text) > MAX_CHARS or text.count("\\boxed") > MAX_BOXES:
    return False
  try:
    golds, found = _parsed(gold), _parsed(text)
    if not all(map(tame.is_tame, (*golds, *found))):
      return any(a == b for a, b in itertools.product(golds, found))
    if any(map(_is_percentage, golds)) != any(map(_is_percentage, found)):
      golds = tuple(map(_as_number, golds))
      found = tuple(map(_as_number, found))
    with no_eval.no_eval():
      return math_verify.verify(list(golds), list(found), timeout_seconds=None)
  except base.OutOfTime:
    return False


# How math-verify marks a percentage. Newer versions let 18% equal 18; the one
# that AGRPO was measured with, and we, do not, though 18% equals 0.18.
_PERCENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))


def _is_percentage(expression: object) -> bool:
  return isinstance(expression, sympy.Mul) and _PERCENT in expression.args


def _as_number(expression: Any) -> Any:
  return expression.doit() if _is_percentage(expression) else expression
