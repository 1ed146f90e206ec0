"""SPG: a lower bound is pushed up, an upper bound down (arXiv:2510.09541).

Minimising a lower bound of a bad completion's likelihood need not lower the
likelihood. With K masks of a completion with Le tokens (up to its EOS),

    A > 0:   l = mean_k mean over masked of log p
    A <= 0:  l = omega U + (1 - omega) (the same),
             U = 1/beta mean_i log( 1/K sum_k [i in k] p_i^beta Le / n_k )

    loss = -sum A Le l / sum Le

U estimates an upper bound, itself with bias (a log of a mean). Masks are those
that a block-wise sampler meets: a block in part, all that follows it whole.
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

MASK_RULES = ("block_random", "random")


@dataclasses.dataclass(frozen=True)
class Spg(masks.Masks):
  """Settings of SPG; defaults as published for GSM8K, the mixture.

  Attributes:
    num_masks: K; each costs a pass.
    upper_weight: omega; 0 is the lower bound alone, 1 the upper one.
    upper_power: beta, at least 1; published between 1 and 2, task by task.
    mask_rule: `block_random`: a block of the sampler in part, those behind it
      whole; `random`: part of all tokens.
    prompt_mask_ratio: the probability with which a token of the prompt, or of
      blocks before the chosen one, is masked.
  """

  updates_per_batch: int = 4
  num_masks: int = 2
  upper_weight: float = 0.5
  upper_power: float = 1.5
  mask_rule: str = "block_random"
  prompt_mask_ratio: float = 0.15

  is_sum_over_visits: ClassVar[bool] = False

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    ratio, upper = self.prompt_mask_ratio, self.upper_weight
    return (
      base.at_least(1, self, "updates_per_batch", "num_masks", "upper_power")
      + base.one_of(self, mask_rule=MASK_RULES)
      + base.problems_of(
        self,
        prompt_mask_ratio=(0 <= ratio < 1, "in [0, 1)"),
        upper_weight=(0 <= upper <= 1, "in [0, 1]"),
      )
    )

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the rewards minus their mean, [N, G]."""
    return advantage_lib.group_advantage(reward_NxG, "group_mean")

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """K masks, [U, B, K, 1], with scale Le / n."""
    del advantage_B, batch_key
    is_content_BxC = masks.until_eos(rollout, sampling.eos_ids)
    total = is_content_BxC.sum()

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      key = jax.random.fold_in(key, update)
      prompt_key, block_key, mask_key = jax.random.split(key, 3)
      is_content_C = masks.until_eos(row, sampling.eos_ids)
      length = is_content_C.sum()
      end = jnp.where(is_content_C, 1 + jnp.arange(len(is_content_C)), 0).max()
      is_masked_KxC = jax.vmap(
        lambda key, block: self._mask(key, block, is_content_C, sampling)
      )(
        jax.random.split(mask_key, self.num_masks),
        self._blocks(block_key, end, sampling),
      )
      is_prompt_masked_KxP = jax.random.bernoulli(
        prompt_key, self.prompt_mask_ratio, (self.num_masks, len(row.prompt))
      )
      num_scored_K = (is_masked_KxC & is_content_C[None]).sum(axis=1)
      return masks.visits(
        is_masked_KxC,
        length / total,
        length / num_scored_K,
        is_prompt_masked_KxP,
      )

    return masks.each(one, key_B, rollout, self.updates_per_batch), {}

  def _blocks(
    self, key: jax.Array, end: jax.Array, sampling: sampling_lib.Sampling
  ) -> jax.Array:
    """int32 [K], blocks with tokens, all different while there are so many."""
    num_blocks = -(-end // sampling.block_length)
    noise = jax.random.uniform(key, (sampling.num_blocks,))
    has_tokens = jnp.arange(sampling.num_blocks) < num_blocks
    order = jnp.argsort(jnp.where(has_tokens, noise, 2.0))
    return order[jnp.arange(self.num_masks) % num_blocks]

  def _mask(
    self,
    key: jax.Array,
    block: jax.Array,
    is_content_C: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> jax.Array:
    """bool [C]: some of the block's tokens, and all that follows it."""
    count_key, noise_key, early_key = jax.random.split(key, 3)
    block_C = jnp.arange(len(is_content_C)) // sampling.block_length
    if self.mask_rule == "random":
      block_C = jnp.full_like(block_C, block)
    is_mine_C = is_content_C & (block_C == block)
    num = jax.random.randint(count_key, (), 1, is_mine_C.sum() + 1)
    noise_C = jax.random.uniform(noise_key, block_C.shape)
    is_early_C = jax.random.bernoulli(
      early_key, self.prompt_mask_ratio, block_C.shape
    ) & (block_C < block)
    is_masked_C = masks.exactly(noise_C, is_mine_C, num) | is_early_C
    return is_masked_C | (block_C > block) | ~is_content_C

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns -A Le l / sum Le, summed over completions."""
    del behaviour, reference, rows
    is_factor = policy.is_factor
    logprob = jnp.where(is_factor, policy.logprob, 0.0)
    num_GxQxS = jnp.maximum(is_factor.sum(axis=-1), 1)
    lower_G = (logprob.sum(axis=-1) / num_GxQxS).mean(axis=(1, 2))
    # log of the mean over masks, of those that mask the token
    power = self.upper_power * logprob + jnp.log(visits.scale)[..., None]
    is_read_GxC = is_factor.any(axis=(1, 2))
    sum_GxC = jax.nn.logsumexp(power, axis=(1, 2), where=is_factor)
    log_mean_GxC = jnp.where(
      is_read_GxC, sum_GxC - jnp.log(self.num_masks), 0.0
    )
    num_read_G = jnp.maximum(is_read_GxC.sum(axis=1), 1)
    upper_G = log_mean_GxC.sum(axis=1) / num_read_G / self.upper_power
    mixed_G = self.upper_weight * upper_G + (1 - self.upper_weight) * lower_G
    bound_G = jnp.where(advantage_G > 0, lower_G, mixed_G)
    num = is_factor.sum().astype(jnp.float32)
    return base.Terms.zeros().replace(
      loss=-(advantage_G * masks.row_weight(visits) * bound_G).sum(),
      num_factors=num,
      ratio=num,
    )
