"""Reading numbers with sympy without Python's `eval`.

sympy turns text into numbers by writing a line of Python and evaluating it:
`sympy.Number("12")` ends in `eval("Integer (12 )")`. The text that gets there
from a completion has passed patterns and a lexer, but code made from what a
model wrote should not be run at all. Inside `no_eval()` sympy's evaluation is
replaced by one that understands the lines it writes for literals, and nothing
else.
"""

import ast
import contextlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import sympy
from sympy.parsing import sympy_parser

_MAKERS = {
  "Integer": sympy.Integer,
  "Float": sympy.Float,
  "Rational": sympy.Rational,
  "Symbol": sympy.Symbol,
}


def literal(
  code: object, local_dict: Mapping[str, Any], global_dict: Mapping[str, Any]
) -> sympy.Basic:
  """The value of `Integer (12)`, `-Float ('0.5')`, or a constant's name.

  Raises ValueError for any other code.
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


@contextlib.contextmanager
def no_eval() -> Iterator[None]:
  """Within it, sympy understands literals and evaluates no code."""
  original = sympy_parser.eval_expr
  sympy_parser.eval_expr = literal
  try:
    yield
  finally:
    sympy_parser.eval_expr = original
