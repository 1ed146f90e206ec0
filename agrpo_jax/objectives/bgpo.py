"""BGPO: a bound of the objective that is a sum over masks (arXiv:2510.11683).

exp(B - B_old) of two ELBO estimates couples all masks of a completion, whose
activations then have to be held together. With d_k the difference that mask k
makes, times K,

    A >= 0:  (1 + d_k) A / K          A < 0:  exp(d_k) A / K

summed over masks is below A exp(mean of d_k), and equal to it, with its
gradient, where the policy is the behaviour policy. No clipping, and for A < 0
an exponential of a whole completion's log-ratio: few updates per rollout.
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


@dataclasses.dataclass(frozen=True)
class Bgpo(masks.Masks):
  """Settings of BGPO; defaults as published (32 masks for Sudoku).

  Published with a uniform mask ratio t, and 1 / t; here with exact counts n,
  uniform and stratified over a completion's masks, and C / n.

  Attributes:
    num_masks: K; each costs a pass.
  """

  num_masks: int = 16

  behaviour: ClassVar[Literal["scored"]] = "scored"
  scores_padding: ClassVar[bool] = True

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return base.at_least(1, self, "updates_per_batch", "num_masks")

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
    """K masks of exact counts, [U, B, K, 1]."""
    del advantage_B, batch_key, sampling
    num_rows = rollout.completion.shape[0]

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      is_masked_KxC, scale_K = masks.any_order(
        jax.random.fold_in(key, update), masks.drawn(row), self.num_masks
      )
      # Every mask is an estimate of its own.
      weight = 1.0 / (num_rows * self.num_masks)
      return masks.visits(is_masked_KxC, weight, scale_K * self.num_masks)

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
    """Returns the sum of the bounds, mask by mask."""
    del reference, rows
    log_ratio = jnp.where(policy.is_factor, policy.logprob - behaviour, 0.0)
    difference_GxQxS = visits.scale * log_ratio.sum(axis=-1)
    advantage_Gx1x1 = advantage_G[:, None, None]
    # Where it is not used the exponential must not overflow.
    is_negative = advantage_Gx1x1 < 0
    ratio = jnp.exp(jnp.where(is_negative, difference_GxQxS, 0.0))
    bound = jnp.where(is_negative, ratio, 1 + difference_GxQxS)
    is_counted = visits.weight > 0
    deviation = jnp.abs(bound - 1)
    return base.Terms.zeros().replace(
      loss=-(visits.weight * bound * advantage_Gx1x1).sum(),
      num_factors=is_counted.sum().astype(jnp.float32),
      ratio=jnp.where(is_counted, bound, 0.0).sum(),
      ratio_deviation=jnp.where(is_counted, deviation, 0.0).max(),
    )
