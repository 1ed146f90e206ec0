"""DiPO, the objective of DiRL (arXiv:2512.22234).

Every denoising step is scored in the state that it acted on, token by token,
and the loss is the mean over a completion's tokens. Published for block-causal
models: with their cache the learner scores all steps beside one pass over the
completion, as published; other models get a pass for each step. What the choice
of positions adds to the likelihood is left out as published.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import replay
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Dipo(replay.ClippedReplay):
  """Settings of DiPO; defaults as published."""

  clip_high: float = 0.28

  max_log_ratio: ClassVar[float] = 10.0

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the standard scores of the rewards in their groups, [N, G]."""
    return advantage_lib.standard_score(reward_NxG, 0, 0.0)

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Returns all steps, weighted for a mean over tokens."""
    visits, metrics = super().visits(
      rollout, advantage_B, batch_key, key_B, sampling
    )
    num_BxK = replay.unmasked_per_step(rollout, sampling.max_steps)
    num_Bx1 = jnp.maximum(num_BxK.sum(axis=1, keepdims=True), 1)
    share_BxK = jnp.broadcast_to(1 / num_Bx1, num_BxK.shape)
    return replay.weigh(visits, share_BxK), metrics
