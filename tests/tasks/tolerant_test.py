"""tolerant: the number that is meant, and never a guess."""

import fractions
import json
import pathlib
import time

import pytest

from agrpo_jax.tasks.verdicts import tolerant

_HALF = fractions.Fraction(1, 2)
_TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"


@pytest.mark.parametrize(
  "span, number",
  [
    *[("18", 18), ("18.0", 18), ("18.", 18), (".5", _HALF), ("-0", 0)],
    *[("$18", 18), ("\\$18", 18), ("US$18", 18), ("-$5", -5), ("$-5", -5)],
    *[("18 dollars", 18), ("50 mph", 50), ("100m2", 100), ("18%", 18)],
    *[("10\\%", 10), ("82^\\circ", 82), ("90^{\\circ}", 90)],
    *[("-5", -5), ("−5", -5), ("–5", -5), ("a 5-day trip", 5)],
    *[("1,234", 1234), ("1{,}234", 1234), ("10,\\!080", 10080)],
    *[("1,234,567.5", fractions.Fraction("1234567.5"))],
    *[("x = 18", 18), ("18 = x", 18), ("3 + 15 = 18", 18), ("10+8", 18)],
    *[("36/2", 18), ("\\frac{36}{2}", 18), ("18^1", 18), ("2 × 9", 18)],
    *[("1/2", _HALF), ("1 1/2", 3 * _HALF), ("1\\frac{1}{2}", 3 * _HALF)],
    *[("-\\frac{1}{2}", -_HALF), ("1.8e1", 18), ("1.5 million", 1_500_000)],
    *[("\\(18\\)", 18), ("**18**", 18), ("\\text{exactly} 18", 18)],
    *[("18\u200b", 18), ("\xa018", 18), ("१८", 18), ("１８", 18)],
    *[("18, 18", 18), ("007", 7)],
  ],
)
def test_number(span, number):
  assert tolerant.number(span) == number


@pytest.mark.parametrize(
  "span",
  [
    *["", "none", "18 or 20", "3 hours and 20 minutes", "2:30", "1,23"],
    *["5²", "¹⁸", "2x", "3z", "x^{2}", "\\sqrt{2}", "2\\pi", "3+4i", "1/0"],
    *["x2", "1 234", "[0, 1)", "1, 2, 3", "1e4000", "9" * 100 + " or 8"],
  ],
)
def test_no_number(span):
  assert tolerant.number(span) is None


@pytest.mark.parametrize(
  "span, number",
  [("1,234", 1234), ("-\\frac{1}{2}", -_HALF), ("82^\\circ", 82), ("3+4", 7)],
)
def test_plain_number(span, number):
  assert tolerant.plain_number(span) == number


@pytest.mark.parametrize(
  "span",
  ["x = 5", "5 dollars", "2\\pi", "(3, 4)", "(3,456)", "\\sqrt{3}", "3i"],
)
def test_no_plain_number(span):
  assert tolerant.plain_number(span) is None


@pytest.mark.parametrize(
  "completion, number",
  [
    ("<answer>\\boxed{17}</answer> so <answer>\\boxed{18}</answer>", 18),
    ("<answer>\\boxed{17} \\boxed{18}", 18),
    ("\\boxed{18} in all of 20 days", 18),
    ("The answer is 18 dollars a day.", 18),
    ("2 + 3 = 5\n#### 18", 18),
    ("First 3.\nThen 4 more make $7 a week.\n</reasoning>", 7),
    ("It is 7 or maybe 8", None),
    (
      "<answer>It takes her a long time, either 7 or maybe 8 days</answer>",
      None,
    ),
    ("<answer>She sells 9 eggs at $2, which makes 18 dollars</answer>", 18),
    ("It is 1\x008", None),  # neither 8 nor 18: a guess
    ("\\boxed{1\x008}", None),
    ("It is \x0018", 18),
    ("no digits", None),
    ("", None),
  ],
)
def test_answer_number(completion, number):
  assert tolerant.answer_number(completion) == number


def test_hand_checked_completions_of_llada():
  """100 answers of LLaDA-8B-Instruct to GSM8K, `right` judged by reading them.

  Ends of generations published with d1 (Apache-2.0): the 55 on which d1's
  scorer and this one disagree, and 45 others. None that is wrong may be called
  right; two that are right are not understood.
  """
  with (_TESTDATA / "hand_checked.jsonl").open() as lines:
    rows = [json.loads(line) for line in lines]
  called_right = [
    tolerant.answer_number(row["completion"]) == int(row["gold"])
    for row in rows
  ]
  right = [row["right"] for row in rows]
  assert len(rows) == 100
  assert not any(
    called and not truly
    for called, truly in zip(called_right, right, strict=True)
  )
  assert sum(right) - sum(called_right) == 2


@pytest.mark.parametrize(
  "piece", ["1", "1,", "1,000", "1 ", "-", "$", "\\frac{1}{", "{", "1/", "1e1"]
)
def test_long_text_takes_linear_time(piece):
  def seconds(length: int) -> float:
    text = piece * (length // len(piece))
    begin = time.process_time()
    tolerant.answer_number(text)
    tolerant.answer_number(f"<answer>{text}</answer>")
    return time.process_time() - begin

  # Four times as much text: not sixteen times as long, on a slow machine too.
  assert seconds(100_000) < 8 * seconds(25_000) + 0.5
