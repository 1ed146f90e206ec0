"""ESPO: a completion is one action, scored by an ELBO (arXiv:2512.03759).

With n of C positions masked, n uniform over 0..C, and once more with the others
masked instead,

    B = mean over masks and complements of (C + 1) / n sum over masked log p

is an unbiased estimate of the any-order lower bound, as either half would be,
with more variance. The policy ratio is exp((B - B_old) / C).
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
class Espo(advantage_lib.Baseline, clip_lib.Clip, masks.Masks):
  """Settings of ESPO; defaults as published for GSM8K.

  Published with counts stratified over a microbatch, here over a completion's
  own masks. For Countdown the published range of the ratio is a point, which
  is no clipping: use a small one.

  Attributes:
    kl_coef: of (B - B_ref)^2 / (2 C), whose gradient is that of the KL.
    num_masks: M; each costs two passes.
  """

  updates_per_batch: int = 8
  kl_coef: float = 1e-3
  num_masks: int = 2
  baseline: str = "leave_one_out"

  is_sum_over_visits: ClassVar[bool] = False
  behaviour: ClassVar[Literal["scored"]] = "scored"
  scores_padding: ClassVar[bool] = True

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch", "num_masks")
      + clip_lib.problems(self)
      + advantage_lib.problems(self)
      # Of another estimator nothing would come of it.
      + base.problems_of(
        self,
        kl_estimator=(self.kl_estimator == "k3", "left at k3: see kl_coef"),
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
    """Masks and complements, [U, B, 2 M, 1]."""
    del advantage_B, batch_key, sampling
    num_rows, max_tokens = rollout.completion.shape

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      is_token_C = masks.drawn(row)
      num_tokens = is_token_C.sum()
      count_key, noise_key = jax.random.split(jax.random.fold_in(key, update))
      uniform_M = base.stratified(count_key, self.num_masks)
      count_M = jnp.floor(uniform_M * (num_tokens + 1))
      noise_MxC = jax.random.uniform(noise_key, (self.num_masks, max_tokens))
      is_masked_MxC = jax.vmap(masks.exactly, (0, None, 0))(
        noise_MxC, is_token_C, count_M
      )
      is_masked_QxC = jnp.concatenate([is_masked_MxC, ~is_masked_MxC])
      count_Q = jnp.concatenate([count_M, num_tokens - count_M])
      scale_Q = (num_tokens + 1) / jnp.maximum(count_Q, 1) / len(count_Q)
      weight_Q = jnp.where(count_Q > 0, 1.0 / num_rows, 0.0)
      return masks.visits(is_masked_QxC, weight_Q, scale_Q)

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
    """Returns the clipped surrogate of every completion, with the penalty."""
    return clip_lib.of_values(
      policy,
      behaviour,
      reference,
      advantage_G,
      visits,
      rows,
      self,
      kl=lambda value, reference, num: (value - reference) ** 2 / (2 * num),
    )
