"""Arithmetic from text, exactly and within bounds; nothing is executed.

Text is parsed to a syntax tree, and only numbers, parentheses and
+ - * / // ** between them are understood.
"""

import ast
import fractions
import operator
import re
from collections.abc import Callable

MAX_CHARS = 4096
MAX_DEPTH = 64  # of parentheses
MAX_BITS = 4096  # of a numerator or denominator

_CHARACTERS = re.compile(r"[0-9.\s+\-*/()]*")
_BINARY: dict[type, Callable] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
}


def value(text: str) -> fractions.Fraction:
  """Returns the value of an arithmetic expression.

  Raises:
    ValueError: anything else, a division by zero, or what is too long, too deep
      or too large.
  """
  text = text.strip()
  if len(text) > MAX_CHARS or not _CHARACTERS.fullmatch(text):
    raise ValueError("not an arithmetic expression")
  if _depth(text) > MAX_DEPTH:
    raise ValueError("the expression is too deep")
  try:
    tree = ast.parse(text, mode="eval")
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError("not an expression") from error
  try:
    return _fold(tree.body)
  except (ZeroDivisionError, RecursionError) as error:
    raise ValueError("the expression has no value") from error


def _depth(text: str) -> int:
  depth = deepest = 0
  for character in text:
    depth += (character == "(") - (character == ")")
    deepest = max(deepest, depth)
  return deepest


def _fold(node: ast.expr) -> fractions.Fraction:
  """Returns the value of a tree.

  Its long left arm is folded in a loop: sums may have many terms.
  """
  rights = []
  while isinstance(node, ast.BinOp):
    rights.append((node.op, node.right))
    node = node.left
  result = _leaf(node)
  for op, right in reversed(rights):
    result = _apply(op, result, _fold(right))
  return result


def _leaf(node: ast.expr) -> fractions.Fraction:
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    # Through text: a decimal means what is written, not its binary neighbour.
    return _bounded(fractions.Fraction(str(node.value)))
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    return -_fold(node.operand)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd):
    return _fold(node.operand)
  raise ValueError(f"{type(node).__name__} is no arithmetic")


def _apply(
  op: ast.operator, left: fractions.Fraction, right: fractions.Fraction
) -> fractions.Fraction:
  if isinstance(op, ast.Pow):
    return _power(left, right)
  if type(op) not in _BINARY:
    raise ValueError(f"{type(op).__name__} is no arithmetic")
  return _bounded(fractions.Fraction(_BINARY[type(op)](left, right)))


def _power(
  left: fractions.Fraction, right: fractions.Fraction
) -> fractions.Fraction:
  if right.denominator != 1:
    raise ValueError("powers must be whole")
  size = max(left.numerator.bit_length(), left.denominator.bit_length())
  if size * abs(right.numerator) > MAX_BITS:
    raise ValueError("the power is too large")
  return _bounded(fractions.Fraction(left ** int(right)))


def _bounded(number: fractions.Fraction) -> fractions.Fraction:
  bits = max(number.numerator.bit_length(), number.denominator.bit_length())
  if bits > MAX_BITS:
    raise ValueError("the number is too large")
  return number
