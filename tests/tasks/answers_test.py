"""answers: what is found in a completion, and at what cost."""

import time

import pytest

from agrpo_jax.tasks.verdicts import answers


@pytest.mark.parametrize(
  "text, inside",
  [
    ("<answer> 18\n</answer>", "18"),
    ("<ANSWER>18</aNSWER>", "18"),
    ("<answer></answer>", ""),
    ("<answer>1</answer><answer>2</answer>", "1"),
    ("<answer>1<answer>2</answer>", "1<answer>2"),
    ("</answer>1<answer>2</answer>", "2"),
    ("<answer>18", None),
    ("18</answer>", None),
    ("< answer>18</answer>", None),
    ("", None),
  ],
)
def test_in_tag(text, inside):
  assert answers.in_tag(text, "answer") == inside


@pytest.mark.parametrize(
  "text, inside",
  [
    ("<answer>1</answer> <answer> 2 </answer> 3", "2"),
    ("<answer>1</answer> <answer>2", "2"),
    ("1</answer>", None),
  ],
)
def test_after_tag(text, inside):
  assert answers.after_tag(text, "answer") == inside


@pytest.mark.parametrize(
  "text, first, last",
  [
    ("\\boxed{1} \\boxed{2}", "1", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed{\\boxed{18}}", "\\boxed{18}", "18"),
    ("\\boxed{1 \\boxed{2}", None, "2"),
    ("\\boxed{1} \\boxed{2", "1", "1"),
    ("}\\boxed{3}}", "3", "3"),
    ("boxed{1}", None, None),
    ("\\boxed{}", "", ""),
  ],
)
def test_boxed(text, first, last):
  assert answers.first_boxed(text) == first
  assert answers.last_boxed(text) == last


@pytest.mark.parametrize(
  "text, answer",
  [
    ("x <answer> \\boxed{3} </answer> \\boxed{4}", "3"),
    ("x <answer> 3 </answer> \\boxed{4}", "3"),
    ("x \\boxed{4} <answer>3", "4"),
    ("<answer>\\boxed{}</answer>", "\\boxed{}"),
    ("plain", "plain"),
  ],
)
def test_released_answer(text, answer):
  assert answers.released_answer(text) == answer


@pytest.mark.parametrize(
  "piece",
  ["<answer>", "</answer>", "\\boxed{", "\\boxed{}", "{", "}", "<", " ", "\\"],
)
def test_a_megabyte_takes_linear_time(piece):
  text = piece * (1_000_000 // len(piece))
  begin = time.process_time()
  answers.in_tag(text, "answer")
  answers.after_tag(text, "answer")
  answers.first_boxed(text)
  answers.last_boxed(text)
  assert time.process_time() - begin < 2.0


def test_clip():
  assert len(answers.clip("x" * 1_000_000)) == answers.MAX_CHARS
