"""CJ-GRPO: GRPO along the recorded trajectory (arXiv:2509.23924).

Every denoising step is scored in the state that it acted on; the loss is the
mean over steps of the mean over the tokens that a step unmasked. What the
choice of positions adds to the likelihood is left out as published. Published
with raw logits and a behaviour policy that is scored anew; here both are the
sampler's own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import replay
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class CjGrpo(advantage_lib.Baseline, replay.ClippedReplay):
  """Settings of CJ-GRPO; defaults as published for GSM8K.

  Attributes:
  """

  updates_per_batch: int = 12
  clip_low: float = 0.5
  clip_high: float = 0.5
  kl_coef: float = 0.04

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    return super().problems(sampling) + base.one_of(
      self, baseline=advantage_lib.BASELINES
    )

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Returns all steps, weighted for a mean of means."""
    visits, metrics = super().visits(
      rollout, advantage_B, batch_key, key_B, sampling
    )
    num_BxK = replay.unmasked_per_step(rollout, sampling.max_steps)
    num_steps_B = jnp.maximum((num_BxK > 0).sum(axis=1), 1)
    share_BxK = 1.0 / (jnp.maximum(num_BxK, 1) * num_steps_B[:, None])
    return replay.weigh(visits, share_BxK), metrics
