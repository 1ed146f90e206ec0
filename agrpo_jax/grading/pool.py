"""Rewards and grades of completions, computed in worker processes.

Grading runs beside the device work: `submit` returns at once, and the workers
start while the first rollout compiles. Whatever a completion does to a grader
costs that completion only: where its grader raises, crashes or takes too long,
what that had not decided yet is 0; it is counted and logged, and the rest goes
on.

    with grading.Grader("gsm8k", num_workers=4) as grader:
      pending = grader.submit(completions, fields)
      ...  # device work
      graded = pending.result()
"""

import collections
import concurrent.futures
import dataclasses
import json
import queue
import threading
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.grading import process
from agrpo_jax.tasks import contract

MAX_CHARS = 100_000  # of a completion; the rest is not looked at
# What a worker is sent at once. Fits the socket's buffer, so that sending
# never waits for an answer.
_BATCH_ITEMS = 16
_BATCH_BYTES = 64_000
TIMED_OUT = "took too long"  # in `Graded.failures`


@dataclasses.dataclass(frozen=True)
class Graded:
  """Rewards and grades of the B completions of one `submit`, in their order.

  Whatever a grader could not decide is 0.

  Attributes:
    reward_B: float64 [B], the weighted sum of the parts.
    parts: name -> float64 [B], unweighted.
    grades: name -> float64 [B]; "accuracy" is always there.
    num_failed: completions whose grader raised or crashed.
    num_timed_out: completions whose grader was stopped. Parts that it had
      decided by then are kept, as where it raised: an answer too hard to check
      can have its tags.
    answers: the extracted answer of each completion, "" where there is none.
    failures: row -> what went wrong, of those that failed or timed out.
  """

  reward_B: np.ndarray
  parts: dict[str, np.ndarray]
  grades: dict[str, np.ndarray]
  num_failed: int
  num_timed_out: int
  answers: tuple[str, ...]
  failures: Mapping[int, str] = dataclasses.field(default_factory=dict)

  @property
  def grade_B(self) -> np.ndarray:
    """Returns the strict accuracy, float64 [B] in [0, 1]."""
    return self.grades["accuracy"]


def concatenate(batches: Sequence[Graded]) -> Graded:
  """Returns the completions of several `submit`s of one grader, in order.

  A grade that a batch lacks, because all of its completions failed, is 0 there.
  """
  names = dict.fromkeys(name for batch in batches for name in batch.grades)
  sizes = [batch.reward_B.size for batch in batches]
  starts = [sum(sizes[:index]) for index in range(len(sizes))]
  return Graded(
    reward_B=np.concatenate([batch.reward_B for batch in batches]),
    parts={
      name: np.concatenate([batch.parts[name] for batch in batches])
      for name in batches[0].parts
    },
    grades={
      name: np.concatenate(
        [
          batch.grades.get(name, np.zeros_like(batch.reward_B))
          for batch in batches
        ]
      )
      for name in names
    },
    num_failed=sum(batch.num_failed for batch in batches),
    num_timed_out=sum(batch.num_timed_out for batch in batches),
    answers=tuple(answer for batch in batches for answer in batch.answers),
    failures={
      start + row: reason
      for start, batch in zip(starts, batches, strict=True)
      for row, reason in batch.failures.items()
    },
  )


class Grader:
  """A pool of grading workers for one task. Use as a context manager."""

  def __init__(
    self,
    task: str,
    options: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    num_workers: int = 2,
    timeout_seconds: float = 5.0,
    *,
    memory_gib: float = 8.0,
    task_path: str | None = None,
  ):
    """Starts the workers without waiting for them.

    Args:
      task: a name for `tasks.get`.
      options: of the task.
      weights: part name -> weight, over the task's own.
      num_workers: processes.
      timeout_seconds: processor time for one completion; after twice that by
        the clock, plus one second, its worker is killed and replaced.
      memory_gib: 2^30 bytes that a worker may map beyond what its task takes to
        load. A completion that wants more has failed.
      task_path: file of a task of one's own, in place of `task`.

    Raises:
      UserError: bad options, weights of unknown parts.
    """
    # Not written as <= 0, which nan is not.
    if num_workers < 1 or not timeout_seconds > 0 or not memory_gib > 0:
      raise errors.UserError(
        f"grading: {num_workers=} must be at least 1, {timeout_seconds=} and "
        f"{memory_gib=} above 0."
      )
    options = dict(options or {})
    try:
      json.dumps(options)  # how the workers get them
    except (TypeError, ValueError) as error:
      raise errors.UserError(
        f"config.task.options={options} must be JSON values: {error}."
      ) from error
    self.weights = contract.reward_weights(
      tasks.get(task, task_path), options, weights
    )
    start = {
      "task": task,
      "path": task_path,
      "options": options,
      "parts": list(self.weights),
      "timeout_seconds": timeout_seconds,
      "memory_bytes": int(memory_gib * 2**30),
    }
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._closed = threading.Event()
    self._workers = [
      process.WorkerProcess(start, 2 * timeout_seconds + 1)
      for _ in range(num_workers)
    ]
    self._threads = [
      threading.Thread(target=self._serve, args=(worker,), daemon=True)
      for worker in self._workers
    ]
    for thread in self._threads:
      thread.start()

  def __enter__(self) -> "Grader":
    return self

  def __exit__(self, *unused_exception: object) -> None:
    self.close()

  def submit(
    self, completions: Sequence[str], fields: Sequence[Mapping[str, Any]]
  ) -> "concurrent.futures.Future[Graded]":
    """Starts grading completions[i] against fields[i].

    Returns:
      A future of `Graded`. It raises UserError where the task breaks its
      contract, and RuntimeError where no worker can be started.

    Raises:
      ValueError: lists of unequal length, or a closed grader.
    """
    if len(completions) != len(fields):
      raise ValueError(f"{len(completions)=} and {len(fields)=} differ.")
    if self._closed.is_set():
      raise ValueError("the grader is closed.")
    job = _Job(len(completions), self.weights)
    items = [
      _Item(job, index, completion, _line(completion, field))
      for index, (completion, field) in enumerate(
        zip(completions, fields, strict=True)
      )
    ]
    # A small batch is shared out, so that no worker idles beside another.
    share = -(-len(items) // len(self._workers))
    for batch in _batches(items, min(_BATCH_ITEMS, share)):
      self._queue.put(batch)
    return job.future

  def close(self) -> None:
    """Ends the workers; what is still pending is cancelled."""
    self._closed.set()
    for worker in self._workers:
      self._queue.put(None)  # wakes a thread that waits for work
      worker.hang_up()
    # Before the workers are killed: a thread could be using one.
    for thread in self._threads:
      thread.join()
    for worker in self._workers:
      worker.kill()
    while not self._queue.empty():
      for item in self._queue.get() or ():
        item.job.cancel()

  def _serve(self, worker: process.WorkerProcess) -> None:
    """Takes batches to one worker until the grader is closed."""
    while (batch := self._queue.get()) is not None:
      items = collections.deque(batch)
      while items and not self._closed.is_set():
        try:
          worker.ensure_ready()
        except ConnectionError as error:
          if not self._closed.is_set():
            for item in items:
              item.job.fail(RuntimeError(str(error)))
          break
        self._grade(worker, items)
      # What is left when the grader closes; a job that failed stays so.
      for item in items:
        item.job.cancel()

  def _grade(
    self,
    worker: process.WorkerProcess,
    items: "collections.deque[_Item]",
  ) -> None:
    """Takes items off as they are answered; a bad worker costs one at most.

    The worker answers in order, so the first item without a reply is the one
    that it hung or crashed on. The others go to its successor.
    """
    try:
      worker.send(item.line for item in items)
      while items:
        items[0].finish(worker.receive())
        items.popleft()
    except TimeoutError:
      worker.kill()
      items.popleft().finish({"timed_out": True})
    except ConnectionError:
      worker.kill()
      # A `close` hangs up on the worker, which is no fault of the item.
      if not self._closed.is_set():
        items.popleft().finish({"error": "crashed its worker"})


class _Job:
  """Collects the replies to one `submit`."""

  def __init__(self, size: int, weights: Mapping[str, float]):
    self.future: concurrent.futures.Future[Graded] = concurrent.futures.Future()
    self._weights = weights
    # By index: replies come in any order, and not all that is sent is answered.
    self._replies: list[dict[str, Any]] = [{}] * size
    self._num_missing = size
    self._lock = threading.Lock()
    if not size:
      self.future.set_result(self._graded())

  def finish(self, index: int, reply: dict[str, Any]) -> None:
    """Takes the reply to one completion; the last one completes the future."""
    with self._lock:
      self._replies[index] = reply
      self._num_missing -= 1
      if self._num_missing == 0 and not self.future.done():
        self.future.set_result(self._graded())

  def fail(self, error: Exception) -> None:
    """Makes the future raise, if it is not done."""
    with self._lock:
      if not self.future.done():
        self.future.set_exception(error)

  def cancel(self) -> None:
    """Cancels the future, if it is not done."""
    with self._lock:
      self.future.cancel()

  def _graded(self) -> Graded:
    def column(kind: str, name: str) -> np.ndarray:
      return np.array(
        [reply.get(kind, {}).get(name, 0.0) for reply in self._replies],
        dtype=np.float64,
      )

    parts = {name: column("parts", name) for name in self._weights}
    reward_B = np.zeros(len(self._replies))
    for name, weight in self._weights.items():
      reward_B += weight * parts[name]
    # A reply without grades has failed; the names are those of the others.
    names = {"accuracy": None}
    for reply in self._replies:
      names.update(dict.fromkeys(reply.get("grades", ())))
    return Graded(
      reward_B=reward_B,
      parts=parts,
      grades={name: column("grades", name) for name in names},
      num_failed=sum("error" in reply for reply in self._replies),
      num_timed_out=sum("timed_out" in reply for reply in self._replies),
      answers=tuple(reply.get("answer", "") for reply in self._replies),
      failures={
        row: reply.get("error", TIMED_OUT)
        for row, reply in enumerate(self._replies)
        if "error" in reply or "timed_out" in reply
      },
    )


@dataclasses.dataclass(frozen=True)
class _Item:
  job: _Job
  index: int
  completion: str
  line: bytes

  def finish(self, reply: dict[str, Any]) -> None:
    """Hands a worker's reply on, and logs where there was none to give."""
    if "mistake" in reply:
      self.job.fail(errors.UserError(reply["mistake"]))
      return
    if "error" in reply or "timed_out" in reply:
      logging.log_every_n_seconds(
        logging.WARNING,
        "A grader %s, and what it could not decide is 0: %r",
        1.0,  # all are counted; that many are shown
        errors.readable(reply.get("error", TIMED_OUT)),
        self.completion[:200],
      )
    self.job.finish(self.index, reply)


def _line(completion: str, fields: Mapping[str, Any]) -> bytes:
  message = {"completion": completion[:MAX_CHARS], "fields": dict(fields)}
  return json.dumps(message).encode() + b"\n"


def _batches(items: Sequence[_Item], max_items: int) -> Iterable[list[_Item]]:
  batch: list[_Item] = []
  num_bytes = 0
  for item in items:
    is_full = len(batch) == max_items
    if batch and (is_full or num_bytes + len(item.line) > _BATCH_BYTES):
      yield batch
      batch, num_bytes = [], 0
    batch.append(item)
    num_bytes += len(item.line)
  if batch:
    yield batch
