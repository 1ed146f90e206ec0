"""Prompts: tokenized once, then drawn batch by batch as a function of the step.

There is no iterator to save: batch `train_step` is the same whenever, wherever
and in whichever order it is asked for, so a resumed run goes on exactly.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np
from absl import logging

from agrpo_jax import errors
from agrpo_jax import tasks


class Tokenizer(Protocol):
  """The part of `tokens.Tokenizer` that is used here."""

  def encode_chat(
    self, messages: Sequence[Mapping[str, str]], prefill: str = ""
  ) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Prompt:
  """An example and its prompt as token ids."""

  example: tasks.Example
  tokens: list[int]


class Dataset:
  """The examples whose prompts fit.

  num_skipped: examples left out because their prompt is too long.
  longest: tokens of the longest prompt that was kept.
  """

  def __init__(
    self,
    examples: Sequence[tasks.Example],
    tokenizer: Tokenizer,
    max_prompt_length: int,
  ):
    """Tokenizes all prompts; never cuts one.

    Raises UserError if no example is left.
    """
    prompts = [
      Prompt(
        example,
        list(tokenizer.encode_chat(list(example.messages), example.prefill)),
      )
      for example in examples
    ]
    self.prompts = [
      prompt for prompt in prompts if len(prompt.tokens) <= max_prompt_length
    ]
    self.num_skipped = len(prompts) - len(self.prompts)
    if not self.prompts:
      shortest = min((len(prompt.tokens) for prompt in prompts), default=0)
      raise errors.UserError(
        f"no example is left: {len(prompts)} given, the shortest prompt has "
        f"{shortest} tokens, and {max_prompt_length=}. Raise the limit or use "
        "a protocol with a shorter prompt."
      )
    self.longest = max(len(prompt.tokens) for prompt in self.prompts)
    if self.num_skipped:
      logging.warning(
        "Skipped %d of %d examples: prompts longer than %d tokens.",
        self.num_skipped,
        len(prompts),
        max_prompt_length,
      )

  def __len__(self) -> int:
    return len(self.prompts)


def batch_examples(
  dataset: Dataset, train_step: int, num_prompts: int, seed: int
) -> list[tuple[tasks.Example, list[int]]]:
  """The `num_prompts` examples of one train step, with their token ids.

  Every epoch is a new shuffle cut into whole batches; what is left at its end
  (another remainder in every epoch) is passed over, so a batch never holds an
  example twice. Depends on nothing but the arguments.

  Raises UserError if the data set is smaller than a batch: an example drawn
  twice would get twice the same random keys.
  """
  if num_prompts > len(dataset):
    raise errors.UserError(
      f"{num_prompts=} in a batch, but only {len(dataset)} examples: lower it "
      "or give more data."
    )
  shuffled = (
    grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(None)
  )
  epoch, batch = divmod(train_step, len(dataset) // num_prompts)
  begin = epoch * len(dataset) + batch * num_prompts
  chosen = [dataset.prompts[shuffled[begin + i]] for i in range(num_prompts)]
  return [(prompt.example, prompt.tokens) for prompt in chosen]


def pack(
  rows: Sequence[Sequence[int]], multiple: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of token ids as one array.

  Returns tokens_BxP int32, right-padded with `pad_id`, P the longest row
  rounded up to a multiple of `multiple` (and at least that); and length_B
  int32, the length of each row.
  """
  if multiple < 1:
    raise ValueError(f"{multiple=} must be at least 1.")
  length_B = np.array([len(row) for row in rows], dtype=np.int32)
  longest = max(1, int(length_B.max(initial=0)))
  width = -(-longest // multiple) * multiple
  tokens_BxP = np.full((len(rows), width), pad_id, dtype=np.int32)
  for index, row in enumerate(rows):
    tokens_BxP[index, : len(row)] = row
  return tokens_BxP, length_B
