"""Series of any length as the few points that a chart can show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

MAX_POINTS = 240
MAX_BARS = 60


def thin(
  points: Sequence[tuple[int, float]], most: int = MAX_POINTS
) -> list[tuple[int, float]]:
  """Returns at most `most` of the points: the first, the last, all extremes.

  Between first and last the points are cut into spans of equal size, and of
  each its least and its greatest value stay: a spike of one train step does
  not vanish. Values that are not finite stand for gaps, and go last.

  Args:
    points: (x, y) in the order of x.
    most: at least 4.
  """
  if len(points) <= most:
    return list(points)
  inner = points[1:-1]
  num_spans = (most - 2) // 2
  kept = {0, len(points) - 1}
  for span in range(num_spans):
    begin = span * len(inner) // num_spans
    end = (span + 1) * len(inner) // num_spans
    finite = [i for i in range(begin, end) if math.isfinite(inner[i][1])]
    if finite:
      kept.add(1 + min(finite, key=lambda i: inner[i][1]))
      kept.add(1 + max(finite, key=lambda i: inner[i][1]))
    elif begin < end:
      kept.add(1 + begin)
  return [points[i] for i in sorted(kept)]


def as_json(points: Sequence[tuple[int, float]]) -> list[list[Any]]:
  """Returns [[x ...], [y ...]] of four significant digits; gaps are None."""
  return [[x for x, _ in points], [brief(y) for _, y in points]]


def brief(value: float | None, digits: int = 5) -> float | int | None:
  """Returns a number of so many significant digits, None if not finite."""
  if value is None or not math.isfinite(value):
    return None
  short = float(f"{value:.{digits}g}")
  return int(short) if short.is_integer() and abs(short) < 1e15 else short


def phases(
  records: Sequence[Mapping[str, float]], most: int = MAX_BARS
) -> dict[str, Any]:
  """Returns mean seconds per phase over spans of train steps.

  Returns:
    `names` in the order of the log; `first` and `last`, train steps done, of
    each span; `seconds`: a list per phase, a mean per span.
  """
  names = list(
    dict.fromkeys(
      name.removeprefix("seconds/")
      for record in records
      for name in record
      if name.startswith("seconds/")
    )
  )
  timed = [r for r in records if any(f"seconds/{n}" in r for n in names)]
  size = -(-len(timed) // most) if timed else 1
  spans = [timed[i : i + size] for i in range(0, len(timed), size)]
  return {
    "names": names,
    "first": [int(span[0]["train_step"]) + 1 for span in spans],
    "last": [int(span[-1]["train_step"]) + 1 for span in spans],
    "seconds": [
      [
        brief(sum(r.get(f"seconds/{name}", 0.0) for r in span) / len(span), 4)
        for span in spans
      ]
      for name in names
    ],
  }
