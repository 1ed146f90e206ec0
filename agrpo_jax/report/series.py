"""Series of any length as the few points that a chart can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

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
  y_P = np.array([y for _, y in points])
  least_P = np.where(np.isfinite(y_P), y_P, np.inf)
  most_P = np.where(np.isfinite(y_P), y_P, -np.inf)
  kept = {0, len(points) - 1}
  bounds = np.linspace(1, len(points) - 1, (most - 2) // 2 + 1).astype(int)
  for begin, end in itertools.pairwise(bounds.tolist()):
    # Of nothing finite it is the first: a gap stays a gap.
    kept.add(begin + int(least_P[begin:end].argmin()))
    kept.add(begin + int(most_P[begin:end].argmax()))
  return [points[i] for i in sorted(kept)]


def spread(items: Sequence[Any], most: int = MAX_POINTS) -> list[Any]:
  """Returns at most `most` of the items, the first and the last among them."""
  if len(items) <= most:
    return list(items)
  return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


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
