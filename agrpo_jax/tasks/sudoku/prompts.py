"""Prompts for 4x4 Sudoku, by protocol, with worked examples.

agrpo: system and user turn, <think> and <answer>, three worked examples. Same
  format, same number of examples and same grid notation as the released
  prompt; the wording, the example puzzles and their solutions are ours.
d1: one user turn, <reasoning> and <answer>, the completion prefilled with
  <reasoning>. Published as 0-shot and 3-shot: `shots` chooses.
llada: the question alone.
bare: the 16 characters of the puzzle and nothing else; the completion is the
  16 characters of the solution. For the bundled tiny model.
"""

import functools

from agrpo_jax.tasks import base
from agrpo_jax.tasks.sudoku import grids

PROTOCOLS = ("agrpo", "d1", "llada", "bare")
PREFILL = {"agrpo": "", "d1": "<reasoning>", "llada": "", "bare": ""}
THINK_TAG = {"agrpo": "think", "d1": "reasoning", "llada": "", "bare": ""}

# Their grids are in no test split, neither ours nor the published one.
SHOTS = (
  ("4000010410030401", "4312213412433421"),
  ("0032230110030010", "4132234114233214"),
  ("0400304040000134", "1423324143122134"),
)

_RULES = (
  "Each puzzle is a 4x4 Sudoku written as a string of 16 characters: the four "
  "rows from top to bottom, each from left to right, with 0 for an empty cell. "
  "Replace every 0 by a digit from 1 to 4 so that each row, each column and "
  "each 2x2 box contains 1, 2, 3 and 4 exactly once."
)


def _format(tag: str) -> str:
  return (
    f"Reason step by step inside <{tag}> tags. Then give the complete grid "
    "inside <answer> tags as one string of 16 digits from 1 to 4, without "
    f"spaces or line breaks, like this:\n<{tag}>\nyour reasoning\n</{tag}>\n"
    "<answer>\nthe 16 digits\n</answer>"
  )


def messages(
  puzzle: str, protocol: str, shots: int
) -> tuple[dict[str, str], ...]:
  """Returns the chat turns that ask for `puzzle`."""
  if protocol == "bare":
    return base.user_turn(puzzle)
  if protocol == "llada":
    return base.user_turn(
      f"{_RULES}\nPuzzle: {puzzle}\nEnd with the complete grid as one string "
      "of 16 digits."
    )
  instructions = _instructions(protocol, shots)
  if protocol == "agrpo":
    return base.user_turn(f"Puzzle: {puzzle}", system=instructions)
  return base.user_turn(f"{instructions}\nPuzzle: {puzzle}")


@functools.cache
def _instructions(protocol: str, shots: int) -> str:
  parts = [_RULES, _format(THINK_TAG[protocol])]
  for shot, grid in SHOTS[:shots]:
    parts.append(f"\nPuzzle: {shot}\n\n{completion(shot, grid, protocol)}")
  return "\n".join(parts) + "\n"


def completion(puzzle: str, grid: str, protocol: str) -> str:
  """Returns a worked answer in the format that the protocol asks for."""
  if protocol == "llada":
    return f"{worked(puzzle, grid)}\n{grid}"
  tag = THINK_TAG[protocol]
  return (
    f"<{tag}>\n{worked(puzzle, grid)}\n</{tag}>\n<answer>\n{grid}\n</answer>"
  )


def _rows(grid: str) -> str:
  return "\n".join(
    f"R{row + 1}: {' '.join(grid[4 * row : 4 * row + 4])}" for row in range(4)
  )


def worked(puzzle: str, grid: str) -> str:
  """Returns reasoning that leads from `puzzle` to `grid`.

  Fills, again and again, the first blank where one digit is left by its row,
  column and box. Where none is left with one, or `grid` disagrees, the cell is
  filled from `grid` without a reason.
  """
  cells = list(puzzle)
  lines = ["The rows are:", _rows(puzzle), "", "Fill cell by cell:"]
  while "0" in cells:
    cell, seen = _next_cell(cells)
    place = f"R{cell // 4 + 1}C{cell % 4 + 1}"
    if set("1234") - set(seen) == {grid[cell]}:
      lines.append(f"{place} sees {', '.join(seen)}: it is {grid[cell]}.")
    else:
      lines.append(f"{place} is {grid[cell]}.")
    cells[cell] = grid[cell]
  return "\n".join([*lines, "", "The complete grid:", _rows("".join(cells))])


def _next_cell(cells: list[str]) -> tuple[int, list[str]]:
  """Returns the blank that sees most different digits, and those digits."""
  seen = {
    cell: sorted(
      {cells[i] for unit in grids.UNITS if cell in unit for i in unit} - {"0"}
    )
    for cell in range(grids.SIZE)
    if cells[cell] == "0"
  }
  cell = max(seen, key=lambda cell: len(seen[cell]))
  return cell, seen[cell]
