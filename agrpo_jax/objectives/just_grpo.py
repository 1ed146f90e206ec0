"""JustGRPO: left to right, one token at a time (arXiv:2601.15165).

With everything behind a position masked, its conditional is that of the sampler
that goes from left to right; the sum of their logarithms is its likelihood, and
the policy gradient is exact, for that sampler: `rollout.block_length=1`. One
pass per token. Where completions are drawn otherwise it is off-policy.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import clip as clip_lib
from agrpo_jax.objectives import masks
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class JustGrpo(masks.Masks):
  """Settings of JustGRPO; defaults as published.

  One update per rollout, so that policy ratios are 1 and clipping never acts.
  Advantages are standard scores, divided by the number of completions in the
  batch whose advantage is not 0.

  Attributes:
    visited_share: of the positions, those with the highest recorded entropy;
      below 1 it is faster, and biased (the paper's Fast variant: 0.25).
    temperature: divides the logits.
  """

  visited_share: float = 1.0
  temperature: float = 1.0

  scores_padding: ClassVar[bool] = True

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch")
      + base.positive(self, "temperature")
      + base.problems_of(
        self, visited_share=(0 < self.visited_share <= 1, "in (0, 1]")
      )
    )

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns standard scores over the number of those that are not 0."""
    score_NxG = advantage_lib.standard_score(reward_NxG, 1, 1e-4)
    return score_NxG / ((score_NxG != 0).sum() + 1e-5)

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """A visit per position, all behind it masked: [U, B, C, 1]."""
    del advantage_B, batch_key, sampling
    num_tokens = rollout.completion.shape[1]
    num_visited = max(1, round(self.visited_share * num_tokens))

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      del key, update
      # Of equal entropies the first ones.
      is_drawn_C = masks.drawn(row)
      entropy_C = jnp.where(is_drawn_C, row.entropy, -1.0)
      offset_Q = jax.lax.top_k(entropy_C, num_visited)[1]
      is_masked_QxC = jnp.arange(num_tokens)[None] >= offset_Q[:, None]
      num = jnp.minimum(num_visited, is_drawn_C.sum())
      return masks.visits(is_masked_QxC, is_drawn_C[offset_Q] / num).replace(
        offset=offset_Q[:, None]
      )

    return masks.each(one, key_B, rollout, self.updates_per_batch), {}

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Returns the factor of the visit's token."""
    logits_WxV = logits_WxV / self.temperature
    return super().score(logits_WxV, row, visit, sampling, top_k)

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns -A times the log-probability of every visited token."""
    del behaviour, reference, rows
    return clip_lib.reinforce(policy, advantage_G, visits.weight)
