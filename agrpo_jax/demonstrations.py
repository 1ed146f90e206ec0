"""Batches of (prompt, completion) pairs for SFT, resumable by step number."""

import random
from collections.abc import Callable

import numpy as np

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.models import tokens
from agrpo_jax.tasks import base
from agrpo_jax.tasks import contract
from agrpo_jax.tasks import files

CompletionFn = Callable[[tasks.Example, random.Random], str]


def from_jsonl(path: str) -> list[tasks.Example]:
  """Returns the examples of a JSONL file, whose completions are to be learned.

  A line is {"prompt": text or chat messages, "completion": text}; the text
  stands in `fields["completion"]`.

  Raises:
    UserError: naming file and line of what cannot be used.
  """
  rows = files.read(path, "train", ("prompt", "completion"))
  return [
    tasks.Example(index, *_pair(where, row))
    for index, (where, row) in enumerate(rows)
  ]


def _pair(where: str, row: files.Row) -> tuple[tuple, dict[str, str]]:
  messages, completion = row["prompt"], row["completion"]
  if isinstance(messages, str):
    messages = base.user_turn(messages)
  if not (contract.is_chat(messages) and isinstance(completion, str)):
    raise errors.UserError(
      f"{where}: a demonstration is "
      '{"prompt": text or messages, "completion": text}, not '
      f"{row!r:.80}."
    )
  return tuple(messages), {"completion": completion}


def recorded(example: tasks.Example, rng: random.Random) -> str:
  """The completion that came with the example."""
  del rng
  return example.fields["completion"]


class Demonstrations:
  """What a train step learns from, a pure function of its number."""

  def __init__(
    self,
    dataset: data.Dataset,
    completion_fn: CompletionFn,
    tokenizer: tokens.Tokenizer,
    *,
    completion_length: int,
    batch_size: int,
    bucket: int,
    seed: int,
  ):
    """Fixes the settings.

    Args:
      dataset: the prompts.
      completion_fn: (example, rng) -> text; rng differs from step to step.
      tokenizer: text -> ids.
      completion_length: C, tokens; shorter completions end in EOS.
      batch_size: B.
      bucket: prompts are padded to a multiple of this many tokens.
      seed: of the order and of `completion_fn`.
    """
    self._dataset = dataset
    self._completion_fn = completion_fn
    self._tokenizer = tokenizer
    self._completion_length = completion_length
    self._batch_size = batch_size
    self._bucket = bucket
    self._seed = seed

  def batch(self, train_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts int32 [B, P], their lengths [B], completions int32 [B, C].

    Raises:
      UserError: a completion that is longer than C.
    """
    rows = data.batch_examples(
      self._dataset, train_step, self._batch_size, self._seed
    )
    completion_BxC = np.full(
      (len(rows), self._completion_length), self._tokenizer.eos_id, np.int32
    )
    for row, (example, _) in enumerate(rows):
      rng = random.Random(f"{self._seed}/{train_step}/{example.id}")
      ids = self._tokenizer.encode(self._completion_fn(example, rng))
      if len(ids) > self._completion_length:
        raise errors.UserError(
          f"The completion of demonstration {example.id} has {len(ids)} "
          "tokens, more than config.sft.completion_length="
          f"{self._completion_length}; raise that, or leave it out."
        )
      completion_BxC[row, : len(ids)] = ids
    tokens_BxP, length_B = data.pack([ids for _, ids in rows], self._bucket)
    return tokens_BxP, length_B, completion_BxC
