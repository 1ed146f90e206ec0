"""Plain scripts with cells, as notebooks and as pages of the site.

    python tools/cells.py examples/first_steps.py first_steps.ipynb

A cell begins with a line `# %%`; one that begins with `# %% [markdown]` is
text, each line behind `# `. What stands before the first cell stays out.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

_MARK = "# %%"
_MARKDOWN = "[markdown]"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell: Markdown, or Python."""

  is_text: bool
  source: str


def read(file: pathlib.Path) -> list[Cell]:
  """Returns the cells of a script, without empty ones."""
  _, *parts = f"\n{file.read_text('utf-8')}".split(f"\n{_MARK}")
  cells = []
  for part in parts:
    kind, _, body = part.partition("\n")
    is_text = kind.strip() == _MARKDOWN
    if is_text:
      lines = [line.removeprefix("#") for line in body.splitlines()]
      body = "\n".join(line.removeprefix(" ") for line in lines)
    if body.strip():
      cells.append(Cell(is_text, body.strip("\n")))
  return cells


def notebook(cells: Sequence[Cell]) -> str:
  """Returns a Jupyter notebook (format 4.5) without outputs."""
  found = []
  for number, cell in enumerate(cells):
    one: dict[str, Any] = {
      "cell_type": "markdown" if cell.is_text else "code",
      "id": f"cell-{number}",
      "metadata": {},
      "source": cell.source.splitlines(keepends=True),
    }
    if not cell.is_text:
      one |= {"execution_count": None, "outputs": []}
    found.append(one)
  kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
  whole = {
    "cells": found,
    "metadata": {"kernelspec": kernel},
    "nbformat": 4,
    "nbformat_minor": 5,
  }
  return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def markdown(cells: Sequence[Cell]) -> str:
  """Returns the cells as a page: text, and Python in fences."""
  return "\n\n".join(
    cell.source if cell.is_text else f"```python\n{cell.source}\n```"
    for cell in cells
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    sys.exit(__doc__)
  script, to = map(pathlib.Path, argv)
  to.write_text(notebook(read(script)), "utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])
