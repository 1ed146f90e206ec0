"""A rollout as text: which piece of the answer was unmasked at which step.

A `Rollout` records for every token when it was unmasked and how sure the model
was, so looking at it again needs no forward pass. What is shown as one piece is
mostly one token; a character whose bytes are spread over several tokens is one
piece of them all, because none of its bytes can be read alone.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from agrpo_jax import types
from agrpo_jax.models import tokens

END = "∎"  # stands for EOS, which fills up completions by the hundred

# A character has at most four bytes in UTF-8.
_MAX_BYTES = 4
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
# Characters that would act on the screen instead of being seen: controls,
# formats (which may turn the direction of writing), lone surrogates, other
# line ends.
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclasses.dataclass(frozen=True)
class Token:
  """One position of a completion.

  Attributes:
    position: within the completion, from 0.
    id: in the vocabulary.
    unmask_step: denoising step that unmasked it, from 0, counting those that
      unmasked something; None where none did, since the completion had ended
      before.
    logprob: of the token when it was drawn, nats.
    entropy: of the distribution it was drawn from, nats.
  """

  position: int
  id: int
  unmask_step: int | None
  logprob: float
  entropy: float


@dataclasses.dataclass(frozen=True)
class Piece:
  """The smallest part that is shown: a token, or those of one character.

  Attributes:
    text: visible, with line breaks as the only control characters; a special
      token's name.
    is_special: a special token, or an id that is no token.
    tokens: at least one.
  """

  text: str
  is_special: bool
  tokens: tuple[Token, ...]

  def num_unmasked(self, num_done: int) -> int:
    """Returns how many of its tokens `num_done` denoising steps unmasked."""
    return sum(
      token.unmask_step is not None and token.unmask_step < num_done
      for token in self.tokens
    )

  @property
  def unmask_step(self) -> int | None:
    """The step that completed it, None if there was none."""
    steps = [
      token.unmask_step
      for token in self.tokens
      if token.unmask_step is not None
    ]
    return max(steps) if len(steps) == len(self.tokens) else None

  @property
  def logprob(self) -> float:
    """The log-probability of its least probable token."""
    return min(token.logprob for token in self.tokens)

  @property
  def entropy(self) -> float:
    """The entropy of its least certain token."""
    return max(token.entropy for token in self.tokens)


@dataclasses.dataclass(frozen=True)
class Completion:
  """One row of a rollout.

  Attributes:
    pieces: in reading order.
    num_executed_steps: denoising steps that it took.
    text: as graders read it, without special tokens.
  """

  pieces: tuple[Piece, ...]
  num_executed_steps: int
  text: str

  @property
  def tokens(self) -> list[Token]:
    return [token for piece in self.pieces for token in piece.tokens]


def as_json(completion: Completion, eos_id: int) -> dict[str, Any]:
  """Returns what playing a completion step by step needs, as JSON values.

  Returns:
    A list per field of the pieces: `text`, END for EOS; `unmask_step`, None
    where the completion had ended before; `logprob` and `entropy` of two
    decimals. `special`: indices of those that are special tokens.
    `num_steps`: denoising steps that it took.
  """
  pieces = completion.pieces
  return {
    "text": [
      END if piece.tokens[0].id == eos_id else piece.text for piece in pieces
    ],
    "unmask_step": [piece.unmask_step for piece in pieces],
    "logprob": [round(piece.logprob, 2) for piece in pieces],
    "entropy": [round(piece.entropy, 2) for piece in pieces],
    "special": [i for i, piece in enumerate(pieces) if piece.is_special],
    "num_steps": completion.num_executed_steps,
  }


def completions(
  rollout: types.Rollout, tokenizer: tokens.Tokenizer, num_rows: int
) -> list[Completion]:
  """Returns the first rows of a rollout as text."""
  columns = (
    rollout.completion,
    rollout.unmask_step,
    rollout.logprob,
    rollout.entropy,
  )
  never = rollout.order_logprob.shape[1]  # K
  found = []
  for row in range(num_rows):
    values = [np.asarray(column[row]).tolist() for column in columns]
    # Steps that were not needed leave gaps in the indices; those that unmasked
    # something are counted here.
    executed = sorted({step for step in values[1] if 0 <= step < never})
    number_of = {step: number for number, step in enumerate(executed)}
    row_tokens = [
      Token(
        position=position,
        id=id_,
        unmask_step=number_of.get(step),
        logprob=logprob,
        entropy=entropy,
      )
      for position, (id_, step, logprob, entropy) in enumerate(
        zip(*values, strict=True)
      )
      if step >= 0  # the others are of the prompt
    ]
    found.append(
      Completion(
        pieces=tuple(_pieces(row_tokens, tokenizer)),
        num_executed_steps=int(rollout.num_executed_steps[row]),
        text=tokenizer.decode([token.id for token in row_tokens]),
      )
    )
  return found


def _pieces(
  row_tokens: Sequence[Token], tokenizer: tokens.Tokenizer
) -> list[Piece]:
  pieces = []
  start = 0
  while start < len(row_tokens):
    size = _readable_size(row_tokens[start:][:_MAX_BYTES], tokenizer)
    group = tuple(row_tokens[start : start + size])
    ids = [token.id for token in group]
    pieces.append(
      Piece(
        text=visible(tokenizer.decode_raw(ids)),
        is_special=tokenizer.decode(ids) == "",
        tokens=group,
      )
    )
    start += size
  return pieces


def _readable_size(
  row_tokens: Sequence[Token], tokenizer: tokens.Tokenizer
) -> int:
  """Returns how many tokens from here make text; 1 if they never do."""
  for size in range(1, len(row_tokens) + 1):
    ids = [token.id for token in row_tokens[:size]]
    if _UNREADABLE not in tokenizer.decode_raw(ids):
      return size
  return 1


def visible(text: str) -> str:
  """Returns text in which nothing acts on a screen but line breaks.

  Model text may hold escape sequences, which a terminal would obey, or marks
  that turn the direction of writing.
  """
  return "".join(
    _visible(character)
    for character in text.replace("\r\n", "\n").replace("\t", "  ")
  )


def _visible(character: str) -> str:
  if character == "\n" or unicodedata.category(character) not in _ACTING:
    return character
  return f"<U+{ord(character):04X}>"
