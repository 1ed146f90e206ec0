"""The number that a completion means, however it is written.

Understood: thousands separators, currency, units, percent signs, signs,
decimals, scientific notation, fractions and mixed numbers, plain arithmetic,
LaTeX around all that, and decimal digits of any script. Where a box holds
several different numbers, or alternatives are offered, nothing is understood:
a guess must not be marked right.
"""

import fractions
import re
import unicodedata

from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import arithmetic

MAX_DIGITS = 60

# A sign may stand on either side of the currency's: -$5, $-5.
_CURRENCY = re.compile(r"([-+]?)\s?\\?[$€£¥₹₩₽¢]\s?([-+]?)")
_FRACTION = re.compile(
  r"(\d?)\s?\\[dt]?frac\s?\{([^{}]{1,40})\}\{([^{}]{1,40})\}"
)
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|mbox)\s?\{")
_DEGREES = r"\^\s?\{?\s?\\circ\b\s?\}?"
_NOISE = re.compile(
  rf"{_DEGREES}|\\[!,;: ()\[\]%]|\\(?:left|right|displaystyle)\b|\*\*"
)
# Three digits behind a comma, and no fourth: 1,234 but not 1,2345.
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BRACES = str.maketrans("{}", "  ")
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A number starts at no letter, digit, exponent or clock time. A sign belongs to
# it unless it stands between operands, where it is a minus: 5-3, x -3.
_NUMBER = re.compile(
  r"(?<![\w.,^])(?<!\d:)"
  rf"(?P<sign>(?<![\w)\]] )(?<![)\]])[-+])?"
  rf"(?:(?P<whole>\d+) (?=\d+/\d))?"
  rf"(?P<top>{_UNSIGNED})"
  r"(?P<power>[eE][-+]?\d{1,3}(?!\d))?"
  rf"(?:\s?/\s?(?P<bottom>{_UNSIGNED}))?"
  r"(?P<scale>\s(?:hundred|thousand|million|billion)\b)?"
)
_SCALES = {
  "hundred": 100,
  "thousand": 1000,
  "million": 10**6,
  "billion": 10**9,
}
# After a number: a variable, a clock time or an exponent changes what it is.
_SPOILED = re.compile(r"[xyz](?![a-z])|[eE][-+]?\d|:\d|\^|[²³¹⁰-₟]|,\d")
_MINUS = str.maketrans({"−": "-", "–": "-", "‒": "-", "﹣": "-", "－": "-"})
_CUE = re.compile(r"####|answer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_SHORT = 40  # characters of a tag that holds nothing but the answer
_MAX_SPAN = 200
_CHOICE = re.compile(r"\bor\b|±|\\pm\b", re.IGNORECASE)


def _plain(text: str) -> str:
  """Returns `text` with ASCII digits, without LaTeX, currency, emphasis."""
  text = text.translate(_MINUS).replace("{,}", ",")
  if not text.isascii():
    text = "".join(_ascii_digit(character) for character in text)
  text = _FRACTION.sub(
    lambda m: f"{m[1]}{' ' if m[1] else ''}{m[2].strip()}/{m[3].strip()}", text
  )
  text = _CURRENCY.sub(r" \1\2", text)
  text = _NOISE.sub("", _WRAPPER.sub(" ", text)).replace("^{", "^")
  return text.translate(_BRACES).strip()


def _ascii_digit(character: str) -> str:
  if unicodedata.category(character) == "Cf":  # zero-width characters
    return ""
  if character.isspace():
    return "\n" if character == "\n" else " "
  digit = unicodedata.decimal(character, None)
  return character if digit is None else str(digit)


def _read(match: re.Match[str]) -> fractions.Fraction | None:
  """Returns the value of a match of _NUMBER.

  None if it is too long or divides by 0.
  """
  if match.end() - match.start() > MAX_DIGITS:
    return None
  top = match["top"].replace(",", "") + (match["power"] or "")
  result = fractions.Fraction(top)
  if match["bottom"]:
    bottom = fractions.Fraction(match["bottom"].replace(",", ""))
    if bottom == 0:
      return None
    result /= bottom
  result += int(match["whole"] or 0)
  if match["scale"]:
    result *= _SCALES[match["scale"].strip()]
  return -result if match["sign"] == "-" else result


def _numbers(plain: str) -> list[fractions.Fraction | None]:
  """Returns all numbers; None where something number-like has no value."""
  return [
    None if _SPOILED.match(plain, match.end()) else _read(match)
    for match in _NUMBER.finditer(plain)
  ]


def number(span: str) -> fractions.Fraction | None:
  """Returns the one number that `span` holds; None if none, or several differ.

  Of an equation the last side that holds a number counts. Arithmetic without
  an equals sign is evaluated.
  """
  if answers.BROKEN_NUMBER.search(span):
    return None
  for side in reversed(_plain(span).split("=")):
    value = _arithmetic(side)
    if value is not None:
      return value
    found = set(_numbers(side))
    if found:  # what is left of LaTeX may be a root or a constant
      return found.pop() if len(found) == 1 and "\\" not in side else None
  return None


def plain_number(span: str) -> fractions.Fraction | None:
  """Returns the number that all of `span` is: no units, no equals sign."""
  plain = _plain(span)
  value = _arithmetic(plain)
  match = _NUMBER.fullmatch(plain)
  return _read(match) if value is None and match else value


def _arithmetic(plain: str) -> fractions.Fraction | None:
  if "(" in plain and "," in plain:  # a point or an interval
    return None
  text = _THOUSANDS.sub("", plain.strip().rstrip("."))
  try:
    return arithmetic.value(text.replace("^", "**").replace("×", "*"))
  except ValueError:
    return None


def _last_number(text: str) -> fractions.Fraction | None:
  """Returns the last number of a text; None where alternatives are offered."""
  if answers.BROKEN_NUMBER.search(text):
    return None
  plain = _plain(text)
  found = _numbers(plain)
  if not found or (_CHOICE.search(plain) and len(set(found)) > 1):
    return None
  return found[-1]


def answer_span(text: str) -> tuple[str, bool]:
  """Returns where the answer stands, and whether it stands there alone.

  The last box inside the last <answer> (closed or not), else that tag's text,
  else the last box of the text, else what follows the last "answer is" or
  "####", else the last line that holds a digit. A box and a short tag hold the
  answer alone; elsewhere it is part of a sentence.
  """
  tagged = answers.after_tag(text, "answer")
  scope = tagged if tagged else text
  boxed = answers.last_boxed(scope)
  if boxed is not None and boxed.strip():
    return boxed, True
  if tagged:
    return tagged, len(tagged) <= _SHORT
  cues = list(_CUE.finditer(text))
  if cues and re.search(r"\d", text[cues[-1].end() :]):
    return text[cues[-1].end() :], False
  lines = [line for line in text.splitlines() if re.search(r"\d", line)]
  return (lines[-1] if lines else ""), False


def answer_number(text: str) -> fractions.Fraction | None:
  """Returns the number a completion answers with; None if it gives none."""
  span, is_alone = answer_span(text)
  found = number(span) if len(span) <= _MAX_SPAN else None
  return found if is_alone or found is not None else _last_number(span)
