"""data: batches are a pure function of the step; nothing is cut silently."""

import json

import numpy as np
import pytest

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.policies import row as row_lib


class _OneIdPerCharacter:
  """Encodes the last turn and the prefill, a character an id."""

  def encode_chats(self, chats):
    return [
      [ord(character) for character in messages[-1]["content"] + prefill]
      for messages, prefill in chats
    ]


def _dataset(lengths, max_prompt_length=100, prefill=""):
  examples = [
    tasks.Example(
      id=index,
      messages=({"role": "user", "content": "x" * length},),
      fields={},
      prefill=prefill,
    )
    for index, length in enumerate(lengths)
  ]
  return data.Dataset(examples, _OneIdPerCharacter(), max_prompt_length)


def _ids(dataset, train_step, num_prompts=4, seed=0):
  batch = dataset.batch(train_step, num_prompts, seed)
  return [prompt.example.id for prompt in batch]


def test_too_long_prompts_are_skipped_and_counted_never_cut():
  dataset = _dataset([3, 10, 11, 5, 40], max_prompt_length=10)
  assert [prompt.example.id for prompt in dataset.prompts] == [0, 1, 3]
  assert [len(prompt.tokens) for prompt in dataset.prompts] == [3, 10, 5]
  assert (len(dataset), dataset.num_skipped, dataset.longest) == (3, 2, 10)


def test_prefill_counts_as_prompt():
  dataset = _dataset([3], prefill="ab")
  assert dataset.prompts[0].tokens == [120, 120, 120, 97, 98]
  with pytest.raises(errors.UserError):
    _dataset([9], max_prompt_length=10, prefill="ab")


@pytest.mark.parametrize("lengths", [[], [11, 12]])
def test_no_example_left_is_a_user_error(lengths):
  with pytest.raises(errors.UserError, match="no example is left"):
    _dataset(lengths, max_prompt_length=10)


def test_batch_does_not_depend_on_what_was_asked_before():
  forward = [_ids(_dataset([1] * 10), step) for step in range(7)]
  dataset = _dataset([1] * 10)
  backward = [_ids(dataset, step) for step in reversed(range(7))]
  assert forward == backward[::-1]


def test_no_batch_holds_an_example_twice_and_epochs_differ():
  dataset = _dataset([1] * 10)  # two batches of 4 an epoch, 2 passed over
  batches = [_ids(dataset, step) for step in range(40)]
  assert all(len(set(batch)) == 4 for batch in batches)
  epochs = [batches[i] + batches[i + 1] for i in range(0, 40, 2)]
  assert all(len(set(epoch)) == 8 for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) > 15
  assert set().union(*epochs) == set(range(10))


def test_seed_changes_the_order():
  dataset = _dataset([1] * 50)
  assert _ids(dataset, 0, seed=0) != _ids(dataset, 0, seed=1)


def test_batch_of_the_whole_data_set():
  assert sorted(_ids(_dataset([1] * 4), 3)) == [0, 1, 2, 3]


def test_too_few_examples_is_a_user_error():
  with pytest.raises(errors.UserError, match="only 3 examples"):
    _ids(_dataset([1] * 3), 0)


def test_held_out_problems_of_the_training_file_are_told(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv("HOME", str(tmp_path))
  row = {"question": "6 times 3?", "answer": "#### 18"}
  (tmp_path / "rows.jsonl").write_text(json.dumps(row))
  found_in = data.Files("~/rows.jsonl", "", max_prompt_length=9, bucket=1)
  task = data.Task("gsm8k", "", {})
  assert len(data.load_examples(task, found_in, "train")) == 1
  assert not caplog.text
  data.load_examples(task, found_in, "test")
  assert "config.data.path=~/rows.jsonl, training's too" in caplog.text


def test_pack_pads_on_the_right_to_a_multiple():
  tokens_BxP, length_B = row_lib.pack([[1, 2, 3], [4]], multiple=4, pad_id=9)
  np.testing.assert_array_equal(tokens_BxP, [[1, 2, 3, 9], [4, 9, 9, 9]])
  np.testing.assert_array_equal(length_B, [3, 1])
  assert tokens_BxP.dtype == length_B.dtype == np.int32


@pytest.mark.parametrize(
  "longest, multiple, width",
  [(4, 4, 4), (5, 4, 8), (1, 16, 16), (0, 8, 8), (7, 1, 7)],
)
def test_pack_width(longest, multiple, width):
  tokens_BxP, _ = row_lib.pack([[1] * longest, []], multiple)
  assert tokens_BxP.shape == (2, width)


def test_pack_refuses_an_impossible_multiple():
  with pytest.raises(ValueError, match="multiple=0"):
    row_lib.pack([[1]], 0)


_CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "1+1?"},
]


def test_prompts_of_demonstrations_are_text_or_chats(tmp_path):
  """Whatever the file begins with, and whatever stands in its strings."""
  rows = [
    {"prompt": "1+1?\u2028", "completion": "2\x85"},
    {"prompt": _CHAT, "completion": ""},
  ]
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  file = tmp_path / "pairs.jsonl"
  file.write_text("\ufeff" + "\n\n".join(lines), "utf-8")
  examples = data.from_jsonl(str(file))
  assert [example.id for example in examples] == [0, 1]
  assert [example.fields["completion"] for example in examples] == ["2\x85", ""]
  assert examples[0].messages[0]["content"] == "1+1?\u2028"
  assert list(examples[1].messages) == _CHAT


@pytest.mark.parametrize(
  "line, message",
  [
    (b'{"prompt": "1"}', "line 2: column completion is missing"),
    (b'{"prompt": "1", "completion": 2}', "line 2: a demonstration is"),
    (b'{"prompt": [], "completion": "2"}', "line 2: a demonstration is"),
    (b'{"prompt": ["1"], "completion": "2"}', "line 2: a demonstration is"),
    (b'{"prompt": "1", "completion": ', "line 2 is not JSON"),
    (b'{"prompt": "\\ud800", "completion": "2"}', "line 2 escapes half of"),
    (b'{"prompt": "\xff", "completion": "2"}', "not UTF-8"),
    (b"[1]", "line 2 is no JSON object"),
  ],
)
def test_mistakes_in_demonstrations_are_named_with_their_line(
  tmp_path, line, message
):
  file = tmp_path / "pairs.jsonl"
  file.write_bytes(b'{"prompt": "1", "completion": "1"}\n' + line)
  with pytest.raises(errors.UserError, match=message):
    data.from_jsonl(str(file))
