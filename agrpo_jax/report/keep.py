"""What a run keeps of its completions, so that a report can play them.

It stands in `completions.jsonl` of the work directory, a line each, and is
bounded: so many held-out problems at every evaluation; the best and the worst
completion of so many train steps, evenly over the run; and of those that could
not be graded a few a train step.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from agrpo_jax import data
from agrpo_jax import types
from agrpo_jax.grading import pool
from agrpo_jax.models import tokens
from agrpo_jax.parallel import processes
from agrpo_jax.show import text as text_lib

_TRAIN_STEPS = 64
_FAILURES = 2  # per train step
_FIELDS = (
  "completion",
  "unmask_step",
  "logprob",
  "entropy",
  "num_executed_steps",
)


class HeldOut:
  """Takes the first completions of an evaluation, batch by batch."""

  def __init__(self, tokenizer: tokens.Tokenizer, num_completions: int):
    self._tokenizer = tokenizer
    self._num_left = num_completions
    self._unmasking: list[dict[str, Any]] = []

  def look(self, rollout: types.Rollout) -> None:
    """Takes of a rollout what is still wanted; all processes must take part."""
    num_rows = min(self._num_left, rollout.completion.shape[0])
    if num_rows:
      self._num_left -= num_rows
      self._unmasking += _unmasking(rollout, self._tokenizer, range(num_rows))

  def records(
    self, evaluated: Sequence[Mapping[str, Any]]
  ) -> list[dict[str, Any]]:
    """Returns what is kept, given the records of the evaluation."""
    return [
      {
        "source": "held out",
        "id": record["id"],
        "prompt": record["prompt"],
        "completion": record["completion"],
        "reward": record["reward"],
        "accuracy": record["grades"].get("accuracy", 0.0),
        "answer": record["answer"],
        "unmasking": unmasking,
      }
      # The rows that fill up the last batch are none of the evaluation.
      for record, unmasking in zip(evaluated, self._unmasking, strict=False)
    ]


def of_train_step(
  train_step: int,
  num_steps: int,
  rollout: types.Rollout,
  batch: data.Batch,
  texts: Sequence[str],
  graded: pool.Graded,
  tokenizer: tokens.Tokenizer,
) -> list[dict[str, Any]]:
  """Returns what is kept of a train step; all processes must take part.

  Args:
    train_step: its index.
    num_steps: of the run.
    rollout: of the train step.
    batch: its prompts.
    texts: the completions.
    graded: their grades.
    tokenizer: ids -> text.
  """
  rows: list[int] = []
  unmasking: list[dict[str, Any]] = []
  if train_step % -(-num_steps // _TRAIN_STEPS) == 0:
    best, worst = np.argmax(graded.reward_B), np.argmin(graded.reward_B)
    rows = [int(best), int(worst)] if best != worst else [int(best)]
    unmasking = _unmasking(rollout, tokenizer, rows)

  def record(row: int) -> dict[str, Any]:
    example = batch.examples[row]
    return {
      "source": "training",
      "id": example.id,
      "prompt": example.messages[-1]["content"],
      "completion": texts[row],
      "reward": float(graded.reward_B[row]),
      "accuracy": float(graded.grade_B[row]),
      "answer": graded.answers[row],
    }

  kept = [
    record(row) | {"unmasking": how}
    for row, how in zip(rows, unmasking, strict=True)
  ]
  return kept + [
    record(row) | {"failure": graded.failures[row]}
    for row in sorted(graded.failures)[:_FAILURES]
  ]


def _unmasking(
  rollout: types.Rollout, tokenizer: tokens.Tokenizer, rows: Sequence[int]
) -> list[dict[str, Any]]:
  columns = {
    name: processes.to_host(getattr(rollout, name))[np.array(rows)]
    for name in _FIELDS
  }
  found = text_lib.completions(rollout.replace(**columns), tokenizer, len(rows))
  return [text_lib.as_json(one, tokenizer.eos_id) for one in found]
