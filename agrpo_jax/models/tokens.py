"""Text <-> token ids, with the checkpoint's own tokenizer and chat template.

Text is never interpreted. What a message, a demonstration or a completion
contains is encoded as plain text: a user who writes "<|eot_id|>" gets the
tokens of these characters, not the special token. Special tokens come only
from the chat template.
"""

import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from agrpo_jax.models import base
from agrpo_jax.models import tokens_bytes
from agrpo_jax.models import tokens_fast

write_byte_tokenizer = tokens_bytes.write
byte_network_settings = tokens_bytes.network_settings
special_ids = tokens_fast.special_ids


class Tokenizer(Protocol):
  """The part of a tokenizer that the rest of the package uses.

  Attributes:
    mask_id: id of the mask token.
    eos_id: id that ends (and fills up) a completion.
    stop_ids: further ids that end one.
    eot_id: id that ends a turn of the chat, or None.
    pad_id: id that fills padding.
  """

  mask_id: int
  eos_id: int
  stop_ids: tuple[int, ...]
  eot_id: int | None
  pad_id: int

  def encode_chat(
    self, messages: Sequence[Mapping[str, str]], prefill: str = ""
  ) -> list[int]:
    """The prompt that asks for the next turn, which begins with `prefill`.

    messages: of "role" and "content".
    """

  def encode_chats(
    self, chats: Sequence[tuple[Sequence[Mapping[str, str]], str]]
  ) -> list[list[int]]:
    """`encode_chat` of many messages and prefills, faster than one by one."""

  def encode(self, text: str) -> list[int]:
    """Plain text; nothing in it is special."""

  def decode(self, ids: Sequence[int]) -> str:
    """Text without special tokens and without ids that are no token.

    What stands after the first EOS is kept: the released code grades it too.
    """

  def decode_raw(self, ids: Sequence[int]) -> str:
    """Text in which special tokens, and ids that are no token, can be seen."""

  def decode_batch(self, ids_BxC: np.ndarray) -> list[str]:
    """`decode` of every row."""


def load(folder: pathlib.Path | None, vocabulary: base.Vocabulary) -> Tokenizer:
  """Reads the tokenizer of a model's folder, checked against its network.

  Args:
    folder: that holds a tokenizer (`tokens_fast.FastTokenizer`) and a chat
      template; None for raw bytes, see `tokens_bytes.ByteTokenizer`.
    vocabulary: of the network, which the tokenizer must agree with.

  Raises:
    UserError: if there is no tokenizer, or it does not fit the network.
  """
  if folder is None:
    return tokens_bytes.ByteTokenizer(vocabulary)
  return tokens_fast.FastTokenizer(folder, vocabulary)
