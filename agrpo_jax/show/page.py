"""Completions as one HTML page that needs nothing but a browser.

The page's design and behaviour are in page.html; here its places are
filled in. What the model wrote is escaped and never becomes markup.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import pathlib
import re
from collections.abc import Sequence

from agrpo_jax.show import text as text_lib

_TEMPLATE = pathlib.Path(__file__).parent / "page.html"


@dataclasses.dataclass(frozen=True)
class Page:
  """The content of a page.

  Attributes:
    title: its heading.
    settings: how the completions were drawn, on a line.
    prompt: the user's words.
    raw_prompt: the same with the chat template, special tokens visible.
    completions: side by side.
    block_length: T.
    eos_id: its token is shown as a sign, since it fills up completions.
    eos_name: what the sign stands for.
  """

  title: str
  settings: str
  prompt: str
  raw_prompt: str
  completions: Sequence[text_lib.Completion]
  block_length: int
  eos_id: int
  eos_name: str


def render(page: Page) -> str:
  """Returns the page's HTML."""
  entropies = [
    token.entropy for one in page.completions for token in one.tokens
  ]
  most = max(max(entropies), 1e-9)
  last = max(one.num_executed_steps for one in page.completions)
  cards = [
    _card(page, number, one, most, last)
    for number, one in enumerate(page.completions, 1)
  ]
  values = {
    "TITLE": html.escape(page.title),
    "SETTINGS": html.escape(page.settings),
    "PROMPT": html.escape(page.prompt),
    "RAW_PROMPT": html.escape(page.raw_prompt),
    "STEPS": str(last),
    "ENTROPY": f"{most:.2f}",
    "LEGEND": _legend(page),
    "COMPLETIONS": "\n".join(cards),
  }
  # In one pass: a value that contains a place's name is left as it is.
  return re.sub(
    "@@([A-Z_]+)@@",
    lambda match: values[match.group(1)],
    _TEMPLATE.read_text(encoding="utf-8"),
  )


def _legend(page: Page) -> str:
  tokens = [token for one in page.completions for token in one.tokens]
  parts = []
  if any(token.id == page.eos_id for token in tokens):
    name = html.escape(page.eos_name)
    parts.append(f"<span>{text_lib.END} {name}</span>")
  if any(token.unmask_step is None for token in tokens):
    parts.append("<span>faint: filled up after the end</span>")
  if len(tokens) > page.block_length * len(page.completions):
    block = '<span class="text"><i class="block">0</i></span>'
    parts.append(f"<span>{block}a block begins</span>")
  return "\n".join(parts)


def _card(
  page: Page,
  number: int,
  completion: text_lib.Completion,
  most_entropy: float,
  last: int,
) -> str:
  pieces = "".join(
    _piece(page, piece, completion, most_entropy, last)
    for piece in completion.pieces
  )
  done = [
    token.unmask_step + 1
    for token in completion.tokens
    if token.unmask_step is not None
  ]
  return (
    f"<article class=\"card\" data-done='{json.dumps(done)}'>\n"
    f'<div class="head"><h2>Completion {number}</h2>'
    '<span class="soft count"></span></div>\n'
    f'<div class="text">{pieces}</div>\n'
    f'<div class="strip" aria-hidden="true">{_strip(completion, last)}</div>\n'
    '<div class="soft caption">Bars: mean probability of each step’s tokens. '
    f"{_summary(completion)}</div>\n"
    "</article>"
  )


def _summary(completion: text_lib.Completion) -> str:
  logprob = sum(token.logprob for token in completion.tokens)
  return f"All tokens: log-probability {logprob:.2f}."


def _strip(completion: text_lib.Completion, last: int) -> str:
  """Returns a bar per denoising step: how probable its tokens were."""
  probabilities: list[list[float]] = [[] for _ in range(last)]
  for token in completion.tokens:
    if token.unmask_step is not None:
      probabilities[token.unmask_step].append(math.exp(token.logprob))
  return "".join(
    f'<b style="height:{100 * sum(each) / max(1, len(each)):.0f}%"></b>'
    for each in probabilities
  )


def _piece(
  page: Page,
  piece: text_lib.Piece,
  completion: text_lib.Completion,
  most_entropy: float,
  last: int,
) -> str:
  step = piece.unmask_step
  known = [t.unmask_step for t in piece.tokens if t.unmask_step is not None]
  done = completion.num_executed_steps if step is None else step + 1
  first = min(known) + 1 if known else done
  is_eos = piece.tokens[0].id == page.eos_id
  text = text_lib.END if is_eos else piece.text.replace("\n", "↵\n")
  classes = [
    name
    for name, holds in (
      ("special", piece.is_special),
      ("filled", step is None),
      ("block", _begins_block(piece, page.block_length)),
    )
    if holds
  ]
  style = (
    f"--p:{math.exp(piece.logprob):.3f};"
    f"--s:{(step or 0) / max(1, last - 1):.3f};"
    f"--h:{piece.entropy / most_entropy:.3f}"
  )
  tip = html.escape("\n\n".join(_tip(piece, token) for token in piece.tokens))
  return (
    f'<i class="{" ".join(classes)}" data-done="{done}" data-first="{first}" '
    f'style="{style}" data-tip="{tip}">{html.escape(text)}</i>'
  )


def _begins_block(piece: text_lib.Piece, block_length: int) -> bool:
  position = piece.tokens[0].position
  return position > 0 and position % block_length == 0


def _tip(piece: text_lib.Piece, token: text_lib.Token) -> str:
  """Returns a token's numbers, a line each."""
  name = (
    f"{piece.text!r}" if len(piece.tokens) == 1 else f"part of {piece.text}"
  )
  head = f"{name}, token {token.id}, position {token.position + 1}"
  if token.unmask_step is None:
    return f"{head}\nfilled up: the completion had ended"
  return (
    f"{head}\nunmasked at step {token.unmask_step + 1}\n"
    f"probability {math.exp(token.logprob):.3f} "
    f"(log {token.logprob:.3f})\n"
    f"entropy {token.entropy:.3f} nats"
  )
