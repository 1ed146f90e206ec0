"""Advantages: a completion's reward against the rest of its group."""

import chex
import jax
import jax.numpy as jnp

BASELINES = ("leave_one_out", "group_mean")


def group_advantage(reward_G: jax.Array, baseline: str) -> jax.Array:
  """Reward minus a baseline made of the group's rewards; no division by spread.

  `group_mean` is the paper's (arXiv:2510.04019): the mean over all G, own
  reward included, which shrinks every advantage by (G - 1) / G.
  `leave_one_out` is the mean over the other G - 1, independent of the own
  completion, so that the gradient stays unbiased: G / (G - 1) times the other.

  Args:
    reward_G: float [G], rewards of the completions of one prompt, G >= 2.
    baseline: one of `BASELINES`.

  Returns:
    float [G], zero throughout (exactly) when all rewards are equal.

  Raises:
    ValueError: unknown baseline, or fewer than two completions.
  """
  chex.assert_rank(reward_G, 1)
  chex.assert_type(reward_G, float)
  group_size = reward_G.shape[0]
  if baseline not in BASELINES:
    raise ValueError(f"{baseline=} is not one of {BASELINES}")
  if group_size < 2:
    raise ValueError(f"{group_size=}: an advantage needs two completions")
  # The mean of equal floats may differ from them in the last bit; a group
  # without spread must teach nothing at all.
  has_spread = reward_G.max() > reward_G.min()
  advantage_G = jnp.where(has_spread, reward_G - reward_G.mean(), 0.0)
  if baseline == "leave_one_out":
    advantage_G *= group_size / (group_size - 1)
  return advantage_G
