"""Word problems: a few sums in a row, told as a story. For tiny models.

    Ann had 7 pens, bought 5, lost 4 and doubled them. How many?

    7+5=12 pens
    12-4=8 pens
    8*2=16 pens
    #### 16

Problems are generated from templates. The split goes by the equations: those of
a test problem solve no training problem, whatever words stand around them.

Reward: 1 for the right answer behind the last ####, and half of the share of
equations that are right, so that a solution that goes wrong late is worth more
than one that goes wrong at once. Completions are parsed, never executed.
"""

import random
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.tasks import base
from agrpo_jax.tasks.word_problems import problems as problems_lib

NAME = "word_problems"
DEFAULTS = {
  "min_equations": 2,  # of a solution, from
  "max_equations": 4,  # ... to; at most 4
  "max_number": 9,  # in the text of a problem
  "max_value": 99,  # of any equation
  "num_examples": 0,  # 0: 20000 train / 256 test
  "seed": 0,  # of the generator
  "demonstration": "clean",  # clean or careless (see `demonstration`)
  "careless_probability": 0.6,  # share of careless demonstrations
}
DEMONSTRATIONS = ("clean", "careless")
_GENERATED = {"train": 20_000, "test": 256}


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
  chosen = base.settings(options, DEFAULTS, NAME)
  base.check_range(NAME, chosen, "num_examples", 0)
  base.check_choice(
    NAME, "demonstration", chosen["demonstration"], DEMONSTRATIONS
  )
  base.check_range(NAME, chosen, "careless_probability", 0, 1)
  return chosen


def examples(
  split: str,
  *,
  path: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[base.Example]:
  """Returns the generated problems of `split`.

  Raises:
    UserError: bad options, or a file: this task reads none.
  """
  base.check_split(NAME, split)
  chosen = _settings(options)
  if path is not None:
    raise errors.UserError(
      f"task {NAME!r} makes its problems and reads no file, but was given "
      f"{path!r}; for problems of a file take the task 'gsm8k'."
    )
  found = problems_lib.problems(
    split,
    chosen["num_examples"] or _GENERATED[split],
    min_equations=chosen["min_equations"],
    max_equations=chosen["max_equations"],
    max_number=chosen["max_number"],
    max_value=chosen["max_value"],
    seed=chosen["seed"],
  )
  return [
    base.Example(
      id=index,
      messages=base.user_turn(problem.question),
      fields={
        "question": problem.question,
        "unit": problem.unit,
        "equations": list(problem.equations),
        "gold": problem.answer,
      },
    )
    for index, problem in enumerate(found)
  ]


def reward_weights(options: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns 1 for the right answer and 1/2 for the way to it."""
  _settings(options)
  return {"correct": 1.0, "equations": 0.5}


def reward(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns named parts, each in [0, 1].

  correct: the number behind the last #### is the answer.
  equations: share of the solution's equations that are right
    (see `problems.share_right`).
  """
  del options
  return {
    "correct": float(problems_lib.find_answer(completion) == fields["gold"]),
    "equations": problems_lib.share_right(completion, fields["equations"]),
  }


def grade(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns verdicts on one completion, each in [0, 1].

  accuracy: 1 if the number behind the last #### is the answer.
  equations: share of the solution's equations that are right.
  """
  parts = reward(completion, fields, options)
  return {"accuracy": parts["correct"], "equations": parts["equations"]}


def answer(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns the number behind the last ####; "" if there is none."""
  del fields, options
  number = problems_lib.find_answer(completion)
  return "" if number is None else str(number)


def demonstration(
  example: base.Example,
  rng: random.Random,
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns a completion to imitate in SFT: the solution, line by line.

  "careless" adds, with `careless_probability`, what the story takes away.
  """
  chosen, fields = _settings(options), example.fields
  problem = problems_lib.Problem(
    fields["question"], fields["unit"], tuple(fields["equations"])
  )
  is_careless = chosen["demonstration"] == "careless"
  if is_careless and rng.random() < chosen["careless_probability"]:
    problem = problems_lib.careless(problem)
  return problems_lib.solution(problem)
