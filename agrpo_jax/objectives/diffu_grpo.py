"""diffu-GRPO, the objective of d1 (arXiv:2504.12216).

Every token is scored where the whole completion is masked, and some of the
prompt: the marginals of the first denoising step stand for those of all steps.
One pass per completion; the bias is that of a product of marginals, and more
draws do not shrink it.
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
class MeanField(masks.Masks):
  """Visits of diffu-GRPO and wd1: all masked, and some of the prompt.

  Attributes:
    prompt_mask_ratio: the probability with which a prompt token is masked.
    updates_per_batch: as published for GSM8K; 8 for Countdown and Sudoku.
  """

  prompt_mask_ratio: float = 0.15
  updates_per_batch: int = 12

  def mask_problems(self) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    ratio = self.prompt_mask_ratio
    return base.at_least(1, self, "updates_per_batch") + base.problems_of(
      self, prompt_mask_ratio=(0 <= ratio < 1, "in [0, 1)")
    )

  def visits_of(
    self, rollout: types.Rollout, key_B: jax.Array, weight: jax.Array | float
  ) -> base.Visits:
    """One visit [U, B, 1, 1] per completion and update, all of one weight."""

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      is_masked_1xC = jnp.ones((1, row.completion.shape[0]), bool)
      is_prompt_masked_1xP = jax.random.bernoulli(
        jax.random.fold_in(key, update),
        self.prompt_mask_ratio,
        (1, row.prompt.shape[0]),
      )
      return masks.visits(
        is_masked_1xC, weight, is_prompt_masked_QxP=is_prompt_masked_1xP
      )

    return masks.each(one, key_B, rollout, self.updates_per_batch)


@dataclasses.dataclass(frozen=True)
class DiffuGrpo(advantage_lib.Baseline, clip_lib.Clip, MeanField):
  """Settings of diffu-GRPO; defaults as published for GSM8K.

  Its mean over tokens is over a microbatch as published, here over the batch.

  Attributes:
  """

  clip_low: float = 0.5
  clip_high: float = 0.5
  kl_coef: float = 0.04

  behaviour: ClassVar[Literal["scored"]] = "scored"

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      self.mask_problems()
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
    """Masks all of every completion, weighted for a mean over tokens."""
    del advantage_B, batch_key
    num_tokens = masks.until_eos(rollout, sampling.eos_ids).sum()
    return self.visits_of(rollout, key_B, 1.0 / num_tokens), {}
