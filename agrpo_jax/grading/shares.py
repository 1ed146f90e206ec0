"""Completions to text and grades; each process grades its share of the rows."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np

from agrpo_jax import data
from agrpo_jax.grading import pool
from agrpo_jax.models import tokens
from agrpo_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class Pending:
  """A batch whose grading is under way.

  Attributes:
    completion_BxC: int32 [B, C], see `host.Sampler.drawn`.
    texts: the B completions.
    own: grades of this process's rows, when they are done.
  """

  completion_BxC: np.ndarray
  texts: list[str]
  own: "futures.Future[pool.Graded]"


def submit(
  drawn_BxC: np.ndarray,
  batch: data.Batch,
  tokenizer: tokens.Tokenizer,
  grader: pool.Grader,
) -> Pending:
  """Starts grading completions.

  Args:
    drawn_BxC: int32, on the host, see `host.Sampler.drawn`.
    batch: of its first rows; the others are repetitions that fill it up, and
      are dropped.
    tokenizer: ids -> text.
    grader: of the task.
  """
  completion_BxC = drawn_BxC[: len(batch)]
  fields = batch.fields
  texts = tokenizer.decode_batch(completion_BxC)
  own = processes.own_rows(len(texts)).tolist()
  future = grader.submit([texts[i] for i in own], [fields[i] for i in own])
  return Pending(completion_BxC, texts, future)


def collect(pending: Sequence[Pending]) -> pool.Graded:
  """Returns the grades of all batches and rows, the same on every process."""
  own = [one.own.result() for one in pending]
  # Once for all batches: each exchange waits for the slowest process.
  every = processes.exchange([_to_json(graded) for graded in own])
  return pool.concatenate(
    [
      _merge([process[batch] for process in every], len(one.texts))
      for batch, one in enumerate(pending)
    ]
  )


def _to_json(graded: pool.Graded) -> dict[str, Any]:
  def lists(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: array.tolist() for name, array in arrays.items()}

  return {
    "reward": graded.reward_B.tolist(),
    "parts": lists(graded.parts),
    "grades": lists(graded.grades),
    "num_failed": graded.num_failed,
    "num_timed_out": graded.num_timed_out,
    "answers": graded.answers,
    "failures": [*graded.failures.items()],
  }


def _merge(shares: Sequence[Mapping[str, Any]], num_rows: int) -> pool.Graded:
  """Puts the rows of all processes in their places."""

  def column(values: Sequence[Sequence[float] | None]) -> np.ndarray:
    array_B = np.zeros(num_rows)
    for process, own in enumerate(values):
      if own is not None:  # a share whose rows all failed has no grades
        array_B[process :: len(shares)] = own
    return array_B

  def columns(kind: str) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for share in shares for name in share[kind])
    return {
      name: column([share[kind].get(name) for share in shares])
      for name in names
    }

  # Process p of n graded the rows p, p + n, p + 2n, ... (`own_rows`).
  answers = [""] * num_rows
  for process, share in enumerate(shares):
    answers[process :: len(shares)] = share["answers"]
  return pool.Graded(
    reward_B=column([share["reward"] for share in shares]),
    parts=columns("parts"),
    grades=columns("grades"),
    num_failed=sum(share["num_failed"] for share in shares),
    num_timed_out=sum(share["num_timed_out"] for share in shares),
    answers=tuple(answers),
    failures={
      process + row * len(shares): reason
      for process, share in enumerate(shares)
      for row, reason in share["failures"]
    },
  )
