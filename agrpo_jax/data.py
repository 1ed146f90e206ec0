"""Problems, prompts and batches, each a function of settings and train step.

There is no iterator to save: batch `train_step` is the same whenever, wherever
and in whichever order it is asked for, so a resumed run goes on exactly.
"""

import dataclasses
import pathlib
import random
import types as python_types
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import numpy as np
from absl import logging

from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.policies import row as row_lib
from agrpo_jax.tasks import base
from agrpo_jax.tasks import contract
from agrpo_jax.tasks import files


class Tokenizer(Protocol):
  """The part of `tokens.Tokenizer` that is used here."""

  @property
  def eos_id(self) -> int: ...

  def encode(self, text: str) -> list[int]: ...

  def encode_chats(
    self, chats: Sequence[tuple[Sequence[Mapping[str, str]], str]]
  ) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: where problems come from and how completions are graded.

  Attributes:
    name: of a task of the package; "" under `path`.
    path: Python file of a task of one's own, or "".
    options: of the task.
    reward_weights: part of the reward -> weight, for the parts that have one.
  """

  name: str
  path: str
  options: Mapping[str, Any]
  reward_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __bool__(self) -> bool:
    return bool(self.name or self.path)

  def load(self) -> python_types.ModuleType:
    """Imports the task's module."""
    return tasks.get(self.name, self.path or None)

  def load_maker_of_demonstrations(self) -> "CompletionFn":
    """Returns (example, rng) -> text of the task's own demonstrations.

    Raises:
      UserError: the task makes none.
    """
    module = self.load()
    if not hasattr(module, "demonstration"):
      raise errors.UserError(
        f"The task {self.name or self.path!r} makes no demonstrations; give a "
        "JSONL file of prompt and completion."
      )
    return lambda example, rng: contract.demonstration(
      module, example, rng, self.options
    )


@dataclasses.dataclass(frozen=True)
class Files:
  """Files of problems, and how long prompts may be.

  Attributes:
    path: file of problems, or folder of train.* and test.*; "" for those that
      the task makes or fetches.
    test_path: held-out problems, where `path` is a file of others; or "".
    max_prompt_length: tokens; longer prompts are skipped, and counted.
    bucket: prompts are padded to a multiple of this many tokens.
  """

  path: str
  test_path: str
  max_prompt_length: int
  bucket: int


def load_examples(
  task: Task, found_in: Files, split: str
) -> list[tasks.Example]:
  """Reads, or makes, the task's problems of a split."""
  path = found_in.path
  if split == "test":
    path = found_in.test_path or path
    if not found_in.test_path and pathlib.Path(path).expanduser().is_file():
      logging.warning(
        "The held-out problems are those of config.data.path=%s, training's "
        "too; give others as config.data.test_path, or a folder of train.* "
        "and test.* as config.data.path.",
        path,
      )
  return contract.examples(
    task.load(), split, path=path or None, options=task.options
  )


@dataclasses.dataclass(frozen=True)
class Prompt:
  """An example and its prompt as token ids."""

  example: tasks.Example
  tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows: a prompt each, and which of its prompt's completions it is.

  Attributes:
    prompts: one per row.
    index: one per row; it counts the completions of a prompt.
  """

  prompts: tuple[Prompt, ...]
  index: tuple[int, ...]

  @classmethod
  def of(cls, prompts: Sequence[Prompt], num_samples: int = 1) -> "Batch":
    """Returns `num_samples` rows of each prompt, side by side."""
    return cls(
      prompts=tuple(p for p in prompts for _ in range(num_samples)),
      index=tuple(range(num_samples)) * len(prompts),
    )

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, rows: slice) -> "Batch":
    return Batch(self.prompts[rows], self.index[rows])

  @property
  def examples(self) -> list[tasks.Example]:
    return [prompt.example for prompt in self.prompts]

  @property
  def tokens(self) -> list[list[int]]:
    return [prompt.tokens for prompt in self.prompts]

  @property
  def fields(self) -> list[dict[str, Any]]:
    return [prompt.example.fields for prompt in self.prompts]

  @property
  def id_Bx2(self) -> np.ndarray:
    """uint32 [B, 2], what the random key of each row is made of."""
    ids = [prompt.example.id for prompt in self.prompts]
    return np.stack([np.array(ids), np.array(self.index)], 1).astype(np.uint32)


class Dataset:
  """The examples whose prompts fit.

  Attributes:
    prompts: theirs, in order.
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

    Raises:
      UserError: no example is left.
    """
    encoded = tokenizer.encode_chats(
      [(example.messages, example.prefill) for example in examples]
    )
    prompts = [
      Prompt(example, ids)
      for example, ids in zip(examples, encoded, strict=True)
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

  def batch(
    self, train_step: int, num_prompts: int, seed: int
  ) -> tuple[Prompt, ...]:
    """The prompts of one train step.

    Every epoch is a new shuffle cut into whole batches; what is left at its end
    (another remainder in every epoch) is passed over, so a batch never holds an
    example twice. Depends on nothing but the arguments.

    Raises:
      UserError: the data set is smaller than a batch.
    """
    check_size(len(self), num_prompts, self.num_skipped)
    # It brings Orbax along; commands that train nothing start sooner without.
    import grain

    shuffled = (
      grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(None)
    )
    epoch, batch = divmod(train_step, len(self) // num_prompts)
    begin = epoch * len(self) + batch * num_prompts
    return tuple(self.prompts[shuffled[begin + i]] for i in range(num_prompts))


def check_size(
  num_examples: int,
  num_prompts: int,
  num_skipped: int = 0,
  key: str = "config.rollout.num_prompts",
) -> None:
  """Raises UserError if there are not enough examples for a batch.

  An example drawn twice would get twice the same random keys.

  Args:
    num_examples: there are.
    num_prompts: in a batch.
    num_skipped: examples whose prompt is too long, for the message.
    key: of the config, which sets `num_prompts`.
  """
  if num_prompts > num_examples:
    skipped = f", {num_skipped} skipped as too long" if num_skipped else ""
    raise errors.UserError(
      f"{key}={num_prompts} in a batch, but only {num_examples} "
      f"examples{skipped}: lower it or give more data."
    )


def load_dataset(
  task: Task, found_in: Files, tokenizer: Tokenizer, split: str
) -> Dataset:
  """Reads the task's problems of a split and tokenizes their prompts."""
  return Dataset(
    load_examples(task, found_in, split), tokenizer, found_in.max_prompt_length
  )


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
  """The batches of supervised fine-tuning, a function of the train step."""

  def __init__(
    self,
    dataset: Dataset,
    completion_fn: CompletionFn,
    tokenizer: Tokenizer,
    *,
    completion_length: int,
    batch_size: int,
    bucket: int,
    seed: int,
    prompt_multiple: int = 1,
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
      prompt_multiple: what a prompt has beyond a multiple of this many tokens
        stands at the beginning of its completion.

    Raises:
      UserError: fewer prompts than a batch takes.
    """
    check_size(
      len(dataset), batch_size, dataset.num_skipped, "config.sft.batch_size"
    )
    self._dataset = dataset
    self._completion_fn = completion_fn
    self._tokenizer = tokenizer
    self._completion_length = completion_length
    self._batch_size = batch_size
    self._bucket = bucket
    self._seed = seed
    self._prompt_multiple = prompt_multiple

  def batch(
    self, train_step: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts int32 [B, P], their lengths [B], completions int32 [B, C].

    And int32 [B], how many tokens at the beginning of each completion are its
    prompt's.

    Raises:
      UserError: a completion that is longer than C.
    """
    rows = self._dataset.batch(train_step, self._batch_size, self._seed)
    prompts, ends = row_lib.cut(
      [one.tokens for one in rows], self._prompt_multiple
    )
    completion_BxC = np.full(
      (len(rows), self._completion_length), self._tokenizer.eos_id, np.int32
    )
    for row, prompt in enumerate(rows):
      example = prompt.example
      # From these alone: the same text on every process and in a resumed run.
      rng = random.Random(f"{self._seed}/{train_step}/{example.id}")
      ids = self._tokenizer.encode(self._completion_fn(example, rng))
      ids = [*ends[row], *ids]
      if len(ids) > self._completion_length:
        raise errors.UserError(
          f"The completion of demonstration {example.id} has {len(ids)} "
          "tokens, more than config.sft.completion_length="
          f"{self._completion_length}; raise that, or leave it out."
          + f" (Its first block has {len(ends[row])} tokens of the prompt.)"
          * bool(ends[row])
        )
      completion_BxC[row, : len(ids)] = ids
    tokens_BxP, length_B = row_lib.pack(prompts, self._bucket)
    num_given_B = np.array([len(end) for end in ends], np.int32)
    return tokens_BxP, length_B, completion_BxC, num_given_B
