"""TBRM: the squared Bellman residual of whole trajectories (arXiv:2505.15311).

The optimum under a KL penalty beta satisfies, for every completion of a prompt,

    beta log(policy / reference)(completion) = reward - V(prompt)

so the residual is squared and minimised, off-policy as well, without ratios or
clipping. The log-ratio is a sum over all recorded denoising steps, since the
square of a drawn sum is biased. Where the paper reads V off the first token's
logits, a mask model has no such; V is what fits a group best, its mean.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import replay
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Tbrm(replay.Replay):
  """Settings of TBRM.

  Attributes:
    likelihood: of a step, with the choice of positions by default.
    beta: weight of the KL penalty, in units of the reward per nat.
  """

  likelihood: str = "exact"
  beta: float = 0.01

  is_sum_over_visits: ClassVar[bool] = False
  behaviour: ClassVar[Literal["none"]] = "none"

  @property
  def has_reference(self) -> bool:
    return True

  @property
  def skips_zero_advantage(self) -> bool:
    return False  # the reward may be average, and the residual not

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    return self.step_problems(sampling) + base.positive(self, "beta")

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the rewards minus their mean, [N, G]."""
    return advantage_lib.group_advantage(reward_NxG, "group_mean")

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns half the squared residuals, a mean over completions."""
    del behaviour, rows
    is_read = policy.is_factor & (visits.weight > 0)[..., None]
    log_ratio = jnp.where(is_read, policy.logprob - reference, 0.0)
    log_ratio_G = log_ratio.sum(axis=(1, 2, 3))
    residual_G = self.beta * (log_ratio_G - log_ratio_G.mean()) - advantage_G
    weight = visits.weight.max()  # 1 / B, in every visit there is
    num = is_read.sum().astype(jnp.float32)
    return base.Terms.zeros().replace(
      loss=weight * (residual_G**2).sum() / 2,
      num_factors=num,
      ratio=num,
      kl=log_ratio_G.sum(),
    )
