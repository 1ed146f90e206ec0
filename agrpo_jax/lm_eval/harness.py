"""What lm-eval asks for, in order, in groups, and cut to size."""

from __future__ import annotations

import collections
import itertools
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from absl import logging


class Request(Protocol):
  """What is used of lm-eval's `Instance`."""

  args: tuple


def cut(text: str, until: str | Sequence[str] | None) -> str:
  """The text before the first of the stop strings."""
  stops = [until] if isinstance(until, str) else until or []
  places = [text.find(stop) for stop in stops if stop and stop in text]
  return text[: min(places, default=len(text))]


def number(text: str) -> int:
  """32 bits that a text always gets."""
  return zlib.crc32(text.encode())


def row_ids(requests: Sequence[Request]) -> np.ndarray:
  """uint32 [B, 2]: a number of the context, and which of its repetitions."""
  seen: collections.Counter[str] = collections.Counter()
  found = []
  for request in requests:
    context = request.args[0]
    found.append((number(context), seen[context]))
    seen[context] += 1
  return np.array(found, np.uint32).reshape(-1, 2)


def warn_of_ignored(requests: Sequence[Request]) -> None:
  """Names the tasks' generation settings that are not heeded."""
  ignored = {
    f"{name}={value}"
    for request in requests
    for name, value in request.args[1].items()
    if name != "until"
  }
  if ignored:
    logging.warning(
      "Without effect, since the model's settings are those of --model_args: "
      "%s.",
      ", ".join(sorted(ignored)),
    )


def groups(widths: Sequence[tuple[int, ...]], bucket: int) -> list[list[int]]:
  """Indices of rows that are padded to the same widths, the widest first."""
  rounded = [tuple(-(-one // bucket) for one in row) for row in widths]
  order = sorted(range(len(rounded)), key=lambda at: rounded[at])
  found = itertools.groupby(order, key=lambda at: rounded[at])
  return [list(group) for _, group in found][::-1]
