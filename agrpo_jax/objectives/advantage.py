"""Advantages: a completion's reward against the rest of its group."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from agrpo_jax.objectives import base

BASELINES = ("leave_one_out", "group_mean")


@dataclasses.dataclass(frozen=True)
class Baseline:
  """The setting of objectives whose advantage is `group_advantage`.

  Attributes:
    baseline: one of `BASELINES`.
  """

  baseline: str = "group_mean"

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns the rewards minus their baseline, [N, G]."""
    return group_advantage(reward_NxG, self.baseline)


def problems(settings: Baseline) -> list[str]:
  """Returns what is wrong with the setting, a sentence."""
  return base.one_of(settings, baseline=BASELINES)


def group_advantage(reward_NxG: jax.Array, baseline: str) -> jax.Array:
  """Reward minus a baseline made of the group's rewards; no division by spread.

  `group_mean` is the paper's (arXiv:2510.04019): the mean over all G, own
  reward included, which shrinks every advantage by (G - 1) / G.
  `leave_one_out` is the mean over the other G - 1, independent of the own
  completion, so that the gradient stays unbiased: G / (G - 1) times the other.

  Args:
    reward_NxG: float [..., G], rewards of the completions of each prompt,
      G >= 2.
    baseline: one of `BASELINES`.

  Returns:
    float [..., G], zero throughout (exactly) where all of a group are equal.

  Raises:
    ValueError: unknown baseline, or fewer than two completions.
  """
  if baseline not in BASELINES:
    raise ValueError(f"{baseline=} is not one of {BASELINES}")
  advantage_NxG = _centred(reward_NxG)
  if baseline == "leave_one_out":
    group_size = reward_NxG.shape[-1]
    advantage_NxG *= group_size / (group_size - 1)
  return advantage_NxG


def standard_score(
  reward_NxG: jax.Array, correction: int, epsilon: float
) -> jax.Array:
  """(reward - mean) / (standard deviation + epsilon), group by group.

  Dividing by the spread makes the gradient biased: groups that nearly always
  succeed, or fail, count for more.

  Args:
    reward_NxG: float [..., G], G >= 2.
    correction: 0: the standard deviation of the group as it is; 1: the unbiased
      estimate.
    epsilon: what is added to it.

  Returns:
    float [..., G], zero throughout where all of a group are equal.

  Raises:
    ValueError: fewer than two completions.
  """
  centred_NxG = _centred(reward_NxG)
  spread_Nx1 = reward_NxG.std(axis=-1, ddof=correction, keepdims=True)
  # Without spread the quotient may be 0 / 0.
  has_spread = spread_Nx1 > 0
  return centred_NxG / (jnp.where(has_spread, spread_Nx1, 1.0) + epsilon)


def _centred(reward_NxG: jax.Array) -> jax.Array:
  chex.assert_type(reward_NxG, float)
  group_size = reward_NxG.shape[-1]
  if group_size < 2:
    raise ValueError(f"{group_size=}: an advantage needs two completions")
  # The mean of equal floats may differ from them in the last bit; a group
  # without spread must teach nothing at all.
  lowest, highest = (
    x(reward_NxG, axis=-1, keepdims=True) for x in (jnp.min, jnp.max)
  )
  mean_Nx1 = reward_NxG.mean(axis=-1, keepdims=True)
  return jnp.where(highest > lowest, reward_NxG - mean_Nx1, 0.0)
