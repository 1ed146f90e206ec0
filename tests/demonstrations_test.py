"""demonstrations: what a JSONL file of them may hold."""

import json

import pytest

from agrpo_jax import demonstrations
from agrpo_jax import errors

_CHAT = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "1+1?"},
]


def test_prompts_are_text_or_chats(tmp_path):
  """Whatever the file begins with, and whatever stands in its strings."""
  rows = [
    {"prompt": "1+1?\u2028", "completion": "2\x85"},
    {"prompt": _CHAT, "completion": ""},
  ]
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  file = tmp_path / "pairs.jsonl"
  file.write_text("\ufeff" + "\n\n".join(lines), "utf-8")
  examples = demonstrations.from_jsonl(str(file))
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
def test_mistakes_are_named_with_their_line(tmp_path, line, message):
  file = tmp_path / "pairs.jsonl"
  file.write_bytes(b'{"prompt": "1", "completion": "1"}\n' + line)
  with pytest.raises(errors.UserError, match=message):
    demonstrations.from_jsonl(str(file))
