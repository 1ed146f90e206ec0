"""Random-mask and coupled RL of dLLM-RL (arXiv:2509.06949, its baselines).

As TraceRL, with masks of a random ratio in place of recorded steps; coupled
with its complement, a mask reads every token once. Biased: a token's mean over
masks is no log-probability of the sampler.
"""

import dataclasses

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.objectives import masks
from agrpo_jax.objectives import trace_rl
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class RandomMask(trace_rl.TokenMean):
  """Settings; defaults as published, but for `max_eos`: released is 0.

  Attributes:
    num_masks: per completion; twice as many visits if coupled.
    min_ratio, max_ratio: between which mask ratios are drawn.
    is_coupled: whether each mask comes with its complement.
  """

  num_masks: int = 35
  min_ratio: float = 0.1
  max_ratio: float = 0.9
  is_coupled: bool = False

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    low, high = self.min_ratio, self.max_ratio
    return (
      self.common_problems()
      + base.at_least(1, self, "num_masks")
      + base.problems_of(
        self,
        min_ratio=(0 < low <= high, f"in (0, max_ratio={high!r}]"),
        max_ratio=(high <= 1, "at most 1"),
      )
    )

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Masks [U, B, Q, 1]; what is not scored is masked in all of them."""
    del advantage_B, batch_key
    num_tokens = rollout.completion.shape[1]

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      ratio_key, mask_key = jax.random.split(jax.random.fold_in(key, update))
      ratio_Mx1 = jax.random.uniform(
        ratio_key,
        (self.num_masks, 1),
        minval=self.min_ratio,
        maxval=self.max_ratio,
      )
      is_drawn_QxC = jax.random.bernoulli(
        mask_key, ratio_Mx1, (self.num_masks, num_tokens)
      )
      if self.is_coupled:
        is_drawn_QxC = jnp.concatenate([is_drawn_QxC, ~is_drawn_QxC])
      is_scored_1xC = self.is_scored(row, sampling.eos_ids)[None]
      is_target_QxC = is_drawn_QxC & is_scored_1xC
      return masks.visits(
        is_drawn_QxC | ~is_scored_1xC,
        is_target_QxC.any(axis=1).astype(jnp.float32),
      )

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
    """Returns a factor per masked token that is scored."""
    factors = super().score(logits_WxV, row, visit, sampling, top_k)
    is_scored_C = self.is_scored(row, sampling.eos_ids)
    return factors.replace(is_factor=factors.is_factor & is_scored_C)
