"""coupled-GRPO, the objective of DiffuCoder (arXiv:2506.20639).

A token's log-probability is half of that where all is masked, and half of a
weighted one where a random part of the completion is masked with it: that part,
or its complement, so that every token is read in just one of the two:

    l_i = 1/2 [log p_i(all masked) + w_i log p_i(its part masked)]

with w_i = 1/t in the part, drawn with mask ratio t, and 1/(1 - t) in the rest.
Neither a bound nor a probability of the sampler; w multiplies log-ratios.
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
class CoupledGrpo(advantage_lib.Baseline, clip_lib.Clip, masks.Masks):
  """Settings of coupled-GRPO; defaults as published.

  The mask ratio is a microbatch's as published, here a completion's.

  Attributes:
    min_ratio, max_ratio: between which the mask ratio is drawn.
  """

  updates_per_batch: int = 2
  clip_low: float = 0.5
  clip_high: float = 0.5
  kl_coef: float = 0.01
  min_ratio: float = 0.2
  max_ratio: float = 0.8
  baseline: str = "leave_one_out"

  is_sum_over_visits: ClassVar[bool] = False
  behaviour: ClassVar[Literal["scored"]] = "scored"

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    low, high = self.min_ratio, self.max_ratio
    return (
      base.at_least(1, self, "updates_per_batch")
      + clip_lib.problems(self)
      + advantage_lib.problems(self)
      + base.problems_of(
        self,
        min_ratio=(0 < low <= high, f"in (0, max_ratio={high!r}]"),
        max_ratio=(high < 1, "below 1"),
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
    """Masks all, a random part, and the rest: visits [U, B, 3, 1]."""
    del advantage_B, batch_key
    num_tokens = masks.until_eos(rollout, sampling.eos_ids).sum()

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      ratio_key, mask_key = jax.random.split(jax.random.fold_in(key, update))
      ratio = jax.random.uniform(
        ratio_key, minval=self.min_ratio, maxval=self.max_ratio
      )
      is_part_C = jax.random.bernoulli(mask_key, ratio, row.completion.shape)
      is_masked_3xC = jnp.stack(
        [jnp.ones_like(is_part_C), is_part_C, ~is_part_C]
      )
      scale_3 = jnp.stack([jnp.ones(()), 1 / ratio, 1 / (1 - ratio)]) / 2
      return masks.visits(is_masked_3xC, 1.0 / num_tokens, scale_3)

    return masks.each(one, key_B, rollout, self.updates_per_batch), {}

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns the clipped surrogate of every token's l, with the KL penalty."""
    del rows
    scale_GxQxSx1 = visits.scale[..., None]

    def mixed(logprob: jax.Array) -> jax.Array:
      part = jnp.where(policy.is_factor, scale_GxQxSx1 * logprob, 0.0)
      return part.sum(axis=(1, 2))

    tokens = base.Factors(mixed(policy.logprob), policy.is_factor.any((1, 2)))
    return clip_lib.surrogates(
      tokens,
      mixed(behaviour),
      None if reference is None else mixed(reference),
      advantage_G,
      masks.row_weight(visits),
      self,
    )
