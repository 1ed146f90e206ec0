"""Tokenizers made of bytes: one in memory, and one written as files.

`ByteTokenizer` serves checkpoints that have no tokenizer. `write` makes the
tokenizer of the tiny models that come with this package: bytes, the words of
the chat layout and LLaDA's special tokens, in the same files and with the same
chat layout as LLaDA-8B-Instruct.
"""

import itertools
import json
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from agrpo_jax import errors
from agrpo_jax.models import base

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
EOT = "<|eot_id|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
MASK = "<|mdm_mask|>"

_SPECIAL = (BOS, EOS, EOT, START_HEADER, END_HEADER, MASK)
# What every chat contains is one token each; all else is bytes.
_WORDS = ("\n\n", "user", "assistant", "system")

CHAT_TEMPLATE = (
  "{{ bos_token }}"
  "{% for message in messages %}"
  "{{ '" + START_HEADER + "' + message['role'] + '" + END_HEADER + "\n\n' }}"
  "{{ message['content'] | trim }}{{ '" + EOT + "' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '" + START_HEADER + "assistant" + END_HEADER + "\n\n' }}"
  "{% endif %}"
)


class ByteTokenizer:
  """UTF-8 bytes as tokens, for a checkpoint without a tokenizer.

  Byte b is the b-th id that is not special. The chat is written out in plain
  text, "user:" and "assistant:" on lines of their own.
  """

  def __init__(self, vocabulary: base.Vocabulary):
    self.mask_id = vocabulary.mask_id
    self.eos_id = vocabulary.eos_id
    self.stop_ids = vocabulary.stop_ids
    self.pad_id = vocabulary.pad_id
    self.eot_id: int | None = None
    self._names = {
      self.pad_id: "<|pad|>",
      **dict.fromkeys(self.stop_ids, "<|stop|>"),
      self.eos_id: "<|eos|>",
      self.mask_id: "<|mask|>",
    }
    ordinary = (i for i in range(vocabulary.size) if i not in self._names)
    self._of_byte = list(itertools.islice(ordinary, 256))
    if len(self._of_byte) < 256:
      raise errors.UserError(
        f"The 'bytes' tokenizer needs 256 ids besides {len(self._names)} "
        f"special ones, but the network's vocab_size is {vocabulary.size}. "
        "Use the network's own tokenizer."
      )
    self._byte_of = {one: byte for byte, one in enumerate(self._of_byte)}

  def encode_chat(
    self, messages: Sequence[Mapping[str, str]], prefill: str = ""
  ) -> list[int]:
    turns = [
      f"{message['role']}:\n{message['content'].strip()}\n\n"
      for message in messages
    ]
    return self.encode("".join([*turns, "assistant:\n", prefill]))

  def encode_chats(
    self, chats: Sequence[tuple[Sequence[Mapping[str, str]], str]]
  ) -> list[list[int]]:
    return [self.encode_chat(messages, prefill) for messages, prefill in chats]

  def encode(self, text: str) -> list[int]:
    return [self._of_byte[byte] for byte in text.encode("utf-8")]

  def decode(self, ids: Sequence[int]) -> str:
    return self._text(one for one in ids if one in self._byte_of)

  def decode_raw(self, ids: Sequence[int]) -> str:
    pieces = []
    for is_byte, run in itertools.groupby(
      ids, key=lambda one: one in self._byte_of
    ):
      if is_byte:
        pieces.append(self._text(run))
      else:
        pieces += [self._names.get(one, f"<|id {one}|>") for one in run]
    return "".join(pieces)

  def decode_batch(self, ids_BxC: np.ndarray) -> list[str]:
    return [self.decode(row) for row in np.asarray(ids_BxC).tolist()]

  def _text(self, ids: Iterable[int]) -> str:
    return bytes(self._byte_of[one] for one in ids).decode("utf-8", "replace")


def network_settings() -> dict[str, int]:
  """Returns the fields of a network's shape that follow from the tokenizer."""
  vocab = _make().get_vocab()
  return {
    "vocab_size": len(vocab),
    "mask_id": vocab[MASK],
    "eos_id": vocab[EOS],
    "pad_id": vocab[EOS],
  }


def write(folder: str | pathlib.Path) -> dict[str, int]:
  """Writes the tokenizer's files into a folder, made if need be.

  Returns:
    See `network_settings`.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = _make()
  tokenizer.save(str(folder / "tokenizer.json"))
  named = {
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": EOS,
    "mask_token": MASK,
  }
  _write_json(
    folder / "tokenizer_config.json",
    {
      **named,
      "chat_template": CHAT_TEMPLATE,
      "clean_up_tokenization_spaces": False,
      "tokenizer_class": "PreTrainedTokenizerFast",
    },
  )
  _write_json(folder / "special_tokens_map.json", named)
  return network_settings()


def _make() -> tokenizers.Tokenizer:
  letters = _letters()
  vocab = {letter: byte for byte, letter in enumerate(letters)}
  for word in _WORDS:
    name = "".join(letters[byte] for byte in word.encode())
    vocab[name] = len(vocab)
  tokenizer = tokenizers.Tokenizer(
    # No merges: a word is a token if it is in the vocabulary as a whole.
    models.BPE(vocab=vocab, merges=[], ignore_merges=True)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(r"\n\n|\p{L}+|[^\p{L}]"), behavior="isolated"
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(_SPECIAL))
  return tokenizer


def _letters() -> list[str]:
  """The letter that byte-level tokenizers write for each byte.

  Printable bytes are written as themselves; the others, in order, as the
  letters from U+0100 on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return [
    chr(byte if byte in printable else next(others)) for byte in range(256)
  ]


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
  )
