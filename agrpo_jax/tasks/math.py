"""MATH: competition mathematics with an expression for an answer.

Training rows have the columns problem, level and solution (the gold answer is
the first \\boxed{...} of the solution); test rows, MATH-500, have problem and
answer. They come from a local file, or from the hub at a pinned revision. As in
the released AGRPO code, training leaves out the problems of MATH-500 and those
of level 5.

Reward as there: 0.5 for a <think> pair, 0.5 for an <answer> pair, 3 for an
answer that math-verify finds equal.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from agrpo_jax import errors
from agrpo_jax.tasks import base
from agrpo_jax.tasks import boxed
from agrpo_jax.tasks import files
from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import d1
from agrpo_jax.tasks.verdicts import equality
from agrpo_jax.tasks.verdicts import tolerant

NAME = "math"
DEFAULTS = {
  "protocol": "agrpo",  # agrpo, d1, llada or bare
  "max_level": 4,  # of training problems, 1-5
  "exclude": "",  # MATH-500 as a file: its problems are left out of training
  "num_examples": 0,  # only the first so many; 0: all
}
HUB = {
  "train": files.Hub(
    "qwedsacf/competition_math",
    revision="e839825f9ec5c6cfa585c654a59610969ec13993",
  ),
  "test": files.Hub(
    "HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
  ),
}
PUBLISHED = {  # `base.fingerprint` of all examples
  "fbc9aa9f070b3caf": "MATH-500",
}


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
  chosen = base.settings(options, DEFAULTS, NAME)
  base.check_range(NAME, chosen, "num_examples", 0)
  base.check_choice(NAME, "protocol", chosen["protocol"], boxed.PROTOCOLS)
  base.check_range(NAME, chosen, "max_level", 1, 5)
  return chosen


def examples(
  split: str,
  *,
  path: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[base.Example]:
  """Returns the problems of `split`, from `path` or the hub.

  Raises:
    UserError: bad options, a file that is missing, empty, malformed or
      of other columns, or a row without an answer.
  """
  base.check_split(NAME, split)
  chosen = _settings(options)
  load = _train if split == "train" else _test
  return [
    boxed.example(index, problem, gold, chosen["protocol"])
    for index, (problem, gold) in enumerate(
      load(path, chosen)[: chosen["num_examples"] or None]
    )
  ]


def _test(path: str | None, chosen: Mapping[str, Any]) -> list[tuple[str, str]]:
  del chosen
  columns = ("problem", "answer")
  rows = (
    files.read(path, "test", columns)
    if path is not None
    else files.from_hub(HUB["test"], "test", columns)
  )
  return [
    (files.text(where, row, "problem"), files.text(where, row, "answer"))
    for where, row in rows
  ]


def _train(
  path: str | None, chosen: Mapping[str, Any]
) -> list[tuple[str, str]]:
  columns = ("problem", "level", "solution")
  if path is None:
    rows = files.from_hub(HUB["train"], "train", columns)
    held_out = _test(chosen["exclude"] or None, chosen)
  else:
    rows = files.read(path, "train", columns)
    # A folder brings its own test split.
    exclude = chosen["exclude"] or (path if pathlib.Path(path).is_dir() else "")
    held_out = _test(exclude, chosen) if exclude else []
    if not held_out:
      logging.warning(
        "Training on %s with all its problems; name a MATH-500 file in the "
        "task option exclude to leave its problems out.",
        path,
      )
  test_problems = {problem for problem, _ in held_out}
  pairs = []
  for where, row in rows:
    level = re.fullmatch(r"(?:Level )?(\d)", str(row["level"]))
    gold = answers.first_boxed(files.text(where, row, "solution"))
    problem = files.text(where, row, "problem")
    if (
      level
      and int(level[1]) <= chosen["max_level"]
      and gold
      and problem not in test_problems
    ):
      pairs.append((problem, gold))
  if not pairs:
    raise errors.UserError(
      f"task 'math': none of the {len(rows)} rows of {path or 'the hub'} is "
      f"left: each needs a level up to max_level={chosen['max_level']} (as in "
      "'Level 3') and a \\boxed{...} in its solution."
    )
  return pairs


def reward_weights(options: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns the released weights, those of the options' protocol."""
  return boxed.reward_weights(_settings(options)["protocol"])


reward = boxed.reward  # GSM8K's and MATH's are the same


def grade(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns verdicts, 1 or 0.

  accuracy: as published: by math-verify on the answer as the released AGRPO
    evaluation finds it, or, under the protocol d1, by d1's string comparison.
  accuracy_tolerant: the answer wherever it stands, equal as a string, as a
    number or by math-verify.
  accuracy_string: d1's string comparison, under every protocol.
  """
  text = answers.clip(completion)
  gold = fields["gold"]
  as_string = d1.math_correct(text, gold)
  is_d1 = _settings(options)["protocol"] == "d1"
  strict = as_string if is_d1 else boxed.released_correct(text, gold)
  span, _ = tolerant.answer_span(text)
  number = tolerant.plain_number(gold)
  return {
    "accuracy": float(strict),
    "accuracy_tolerant": float(
      span.strip() == gold.strip()
      or (number is not None and tolerant.plain_number(span) == number)
      or equality.equal(f"${gold}$", f"${span}$")
    ),
    "accuracy_string": float(as_string),
  }


def answer(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns the answer: of a number one form for all spellings, else the text.

  Answers that only math-verify finds equal are different texts here.
  """
  del fields, options
  span, _ = tolerant.answer_span(answers.clip(completion))
  number = tolerant.plain_number(span)
  return "".join(span.split()) if number is None else str(number)
