"""DiFFPO's two-times surrogate (arXiv:2510.02212).

A denoising step is drawn per completion. Tokens unmasked before it are scored
from the prompt alone, the others from the partial completion as it then stood:
two passes, closer to the sampler than one mean field. The policy ratio is of
this surrogate; what separates the surrogate from the sampler's own record is
undone by a truncated weight.

No code is public, and details are ours: the step is uniform over the executed
ones, and the weight is a token's. The paper trains a threshold too, which here
is an unmask rule's business (`soft_threshold`, with `step_price`).
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
class Diffpo(advantage_lib.Baseline, clip_lib.Clip, masks.Masks):
  """Settings of the two-times surrogate.

  Attributes:
    max_weight: at which surrogate over recorded probability is truncated.
  """

  max_weight: float = 2.0

  behaviour: ClassVar[Literal["scored"]] = "scored"
  scores_padding: ClassVar[bool] = True

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch")
      + base.problems_of(self, max_weight=(self.max_weight > 0, "positive"))
      + clip_lib.problems(self)
      + advantage_lib.problems(self)
    )

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """All masked, and the state before a drawn step: [U, B, 2, 1]."""
    del advantage_B, batch_key
    num_rows, num_steps = rollout.completion.shape[0], sampling.max_steps

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      # Drawn among steps: among positions, steps that unmask more would be
      # likelier.
      is_executed_K = base.executed(row.unmask_step, num_steps)
      denoise_step = jax.random.categorical(
        jax.random.fold_in(key, update), jnp.where(is_executed_K, 0.0, -jnp.inf)
      )
      is_late_C = row.unmask_step >= denoise_step
      is_early_C = masks.drawn(row) & ~is_late_C
      num_unmasked = jnp.maximum(
        (masks.drawn(row) & (row.unmask_step < num_steps)).sum(), 1
      )
      # Without an early token there is nothing to score from the prompt alone.
      weight_2 = jnp.stack([is_early_C.any(), jnp.bool_(True)])
      visits = masks.visits(
        jnp.stack([jnp.ones_like(is_late_C), is_late_C]),
        weight_2 / (num_rows * num_unmasked),
      )
      steps_2 = jnp.broadcast_to(denoise_step.astype(jnp.int32), (2,))
      return visits.replace(denoise_step=steps_2)

    return masks.each(one, key_B, rollout, self.updates_per_batch), {}

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Returns a factor per unmasked token that this visit is to score."""
    factors = super().score(logits_WxV, row, visit, sampling, top_k)
    is_early_C = masks.drawn(row) & (row.unmask_step < visit.denoise_step)
    # Early tokens are masked in the first visit only, and are scored there.
    is_mine_C = jnp.where(
      (visit.is_masked & is_early_C).any(), is_early_C, ~is_early_C
    ) & (row.unmask_step < sampling.max_steps)
    return factors.replace(is_factor=factors.is_factor & is_mine_C)

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns the surrogate of every token, weighted by its record."""
    recorded = jnp.broadcast_to(rows.logprob[:, None, None], behaviour.shape)
    log_weight = jnp.where(policy.is_factor, behaviour - recorded, 0.0)
    weight = jnp.minimum(jnp.exp(log_weight), self.max_weight)
    weight *= visits.weight[..., None]
    advantage = jnp.broadcast_to(
      advantage_G[:, None, None, None], behaviour.shape
    )

    def flat(x: jax.Array) -> jax.Array:
      return x.reshape(-1, 1)  # every token is a summand with its own weight

    return clip_lib.surrogates(
      jax.tree.map(flat, policy),
      flat(behaviour),
      None if reference is None else flat(reference),
      advantage.reshape(-1),
      weight.reshape(-1),
      self,
    )
