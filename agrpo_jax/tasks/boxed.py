"""What GSM8K and MATH share: a question, and an answer in \\boxed{}.

Prompt protocols, for results that compare with the published ones:

agrpo: system and user turn; reasoning in <think>, the boxed answer in
  <answer>. The same for training and evaluation, as in the released AGRPO.
d1: one user turn with instructions and question; <reasoning> and <answer>, and
  the completion prefilled with <reasoning>, as in d1's evaluation.
llada: the question and one sentence that asks for a boxed answer.
bare: the question alone.

The required format is that of the released prompts; the wording is ours.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_jax.tasks import base
from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import equality

PROTOCOLS = ("agrpo", "d1", "llada", "bare")
PREFILL = {"agrpo": "", "d1": "<reasoning>", "llada": "", "bare": ""}
THINK_TAG = {"agrpo": "think", "d1": "reasoning", "llada": "", "bare": ""}

_TASK = (
  "You are given a mathematics problem. Solve it step by step, writing your "
  "reasoning inside <{tag}> tags. Then state the final answer inside <answer> "
  "tags: nothing but the number or expression, in \\boxed{{}}. Use exactly "
  "this format:\n<{tag}>\n...\n</{tag}>\n<answer>\n\\boxed{{...}}\n</answer>\n"
)


def messages(question: str, protocol: str) -> tuple[dict[str, str], ...]:
  """Returns the chat turns that ask `question`."""
  if protocol == "bare":
    return base.user_turn(question)
  if protocol == "llada":
    return base.user_turn(
      f"{question}\n\nReason step by step and put the final answer in "
      "\\boxed{}."
    )
  instructions = _TASK.format(tag=THINK_TAG[protocol])
  if protocol == "agrpo":
    return base.user_turn(question, system=instructions)
  return base.user_turn(f"{instructions}\n{question}")


def example(
  index: int, question: str, gold: str, protocol: str
) -> base.Example:
  """Returns the problem that asks `question`."""
  return base.Example(
    id=index,
    messages=messages(question, protocol),
    fields={"question": question, "gold": gold},
    prefill=PREFILL[protocol],
  )


def reward_weights(protocol: str) -> dict[str, float]:
  """Returns the released weights: tags 0.5 each and 3 for a right answer.

  The protocols without tags reward the answer alone.
  """
  tag = 0.5 if THINK_TAG[protocol] else 0.0
  return {"think_tag": tag, "answer_tag": tag, "correct": 3.0}


def reward(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns the parts of both tasks' reward, 1 or 0 each.

  think_tag, answer_tag: the tag is opened and closed.
  correct: the released verdict.
  """
  protocol = (options or {}).get("protocol", PROTOCOLS[0])
  completion = answers.clip(completion)
  think = THINK_TAG[protocol] or "think"
  text = PREFILL[protocol] + completion
  return {
    "think_tag": float(answers.in_tag(text, think) is not None),
    "answer_tag": float(answers.in_tag(text, "answer") is not None),
    "correct": float(released_correct(completion, fields["gold"])),
  }


def released_correct(text: str, gold: str) -> bool:
  """Returns whether math-verify finds the answer equal to `gold`, as LaTeX."""
  return equality.equal(f"${gold}$", f"${answers.released_answer(text)}$")
