"""Rollouts as pieces of text, by hand."""

from agrpo_jax.show import text as text_lib
from fixtures import completions


def test_bytes_of_one_character_are_one_piece():
  found = completions.completion("é!", [2, 0, 1, 4])
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
  assert (found.num_executed_steps, found.text) == (3, "é!")


def test_four_bytes_are_one_piece():
  found = completions.completion("😀", [3, 2, 1, 0])
  assert [piece.text for piece in found.pieces] == ["😀"]
  assert found.pieces[0].unmask_step == 3


def test_bytes_that_are_no_character_stand_alone():
  lead = completions.TOKENIZER.encode("é")[0]
  ids = [lead, *completions.TOKENIZER.encode("a"), completions.EOS, lead]
  (found,) = text_lib.completions(
    completions.rollout([(ids, [0, 1, 2, 3])]), completions.TOKENIZER, 1
  )
  texts = [piece.text for piece in found.pieces]
  assert texts == ["\ufffd", "a", "<|eos|>", "\ufffd"]


def test_ids_that_are_no_token_are_shown():
  (found,) = text_lib.completions(
    completions.rollout([([259, completions.VOCABULARY.mask_id], [0, 1])]),
    completions.TOKENIZER,
    1,
  )
  assert [piece.text for piece in found.pieces] == ["<|id 259|>", "<|mask|>"]
  assert all(piece.is_special for piece in found.pieces)


def test_only_the_rows_asked_for():
  rows = [(completions.TOKENIZER.encode(text), [0]) for text in "abc"]
  found = text_lib.completions(
    completions.rollout(rows), completions.TOKENIZER, 2
  )
  assert [one.text for one in found] == ["a", "b"]


def test_nothing_in_text_acts_on_a_screen():
  assert text_lib.visible("a\nb\r\nc\td") == "a\nb\nc  d"
  assert text_lib.visible("\x1b[2J\x07") == "<U+001B>[2J<U+0007>"
  assert text_lib.visible("\u202eevil\u200b\ud800") == (
    "<U+202E>evil<U+200B><U+D800>"
  )
  assert text_lib.visible("日本 é") == "日本 é"
