"""Finding and checking the answer to a Countdown problem."""

import re

from agrpo_jax.tasks.countdown import problems
from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import arithmetic
from agrpo_jax.tasks.verdicts import equality

# What math-verify takes for one plain expression if it is all of the text.
_PLAIN = re.compile(r"\s*-?\(?-?\d[\d.\s+\-*/^()]*[+\-*/^()][\d.\s+\-*/^()]+")


def released_correct(equation: str, numbers: list[int], target: int) -> bool:
  """Returns whether the left side has the numbers and the value.

  The right side is not looked at. The value is math-verify's; plain arithmetic,
  which is nearly all there is, is evaluated here: the same in microseconds.
  """
  if "=" not in equation:
    return False
  left = equation.partition("=")[0]
  if not problems.uses(left, numbers):
    return False
  if _PLAIN.fullmatch(left):
    try:
      return arithmetic.value(left.replace("^", "**")) == target
    except ValueError:
      pass  # math-verify may still find a number in it
  return equality.equal(str(target), left)


def released_grade(text: str, numbers: list[int], target: int) -> bool:
  """Returns the verdict on the last line of the answer with an equation.

  That is an equals sign after another character. False where the released
  code crashes: on integers of more digits than Python converts.
  """
  for line in reversed(answers.released_answer(text).split("\n")):
    equation = line.lstrip("=")
    if "=" in equation:
      return released_correct(equation, numbers, target)
  return False


# Notations of an expression, and what of them is dropped. An x is a sign of
# multiplication only between operands.
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}")
_TIMES = re.compile(r"\\times\b|\\cdot\b|[×⋅·∗]|(?<=[\d)])\s?[xX]\s?(?=[\d(])")
_DIVIDED = re.compile(r"\\div\b|÷")
_DROPPED = re.compile(r"\\(?:left|right)\b|\\[()\[\],;:! ]|[$`{}]")
# Not from within a word or number: "x2+3" is no 2+3.
_SPAN = re.compile(r"(?<![\w.])[\d.\s+*/()-]+")
_OPERATOR = re.compile(r"[\d)]\s*[+*/-]")
_MINUS = str.maketrans({"−": "-", "–": "-"})


def _plain(text: str) -> str:
  """Returns `text` with + - * / for its operators and without LaTeX."""
  text = text.translate(_MINUS).replace("\\boxed", " ")
  text = _FRACTION.sub(r"((\1)/(\2))", text)
  text = _DIVIDED.sub("/", _TIMES.sub("*", text))
  return _DROPPED.sub("", text)


def find(text: str, numbers: list[int]) -> str:
  """Returns the expression a completion answers with, in plain characters.

  Looked for in the last box inside the last <answer> (closed or not), else in
  the last line of that tag that holds an operator, else in the last box, else
  in the last such line of all. Of an equation the first side that uses the
  numbers counts, else the first side; "" if there is no expression at all.
  """
  tagged = answers.after_tag(text, "answer")
  scope = tagged if tagged else text
  boxed = answers.last_boxed(scope)
  lines = [boxed] if boxed else reversed(scope.splitlines())
  for line in lines:
    if answers.BROKEN_NUMBER.search(line):
      continue
    plain = _plain(line)
    spans = (
      max(_SPAN.findall(side), key=len, default="") for side in plain.split("=")
    )
    sides = [span.strip() for span in spans if _OPERATOR.search(span)]
    if sides:
      fitting = (s for s in sides if problems.uses(s, numbers))
      return next(fitting, sides[0])
  return ""
