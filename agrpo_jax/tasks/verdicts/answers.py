"""Finding the answer in a completion. Every search is linear in the text."""

import functools
import re

BOX = "\\boxed{"
MAX_CHARS = 100_000  # a longer completion is cut before anything reads it


# Control characters between digits: nobody can say which number is meant.
BROKEN_NUMBER = re.compile(r"\d[\x00-\x08\x0e-\x1b\x7f]+\d")


def clip(text: str) -> str:
  """Returns the part of a completion that is looked at."""
  return text[:MAX_CHARS]


@functools.cache
def _tag(name: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
  return (
    re.compile(f"<{re.escape(name)}>", re.IGNORECASE),
    re.compile(f"</{re.escape(name)}>", re.IGNORECASE),
  )


def in_tag(text: str, name: str) -> str | None:
  """Returns the text between the first <name> and the next </name>.

  Stripped of white space; None without such a pair. Two searches instead of
  one pattern with a lazy middle: that one is quadratic in the number of tags
  left open.
  """
  opening, closing = _tag(name)
  start = opening.search(text)
  if start is None:
    return None
  end = closing.search(text, start.end())
  return None if end is None else text[start.end() : end.start()].strip()


def after_tag(text: str, name: str) -> str | None:
  """Returns what follows the last <name>, to its end tag or the text's end."""
  opening, closing = _tag(name)
  starts = [match.end() for match in opening.finditer(text)]
  if not starts:
    return None
  end = closing.search(text, starts[-1])
  return text[starts[-1] : end.start() if end else len(text)].strip()


def first_boxed(text: str) -> str | None:
  """Returns what the first \\boxed{...} holds; None if it never closes."""
  start = text.find(BOX)
  if start < 0:
    return None
  start += len(BOX)
  depth = 1
  for brace in re.finditer("[{}]", text[start:]):
    depth += 1 if brace.group() == "{" else -1
    if depth == 0:
      return text[start : start + brace.start()]
  return None


def last_boxed(text: str) -> str | None:
  """Returns what the closed \\boxed{...} that starts last holds, or None."""
  boxes = {match.end() for match in re.finditer(r"\\boxed\{", text)}
  opened: list[int] = []
  best: tuple[int, int] | None = None
  for brace in re.finditer("[{}]", text):
    if brace.group() == "{":
      opened.append(brace.end())
    elif opened:
      start = opened.pop()
      if start in boxes and (best is None or start > best[0]):
        best = (start, brace.start())
  return text[best[0] : best[1]] if best else None


def released_answer(text: str) -> str:
  """Returns the answer as AGRPO's released code finds it.

  Inside <answer> if that tag is there, then inside the first \\boxed{...} of
  that if it is not empty; else all of the text.
  """
  tagged = in_tag(text, "answer")
  text = text if tagged is None else tagged
  return first_boxed(text) or text
