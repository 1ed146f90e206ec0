"""DMPO: towards the reward-tilted reference (arXiv:2510.08233).

The optimum of reward r under a KL penalty alpha is p_ref exp(r / alpha) / Z.
Completions are weighted by what it gives them relative to the policy that drew
them, in groups, and their denoising cross-entropy is minimised:

    g_i  = B_ref(o_i) - B_old(o_i)                     (ELBO estimates)
    w_i  = softmax(g + r / alpha)_i - s softmax(g - r / alpha)_i
    loss = sum_i w_i mean over masks of the mean over masked of -log p

Consistent for the model's any-order likelihood if g were exact; it is not.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import masks
from agrpo_jax.samplers import sampling as sampling_lib

CENTRINGS = ("negative", "mean", "none")


@dataclasses.dataclass(frozen=True)
class Dmpo(masks.Masks):
  """Settings of DMPO; defaults as published.

  Attributes:
    alpha: temperature of the tilt, in units of the reward.
    coefficient: multiplies what the softmax is taken of.
    num_masks: of the cross-entropy, in pairs with their complements.
    num_bound_masks: of the ELBO estimates, in pairs; the same ones for both
      policies, and in all updates of a rollout.
    min_ratio: masks are drawn with a ratio between it and 1.
    centring: what is subtracted from the weights: the `negative` softmax (the
      published default), their `mean`, or nothing.
    centring_strength: s.
  """

  updates_per_batch: int = 8
  alpha: float = 0.04
  coefficient: float = 1.0
  num_masks: int = 4
  num_bound_masks: int = 4
  min_ratio: float = 0.1
  centring: str = "negative"
  centring_strength: float = 1.0

  is_sum_over_visits: ClassVar[bool] = False
  behaviour: ClassVar[Literal["scored"]] = "scored"
  scores_padding: ClassVar[bool] = True

  @property
  def has_reference(self) -> bool:
    return True

  @property
  def skips_zero_advantage(self) -> bool:
    return False  # every completion of a group is in its softmax

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch")
      + base.positive(self, "alpha")
      + base.at_least(0, self, "centring_strength", "coefficient")
      + base.one_of(self, centring=CENTRINGS)
      + base.problems_of(
        self,
        min_ratio=(0 <= self.min_ratio < 1, "in [0, 1)"),
        **{
          name: (
            getattr(self, name) >= 2 and getattr(self, name) % 2 == 0,
            "even and positive: masks come with their complements",
          )
          for name in ("num_masks", "num_bound_masks")
        },
      )
    )

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the rewards minus their mean, over alpha, [N, G]."""
    return advantage_lib.group_advantage(reward_NxG, "group_mean") / self.alpha

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """The masks of the ELBO estimates, then those of the cross-entropy."""
    del advantage_B, batch_key, sampling
    num_rows, num_tokens = rollout.completion.shape

    def pairs(key: jax.Array, num: int, is_token_C: jax.Array) -> jax.Array:
      ratio_key, mask_key = jax.random.split(key)
      ratio = jax.random.uniform(
        ratio_key, (num // 2, 1), minval=self.min_ratio, maxval=1.0
      )
      is_masked = jax.random.bernoulli(mask_key, ratio, (num // 2, num_tokens))
      return jnp.concatenate([is_masked, ~is_masked]) & is_token_C[None]

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      is_token_C = masks.drawn(row)
      # The same in all updates, whose keys have the numbers below U.
      bound_key = jax.random.fold_in(key, self.updates_per_batch)
      bound_QxC = pairs(bound_key, self.num_bound_masks, is_token_C)
      own_key = jax.random.fold_in(key, update)
      own_QxC = pairs(own_key, self.num_masks, is_token_C)
      is_masked_QxC = jnp.concatenate([bound_QxC, own_QxC])
      scale_Q = jnp.concatenate(
        [
          jnp.full(len(bound_QxC), is_token_C.sum() / len(bound_QxC)),
          jnp.full(len(own_QxC), 1 / len(own_QxC)),
        ]
      ) / jnp.maximum(is_masked_QxC.sum(axis=1), 1)
      return masks.visits(is_masked_QxC, 1.0 / num_rows, scale_Q)

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
    """Returns the weighted cross-entropy of a group; a mean over groups."""
    del rows
    num = self.num_bound_masks

    def value(logprob: jax.Array, part: slice) -> jax.Array:
      return masks.value(
        jax.tree.map(lambda x: x[:, part], policy.replace(logprob=logprob)),
        jax.tree.map(lambda x: x[:, part], visits),
      )

    bound = slice(0, num)
    gap_G = value(reference, bound) - value(behaviour, bound)
    weight_G = jax.nn.softmax(self.coefficient * (gap_G + advantage_G))
    if self.centring != "none":
      centre_G = jax.nn.softmax(self.coefficient * (gap_G - advantage_G))
      if self.centring == "mean":
        centre_G = jnp.full_like(weight_G, weight_G.mean())
      weight_G -= self.centring_strength * centre_G
    own_G = value(policy.logprob, slice(num, None))
    # Weights are of rows; a group's sum shall count as one of N.
    group_weight = masks.row_weight(visits)[0] * len(weight_G)
    is_counted = policy.is_factor[:, num:].sum().astype(jnp.float32)
    return base.Terms.zeros().replace(
      loss=-group_weight * (weight_G * own_G).sum(),
      num_factors=is_counted,
      ratio=is_counted,
      kl=-gap_G.sum(),
    )
