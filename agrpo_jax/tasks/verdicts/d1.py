"""Strict verdicts of the d1 protocol, as its evaluation gives them.

d1 (arXiv:2504.12216) reads answers in another way than AGRPO: boxes anywhere
in the text, tags only as a fallback, and strings instead of values for MATH.
These functions follow its published scorer, so that figures under the protocol
"d1" compare with its tables. Two things differ: golds that its own data code
loses (the two negative ones of GSM8K) are kept, and nothing is executed.
"""

import itertools
import re

from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import arithmetic

_SHORT_BOX = re.compile(r"\\boxed\{([^}\n]{0,1000})\}")
_DECIMAL = re.compile(r"-?\d+\.?\d*")
_END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
_ANSWER = re.compile("<answer>")
_ANSWER_END = re.compile("</answer>")


def _answer_text(text: str) -> str | None:
  """Returns the text from the first <answer> to </answer>; case matters."""
  start = _ANSWER.search(text)
  end = start and _ANSWER_END.search(text, start.end())
  return text[start.end() : end.start()].strip() if start and end else None


def _float(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def gsm8k_number(text: str) -> float | None:
  """Returns the first box's number, else the last number in <answer>."""
  for box in _SHORT_BOX.findall(text):
    box = box.strip()
    if not box.strip("."):
      continue
    number = _float(box)
    if number is None and (decimals := _DECIMAL.findall(box)):
      number = float(decimals[0])
    if number is not None:
      return number
  tagged = _answer_text(text)
  if not tagged:
    return None
  number = _float(tagged)
  if number is None and (decimals := _DECIMAL.findall(tagged)):
    number = float(decimals[-1])
  return number


def _last_box(text: str) -> str | None:
  """Returns the last \\boxed, by d1's rules; None where they find no end to it.

  The whole text if it has no \\boxed. "\\boxed " with a space wins over braces
  and reaches to the next dollar sign.
  """
  if "\\boxed " in text:
    return text.rpartition("\\boxed ")[2].partition("$")[0]
  start = text.rfind("\\boxed")
  if start < 0:
    start = text.rfind("\\fbox")
  if start < 0:
    return text
  depth = 0
  for brace in re.finditer("[{}]", text[start:]):
    depth += 1 if brace.group() == "{" else -1
    if depth == 0:
      box = text[start : start + brace.end()]
      is_plain = box.startswith(answers.BOX)
      return box[len(answers.BOX) : -1] if is_plain else box
  return None


def math_correct(text: str, gold: str) -> bool:
  """Returns whether the last box, else <answer>, is `gold` when tidied."""
  answer = _last_box(text) or _answer_text(text)
  return answer is not None and _tidy(answer) == _tidy(gold)


# In this order: later rules see what earlier ones leave.
_TIDY = (
  ("\n", ""),
  ("\\!", ""),
  ("\\\\", "\\"),
  ("tfrac", "frac"),
  ("dfrac", "frac"),
  ("\\left", ""),
  ("\\right", ""),
  ("^{\\circ}", ""),
  ("^\\circ", ""),
  ("\\$", ""),
)


def _tidy(latex: str) -> str:
  """Returns LaTeX without what MATH's string comparison ignores."""
  text = latex
  for old, new in _TIDY:
    text = text.replace(old, new)
  if text.count("\\text{ ") == 1:  # units
    text = text.partition("\\text{ ")[0]
  elif "\\text{ " in text:
    return latex
  text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
  if text.startswith("."):
    text = f"0{text}"
  name, equals, value = text.partition("=")
  if equals and "=" not in value and len(name) <= 2:
    text = value
  text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
  text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
  text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
  if text == "0.5":
    return "\\frac{1}{2}"
  if match := re.fullmatch(r"(-?[1-9]\d*|0)/(-?[1-9]\d*|0)", text):
    return f"\\frac{{{match[1]}}}{{{match[2]}}}"
  return text


def countdown_correct(text: str, numbers: list[int], target: int) -> bool:
  """Returns whether the answer uses the numbers and gives the target.

  The answer is the last box, else <answer>, else all of the text; of
  "expression=number" the expression counts.
  """
  answer = _last_box(text)
  if answer is None:
    tagged = _answer_text(text)
    answer = text if tagged is None else tagged
  for latex, plain in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
    answer = answer.replace(latex, plain)
  answer = _left_side(answer)
  try:
    used = sorted(int(number) for number in re.findall(r"\d+", answer))
    # d1 has eval() compute a float here, hence its tolerance.
    return used == sorted(numbers) and (
      abs(arithmetic.value(answer) - target) < 1e-5
    )
  except ValueError:
    return False


def _left_side(answer: str) -> str:
  """Returns the first arithmetic before "=number", else `answer` itself."""
  pieces = answer.split("=")
  for left, right in itertools.pairwise(pieces):
    run = left[len(left.rstrip("0123456789+-*/() ")) :]
    if run and right[:1] in tuple("0123456789. "):
      return run.strip()
  return answer


def sudoku_grid(text: str) -> str:
  """Returns the grid by d1's cascade, zero-padded on the right, cut to 16.

  A fence of digits after <answer>; <answer> to its end tag or the end of the
  turn; what follows </answer>; 16 digits before </answer>; 16 digits.
  """
  grid = re.sub(r"\s", "", _sudoku_text(text))
  return grid.ljust(16, "0")[:16] if grid else ""


def _sudoku_text(text: str) -> str:
  start = _ANSWER.search(text)
  if start:
    rest = text[start.end() :]
    fence = re.search(r"`{3}([\d\s]+)`{3}", rest)
    if fence and fence.group(1).strip():
      return fence.group(1)
    end = re.search(r"</answer>|" + _END.pattern, rest)
    if end and rest[: end.start()].strip():
      return rest[: end.start()]
  closed = _ANSWER_END.search(text)
  if closed:
    after = text[closed.end() :].lstrip()
    end = _END.search(after)
    after = after[: end.start()] if end else after
    if after.strip():
      return after
    before = re.findall(r"\d{16}(?=\s*</answer>)", text)
    if before:
      return before[0]
  alone = re.search(r"\b(\d{16})\b", text)
  return alone.group(1) if alone else ""
