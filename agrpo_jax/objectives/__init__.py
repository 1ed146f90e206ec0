"""How graded completions become a loss; knows no network.

One file per objective; each is a frozen dataclass of its settings with the
functions of `base.Objective`. Its fields are the keys of `config.objective`.
"""

from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import base

OBJECTIVES: dict[str, type[base.Objective]] = {
  "agrpo": agrpo.Agrpo,
}
"""Name -> objective."""
