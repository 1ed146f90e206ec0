"""arithmetic: exact, bounded, and nothing but arithmetic."""

import builtins
import fractions

import pytest

from agrpo_jax.tasks.verdicts import arithmetic


@pytest.mark.parametrize(
  "text, value",
  [
    ("17*5-18", 67),
    (" ( 1 + 2 ) * 3 ", 9),
    ("8 / (3 - 8 / 3)", 24),
    ("7/3*6", 14),
    ("7 // 2 * 3", 9),
    ("2 - -3", 5),
    ("+1 + +2", 3),
    ("2**3**2", 512),
    ("2**-1", fractions.Fraction(1, 2)),
    ("0.1 + 0.2", fractions.Fraction(3, 10)),
    ("1/3 + 1/3 + 1/3", 1),
    ("+".join(["1"] * 2000), 2000),
    ("(" * 64 + "1" + ")" * 64, 1),
  ],
)
def test_value(text, value):
  assert arithmetic.value(text) == value


@pytest.mark.parametrize(
  "text",
  [
    *["", " ", "1 2", "1,2", "(1", "1)", "()", "1 +", "007", "1e3", "1_0"],
    *["0x10", "x", "abs(1)", "True", "1;2", "1 if 1 else 2", "[1]", "'1'"],
    *[
      "1j",
      "2(3)",
      "1 % 2",
      "1 << 2",
      "1 == 1",
      "lambda: 1",
      "__import__('os')",
    ],
    *["1/0", "0**-1", "1//0", "2**0.5", "9**9**9**9", "10**100000"],
    *["-" * 3000 + "1", "(" * 65 + "1" + ")" * 65, "1+" * 5000 + "1"],
    *[
      "9" * 2000,
      "9" * 5000,
      "1." + "9" * 400 + "1" * 400 + "*" * 3,
      "２+２",
      "١",
      "²",
    ],
  ],
)
def test_no_value(text):
  with pytest.raises(ValueError):
    arithmetic.value(text)


def test_nothing_is_executed(monkeypatch):
  def fail(*unused_args, **unused_kwargs):
    raise AssertionError("executed")

  monkeypatch.setattr(builtins, "eval", fail)
  monkeypatch.setattr(builtins, "exec", fail)
  assert arithmetic.value("1 + 2") == 3
