"""equality: math-verify as released, without eval and without explosions."""

import builtins
import time

import pytest
import sympy
from sympy.parsing import sympy_parser

from agrpo_jax.tasks.verdicts import equality

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


# Verdicts of math-verify 0.8.0, which AGRPO was measured with.


@pytest.mark.parametrize(
  "gold, text, verdict",
  [
    ("18", "x=18\\%", False),
    ("x=18", "x=18\\%", False),
    ("18", "5+13=18\\%", False),
    ("18", "18 percent", False),
    ("18\\%", "x=18", False),
    ("0.18", "x=18\\%", True),
    ("18\\%", "x=18\\%", True),
    ("18,20", "18\\%,20\\%", False),
    ("0.18,0.2", "18\\%,20\\%", True),
    ("\\{18\\}", "\\{18\\%\\}", False),
    ("x<18", "x<18\\%", False),
    ("x<0.18", "x<18\\%", True),
    ("x+18\\%", "x+0.18", True),
    ("9", "900\\%", True),
    ("50\\%", "\\frac12", True),
    ("33.3333\\%", "\\frac13", True),
  ],
)
def test_a_percentage_is_a_hundredth_wherever_it_stands(gold, text, verdict):
  assert equality.equal(f"${gold}$", f"${text}$") is verdict


@pytest.mark.parametrize(
  "gold, text",
  [
    ("-1", "(5(-2)+9)^611"),
    ("-1", "(-1)^{2023}"),
    ("1", "1^{2024}"),
    ("1", "(3-2)^{1000000}"),
    ("1", "(\\frac12+\\frac12)^{999}"),
    ("1", "(1+1)^{100}/2^{100}"),
    ("0", "0^{5000}"),
    ("3", "3^{(1-1)^{5000}+1}"),
    ("2^{5000}", "4^{2500}"),
    ("2^{1001}", "2\\cdot 2^{1000}"),
    ("(1+\\sqrt2)^{20}", "(3+2\\sqrt2)^{10}"),
    ("2047276", "\\binom{2024}{2}"),
    ("2024", "\\frac{2024!}{2023!}"),
    ("1", "(1.5-0.5)^{611}"),
    ("2x(3y+2)^{20}", "x\\cdot(3y+2)^{20}\\cdot2"),
  ],
)
def test_large_powers_of_numbers_are_computed(gold, text):
  assert equality.equal(f"${gold}$", f"${text}$")
  assert not equality.equal("$77$", f"${text}$")


@pytest.mark.parametrize(
  "latex",
  [
    *["9^{9^{9^{9}}}", "10^{1000000000}", "100000!!", "x^{10^{10^{10}}}"],
    *["\\binom{1000000}{500000}", "\\sum_{k=1}^{10000000} \\frac{1}{k^2}"],
    *[
      "7^{10000000}",
      "(6+1)^{10000000}",
      "1^{10^{10^{10}}}",
      "((2^{999})^{999})",
    ],
    *["(1+\\pi)^{999}", "(1+\\sqrt2+\\sqrt3)^{40}", "\\binom{99999}{50000}"],
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
  assert equality.equal("$10^{1000000000}$", "$x=10^{1000000000}$")
  assert equality.equal("$18$", "$10^{1000000000}=18$")
  assert not equality.equal("$18$", "$18=10^{1000000000}$")
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
    (_X + _Y) ** 99,
    (_X + _Y + sympy.Symbol("z") + 1) ** 12,
    ((_X + 1) ** 3 + 1) ** 5,
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
  assert equality.is_tame(expression)


@pytest.mark.parametrize(
  "expression",
  [
    _pow(9, 9, 9),
    _pow(_X, 10, 10, 10),
    (_X + _Y) ** 100,
    (_X + _Y + 1) ** 13,
    ((_X + 1) ** 10 + 1) ** 9,
    sympy.factorial(20_000, evaluate=False),
    sympy.factorial(sympy.factorial(8, evaluate=False), evaluate=False),
    sympy.binomial(50_000, 3, evaluate=False),
    sympy.Sum(_X, (_X, 1, 10_000)),
    sympy.Product(_X, (_X, -10_000, 1)),
    sympy.exp(sympy.exp(10, evaluate=False), evaluate=False),
    sympy.Add(*[_X**i for i in range(2, 400)]),
    sympy.Integral(_X, _X),
  ],
)
def test_not_tame(expression):
  assert not equality.is_tame(expression)


def test_deep_tree_is_not_tame():
  tree = _X
  for _ in range(30):
    tree = sympy.sin(tree)
  assert not equality.is_tame(tree)


@pytest.fixture
def forbidden(monkeypatch):
  def fail(*unused_args, **unused_kwargs):
    raise AssertionError("evaluated")

  monkeypatch.setattr(builtins, "eval", fail)


@pytest.mark.parametrize(
  "text, number",
  [
    ("12", sympy.Integer(12)),
    ("-12", sympy.Integer(-12)),
    ("--12", sympy.Integer(12)),
    ("0.5", sympy.Float("0.5")),
    ("1e3", sympy.Float("1e3")),
    ("E", sympy.E),
    ("pi", sympy.pi),
    ("x", sympy.Symbol("x")),
  ],
)
def test_literals(forbidden, text, number):
  with equality.no_eval():
    assert sympy.sympify(text) == number


@pytest.mark.parametrize(
  "text",
  [
    *["1 + 2", "f(1)", "x.y", "[1]", "(1).real", "__import__('os')"],
    *["1 if 1 else 2", "-f(1)", "~1", "9**9", "1e"],
  ],
)
def test_nothing_else(forbidden, text):
  with equality.no_eval(), pytest.raises((ValueError, sympy.SympifyError)):
    sympy.sympify(text)


@pytest.mark.parametrize(
  "code",
  [
    "Integer (__import__('os'))",
    "Integer (1 , x=2)",
    "Function ('f')(1)",
    "Symbol",
    "Integer",
    compile("1", "<test>", "eval"),
  ],
)
def test_no_other_code(code):
  with pytest.raises(ValueError):
    equality.literal(code, {}, vars(sympy))


def test_sympy_is_left_as_it_was():
  before = sympy_parser.eval_expr
  with pytest.raises(KeyError), equality.no_eval():
    raise KeyError
  assert sympy_parser.eval_expr is before
  assert sympy.sympify("1 + 2") == 3


def test_no_text_of_a_completion_is_evaluated(forbidden):
  """Numbers that no other test has parsed before, in each way to find them."""
  assert equality.equal("7123", "it is 7000 + 100 + 23")
  assert equality.equal("7124", "the answer is 7124")
  assert equality.equal("-7129", "so 1 - 7130")
  assert equality.equal("$7125$", "$7,125.0$")
  assert equality.equal("$7126\\%$", "$7126\\%$")
  assert not equality.equal("$7127$", "$7128$")
