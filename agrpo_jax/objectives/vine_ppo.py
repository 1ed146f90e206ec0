"""VinePPO (arXiv:2410.01679): values of states by drawing on from them.

The sampler goes block by block. State s_b is what a completion is where block b
begins, and V(s_b) the reward that is to be expected from there. An estimate of
it is the mean reward of completions that the same sampler draws anew from s_b:
since they are independent of what this completion went on with, the gradient
stays unbiased, however few they are. With states e_0 = 0 < e_1 < ... < e_V that
have a value, and the reward R as the value of the end, the steps of the blocks
from e_j to e_(j+1) have the advantage

  V(s_e_(j+1)) - V(s_e_j)    target `next_value`, as published, or
  R            - V(s_e_j)    target `reward`

The first tells just what these steps changed, at the price of a second estimate
with its own noise. The second is that of AGRPO with a baseline that knows more.

V(s_0) costs nothing: the mean reward of the rest of the group. A completion
that ended early has its reward for the value of every state behind its end.

All groups are drawn on, also those whose completions had equal rewards: leaving
them out would select by the reward, which biases the gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import base
from agrpo_jax.samplers import sampling as sampling_lib

TARGETS = ("next_value", "reward")


@dataclasses.dataclass(frozen=True)
class VinePpo(agrpo.Agrpo):
  """Settings of VinePPO: those of AGRPO, and of the values.

  Attributes:
    num_restarts: completions drawn anew from each state that gets a value; 9 as
      published.
    num_states: states of a completion that get a value, besides its first;
      spread evenly over the blocks. 0: all, where a block begins.
    target: `next_value` or `reward`, see the head of the file.
  """

  num_restarts: int = 9
  num_states: int = 0
  target: str = "next_value"

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    found = super().problems(sampling)
    found += base.at_least(1, self, "num_restarts")
    found += base.one_of(self, target=TARGETS)
    if sampling_lib.problems(sampling):
      return found  # how many blocks there are is told by legal settings only
    most = sampling.num_blocks - 1
    if most < 1:
      found.append(
        f"num_states={self.num_states!r} finds none: values are those of "
        f"states where a later block begins, and block_length="
        f"{sampling.block_length} is the whole completion; lower "
        "config.rollout.block_length"
      )
    elif not 0 <= self.num_states <= most:
      found.append(
        f"num_states={self.num_states!r} must be from 1 to {most}, one less "
        f"than the {sampling.num_blocks} blocks of a completion, or 0 for all"
      )
    return found

  def restarts(self, sampling: sampling_lib.Sampling) -> base.Restarts:
    """Returns the blocks before which a state has a value."""
    num_blocks = sampling.num_blocks
    num = self.num_states or num_blocks - 1
    return base.Restarts(
      blocks=tuple(num_blocks * (i + 1) // (num + 1) for i in range(num)),
      num=self.num_restarts,
    )

  def block_advantage(
    self,
    reward_NxG: jax.Array,
    value_NxGxV: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> jax.Array:
    """Returns float32 [N, G, num_blocks]; see `objective.Valued`."""
    first_NxG = reward_NxG - self.advantage(reward_NxG)
    before = jnp.concatenate([first_NxG[..., None], value_NxGxV], axis=-1)
    after = reward_NxG[..., None]
    if self.target == "next_value":
      after = jnp.concatenate([value_NxGxV, after], axis=-1)
    # A block's steps begin at the last state with a value that is not behind.
    state_of_block = np.searchsorted(
      self.restarts(sampling).blocks,
      np.arange(sampling.num_blocks),
      side="right",
    )
    return (after - before)[..., state_of_block]
