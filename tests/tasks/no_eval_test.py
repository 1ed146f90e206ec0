"""no_eval: sympy reads literals, and evaluates nothing else."""

import builtins

import pytest
import sympy
from sympy.parsing import sympy_parser

from agrpo_jax.tasks.verdicts import equality
from agrpo_jax.tasks.verdicts import no_eval


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
  with no_eval.no_eval():
    assert sympy.sympify(text) == number


@pytest.mark.parametrize(
  "text",
  [
    *["1 + 2", "f(1)", "x.y", "[1]", "(1).real", "__import__('os')"],
    *["1 if 1 else 2", "-f(1)", "~1", "9**9", "1e"],
  ],
)
def test_nothing_else(forbidden, text):
  with no_eval.no_eval(), pytest.raises((ValueError, sympy.SympifyError)):
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
    no_eval.literal(code, {}, vars(sympy))


def test_sympy_is_left_as_it_was():
  before = sympy_parser.eval_expr
  with pytest.raises(KeyError), no_eval.no_eval():
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
