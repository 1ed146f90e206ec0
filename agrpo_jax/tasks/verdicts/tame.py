"""Which sympy expressions may be compared by computing.

Parsing builds a tree and evaluates little; comparing evaluates it. A tree that
stands for an astronomical number, or that expands into very many terms, would
only run into the time limit: it is refused before, and is then equal only to a
tree of the same shape.
"""

import math

import sympy

MAX_NODES = 600
MAX_DEPTH = 24
MAX_EXPONENT = 1000
MAX_SUM_EXPONENT = 12  # of a sum: (a + b)^12 has thirteen terms
MAX_TERMS = 1000  # of a written-out sum or product
MAX_FACTORIAL = 1000


def is_tame(expression: object) -> bool:
  """Whether computing with `expression` costs little."""
  if not isinstance(expression, sympy.Basic):
    return True
  pending = [(expression, 1)]
  for num_nodes in range(1, MAX_NODES + 1):
    if not pending:
      return True
    node, depth = pending.pop()
    if depth > MAX_DEPTH or not _is_tame_node(node):
      return False
    pending.extend((argument, depth + 1) for argument in node.args)
    if len(pending) + num_nodes > MAX_NODES:
      return False
  return False


def _is_tame_node(node: sympy.Basic) -> bool:
  if isinstance(node, sympy.Integral):
    return False  # nothing bounds the search for an antiderivative
  if isinstance(node, sympy.Pow):
    limit = MAX_SUM_EXPONENT if isinstance(node.base, sympy.Add) else None
    return _size(node.exp) <= (limit or MAX_EXPONENT)
  if isinstance(node, sympy.exp):
    return _size(node.args[0]) <= MAX_EXPONENT
  if isinstance(node, (sympy.factorial, sympy.factorial2, sympy.binomial)):
    return all(_size(argument) <= MAX_FACTORIAL for argument in node.args)
  if isinstance(node, (sympy.Sum, sympy.Product)):
    return all(
      len(limits) < 3 or _size(limits[2]) + _size(limits[1]) <= MAX_TERMS
      for limits in node.limits
    )
  return True


def _size(node: sympy.Basic) -> float:
  """A bound on the absolute value; 1 for each symbol, infinity if too large."""
  if isinstance(node, sympy.Number):
    return abs(float(node)) if node.is_finite else 1.0
  sizes = [_size(argument) for argument in node.args]
  try:
    if isinstance(node, sympy.Add):
      return math.fsum(sizes)
    if isinstance(node, sympy.Mul):
      return math.prod(sizes)
    if isinstance(node, sympy.Pow):
      # A base below 1 under a negative power grows as well.
      return max(sizes[0], 1 / sizes[0] if sizes[0] else 1.0) ** sizes[1]
    if isinstance(node, sympy.exp):
      return math.exp(sizes[0])
    if isinstance(node, (sympy.factorial, sympy.factorial2)):
      return math.gamma(sizes[0] + 1)
  except OverflowError:
    return math.inf
  return max(sizes, default=1.0)
