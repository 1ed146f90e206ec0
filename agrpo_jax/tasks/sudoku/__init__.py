"""Sudoku, 4x4: fill 16 cells so that rows, columns and 2x2 boxes hold 1-4.

A puzzle is 16 characters, row by row, 0 for a blank. There are 288 solved
grids in all. Generated puzzles have exactly one solution, and the grids of the
test split never occur in training. A CSV file with the columns Puzzle and
Solution (the published splits) can be given instead.

Reward as in the released AGRPO code: 0.25 for 16 characters, 0.25 for four of
each digit, 0.5 for keeping the clues, 3 times the share of blanks right.
"""

import random
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.tasks import base
from agrpo_jax.tasks import files
from agrpo_jax.tasks.sudoku import grids
from agrpo_jax.tasks.sudoku import prompts
from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import d1

NAME = "sudoku"
DEFAULTS = {
  "protocol": "agrpo",  # agrpo, d1, llada or bare
  "shots": 3,  # worked examples in the prompt, 0-3 (protocols agrpo and d1)
  "min_blanks": 6,  # blanks of a generated puzzle, from
  "max_blanks": 10,  # ... to; at most 12
  "num_examples": 0,  # 0: all rows of a file, or 20000 train / 256 test
  "seed": 0,  # of the generator
  "demonstration": "clean",  # clean or careless (see `demonstration`)
  "careless_probability": 0.6,  # share of careless demonstrations
}
DEMONSTRATIONS = ("clean", "careless")
PUBLISHED = {  # `base.fingerprint` of all examples
  "4a5d75b73755f72b": "Sudoku test split of d1",
  "e3900fcf31d75471": "Sudoku test split of SPG and AGRPO",
}
_GENERATED = {"train": 20_000, "test": 256}
_RELEASED_WEIGHTS = {
  "length": 0.25,
  "digits": 0.25,
  "clues": 0.5,
  "filled": 3.0,
}


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
  chosen = base.settings(options, DEFAULTS, NAME)
  base.check_range(NAME, chosen, "num_examples", 0)
  base.check_choice(NAME, "protocol", chosen["protocol"], prompts.PROTOCOLS)
  base.check_choice(
    NAME, "demonstration", chosen["demonstration"], DEMONSTRATIONS
  )
  base.check_range(NAME, chosen, "shots", 0, len(prompts.SHOTS))
  base.check_range(NAME, chosen, "careless_probability", 0, 1)
  return chosen


def examples(
  split: str,
  *,
  path: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[base.Example]:
  """Returns the puzzles of `split`: generated, or from a file at `path`.

  Raises:
    UserError: bad options, or a row that is no 4x4 Sudoku.
  """
  base.check_split(NAME, split)
  chosen = _settings(options)
  count = chosen["num_examples"]
  if path is None:
    pairs = grids.puzzles(
      split,
      count or _GENERATED[split],
      min_blanks=chosen["min_blanks"],
      max_blanks=chosen["max_blanks"],
      seed=chosen["seed"],
    )
  else:
    pairs = _published(path, split)
    pairs = pairs[:count] if count else pairs
  return [
    base.Example(
      id=index,
      messages=prompts.messages(puzzle, chosen["protocol"], chosen["shots"]),
      fields={"puzzle": puzzle, "gold": gold},
      prefill=prompts.PREFILL[chosen["protocol"]],
    )
    for index, (puzzle, gold) in enumerate(pairs)
  ]


def _published(path: str, split: str) -> list[tuple[str, str]]:
  pairs = []
  for where, row in files.read(path, split, ("Puzzle", "Solution")):
    # A tool that took the columns for numbers drops leading zeros.
    puzzle = str(row["Puzzle"]).zfill(grids.SIZE)
    gold = str(row["Solution"])
    if not grids.solves(gold, puzzle):
      raise errors.UserError(
        f"{where}: Solution {gold!r} does not solve Puzzle {puzzle!r}."
      )
    pairs.append((puzzle, gold))
  return pairs


def reward_weights(options: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns the released weights; under `bare` the share of right cells."""
  if _settings(options)["protocol"] == "bare":
    return {**dict.fromkeys(_RELEASED_WEIGHTS, 0.0), "cells": 1.0, "exact": 0.0}
  return {**_RELEASED_WEIGHTS, "cells": 0.0, "exact": 0.0}


def reward(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns named parts, each in [0, 1].

  length, digits, clues: about the text inside <answer>, only if it has
    exactly 16 characters. filled: share of blanks right, read as released
    (see `_released_grid`). cells: the same share of the grid read strictly,
    0 unless every clue is kept. exact: 1 for a solved grid.
  """
  text = answers.clip(completion)
  is_bare = _settings(options)["protocol"] == "bare"
  puzzle, gold = fields["puzzle"], fields["gold"]
  tagged = text.strip() if is_bare else answers.in_tag(text, "answer")
  parts = dict.fromkeys((*_RELEASED_WEIGHTS, "cells", "exact"), 0.0)
  if tagged is not None and len(tagged) == grids.SIZE:
    parts["length"] = 1.0
    parts["digits"] = float(sorted(tagged) == sorted("1234" * 4))
    parts["clues"] = float(grids.keeps_clues(tagged, puzzle))
  answer = text.strip() if is_bare else answers.released_answer(text)
  parts["filled"] = grids.share_right(_released_grid(answer), puzzle, gold)
  if grids.keeps_clues(answer, puzzle):
    parts["cells"] = grids.share_right(answer, puzzle, gold)
    parts["exact"] = float(grids.solves(answer, puzzle))
  return parts


def grade(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns verdicts on one completion.

  accuracy: 1 if the grid, read as published, is solved and keeps the clues.
    As published: as in the released AGRPO evaluation, or, under the protocol
    d1, as in d1's; under bare the whole completion.
  accuracy_tolerant: the same of the grid found however it is written.
  cells: share of blanks right, read as published, clues not checked. Its mean
    over puzzles is AGRPO's published score.
  num_right, num_blanks: counts of the same; the ratio of their means is the
    micro cell accuracy, d1's published score.
  """
  text = answers.clip(completion)
  protocol = _settings(options)["protocol"]
  puzzle, gold = fields["puzzle"], fields["gold"]
  if protocol == "bare":
    whole = text.strip()  # with anything more it is no grid, as for the reward
    strict = _released_grid(whole if len(whole) <= grids.SIZE else "")
  elif protocol == "d1":
    strict = d1.sudoku_grid(text) or "0" * grids.SIZE
  else:
    strict = _released_grid(answers.released_answer(text))
  num_right, num_blanks = grids.count_right(strict, puzzle, gold)
  tolerant = _found_grid(text)
  return {
    "accuracy": float(grids.solves(strict, puzzle)),
    "accuracy_tolerant": float(grids.solves(tolerant, puzzle)),
    "cells": num_right / num_blanks if num_blanks else 0.0,
    "num_right": float(num_right),
    "num_blanks": float(num_blanks),
  }


def answer(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns the 16 digits of the grid, however it is written; "" if none."""
  del fields, options
  return _found_grid(answers.clip(completion))


def _found_grid(text: str) -> str:
  return grids.find(answers.after_tag(text, "answer") or text)


def _released_grid(answer: str) -> str:
  """Returns `answer` zero-padded on the left and cut to 16, as released."""
  return answer.zfill(grids.SIZE)[: grids.SIZE]


def demonstration(
  example: base.Example,
  rng: random.Random,
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns a completion to imitate in SFT.

  "clean" gives the solution. "careless" fills, with `careless_probability`,
  the blanks of each row with the digits the row lacks in increasing order,
  whatever the columns and boxes say, and gives the solution otherwise.
  """
  chosen = _settings(options)
  puzzle, grid = example.fields["puzzle"], example.fields["gold"]
  is_careless = chosen["demonstration"] == "careless"
  if is_careless and rng.random() < chosen["careless_probability"]:
    grid = grids.fill_rows(puzzle)
  if chosen["protocol"] == "bare":
    return grid
  text = prompts.completion(puzzle, grid, chosen["protocol"])
  return text.removeprefix(example.prefill)
