"""How graded completions become a loss; knows no network.

One file per objective; each is a frozen dataclass of its settings with the
functions of `objective.Objective`. Its fields are keys of `config.objective`.
`docs/objectives.md` compares them: what each scores, for which sampler it is
unbiased, and what it costs. An objective of your own is one Python file with a
class `Objective`, given by its path.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any
from typing import cast

from agrpo_jax import errors
from agrpo_jax import user_file
from agrpo_jax.objectives import base
from agrpo_jax.objectives import objective
from agrpo_jax.samplers import sampling as sampling_lib

Objective = objective.Objective
Valued = objective.Valued

_CLASSES = {
  "agrpo": "Agrpo",
  "bgpo": "Bgpo",
  "cj_grpo": "CjGrpo",
  "coupled_grpo": "CoupledGrpo",
  "diffpo": "Diffpo",
  "diffu_grpo": "DiffuGrpo",
  "dipo": "Dipo",
  "dmpo": "Dmpo",
  "espo": "Espo",
  "gdpo": "Gdpo",
  "just_grpo": "JustGrpo",
  "random_mask": "RandomMask",
  "spg": "Spg",
  "tbrm": "Tbrm",
  "trace_rl": "TraceRl",
  "uni_grpo": "UniGrpo",
  "vine_ppo": "VinePpo",
  "vrpo": "Vrpo",
  "wd1": "Wd1",
}
NAMES = tuple(_CLASSES)
SHARED_KEYS = ("name", "path", "microbatch", "step_price")
"""Keys of `config.objective` that are no settings of one objective."""

_BEHAVIOURS = ("recorded", "scored", "none")
_FLAGS = (
  "replays",
  "is_sum_over_visits",
  "has_reference",
  "skips_zero_advantage",
)


def get(name: str, path: str = "") -> type[Objective]:
  """Returns the objective called `name`, or the one in the file at `path`.

  Raises:
    UserError: an unknown name, a missing or broken file, or one whose class is
      no objective.
  """
  if path:
    made = getattr(user_file.load(path, "objective"), "Objective", None)
    return _checked(made, path)
  if name not in _CLASSES:
    raise errors.UserError(
      f"objective {name!r} is unknown; the known ones are {', '.join(NAMES)}. "
      "For an objective of your own give the path of its Python file."
    )
  module = importlib.import_module(f"agrpo_jax.objectives.{name}")
  return getattr(module, _CLASSES[name])


def make(
  record: type[Objective],
  settings: Mapping[str, Any],
  sampling: sampling_lib.Sampling,
  path: str = "",
) -> tuple[Objective, list[str]]:
  """Returns an objective, and what is wrong with its settings, a sentence each.

  Args:
    record: its class, see `get`.
    settings: those that are not as the class has them.
    sampling: how rollouts are to be drawn.
    path: of the file of an objective of your own.

  Raises:
    UserError: one of your own fails, or tells what the learner cannot read.
  """
  if not path:
    made = record(**settings)
    return made, made.problems(sampling)
  try:
    made = record(**settings)
    wrong = _misread(made)
    # What is wrong with the class is told first, and alone.
    found = [] if wrong else made.problems(sampling)
    if not isinstance(found, list):
      raise TypeError(f"problems() returned {found!r}, no list of sentences")
  # A user's own class may do anything.
  except Exception as error:
    raise errors.UserError(
      f"the settings of {path!r} cannot be checked: "
      f"{type(error).__name__}: {error}"
    ) from error
  if wrong:
    raise errors.UserError(
      f"in the class `Objective` of {path!r} {'; '.join(wrong)}; see "
      "`agrpo_jax/objectives/objective.py`."
    )
  return made, found


def _misread(made: Objective) -> list[str]:
  """Returns what an objective tells of itself that the learner cannot read."""
  updates = made.updates_per_batch
  found = base.problems_of(
    made,
    updates_per_batch=(
      type(updates) is int and updates >= 1,
      "a whole number, at least 1",
    ),
    **{
      name: (isinstance(getattr(made, name), bool), "True or False")
      for name in _FLAGS
    },
  )
  found += base.one_of(made, behaviour=_BEHAVIOURS)
  if isinstance(made, Valued) and not made.is_sum_over_visits:
    found.append("is_sum_over_visits must be True: it has `block_advantage`")
  return found


def _checked(made: Any, path: str) -> type[Objective]:
  """Returns it if it is a class with all that the learner asks for."""
  # A class below a dataclass is one too, without what it adds.
  if not isinstance(made, type) or "__dataclass_fields__" not in vars(made):
    raise errors.UserError(
      f"objective file {path!r} has no class `Objective` that is a dataclass "
      "of its settings."
    )
  wanted = [name for name in vars(Objective) if not name.startswith("_")]
  # Only asked for where the behaviour policy is recorded.
  if getattr(made, "behaviour", None) != "recorded":
    wanted.remove("recorded")
  fields = {field.name: field.default for field in dataclasses.fields(made)}
  # A class below the protocol has its stubs.
  missing = [
    x
    for x in wanted
    if x not in fields
    and (not hasattr(made, x) or getattr(made, x) is getattr(Objective, x))
  ]
  if missing:
    raise errors.UserError(
      f"the class `Objective` of {path!r} lacks {', '.join(missing)}; see "
      "`agrpo_jax/objectives/objective.py`."
    )
  bare = [x for x, value in fields.items() if value is dataclasses.MISSING]
  if bare:
    raise errors.UserError(
      f"the class `Objective` of {path!r} has settings without a plain value "
      f"as default: {', '.join(bare)}."
    )
  taken = [x for x in SHARED_KEYS if x in fields]
  if taken:
    raise errors.UserError(
      f"the class `Objective` of {path!r} has settings with names that "
      f"config.objective has for others: {', '.join(taken)}; rename them."
    )
  # A function in place of a value would count as true.
  confused = [
    x
    for x in wanted
    if callable(getattr(made, x)) != callable(getattr(Objective, x))
  ]
  if confused:
    raise errors.UserError(
      f"the class `Objective` of {path!r} has functions for values, or values "
      f"for functions: {', '.join(confused)}; a function that stands for a "
      "value needs @property."
    )
  return cast(type[Objective], made)
