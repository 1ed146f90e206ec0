"""The lines and bars by which a person follows a run."""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import TextIO

import tqdm

from agrpo_jax.parallel import processes

_SECONDS_PER_LINE = 30


class Progress:
  """A line per train step: how far, how good, how fast, how long still.

  Args:
    num_train_steps: of the whole run.
    first_step: the train step that this process begins with.
    out: where lines go, standard output by default.
    clock: seconds from any origin.
  """

  def __init__(
    self,
    num_train_steps: int,
    first_step: int = 0,
    *,
    out: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._num_train_steps = num_train_steps
    self._first_step = first_step
    self._out = out
    self._clock = clock
    self._last = clock()
    # The last twenty, because lengths of completions change over a run.
    self._durations: collections.deque[float] = collections.deque(maxlen=20)

  def step(
    self,
    train_step: int,
    scalars: Mapping[str, float],
    seconds: Mapping[str, float],
    num_tokens: int,
  ) -> str:
    """Prints and returns the line of a train step that just ended.

    Args:
      train_step: its number, from 0.
      scalars: its metrics; `reward`, `accuracy` and
        `eval/accuracy`, as `held out`, are shown when there.
      seconds: per phase (rollout, grade, update), shown in this order.
      num_tokens: tokens of completions drawn in this train step.
    """
    now = self._clock()
    duration, self._last = now - self._last, now
    # The first train step of a process compiles: it predicts nothing.
    if train_step > self._first_step:
      self._durations.append(duration)
    left = self._num_train_steps - train_step - 1
    eta = None
    if self._durations:
      eta = left * sum(self._durations) / len(self._durations)
    line = progress_line(
      train_step,
      self._num_train_steps,
      scalars=scalars,
      seconds=seconds,
      tokens_per_second=num_tokens / duration if duration > 0 else 0.0,
      eta_seconds=eta if left else 0.0,
    )
    say(line, self._out)
    return line


def say(line: str, out: TextIO | None = None) -> None:
  """Prints a line, on standard output by default.

  Nobody to read it is no reason to end: of `| tee log` Ctrl-C ends both, and
  what it ends first is tee.
  """
  with contextlib.suppress(OSError):
    print(line, file=out or sys.stdout, flush=True)


def progress_line(
  train_step: int,
  num_train_steps: int,
  *,
  scalars: Mapping[str, float],
  seconds: Mapping[str, float],
  tokens_per_second: float,
  eta_seconds: float | None,
) -> str:
  """Returns `step  12/400  reward 0.512  ...  1480 tok/s  ETA 0:18:22`.

  The first number counts the train steps that are done, as the names of
  checkpoints do.
  """
  width = len(str(num_train_steps))
  parts = [f"step {train_step + 1:>{width}}/{num_train_steps}"]
  shown = ("reward", "accuracy") if "reward" in scalars else ("loss",)
  for name in shown:
    if name in scalars:
      parts.append(f"{name} {scalars[name]:.3f}")
  if "eval/accuracy" in scalars:
    parts.append(f"held out {scalars['eval/accuracy']:.3f}")
  parts += [f"{phase} {value:.2f}s" for phase, value in seconds.items()]
  parts.append(f"{tokens_per_second:.0f} tok/s")
  parts.append(f"ETA {'?' if eta_seconds is None else duration(eta_seconds)}")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """Returns hours, minutes and seconds: 3:05:09, or 2d 3:05:09."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  days, hour = divmod(hours, 24)
  clock = f"{hour}:{minute:02d}:{second:02d}"
  return f"{days}d {clock}" if days else clock


def bar(
  total: int,
  description: str,
  *,
  out: TextIO | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> Any:
  """Returns a bar for a long wait, which elsewhere than on a terminal is lines.

  Use: `with bar(10, "evaluating") as b: b.update()`. Of several processes the
  first alone shows it.

  Args:
    total: updates until the end.
    description: what is being done.
    out: where to; None for standard error, so that what a command prints as its
      result holds nothing else.
    clock: seconds from any origin; bars have their own.
  """
  out = out or sys.stderr
  if out.isatty():
    is_hidden = not processes.is_main()
    return tqdm.tqdm(
      total=total, desc=description, disable=is_hidden, leave=False, file=out
    )
  return _Lines(total, description, out, clock)


class _Lines:
  """A line for the first update and the last, and every half a minute."""

  def __init__(
    self,
    total: int,
    description: str,
    out: TextIO,
    clock: Callable[[], float],
  ):
    self._total = total
    self._description = description
    self._out = out
    self._clock = clock
    self._done = 0
    self._start = clock()
    self._last = -math.inf  # when the last line was written

  def __enter__(self) -> "_Lines":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def update(self, count: int = 1) -> None:
    self._done += count
    now = self._clock()
    is_due = now - self._last >= _SECONDS_PER_LINE or self._done == self._total
    if count and is_due and processes.is_main():
      self._last = now
      say(
        f"{self._description}: {self._done} of {self._total} after "
        f"{duration(now - self._start)}",
        self._out,
      )

  def close(self) -> None:
    """Does nothing: lines stay."""


class Clock:
  """Seconds of the phases of a train step: `lap` ends one, begins another."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._last = time.monotonic()

  def lap(self, phase: str) -> None:
    now = time.monotonic()
    self.seconds[phase] = now - self._last
    self._last = now
