"""wd1: a weighted log-likelihood without policy ratios (arXiv:2507.08838).

The optimum of a reward under a reverse KL penalty reweights old completions by
exp(advantage). Maximising their weighted likelihood, and minimising that of
those with low rewards likewise, needs neither ratio nor reference:

    loss = sum_i (softmax(-A)_i - softmax(A)_i) sum_t log p(token t of i)

with the log-probabilities of diffu-GRPO, and A the rewards minus their mean.
For small A the weight is -2 A / G, REINFORCE; for large ones it saturates.
"""

import dataclasses

import jax

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import clip as clip_lib
from agrpo_jax.objectives import diffu_grpo
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Wd1(diffu_grpo.MeanField):
  """Settings of wd1; defaults as published.

  Its softmax is over a device's microbatch as published, which has to be one
  group; here it is over the group, and the loss is the mean over groups.

  Attributes:
    negative_weight: of the second softmax; 0 leaves it out, which did much
      worse where it was published.
  """

  negative_weight: float = 1.0

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return self.mask_problems() + base.at_least(0, self, "negative_weight")

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns (softmax(A) - softmax(-A)) / N of every group, [N, G]."""
    centred_NxG = advantage_lib.group_advantage(reward_NxG, "group_mean")
    negative_NxG = self.negative_weight * jax.nn.softmax(-centred_NxG)
    return (jax.nn.softmax(centred_NxG) - negative_NxG) / len(reward_NxG)

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Masks all of every completion."""
    del advantage_B, batch_key, sampling
    return self.visits_of(rollout, key_B, 1.0), {}

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns the weighted log-likelihood of every completion."""
    del behaviour, reference, rows
    return clip_lib.reinforce(policy, advantage_G, visits.weight)
