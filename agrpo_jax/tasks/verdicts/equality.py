"""Mathematical equality by `math-verify`, as the released AGRPO code asks it.

math-verify finds the expression in a text (LaTeX first), turns it into a sympy
expression and compares by value. Three things are changed.

* Plain arithmetic and numbers would go through sympy's parser, which hands text
  to Python's `eval`: `arithmetic.value` and `no_eval` take its place.
* What would take too long is refused beforehand where it can be told
  (`is_tame`). What slips through is stopped by the timer of the process that
  grades (`grading.worker`), so call this only there, or on text that you trust.
  math-verify's own alarms are off: they need whole seconds and another signal
  handler.
* Newer versions let 18% equal 18. The one that AGRPO was measured with (0.8.0)
  does not, and neither does this.
"""

import ast
import contextlib
import fractions
import functools
import itertools
import logging
import math
import re
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import math_verify
import sympy
from math_verify import grader
from math_verify import parser
from sympy.parsing import sympy_parser

from agrpo_jax.tasks import base
from agrpo_jax.tasks.verdicts import arithmetic

MAX_CHARS = 20_000  # of a text that is searched
MAX_LATEX_CHARS = 1000  # of one expression
MAX_NESTING = 24
MAX_BOXES = 100

# Of a sympy expression that is compared by computing.
MAX_NODES = 600
MAX_DEPTH = 24
MAX_BITS = 1 << 17  # of a power of a rational number
MAX_EXPONENT = 1000  # of anything else
MAX_SUM_TERMS = 500  # of a sum's power, written out: (a + b)^12 has 13
MAX_SUM_EXPONENT = 12  # with so many terms; above it a fifth of them
MAX_TERMS = 1000  # of a written-out sum or product
MAX_FACTORIAL = 10_000

logging.getLogger("math_verify").setLevel(logging.ERROR)


def equal(gold: str, text: str) -> bool:
  """Returns whether math-verify finds the value of `gold` in `text`.

  Args:
    gold: the gold answer, in dollar signs to be read as LaTeX.
    text: a model's.

  Returns:
    The verdict: False as well for text too long for math-verify's patterns, for
    an answer that is not tame and of another shape than the gold one, and when
    time is up.
  """
  if len(text) > MAX_CHARS or text.count("\\boxed") > MAX_BOXES:
    return False
  try:
    pairs = itertools.product(_parsed(gold), _parsed(text))
    return any(_equal(*_compared_sides(*pair)) for pair in pairs)
  except base.OutOfTime:
    return False


def _compared_sides(gold: Any, found: Any) -> tuple[Any, Any]:
  """Returns what math-verify will compare: of an equation maybe one side.

  So that the other side, which nobody looks at, need not be tame.
  """
  if grader.is_equation(found) and not grader.is_equation(gold):
    return gold, grader.take_last_relation(found).rhs
  if grader.is_assignment_relation(gold) and not grader.is_equation(found):
    return grader.take_last_relation(gold).rhs, found
  return gold, found


def _equal(gold: Any, found: Any) -> bool:
  if not (is_tame(gold) and is_tame(found)):
    return gold == found
  with no_eval():
    return math_verify.verify(gold, found, timeout_seconds=None)


# math-verify's patterns take quadratic time in a run of white space.
_LONG_SPACE = re.compile(r"(\s)\1{99,}")


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple:
  text = _LONG_SPACE.sub(lambda match: match[1] * 99, text)
  with no_eval():
    return tuple(math_verify.parse(text, parsing_timeout=None))


# --- What of math-verify is used or replaced that is no part of its interface.


def _parse_arithmetic(text: str) -> sympy.Rational:
  value = arithmetic.value(text)
  return sympy.Rational(value.numerator, value.denominator)


# The parser evaluates binomials at once, unlike everything else.
_LARGE_BINOMIAL = re.compile(r"binom\D{0,9}\d{5}|binom\D{0,9}\d+\D{1,9}\d{5}")


def _check_latex(latex: str) -> None:
  """Refuses LaTeX that would take very long to parse.

  Raises:
    ValueError: it is too long or too deep, or holds a large binomial.
  """
  depth = deepest = 0
  for character in latex:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  if deepest > MAX_NESTING or len(latex) > MAX_LATEX_CHARS:
    raise ValueError("the expression is too long or too deep")
  if _LARGE_BINOMIAL.search(latex):
    raise ValueError("the binomial is too large")


def _parse_bounded_latex(latex: str) -> sympy.Basic:
  _check_latex(latex)
  return _parse_latex(latex)


def _percentage_value(expression: sympy.Basic, default: object) -> sympy.Basic:
  """Returns what a percentage is worth, where newer versions drop the sign."""
  del default
  return expression.doit()


for _module, _name in (
  (parser, "parse_expr_cached"),
  (parser, "parse_latex_cached"),
  (grader, "get_pct_val"),
  (grader, "is_equation"),
  (grader, "is_assignment_relation"),
  (grader, "take_last_relation"),
):
  if not hasattr(_module, _name):
    raise ImportError(
      f"this math-verify has no {_module.__name__}.{_name}: install the "
      "version that requirements.txt names."
    )
_parse_latex = parser.parse_latex_cached
parser.parse_expr_cached = _parse_arithmetic
parser.parse_latex_cached = _parse_bounded_latex
grader.get_pct_val = _percentage_value


# --- Numbers without `eval`. sympy turns text into numbers by writing a line of
# Python and evaluating it: `sympy.Number("1")` ends in `eval("Integer (1 )")`.
# The text that gets there from a completion has passed patterns and a lexer,
# but code made from what a model wrote should not be run at all.

_MAKERS = {
  "Integer": sympy.Integer,
  "Float": sympy.Float,
  "Rational": sympy.Rational,
  "Symbol": sympy.Symbol,
}


@contextlib.contextmanager
def no_eval() -> Iterator[None]:
  """Keeps sympy, within it, to the literals it writes: it runs no code."""
  original = sympy_parser.eval_expr
  sympy_parser.eval_expr = literal
  try:
    yield
  finally:
    sympy_parser.eval_expr = original


def literal(
  code: object, local_dict: Mapping[str, Any], global_dict: Mapping[str, Any]
) -> sympy.Basic:
  """Returns the value of `Integer (12)`, `-Float ('0.5')`, a constant's name.

  The arguments are those of sympy's `eval_expr`.

  Raises:
    ValueError: any other code.
  """
  del local_dict
  if isinstance(code, str):
    value = _fold(ast.parse(code.strip(), mode="eval").body, global_dict)
    if value is not None:
      return value
  raise ValueError(f"not a literal: {code!r:.80}")


def _fold(node: ast.expr, names: Mapping[str, Any]) -> sympy.Basic | None:
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    value = _fold(node.operand, names)
    return None if value is None else -value
  if isinstance(node, ast.Name):
    value = names.get(node.id)
    return value if isinstance(value, sympy.Basic) else None
  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
    maker = _MAKERS.get(node.func.id)
    constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
    if maker and len(constants) == len(node.args) and not node.keywords:
      return maker(*constants)
  return None


# --- Which expressions may be compared by computing. Parsing builds a tree and
# evaluates little; comparing evaluates it. A tree that stands for an
# astronomical number, or that expands into very many terms, would only run into
# the time limit.


def is_tame(expression: object) -> bool:
  """Returns whether computing with `expression` costs little."""
  if not isinstance(expression, sympy.Basic):
    return True
  # Size and depth first: the rules for a node recurse into what is below it.
  nodes = [(expression, 1)]
  for node, depth in nodes:
    nodes.extend((argument, depth + 1) for argument in node.args)
    if depth > MAX_DEPTH or len(nodes) > MAX_NODES:
      return False
  return all(_is_tame_node(node) for node, _ in nodes)


def _is_tame_node(node: sympy.Basic) -> bool:
  if isinstance(node, sympy.Integral):
    return False  # nothing bounds the search for an antiderivative
  if isinstance(node, sympy.Pow):
    return _is_tame_power(node.base, _size(node.exp))
  if isinstance(node, sympy.exp):
    return _size(node.args[0]) <= MAX_EXPONENT
  if isinstance(node, (sympy.factorial, sympy.factorial2, sympy.binomial)):
    return all(_size(argument) <= MAX_FACTORIAL for argument in node.args)
  if isinstance(node, (sympy.Sum, sympy.Product)):
    return all(
      len(limits) < 3 or _size(limits[2]) + _size(limits[1]) <= MAX_TERMS
      for limits in node.limits
    )
  return True


def _is_tame_power(base_node: sympy.Basic, exponent: float) -> bool:
  """Returns whether a power is cheap.

  A number only grows; a sum is multiplied out, with a term for each way to
  choose among its terms.
  """
  value = _rational(base_node)
  if value is not None:
    # Not infinite: 1 to any power is 1, but the power has to be computed too.
    return exponent < math.inf and _bits(value) * exponent <= MAX_BITS
  if not isinstance(base_node, sympy.Add):
    return exponent <= MAX_EXPONENT
  if exponent > MAX_EXPONENT:
    return False
  num_terms = _num_terms(base_node, math.ceil(exponent))
  is_small = exponent <= MAX_SUM_EXPONENT
  return num_terms <= (MAX_SUM_TERMS if is_small else MAX_SUM_TERMS // 5)


def _num_terms(node: sympy.Basic, exponent: int = 1) -> int:
  """Returns a bound on the terms of a node to a power, written out.

  MAX_SUM_TERMS + 1 where it is more.
  """
  num_terms = 1
  if isinstance(node, sympy.Add):
    num_terms = sum(map(_num_terms, node.args))
  elif isinstance(node, sympy.Mul):
    num_terms = math.prod(map(_num_terms, node.args))
  elif isinstance(node, sympy.Pow) and _size(node.exp) <= MAX_EXPONENT:
    num_terms = _num_terms(node.base, math.ceil(_size(node.exp)))
  num_terms = min(num_terms, MAX_SUM_TERMS + 1)
  # So many ways to choose one of the terms for each factor, in any order.
  num_terms = math.comb(exponent + num_terms - 1, num_terms - 1)
  return min(num_terms, MAX_SUM_TERMS + 1)


def _rational(node: sympy.Basic) -> fractions.Fraction | None:
  """Returns the exact value; None if it is irrational, too large, or none.

  A decimal has the value of its float.
  """
  if isinstance(node, sympy.Rational):
    return fractions.Fraction(node.p, node.q)
  if isinstance(node, sympy.Float):
    number = float(node)
    return fractions.Fraction(number) if math.isfinite(number) else None
  if not isinstance(
    node, (sympy.Add, sympy.Mul, sympy.Pow, sympy.UnevaluatedExpr)
  ):
    return None
  values = [v for v in map(_rational, node.args) if v is not None]
  if not values or len(values) < len(node.args):
    return None
  result, *others = values
  for other in others:
    if isinstance(node, sympy.Add):
      result += other
    elif isinstance(node, sympy.Mul):
      result *= other
    elif (
      other.denominator == 1
      and _bits(result) * abs(other) <= MAX_BITS
      and (result or other >= 0)
    ):
      result = result ** int(other)
    else:
      return None
    if _bits(result) > MAX_BITS:
      return None
  return result


def _bits(value: fractions.Fraction) -> int:
  """Returns the bits that a factor of `value` adds; 0 for 1, 0 and -1."""
  return max(abs(value.numerator), value.denominator).bit_length() - 1


def _size(node: sympy.Basic) -> float:
  """Returns a bound on the absolute value; infinity if it is too large.

  A symbol counts as 1.
  """
  try:
    if isinstance(node, sympy.Number):
      return abs(float(node)) if node.is_finite else 1.0
    if (value := _rational(node)) is not None:
      return abs(float(value))
    sizes = [_size(argument) for argument in node.args]
    if isinstance(node, sympy.Add):
      return math.fsum(sizes)
    if isinstance(node, sympy.Mul):
      return math.prod(sizes)
    if isinstance(node, sympy.Pow):
      # A base below 1 under a negative power grows as well.
      return max(sizes[0], 1 / sizes[0] if sizes[0] else 1.0) ** sizes[1]
    if isinstance(node, sympy.exp):
      return math.exp(sizes[0])
    if isinstance(node, (sympy.factorial, sympy.factorial2)):
      return math.gamma(sizes[0] + 1)
  except OverflowError:
    return math.inf
  return max(sizes, default=1.0)
