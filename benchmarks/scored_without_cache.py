"""An objective as it is common: rollouts with a cache, scored without it."""

import dataclasses
from typing import ClassVar
from typing import Literal

from agrpo_jax.objectives import agrpo


@dataclasses.dataclass(frozen=True)
class Objective(agrpo.Agrpo):
  """AGRPO, but its loss does not know of the cache.

  The behaviour policy is scored without it too, so that ratios begin at 1.
  """

  replays: ClassVar[bool] = False
  behaviour: ClassVar[Literal["scored"]] = "scored"  # type: ignore[assignment]
