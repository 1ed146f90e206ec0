"""The 288 solved 4x4 Sudoku grids, and puzzles cut from them."""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable
from collections.abc import Sequence

from agrpo_jax import errors

SIZE = 16
MAX_BLANKS = 12  # no puzzle with fewer than 4 clues has one solution
NUM_TEST_GRIDS = 48

# Cells among which no digit repeats: rows, columns, boxes.
UNITS = (
  *([4 * row + i for i in range(4)] for row in range(4)),
  *([4 * i + column for i in range(4)] for column in range(4)),
  *([corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)),
)


def is_solved(grid: str) -> bool:
  """Returns whether every row, column and box of `grid` holds 1-4 once."""
  return len(grid) == SIZE and all(
    {grid[cell] for cell in unit} == set("1234") for unit in UNITS
  )


def keeps_clues(grid: str, puzzle: str) -> bool:
  """Returns whether `grid` has 16 characters and every clue in its place."""
  return len(grid) == SIZE and all(
    clue in ("0", character)
    for clue, character in zip(puzzle, grid, strict=True)
  )


def solves(grid: str, puzzle: str) -> bool:
  """Returns whether `grid` is solved and keeps the clues of `puzzle`."""
  return len(puzzle) == SIZE and is_solved(grid) and keeps_clues(grid, puzzle)


def count_right(grid: str, puzzle: str, gold: str) -> tuple[int, int]:
  """Returns how many blanks are filled as in `gold`, and how many there are."""
  blanks = [cell for cell in range(SIZE) if puzzle[cell] == "0"]
  return sum(grid[cell] == gold[cell] for cell in blanks), len(blanks)


def share_right(grid: str, puzzle: str, gold: str) -> float:
  """Returns the share of the blanks that are filled as in `gold`.

  A puzzle without blanks gives 0 (the released code divides by zero there).
  """
  num_right, num_blanks = count_right(grid, puzzle, gold)
  return num_right / num_blanks if num_blanks else 0.0


def fill_rows(puzzle: str) -> str:
  """Returns a grid whose rows have their missing digits in increasing order."""
  rows = []
  for start in range(0, SIZE, 4):
    row = puzzle[start : start + 4]
    missing = iter(sorted(set("1234") - set(row)))
    rows.append("".join(next(missing) if c == "0" else c for c in row))
  return "".join(rows)


@functools.cache
def solved_grids() -> tuple[str, ...]:
  """Returns all 288 solved grids, in increasing order."""
  rows = ["".join(digits) for digits in itertools.permutations("1234")]
  return tuple(
    filter(is_solved, map("".join, itertools.product(rows, repeat=4)))
  )


@functools.cache
def split_grids(split: str) -> tuple[str, ...]:
  """Returns 48 grids for "test", the other 240 for "train".

  Drawn by a hash of the grid, so that no seed and no version moves one across.
  """
  shuffled = sorted(
    solved_grids(), key=lambda grid: hashlib.sha256(grid.encode()).digest()
  )
  if split == "test":
    return tuple(shuffled[:NUM_TEST_GRIDS])
  return tuple(shuffled[NUM_TEST_GRIDS:])


@functools.cache
def _holders() -> dict[tuple[int, str], int]:
  """Returns (cell, digit) -> bit set of the grids with the digit there.

  With one bit per solved grid, the grids that fit a puzzle are an AND over its
  clues: every blank of every puzzle that is tried asks.
  """
  holders: dict[tuple[int, str], int] = dict.fromkeys(
    itertools.product(range(SIZE), "1234"), 0
  )
  for index, grid in enumerate(solved_grids()):
    for cell, digit in enumerate(grid):
      holders[cell, digit] |= 1 << index
  return holders


def num_solutions(puzzle: str) -> int:
  """Returns how many of the 288 grids fit the clues."""
  holders = _holders()
  fitting = (1 << len(solved_grids())) - 1
  for cell, clue in enumerate(puzzle):
    if clue != "0":
      fitting &= holders.get((cell, clue), 0)
  return fitting.bit_count()


def puzzles(
  split: str, count: int, *, min_blanks: int, max_blanks: int, seed: int
) -> list[tuple[str, str]]:
  """Returns `count` different (puzzle, solution) pairs of `split`.

  The number of blanks is drawn uniformly from min_blanks..max_blanks, then the
  grid and the blanks, again and again until the solution is unique. The list
  for a larger count starts with the list for a smaller one.

  Raises:
    UserError: impossible settings.
  """
  if not 1 <= min_blanks <= max_blanks <= MAX_BLANKS or count < 1:
    raise errors.UserError(
      f"task 'sudoku': {min_blanks=}, {max_blanks=}, num_examples={count} are "
      f"impossible: need 1 <= min_blanks <= max_blanks <= {MAX_BLANKS} and "
      "num_examples >= 1."
    )
  grids = split_grids(split)
  # Only random() is promised to give the same numbers in every Python.
  draw = random.Random(f"sudoku {split} {seed}").random
  found: dict[str, str] = {}
  num_repeats = 0
  while len(found) < count:
    num_blanks = min_blanks + int(draw() * (max_blanks - min_blanks + 1))
    puzzle, grid = _unique_puzzle(grids, num_blanks, draw)
    num_repeats = num_repeats + 1 if puzzle in found else 0
    found[puzzle] = grid
    if num_repeats > 1000:
      raise errors.UserError(
        f"task 'sudoku': only about {len(found)} different puzzles of split "
        f"{split!r} have {min_blanks} to {max_blanks} blanks; lower "
        f"num_examples={count}."
      )
  return list(found.items())


def _unique_puzzle(
  grids: Sequence[str], num_blanks: int, draw: Callable[[], float]
) -> tuple[str, str]:
  while True:
    grid = grids[int(draw() * len(grids))]
    order = sorted(range(SIZE), key=lambda _: draw())  # a shuffle
    blanks = set(order[:num_blanks])
    puzzle = "".join(
      "0" if cell in blanks else digit for cell, digit in enumerate(grid)
    )
    if num_solutions(puzzle) == 1:
      return puzzle, grid


_GRID = re.compile("(?<![0-9])[0-4]{16}(?![0-9])")
_SEPARATORS = re.compile(r"[\s|+,;_*-]+")


def find(text: str) -> str:
  """Returns the last grid in `text`, however it is written; "" if none.

  16 digits 0-4 in one piece, or else in pieces once white space and the rules
  of a drawn table are dropped.
  """
  for candidate in (text, _SEPARATORS.sub("", text)):
    grids = _GRID.findall(candidate)
    if grids:
      return grids[-1]
  return ""
