"""The rows of a sweep: on screen, as CSV and as a picture."""

import csv
import io
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from agrpo_jax.evaluation import statistics

AXES = (
  "completion_length",
  "num_denoise_steps",
  "unmask_rule",
  "cache",
  "temperature",
)
_FIGURES = (
  "accuracy",
  "accuracy_standard_error",
  "accuracy_low",
  "accuracy_high",
  "accuracy_tolerant",
  "num_disagree",
  "mean_length",
  "mean_denoise_steps",
  "mean_whole_passes",
  "seconds",
  "tokens_per_second",
)
_COLUMNS = {  # shown on screen: head and width, to the left where negative
  "model": ("model", -24),
  "completion_length": ("length", 6),
  "num_denoise_steps": ("steps", 5),
  "unmask_rule": ("unmask_rule", -15),
  "cache": ("cache", -6),
  "temperature": ("temp", 5),
  "accuracy": ("accuracy", 8),
  "accuracy_standard_error": ("± error", 7),
  "accuracy_tolerant": ("tolerant", 8),
  "mean_length": ("tokens", 7),
  "mean_denoise_steps": ("taken", 6),
  "mean_whole_passes": ("passes", 6),
  "seconds": ("seconds", 8),
  "tokens_per_second": ("tokens/s", 9),
}
_WIDTH = sum(abs(width) + 1 for _, width in _COLUMNS.values())


def row(
  model: str, sampling: Mapping[str, Any], result: statistics.Result
) -> dict[str, Any]:
  """Returns a cell's place in the grid and its figures."""
  figures = result.scalars()
  return {
    "model": model,
    **{axis: sampling[axis] for axis in AXES},
    "num_problems": len(result.records),
    **{name: figures.get(name) for name in _FIGURES},
  }


def line(row: Mapping[str, Any] | None = None) -> str:
  """Returns a line of the table on screen; without a row, its head.

  Columns stay under each other: what is wider than its column goes on below.
  """
  table = rich.table.Table(
    box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=row is None
  )
  for head, width in _COLUMNS.values():
    table.add_column(
      head,
      width=abs(width),
      justify="left" if width < 0 else "right",
      overflow="fold",
    )
  if row is not None:
    # Text and not strings, which would be read as markup.
    table.add_row(*(rich.text.Text(_text(k, row[k])) for k in _COLUMNS))
  out = io.StringIO()
  rich.console.Console(file=out, width=_WIDTH, color_system=None).print(table)
  return "\n".join(text.rstrip() for text in out.getvalue().splitlines())


def _text(name: str, value: Any) -> str:
  if value is None:
    return "-"
  if name.startswith("accuracy"):
    return f"{100 * value:.1f} %"
  if name.startswith("mean_") or name in ("seconds", "tokens_per_second"):
    return f"{value:.1f}"
  return str(value)


def write_csv(file: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes all figures, a line per cell."""
  with file.open("w", newline="", encoding="utf-8") as opened:
    writer = csv.DictWriter(opened, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


# What tells one line of a picture from another.
_LINE_KEYS = (
  "model",
  "unmask_rule",
  "cache",
  "completion_length",
  "temperature",
)
_SHORT = {"completion_length": "length", "temperature": "temperature"}


def curves(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
  """Returns label -> rows of a sweep in order of denoising steps.

  A label names only what differs between lines.
  """
  differing = [
    key for key in _LINE_KEYS if len({row[key] for row in rows}) > 1
  ] or ["model"]
  found: dict[str, list[Mapping[str, Any]]] = {}
  for row in sorted(rows, key=lambda row: row["num_denoise_steps"]):
    label = ", ".join(
      f"{_SHORT[key]} {row[key]:g}" if key in _SHORT else row[key]
      for key in differing
    )
    found.setdefault(label, []).append(row)
  return found


def plot(rows: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
  """Draws accuracy against denoising steps, a line per model, rule, length.

  Args:
    rows: of a sweep; bars are the standard error of the accuracy.
    file: PNG to write.
  """
  # Not pyplot: that would look for a display.
  from matplotlib import figure as figure_lib
  from matplotlib import ticker

  figure = figure_lib.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.add_subplot()
  found = curves(rows)
  for index, (label, ordered) in enumerate(found.items()):
    # Side by side, so that bars do not hide each other.
    shift = 2 ** (0.03 * (index - (len(found) - 1) / 2))
    axes.errorbar(
      [shift * row["num_denoise_steps"] for row in ordered],
      [100 * row["accuracy"] for row in ordered],
      [100 * (row["accuracy_standard_error"] or 0.0) for row in ordered],
      marker="o",
      capsize=3,
      label=label,
    )
  axes.set_xscale("log", base=2)
  axes.set_xticks(sorted({row["num_denoise_steps"] for row in rows}))
  axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.grid(alpha=0.3)
  axes.set(
    xlabel="denoising steps",
    ylabel="accuracy, %  (bars: standard error)",
    title=f"{rows[0]['num_problems']} problems",
  )
  axes.set_ylim(bottom=0)
  axes.legend(loc="best", fontsize="small")
  figure.savefig(file, dpi=120)
