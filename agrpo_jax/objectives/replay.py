"""Objectives that replay every recorded denoising step.

The states, the policy and the recorded probabilities are AGRPO's under
`step_rule="all"`; what differs is the loss.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import base
from agrpo_jax.objectives import clip as clip_lib
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Replay:
  """What they have in common.

  Attributes:
    likelihood: of a step, see `agrpo.Agrpo`.
    updates_per_batch: optimizer updates per rollout, each over all steps.
  """

  likelihood: str = "product"
  updates_per_batch: int = 1

  replays: ClassVar[bool] = True
  is_sum_over_visits: ClassVar[bool] = True
  behaviour: ClassVar[Literal["recorded", "none"]] = "recorded"

  @property
  def _steps(self) -> agrpo.Agrpo:
    return agrpo.Agrpo(
      step_rule="all",
      likelihood=self.likelihood,
      updates_per_batch=self.updates_per_batch,
    )

  def step_problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    return self._steps.problems(sampling)

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Returns visits [U, B, Q, S] of all steps, each of weight 1 / B."""
    visits, _ = self._steps.visits(
      rollout, advantage_B, batch_key, key_B, sampling
    )
    return visits, {}

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Returns the factors of a denoising step, as AGRPO has them."""
    return self._steps.score(logits_WxV, row, visit, sampling, top_k)

  def recorded(self, row: types.Rollout, visit: base.Visits) -> jax.Array:
    """Returns the same factors, as the rollout recorded them."""
    return self._steps.recorded(row, visit)


@dataclasses.dataclass(frozen=True)
class ClippedReplay(clip_lib.Clip, Replay):
  """Those whose loss is a sum of clipped surrogates over steps."""

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    return self.step_problems(sampling) + clip_lib.problems(self)


def unmasked_per_step(rollout: types.Rollout, num_steps: int) -> jax.Array:
  """float32 [B, K], how many positions each denoising step unmasked."""

  def one(unmask_step_C: jax.Array) -> jax.Array:
    # Dropped is K, which positions have that no step unmasked; -1, of tokens of
    # the prompt, would be the last step.
    step_C = jnp.where(unmask_step_C < 0, num_steps, unmask_step_C)
    return jnp.zeros((num_steps,)).at[step_C].add(1.0, mode="drop")

  return jax.vmap(one)(rollout.unmask_step)


def weigh(visits: base.Visits, share_BxK: jax.Array) -> base.Visits:
  """Multiplies the weights of visits [U, B, Q, S] by their steps' shares."""
  share = jax.vmap(lambda share_K, step: share_K[step])
  factor = jax.vmap(share, (None, 0))(share_BxK, visits.denoise_step)
  return visits.replace(weight=visits.weight * factor)
