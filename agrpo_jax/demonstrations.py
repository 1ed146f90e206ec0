"""Batches of (prompt, completion) pairs for SFT, resumable by step number."""

import json
import pathlib
import random
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.models import tokens

CompletionFn = Callable[[tasks.Example, random.Random], str]


def from_jsonl(path: str) -> list[tasks.Example]:
  """Examples of a JSONL file; `fields["completion"]` is what to learn.

  A line is {"prompt": text or chat messages, "completion": text}.

  Raises:
    UserError: naming file and line of what cannot be used.
  """
  return [
    tasks.Example(id=index, messages=messages, fields={"completion": text})
    for index, (messages, text) in enumerate(_pairs(pathlib.Path(path)))
  ]


def _pairs(file: pathlib.Path) -> Iterator[tuple[tuple, str]]:
  for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise errors.UserError(f"{file}, line {number}: {error}.") from error
    if not isinstance(record, dict):
      record = {}
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    is_chat = isinstance(prompt, list) and all(
      isinstance(turn, dict)
      and isinstance(turn.get("role"), str)
      and isinstance(turn.get("content"), str)
      for turn in prompt
    )
    if not (prompt and is_chat and isinstance(completion, str)):
      raise errors.UserError(
        f"{file}, line {number}: a demonstration is "
        '{"prompt": text or messages, "completion": text}, not '
        f"{line[:80]!r}."
      )
    yield tuple(prompt), completion


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
