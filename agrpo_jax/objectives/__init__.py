"""How graded completions become a loss; knows no network.

One file per objective; each is a frozen dataclass of its settings with the
functions of `objective.Objective`. Its fields are keys of `config.objective`.
`docs/objectives.md` compares them: what each scores, for which sampler it is
unbiased, and what it costs. An objective of your own is one Python file with a
class `Objective`, given by its path.
"""

import dataclasses
import importlib
from typing import Any
from typing import cast

from agrpo_jax import errors
from agrpo_jax import user_file
from agrpo_jax.objectives import objective

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
  return cast(type[Objective], made)
