"""VRPO, the preference objective of LLaDA 1.5 (arXiv:2505.19223), made on-line.

DPO with ELBO estimates for the log-likelihoods, on pairs of a group's own
completions: every completion with every one that earned less.

    -log sigmoid(beta [(B - B_ref)(winner) - (B - B_ref)(loser)])

plus a small share of the winner's negative log-likelihood per token. The budget
is spent on mask counts with one mask each, the same for both policies: with
masks of their own the variance of the difference is a thousand times larger.
The log-sigmoid of a noisy number is biased, by no more than its variance.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import masks
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Vrpo(masks.Masks):
  """Settings of VRPO; defaults as published, except that pairs are a group's.

  Attributes:
    num_masks: K; each costs a pass of either policy.
    beta: of the preference.
    sft_weight: of the winner's negative log-likelihood per token.
  """

  num_masks: int = 8
  beta: float = 0.2
  sft_weight: float = 0.05

  is_sum_over_visits: ClassVar[bool] = False

  @property
  def has_reference(self) -> bool:
    return True

  @property
  def skips_zero_advantage(self) -> bool:
    return False  # of average reward, and still better than some

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch", "num_masks")
      + base.at_least(0, self, "sft_weight")
      + base.positive(self, "beta")
    )

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the rewards minus their mean, of which the order counts."""
    return advantage_lib.group_advantage(reward_NxG, "group_mean")

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """K masks of the tokens up to the first EOS, [U, B, K, 1]."""
    del advantage_B, batch_key
    num_rows = rollout.completion.shape[0]

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      is_content_C = masks.until_eos(row, sampling.eos_ids)
      is_masked_KxC, scale_K = masks.any_order(
        jax.random.fold_in(key, update), is_content_C, self.num_masks
      )
      return masks.visits(is_masked_KxC, 1.0 / num_rows, scale_K)

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
    """Returns the mean over a group's pairs; a mean over groups."""
    del behaviour, rows
    value_G = masks.value(policy, visits)
    gain_G = value_G - masks.value(policy.replace(logprob=reference), visits)
    # [winner, loser]
    is_pair_GxG = advantage_G[:, None] > advantage_G[None, :]
    num_pairs = jnp.maximum(is_pair_GxG.sum(), 1)
    margin_GxG = self.beta * (gain_G[:, None] - gain_G[None, :])
    preference = -jax.nn.log_sigmoid(margin_GxG)
    # The scale is content tokens over masked ones.
    num_masked = visits.is_masked.sum(axis=-1)
    num_tokens_G = (visits.scale * num_masked).sum(axis=(1, 2))
    sft_Gx1 = -self.sft_weight * (value_G / num_tokens_G)[:, None]
    loss = jnp.where(is_pair_GxG, preference + sft_Gx1, 0.0).sum() / num_pairs
    # Weights are of rows; a group's mean shall count as one of N.
    group_weight = masks.row_weight(visits)[0] * len(advantage_G)
    num = policy.is_factor.sum().astype(jnp.float32)
    return base.Terms.zeros().replace(
      loss=group_weight * loss, num_factors=num, ratio=num, kl=gain_G.sum()
    )
