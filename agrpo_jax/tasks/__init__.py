"""Tasks: where problems come from, what is rewarded and how it is graded.

A task is a module of plain Python (no jax) with

    examples(split, *, path=None, options=None) -> list[Example]
    reward_weights(options) -> dict[str, float]
    reward(completion, fields, options) -> dict[str, float]
    grade(completion, fields, options) -> dict[str, float]

and, where demonstrations for SFT can be made,

    demonstration(example, rng, options) -> str

and, for records and majority votes,

    answer(completion, fields, options) -> str

`reward` gives named parts, unweighted; the scalar reward is their sum under
the weights. `reward_weights` names every part; a part of weight 0 is only
logged. `grade` gives "accuracy", the strict verdict in [0, 1], and may add
others beside it. `answer` is what a completion answers with, written so that
equal answers are equal texts, "" for none. All read the completion alone: text
that was prefilled belongs to the prompt. `options` is a plain dict
(`config.task.options`).

A task of your own is one Python file with these functions, given by its path.
What they return is checked (see `contract`).
"""

import importlib
import types
from collections.abc import Sequence

from agrpo_jax import errors
from agrpo_jax import user_file
from agrpo_jax.tasks import base

Example = base.Example

NAMES = ("countdown", "gsm8k", "math", "sudoku", "word_problems")


def get(name: str, path: str | None = None) -> types.ModuleType:
  """Returns the task called `name`, or the one in the Python file at `path`.

  Raises:
    UserError: an unknown name, a missing or broken file, or one whose functions
      are not those of a task.
  """
  if path:
    task = user_file.load(path, "task")
    base.check_functions(task)
    return task
  if name not in NAMES:
    raise errors.UserError(
      f"task {name!r} is unknown; the known ones are {', '.join(NAMES)}. "
      "For a task of your own give the path of its Python file."
    )
  return importlib.import_module(f"agrpo_jax.tasks.{name}")


def provenance(task: types.ModuleType, examples: Sequence[Example]) -> str:
  """Says whether `examples` are a published split, for tables and logs."""
  fingerprint = base.fingerprint(examples)
  published = getattr(task, "PUBLISHED", {}).get(fingerprint)
  size = f"{len(examples)} problems, fingerprint {fingerprint}"
  if published:
    return f"the published {published} ({size})"
  return f"not a published split ({size})"
