"""gsm8k: rows, prompts, parts, verdicts."""

import json
import sys
import types

import pytest

from agrpo_jax import errors
from agrpo_jax.tasks import gsm8k

_ROW = {"question": "6 times 3?", "answer": "6*3=<<6*3=18>>18\n#### 18"}


def _write(tmp_path, rows):
  path = tmp_path / "test.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_examples(tmp_path):
  rows = [_ROW, {"question": "q", "answer": "#### -1,234"}]
  path = _write(tmp_path, rows)
  examples = gsm8k.examples("test", path=path)
  assert [example.id for example in examples] == [0, 1]
  assert examples[0].fields == {"question": "6 times 3?", "gold": "18"}
  assert examples[1].fields["gold"] == "-1,234"
  few = gsm8k.examples("test", path=path, options={"num_examples": 1})
  assert len(few) == 1


@pytest.mark.parametrize(
  "protocol, roles, prefill, has",
  [
    ("agrpo", ["system", "user"], "", ["<think>", "</answer>", "\\boxed{...}"]),
    ("d1", ["user"], "<reasoning>", ["<reasoning>", "\\boxed{...}"]),
    ("llada", ["user"], "", ["\\boxed{}"]),
    ("bare", ["user"], "", []),
  ],
)
def test_protocols(tmp_path, protocol, roles, prefill, has):
  path = _write(tmp_path, [_ROW])
  options = {"protocol": protocol}
  example = gsm8k.examples("test", path=path, options=options)[0]
  assert [message["role"] for message in example.messages] == roles
  assert example.prefill == prefill
  text = "\n".join(message["content"] for message in example.messages)
  assert "6 times 3?" in example.messages[-1]["content"]
  assert all(piece in text for piece in has)
  if protocol == "bare":
    assert text == "6 times 3?"


@pytest.mark.parametrize(
  "row, message",
  [
    ({"question": "q", "answer": "18"}, "line 2: answer '18' does not end in"),
    ({"question": "q", "answer": "#### many"}, "line 2: answer"),
    ({"question": "q", "answer": "####"}, "line 2: answer"),
    ({"question": "q", "answer": 18}, "line 2: answer '18' does not end in"),
    (
      {"question": "q", "answer": ["#### 1"]},
      "line 2: column answer must hold",
    ),
    ({"question": {"a": 1}, "answer": "#### 1"}, "column question must hold"),
    (
      {"problem": "q", "answer": "#### 1"},
      "line 2: column question is",
    ),
  ],
)
def test_bad_rows(tmp_path, row, message):
  with pytest.raises(errors.UserError, match=message):
    gsm8k.examples("test", path=_write(tmp_path, [_ROW, row]))


def test_platinum_is_only_a_test_split(monkeypatch):
  asked = []

  def load_dataset(name, *unused_args, **unused_kwargs):
    asked.append(name)
    return [_ROW]

  module = types.ModuleType("datasets")
  module.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, "datasets", module)
  options = {"source": "platinum"}
  gsm8k.examples("test", options=options)
  gsm8k.examples("train", options=options)
  gsm8k.examples("test")
  main = "openai/gsm8k"
  assert asked == ["madrylab/gsm8k-platinum", main, main]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"source": "silver"}, "main, platinum"),
    ({"protocol": "x"}, "agrpo, d1, llada, bare"),
    ({"nums": 1}, "option 'nums' is unknown"),
    ({"num_examples": "all"}, "num_examples='all' must be of type int"),
    ({"num_examples": -1}, "num_examples=-1 must be at least 0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.UserError, match=message):
    gsm8k.examples("test", options=options)


@pytest.mark.parametrize(
  "protocol, completion, reward",
  [
    ("agrpo", "<think>a</think><answer>\\boxed{18}</answer>", 4.0),
    ("agrpo", "<answer>\\boxed{18}</answer>", 3.5),
    ("agrpo", "<think>a</think><answer>\\boxed{19}</answer>", 1.0),
    ("agrpo", "18", 3.0),
    # The opening tag is prefilled, and so no part of the completion.
    ("d1", "a</reasoning><answer>\\boxed{18}</answer>", 4.0),
    ("d1", "<answer>\\boxed{18}</answer>", 3.5),
    ("llada", "<think>a</think><answer>\\boxed{18}</answer>", 3.0),
    ("bare", "\\boxed{18}", 3.0),
  ],
)
def test_reward(protocol, completion, reward):
  options = {"protocol": protocol}
  weights = gsm8k.reward_weights(options)
  parts = gsm8k.reward(completion, {"gold": "18"}, options)
  assert sum(weights[name] * parts[name] for name in weights) == reward


@pytest.mark.parametrize(
  "protocol, completion, gold, strict, tolerant",
  [
    ("agrpo", "<answer>\\boxed{1,234}</answer>", "1,234", 0, 1),
    ("agrpo", "<answer>\\boxed{-5}</answer>", "5", 1, 0),
    ("agrpo", "<answer>\\boxed{2:30}</answer>", "2", 1, 0),
    ("agrpo", "The sum of 3 and 15 is 18", "18", 0, 1),
    ("d1", "<answer>\\boxed{1,234}</answer>", "1,234", 0, 1),
    ("d1", "<answer>\\boxed{-5}</answer>", "-5", 1, 1),
    ("d1", "\\boxed{...} \\boxed{5}", "5", 1, 1),
    ("d1", "<answer>6 and 5</answer>", "5", 1, 0),
    ("d1", "\\boxed{6 of 5}", "6", 1, 0),
    ("d1", "The sum of 3 and 15 is 18", "18", 0, 1),
  ],
)
def test_verdicts(protocol, completion, gold, strict, tolerant):
  grades = gsm8k.grade(completion, {"gold": gold}, {"protocol": protocol})
  assert grades == {"accuracy": strict, "accuracy_tolerant": tolerant}
