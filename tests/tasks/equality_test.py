"""equality, tame: math-verify without eval and without explosions."""

import time

import pytest
import sympy

from agrpo_jax.tasks.verdicts import equality
from agrpo_jax.tasks.verdicts import tame

_X, _Y = sympy.symbols("x y")


def _pow(*tower):
  """An unevaluated tower of powers."""
  result = tower[-1]
  for base in reversed(tower[:-1]):
    result = sympy.Pow(base, result, evaluate=False)
  return sympy.sympify(result)


@pytest.mark.parametrize(
  "gold, text, verdict",
  [
    ("$\\frac{1}{2}$", "$0.5$", True),
    ("$18$", "$18.0$", True),
    ("$18$", "$17$", False),
    ("$(x+1)^2$", "$x^2+2x+1$", True),
    ("$x=5$", "$5$", True),
    ("$18$", "$18\\%$", False),
    ("$18\\%$", "$18\\%$", True),
    ("$0.18$", "$18\\%$", True),
    ("6", "so 1 + 2 + 3", True),
    ("7", "so 1 + 2 + 3", False),
    ("$18$", "", False),
    ("$18$", "$" * 1000, False),
    ("$18$", "$18$" + " " * 30_000, False),
    ("$18$", "\\boxed{18}" * 200, False),
  ],
)
def test_equal(gold, text, verdict):
  assert equality.equal(gold, text) is verdict


@pytest.mark.parametrize(
  "latex",
  [
    *["9^{9^{9^{9}}}", "10^{1000000000}", "100000!!", "x^{10^{10^{10}}}"],
    *["\\binom{1000000}{500000}", "\\sum_{k=1}^{10000000} \\frac{1}{k^2}"],
    *["(x+1)^{1000}", "(a+b+c+d)^{40}", "e^{e^{e^{e^{e}}}}"],
    *["(" * 60 + "x" + ")" * 60, "\\frac{1}{" * 40 + "2" + "}" * 40],
    *["x" * 3000, "1+" * 2000 + "1", "\\int_0^1 x^{x^x} dx"],
  ],
)
def test_explosions_are_refused(latex):
  begin = time.process_time()
  assert not equality.equal("$18$", f"${latex}$")
  assert time.process_time() - begin < 1.0


def test_what_is_refused_still_equals_itself():
  assert equality.equal("$10^{1000000000}$", "$10^{1000000000}$")
  assert not equality.equal("$10^{1000000000}$", "$10^{1000000001}$")


@pytest.mark.parametrize(
  "expression",
  [
    sympy.Integer(5),
    sympy.Rational(1, 3),
    sympy.pi,
    sympy.oo,
    sympy.Float("1.5"),
    _X**100,
    (_X + _Y) ** 12,
    _pow(2, 100),
    _pow(2, 3, 4),
    sympy.factorial(20, evaluate=False),
    sympy.binomial(10, 3, evaluate=False),
    sympy.Sum(_X, (_X, 1, 100)),
    sympy.exp(3),
    sympy.FiniteSet(1, 2),
    sympy.Matrix([1, 2]),
    "text",
  ],
)
def test_tame(expression):
  assert tame.is_tame(expression)


@pytest.mark.parametrize(
  "expression",
  [
    _pow(9, 9, 9),
    _pow(_X, 10, 10, 10),
    (_X + _Y) ** 13,
    sympy.factorial(2000, evaluate=False),
    sympy.factorial(sympy.factorial(7, evaluate=False), evaluate=False),
    sympy.binomial(5000, 3, evaluate=False),
    sympy.Sum(_X, (_X, 1, 10_000)),
    sympy.Product(_X, (_X, -10_000, 1)),
    sympy.exp(sympy.exp(10, evaluate=False), evaluate=False),
    sympy.Add(*[_X**i for i in range(2, 400)]),
    sympy.Integral(_X, _X),
  ],
)
def test_not_tame(expression):
  assert not tame.is_tame(expression)


def test_deep_tree_is_not_tame():
  tree = _X
  for _ in range(30):
    tree = sympy.sin(tree)
  assert not tame.is_tame(tree)
