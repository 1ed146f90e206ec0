"""How graded completions become a loss; knows no network.

One file per objective; each is a frozen dataclass of its settings with the
functions of `objective.Objective`. Its fields are keys of `config.objective`.
"""

from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import objective

Objective = objective.Objective
OBJECTIVES: dict[str, type[objective.Objective]] = {
  "agrpo": agrpo.Agrpo,
}
"""Name -> objective."""
