"""Rollouts as pieces of text, by hand."""

import types as python_types

import numpy as np

from agrpo_jax import replay
from agrpo_jax import tokens_bytes
from agrpo_jax import types

# Bytes are ids 3 to 258.
NETWORK = python_types.SimpleNamespace(
  vocab_size=260, mask_id=0, eos_id=1, pad_id=2
)
TOKENIZER = tokens_bytes.ByteTokenizer(NETWORK)
EOS = NETWORK.eos_id


def rollout(rows, num_denoise_steps=4) -> types.Rollout:
  """rows: of (ids, unmask steps); the numbers follow from the position."""
  completion_BxC = np.array([ids for ids, _ in rows])
  position_C = np.arange(completion_BxC.shape[1])
  unmask_step_BxC = np.array([steps for _, steps in rows])
  known = unmask_step_BxC < num_denoise_steps
  return types.Rollout(
    prompt=np.zeros((len(rows), 1)),
    prompt_length=np.ones(len(rows)),
    completion=completion_BxC,
    unmask_step=unmask_step_BxC,
    logprob=np.where(known, -0.25 * (position_C + 1), 0.0),
    entropy=np.where(known, 0.5 * (position_C + 1), 0.0),
    support=None,
    order_logprob=np.zeros((len(rows), num_denoise_steps)),
    num_steps=np.where(known, unmask_step_BxC + 1, 0).max(axis=1),
  )


def completion(text: str, steps: list[int]) -> replay.Completion:
  """A completion of this text; what is left of the steps is EOS."""
  ids = TOKENIZER.encode(text)
  ids += [EOS] * (len(steps) - len(ids))
  (found,) = replay.completions(rollout([(ids, steps)]), TOKENIZER, 1)
  return found


def test_bytes_of_one_character_are_one_piece():
  found = completion("é!", [2, 0, 1, 4])
  assert [piece.text for piece in found.pieces] == ["é", "!", "<|eos|>"]
  assert [piece.is_special for piece in found.pieces] == [False, False, True]
  assert [piece.unmask_step for piece in found.pieces] == [2, 1, None]
  # It is as sure as its least sure byte, the second one.
  assert [piece.logprob for piece in found.pieces] == [-0.5, -0.75, 0.0]
  assert [piece.entropy for piece in found.pieces] == [1.0, 1.5, 0.0]
  first = found.pieces[0]
  assert [first.num_unmasked(n) for n in range(4)] == [0, 1, 1, 2]
  assert [token.unmask_step for token in found.tokens] == [2, 0, 1, None]
  assert [token.position for token in found.tokens] == [0, 1, 2, 3]
  assert (found.num_steps, found.text) == (3, "é!")


def test_four_bytes_are_one_piece():
  found = completion("😀", [3, 2, 1, 0])
  assert [piece.text for piece in found.pieces] == ["😀"]
  assert found.pieces[0].unmask_step == 3


def test_bytes_that_are_no_character_stand_alone():
  lead = TOKENIZER.encode("é")[0]
  ids = [lead, *TOKENIZER.encode("a"), EOS, lead]
  (found,) = replay.completions(rollout([(ids, [0, 1, 2, 3])]), TOKENIZER, 1)
  texts = [piece.text for piece in found.pieces]
  assert texts == ["\ufffd", "a", "<|eos|>", "\ufffd"]


def test_ids_that_are_no_token_are_shown():
  (found,) = replay.completions(
    rollout([([259, NETWORK.mask_id], [0, 1])]), TOKENIZER, 1
  )
  assert [piece.text for piece in found.pieces] == ["<|id 259|>", "<|mask|>"]
  assert all(piece.is_special for piece in found.pieces)


def test_only_the_rows_asked_for():
  rows = [(TOKENIZER.encode(text), [0]) for text in "abc"]
  found = replay.completions(rollout(rows), TOKENIZER, 2)
  assert [one.text for one in found] == ["a", "b"]


def test_nothing_in_text_acts_on_a_screen():
  assert replay.visible("a\nb\r\nc\td") == "a\nb\nc  d"
  assert replay.visible("\x1b[2J\x07") == "<U+001B>[2J<U+0007>"
  assert replay.visible("\u202eevil\u200b\ud800") == (
    "<U+202E>evil<U+200B><U+D800>"
  )
  assert replay.visible("日本 é") == "日本 é"
