"""A completion in a terminal: frames of text, coloured by denoising step.

A frame's lines are no wider than the terminal. Every piece takes the same room
before it is unmasked as after, so frames do not jump. Whether the output is a
terminal, and which colours it has, is for `rich` to find out: pipes and files
get plain characters, and so does everybody who set NO_COLOR
(https://no-color.org).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence
from typing import TextIO

import rich.cells
import rich.console
import rich.live
import rich.style
import rich.text

from agrpo_jax.show import text as text_lib

MASKED = "░"
PARTLY = "▒"  # some bytes of a character are unmasked
BREAK = "↵"

# From the first step to the last, in the 256-colour palette: blue, green,
# orange, red, all of them readable on black and on white.
_COLOURS = (27, 33, 32, 37, 36, 35, 71, 107, 143, 179, 173, 172, 166, 160)
_DIM = rich.style.Style(dim=True)
_NEW = rich.style.Style(bold=True, reverse=True)


def make_console(out: TextIO | None = None) -> rich.console.Console:
  """Returns a console that shows text as it is; `out` None is standard output.

  What a model wrote is neither markup nor anything else to be prettified.
  """
  return rich.console.Console(
    file=out, markup=False, highlight=False, emoji=False, soft_wrap=True
  )


def frame(
  completion: text_lib.Completion,
  num_done: int,
  *,
  width: int,
  eos_id: int,
  mark_new: bool = True,
) -> list[rich.text.Text]:
  """Returns the lines of the completion after `num_done` denoising steps.

  Args:
    completion: what to show.
    num_done: from 0 (all masked) to `completion.num_executed_steps`.
    width: columns of the terminal.
    eos_id: the token that is shown as `text.END`.
    mark_new: set apart what the last of these steps unmasked.
  """
  lines = [_line()]
  for piece in completion.pieces:
    style = _style(piece, num_done, completion.num_executed_steps, mark_new)
    # By character and not by word: words appear only when they are unmasked.
    for character in _shown(
      piece, num_done, completion.num_executed_steps, eos_id
    ):
      is_full = lines[-1].cell_len + rich.cells.cell_len(character) > width
      if character == "\n" or is_full:
        lines.append(_line())
      if character != "\n":
        lines[-1].append(character, style)
  return lines


def colour(step: int, num_executed_steps: int) -> rich.style.Style:
  """Returns the colour of a denoising step."""
  share = step / max(1, num_executed_steps - 1)
  number = _COLOURS[round(share * (len(_COLOURS) - 1))]
  return rich.style.Style(color=f"color({number})")


def legend(num_executed_steps: int, has_colours: bool) -> rich.text.Text:
  """Returns a line that says what the colours and signs mean."""
  line = _line()
  if has_colours:
    line.append("unmasked at step 1 ")
    for step in range(len(_COLOURS)):
      line.append("■", colour(step, len(_COLOURS)))
    line.append(f" {num_executed_steps}   ")
  line.append(f"{MASKED} masked   {text_lib.END} end of text")
  return line


def has_colours(console: rich.console.Console) -> bool:
  """Returns whether colours show; bold and dim may where they do not."""
  return console.color_system is not None and not console.no_color


def print_frames(
  completion: text_lib.Completion,
  console: rich.console.Console,
  *,
  eos_id: int,
  num_frames: int = 4,
) -> None:
  """Prints a few frames one below the other, where nothing can be redrawn."""
  last = completion.num_executed_steps
  shown = {round(last * k / num_frames) for k in range(1, num_frames)}
  for num_done in [*sorted(n for n in shown if 0 < n < last), last]:
    console.print(f"after {num_done} of {last} steps")
    for line in frame(
      completion,
      num_done,
      width=console.width,
      eos_id=eos_id,
      mark_new=num_done < last,
    ):
      console.print(line)


def animate(
  completion: text_lib.Completion,
  console: rich.console.Console,
  *,
  eos_id: int,
  seconds: float,
  sleep: Callable[[float], None] = time.sleep,
) -> None:
  """Draws frame over frame, and leaves the last one.

  Args:
    completion: what to show. While it is longer than the terminal is high, the
      lines around what was unmasked last are shown.
    console: the terminal.
    eos_id: the token that is shown as `text.END`.
    seconds: how long all of it takes.
    sleep: waits between frames.
  """
  last = completion.num_executed_steps
  before: list[rich.text.Text] = []
  with rich.live.Live(
    console=console, auto_refresh=False, transient=True
  ) as live:
    for num_done in range(last + 1):
      lines = frame(completion, num_done, width=console.width, eos_id=eos_id)
      view = _around_change(before, lines, max(1, console.height - 3))
      before = lines
      head = _line(f"step {num_done} of {last}")
      live.update(rich.console.Group(head, *view), refresh=True)
      sleep(seconds / (last + 1))
  # All lines again, for scrolling back; an animation must fit the screen.
  console.print(f"{last} steps")
  for line in frame(
    completion, last, width=console.width, eos_id=eos_id, mark_new=False
  ):
    console.print(line)


def _line(text: str = "") -> rich.text.Text:
  return rich.text.Text(text, no_wrap=True, overflow="ignore", end="\n")


def _around_change(
  before: Sequence[rich.text.Text],
  lines: Sequence[rich.text.Text],
  height: int,
) -> Sequence[rich.text.Text]:
  """Returns `height` lines with the first in the middle that has changed."""
  changed = [
    number
    for number, (old, new) in enumerate(zip(before, lines, strict=False))
    if old.plain != new.plain
  ]
  middle = changed[0] if changed else 0
  start = min(max(0, middle - height // 2), max(0, len(lines) - height))
  return lines[start : start + height]


def _full_text(piece: text_lib.Piece, eos_id: int) -> str:
  if piece.tokens[0].id == eos_id:
    return text_lib.END
  return piece.text.replace("\n", BREAK + "\n")


def _shown(piece: text_lib.Piece, num_done: int, last: int, eos_id: int) -> str:
  text = _full_text(piece, eos_id)
  if _is_complete(piece, num_done, last):
    return text
  sign = PARTLY if piece.num_unmasked(num_done) else MASKED
  return "".join(
    "\n" if character == "\n" else sign * rich.cells.cell_len(character)
    for character in text
  )


def _is_complete(piece: text_lib.Piece, num_done: int, last: int) -> bool:
  if piece.unmask_step is None:  # filled up when the completion ended
    return num_done >= last
  return piece.unmask_step < num_done


def _style(
  piece: text_lib.Piece, num_done: int, last: int, mark_new: bool
) -> rich.style.Style:
  step = piece.unmask_step
  if step is None or step >= num_done:
    return _DIM
  style = colour(step, last)
  return style + _NEW if mark_new and step == num_done - 1 else style
