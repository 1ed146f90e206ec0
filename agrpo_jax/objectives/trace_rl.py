"""TraceRL: the recorded order, several steps at a time (arXiv:2509.06949).

Every recorded denoising step is visited, `shrink` of them as one: the tokens of
the later ones are then predicted from before the first. With shrink 1 a visit
is a step as it was, but under the raw logits, and without what the choice of
positions adds to the likelihood. The KL penalty is against the behaviour
policy.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import clip as clip_lib
from agrpo_jax.objectives import masks
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class TokenMean(masks.Masks):
  """Losses of dLLM-RL: rows are visits, with a mean over their targets.

  Attributes:
    clip_low, clip_high: see `clip.Clip`.
    behaviour_kl_coef: of k3 against the behaviour policy, summed over targets.
    max_eos: EOS tokens of a completion that are scored; as released none is,
      and such a model is never taught to end.
  """

  clip_low: float = 0.2
  clip_high: float = 0.2
  behaviour_kl_coef: float = 0.01
  max_eos: int = 1

  behaviour: ClassVar[Literal["scored"]] = "scored"
  scores_padding: ClassVar[bool] = True

  def common_problems(self) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    return (
      base.at_least(1, self, "updates_per_batch")
      + base.at_least(0, self, "max_eos", "behaviour_kl_coef")
      + clip_lib.problems(self._clip)
    )

  @property
  def _clip(self) -> clip_lib.Clip:
    return clip_lib.Clip(self.clip_low, self.clip_high)

  @property
  def skips_zero_advantage(self) -> bool:
    return self.behaviour_kl_coef == 0

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the standard scores of the rewards in their groups, [N, G]."""
    return advantage_lib.standard_score(reward_NxG, 0, 0.0)

  def is_scored(
    self, rows: types.Rollout, eos_ids: tuple[int, ...]
  ) -> jax.Array:
    """bool [..., C]: drawn tokens but for the EOS that are one too many."""
    is_drawn_BxC = masks.drawn(rows)
    is_eos_BxC = is_drawn_BxC & jnp.isin(rows.completion, jnp.array(eos_ids))
    is_one_too_many_BxC = jnp.cumsum(is_eos_BxC, axis=-1) > self.max_eos
    return is_drawn_BxC & ~(is_eos_BxC & is_one_too_many_BxC)

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns the surrogate, a mean over a visit's targets, and the penalty."""
    del reference, rows
    num = jnp.maximum(policy.is_factor.sum(axis=-1), 1)
    terms = clip_lib.over_visits(
      policy, behaviour, None, advantage_G, visits.weight / num, self._clip
    )
    if not self.behaviour_kl_coef:
      return terms
    drift = jnp.where(policy.is_factor, behaviour - policy.logprob, 0.0)
    kl = clip_lib.k3(drift).sum(axis=-1)
    penalty = self.behaviour_kl_coef * (visits.weight * kl).sum()
    return terms.replace(loss=terms.loss + penalty)


@dataclasses.dataclass(frozen=True)
class TraceRl(TokenMean):
  """Settings of TraceRL; the published shrink for LLaDA is 8.

  Attributes:
    shrink: executed steps that are visited as one.
  """

  shrink: int = 8

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return self.common_problems() + base.at_least(1, self, "shrink")

  def merged_step(self, unmask_step_C: jax.Array, num_steps: int) -> jax.Array:
    """int32 [C], the number of the visit that scores each position.

    Executed steps are counted, for their indices may have gaps. Positions that
    no step unmasked come last, tokens of the prompt have -1.
    """
    rank_K = jnp.cumsum(base.executed(unmask_step_C, num_steps)) - 1
    rank_C = rank_K.at[unmask_step_C].get(mode="fill", fill_value=num_steps)
    merged_C = jnp.where(
      rank_C < num_steps, rank_C // self.shrink, self._num_visits(num_steps)
    )
    return jnp.where(unmask_step_C < 0, -1, merged_C)

  def _num_visits(self, num_steps: int) -> int:
    return -(-num_steps // self.shrink)

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Visits [U, B, Q, 1] of the merged steps; a mean over all there are."""
    del advantage_B, batch_key
    num_steps, num_tokens = sampling.max_steps, sampling.completion_length
    width = min(num_tokens, self.shrink * sampling.tokens_per_step)

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      del key, update
      merged_1xC = self.merged_step(row.unmask_step, num_steps)[None]
      visit_Qx1 = jnp.arange(self._num_visits(num_steps))[:, None]
      is_scored_1xC = self.is_scored(row, sampling.eos_ids)[None]
      is_target_QxC = (merged_1xC == visit_Qx1) & is_scored_1xC
      visits = masks.visits(
        merged_1xC >= visit_Qx1, is_target_QxC.any(axis=1).astype(jnp.float32)
      )
      # Of a mask, top_k lists the positions first.
      offset_QxW = jax.lax.top_k(is_target_QxC.astype(jnp.int32), width)[1]
      return visits.replace(offset=offset_QxW, denoise_step=visit_Qx1[:, 0])

    visits = masks.each(one, key_B, rollout, self.updates_per_batch)
    num_visits = jnp.maximum(
      visits.weight.sum(axis=(1, 2, 3), keepdims=True), 1
    )
    return visits.replace(weight=visits.weight / num_visits), {}

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Returns a factor per token that the merged step unmasked."""
    factors = super().score(logits_WxV, row, visit, sampling, top_k)
    merged_C = self.merged_step(row.unmask_step, sampling.max_steps)
    is_target_C = merged_C == visit.denoise_step
    is_target_C &= self.is_scored(row, sampling.eos_ids)
    return factors.replace(is_factor=is_target_C[visit.offset])
