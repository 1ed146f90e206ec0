"""A completion in a terminal: frames of text, coloured by denoising step.

A frame is a list of lines no wider than the terminal. Every piece takes the
same room before it is unmasked as after, so frames do not jump.
"""

from __future__ import annotations

import dataclasses
import os
import time
import unicodedata
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TextIO

from agrpo_jax.show import text as text_lib

MASKED = "░"
PARTLY = "▒"  # some bytes of a character are unmasked
END = "∎"  # stands for EOS, which fills up completions by the hundred
BREAK = "↵"

# From the first step to the last, in the 256-colour palette: blue, green,
# orange, red, all of them readable on black and on white.
_COLOURS = (27, 33, 32, 37, 36, 35, 71, 107, 143, 179, 173, 172, 166, 160)
_DIM = "2"
_NEW = "1;7"
_RESET = "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Look:
  """How frames are drawn.

  Attributes:
    width: columns of the terminal.
    eos_id: the token that is shown as END.
    is_coloured: write colours; otherwise plain characters only.
  """

  width: int
  eos_id: int
  is_coloured: bool


def wants_colour(environment: Mapping[str, str] = os.environ) -> bool:
  """Colour unless NO_COLOR (https://no-color.org) or a dumb terminal."""
  return not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def frame(
  completion: text_lib.Completion,
  num_steps: int,
  look: Look,
  *,
  mark_new: bool = True,
) -> list[str]:
  """The completion after `num_steps` denoising steps.

  Args:
    completion: what to show.
    num_steps: from 0 (all masked) to `completion.num_steps`.
    look: how.
    mark_new: set apart what the last of these steps unmasked.

  Returns:
    Lines.
  """
  lines = [_Line()]
  for piece in completion.pieces:
    style = _style(piece, num_steps, completion.num_steps, mark_new)
    shown = _shown(piece, num_steps, completion.num_steps, look.eos_id)
    for character in shown:
      if character == "\n" or lines[-1].width + _width(character) > look.width:
        lines.append(_Line())
      if character != "\n":
        lines[-1].add(character, style if look.is_coloured else "")
  return [line.text() for line in lines]


def colour(step: int, num_steps: int) -> str:
  """The code that sets the colour of a denoising step."""
  share = step / max(1, num_steps - 1)
  return f"38;5;{_COLOURS[round(share * (len(_COLOURS) - 1))]}"


def legend(num_steps: int, is_coloured: bool) -> str:
  """What the colours and signs mean, on one line."""
  parts = [f"{MASKED} masked", f"{END} end of text"]
  if is_coloured:
    bar = "".join(
      f"\x1b[{colour(step, len(_COLOURS))}m■" for step in range(len(_COLOURS))
    )
    parts.insert(0, f"unmasked at step 1 {bar}{_RESET} {num_steps}")
  return "   ".join(parts)


def static(
  completion: text_lib.Completion, look: Look, *, num_frames: int = 4
) -> list[str]:
  """A few frames one below the other, for where nothing can be redrawn."""
  last = completion.num_steps
  shown = sorted({round(last * k / num_frames) for k in range(1, num_frames)})
  lines = []
  for num_steps in [*(step for step in shown if 0 < step < last), last]:
    lines.append(f"after {num_steps} of {last} steps")
    lines += frame(completion, num_steps, look, mark_new=num_steps < last)
  return lines


def animate(
  completion: text_lib.Completion,
  look: Look,
  *,
  height: int,
  out: TextIO,
  seconds: float,
  sleep: Callable[[float], None] = time.sleep,
) -> None:
  """Draws frame over frame, and leaves the last one.

  Args:
    completion: what to show.
    look: how.
    height: lines of the terminal; of a longer completion, those around what
      was unmasked last are shown until the end.
    out: the terminal.
    seconds: how long all of it takes.
    sleep: waits between frames.
  """
  last = completion.num_steps
  before: list[str] = []
  drawn = 0
  out.write("\x1b[?25l")  # hide the cursor
  try:
    for num_steps in range(last + 1):
      lines = frame(completion, num_steps, look)
      view = _around_change(before, lines, max(1, height - 3))
      before = lines
      view = [f"step {num_steps} of {last}", *view]
      out.write(_over(drawn) + "\n".join(view) + "\n")
      out.flush()
      drawn = len(view)
      sleep(seconds / (last + 1))
    lines = frame(completion, last, look, mark_new=False)
    out.write(_over(drawn) + "\n".join([f"{last} steps", *lines]) + "\n")
  finally:
    out.write("\x1b[?25h")
    out.flush()


def _over(num_lines: int) -> str:
  """Goes up over the lines drawn before and clears them."""
  return f"\x1b[{num_lines}A\r\x1b[J" if num_lines else ""


def _around_change(
  before: Sequence[str], lines: Sequence[str], height: int
) -> Sequence[str]:
  changed = [
    number
    for number, (old, new) in enumerate(zip(before, lines, strict=False))
    if old != new
  ]
  middle = changed[0] if changed else 0
  start = min(max(0, middle - height // 2), max(0, len(lines) - height))
  return lines[start : start + height]


class _Line:
  """Characters with their styles, and the columns they take."""

  def __init__(self) -> None:
    self.width = 0
    self._parts: list[tuple[str, str]] = []

  def add(self, character: str, style: str) -> None:
    self.width += _width(character)
    if self._parts and self._parts[-1][0] == style:
      character = self._parts.pop()[1] + character
    self._parts.append((style, character))

  def text(self) -> str:
    return "".join(
      f"\x1b[{style}m{text}{_RESET}" if style else text
      for style, text in self._parts
    )


def _width(character: str) -> int:
  if unicodedata.combining(character):
    return 0
  return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _full_text(piece: text_lib.Piece, eos_id: int) -> str:
  if piece.tokens[0].id == eos_id:
    return END
  return piece.text.replace("\n", BREAK + "\n")


def _shown(
  piece: text_lib.Piece, num_steps: int, last: int, eos_id: int
) -> str:
  text = _full_text(piece, eos_id)
  if _is_complete(piece, num_steps, last):
    return text
  sign = PARTLY if piece.num_unmasked(num_steps) else MASKED
  return "".join(
    "\n" if character == "\n" else sign * _width(character)
    for character in text
  )


def _is_complete(piece: text_lib.Piece, num_steps: int, last: int) -> bool:
  if piece.unmask_step is None:  # filled up when the completion ended
    return num_steps >= last
  return piece.unmask_step < num_steps


def _style(
  piece: text_lib.Piece, num_steps: int, last: int, mark_new: bool
) -> str:
  step = piece.unmask_step
  if step is None or step >= num_steps:
    return _DIM
  code = colour(step, last)
  return f"{code};{_NEW}" if mark_new and step == num_steps - 1 else code
