"""UniGRPO, the objective of MMaDA (arXiv:2505.15809).

Tokens are scored where a random part of the completion is masked with them.
Over the optimizer updates of a rollout the mask ratios are equally spaced, the
first one random, so that each completion is seen nearly clean, nearly all
masked, and in between. Biased: a mean over masks is no likelihood.

The paper is the source, since its code is not released; two other
implementations are in use, and differ from it and from each other.
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
class UniGrpo(advantage_lib.Baseline, clip_lib.Clip, masks.Masks):
  """Settings of UniGRPO; the paper gives no values for clipping and KL.

  Attributes:
    updates_per_batch: mask ratios per completion, one for each update.
  """

  updates_per_batch: int = 5
  kl_coef: float = 0.04

  behaviour: ClassVar[Literal["scored"]] = "scored"

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch")
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
    """One mask [U, B, 1, 1] per completion and update.

    Tokens behind the first EOS are masked with the others, and not scored. The
    mean over a mask's tokens is part of the weight.
    """
    del advantage_B, batch_key
    num_rows, num_tokens = rollout.completion.shape

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      noise_key = jax.random.fold_in(key, update)
      noise_C = jax.random.uniform(noise_key, (num_tokens,))
      # The same in all updates, whose keys have the numbers below U.
      start_key = jax.random.fold_in(key, self.updates_per_batch)
      start = jax.random.uniform(start_key)
      is_content_C = masks.until_eos(row, sampling.eos_ids)
      num_content = is_content_C.sum()
      ratio = (start + update) / self.updates_per_batch
      num = jnp.clip(jnp.ceil(ratio * num_content), 1, num_content)
      is_target_C = masks.exactly(noise_C, is_content_C, num)
      is_masked_1xC = (is_target_C | ~is_content_C)[None]
      return masks.visits(is_masked_1xC, 1.0 / (num * num_rows))

    return masks.each(one, key_B, rollout, self.updates_per_batch), {}
