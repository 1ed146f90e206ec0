"""Prompts for Countdown, by protocol.

agrpo: system and user turn, <think> and <answer>; the answer is an equation,
  "expression = target", as the released reward wants it.
d1: one user turn, <reasoning> and <answer>, the completion prefilled with
  <reasoning>; the answer is the expression alone, in \\boxed{}.
llada: the problem and one sentence that asks for a boxed expression.
bare: "30,100,93=23", and the completion is the expression and nothing else.
  For tiny models.
worked: posed as bare; the completion works the value out, an equation per line,
  and ends with the expression on a line of its own. For tiny models.

The required format is that of the published prompts; the wording is ours.
"""

from collections.abc import Sequence

from agrpo_jax.tasks import base

PROTOCOLS = ("agrpo", "d1", "llada", "bare", "worked")
PREFILL = {**dict.fromkeys(PROTOCOLS, ""), "d1": "<reasoning>"}

_RULES = (
  "You are given a target and a list of numbers. Combine the numbers with +, "
  "-, * and / (parentheses are allowed) so that the result is exactly the "
  "target. Every number of the list must be used, and used only once."
)
_AGRPO = (
  f"{_RULES}\nTry combinations in an orderly way, writing your reasoning "
  "inside <think> tags. Then give the equation inside <answer> tags: the "
  "expression, an equals sign, the target. Use exactly this format:\n<think>\n"
  "your reasoning\n</think>\n<answer>\nexpression = target\n</answer>\nFor "
  "instance, with the target 44 and the numbers [6, 9, 10] a right answer is:\n"
  "<answer>\n6 * 9 - 10 = 44\n</answer>\n"
)
_D1 = (
  f"{_RULES}\nThink step by step, then give the final expression alone, "
  "without equals sign and target, in \\boxed{}, for instance "
  "\\boxed{6 * 9 - 10}. Use exactly this format:\n<reasoning>\n"
  "your reasoning\n</reasoning>\n<answer>\n"
  "\\boxed{...}\n</answer>\n"
)


def messages(
  numbers: Sequence[int], target: int, protocol: str
) -> tuple[dict[str, str], ...]:
  """Returns the chat turns that pose the problem."""
  if protocol in ("bare", "worked"):
    return base.user_turn(f"{','.join(map(str, numbers))}={target}")
  problem = f"Target: {target}\nNumbers: {list(numbers)}"
  if protocol == "agrpo":
    return base.user_turn(problem, system=_AGRPO)
  if protocol == "d1":
    return base.user_turn(f"{_D1}\n{problem}")
  return base.user_turn(
    f"{_RULES}\n{problem}\nPut the final expression in \\boxed{{}}."
  )


def completion(
  expression: str, equations: Sequence[str], target: int, protocol: str
) -> str:
  """Returns an answer in the protocol's format, after what is prefilled.

  Args:
    expression: has the value `target`.
    equations: its operations in order, as in "6*9=54".
    target: of the problem.
    protocol: one of PROTOCOLS.
  """
  if protocol == "bare":
    return expression
  if protocol == "worked":
    return "\n".join([*equations, expression])
  reasoning = f"{expression} gives {target}."
  box = f"\\boxed{{{expression}}}"
  if protocol == "llada":
    return f"{reasoning}\n{box}"
  if protocol == "d1":
    return f"\n{reasoning}\n</reasoning>\n<answer>\n{box}\n</answer>"
  equation = f"{expression} = {target}"
  return f"<think>\n{reasoning}\n</think>\n<answer>\n{equation}\n</answer>"
