"""The records that learner and objective exchange."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Scores = Any
"""float32 array of factors, or None where an objective asks for none."""


class Visits(flax.struct.PyTreeNode):
  """Partial completions to visit; leading axes [..., Q, S] behind the rows.

  A completion has Q units, each of S states that lie in one block: what a
  policy computes once per block (`policies.base.Policy.open`) serves all of a
  unit. If they are several they are, in order and from its start, steps of one
  memory (`Sampling.steps_per_memory`). A plain policy shares nothing, and S is
  1.

  Attributes:
    is_masked: bool [..., C], the positions that hold [MASK].
    offset: int32 [..., W], completion positions whose logits are read.
    block: int32 [...], the block that the visit belongs to.
    denoise_step: int32 [...], the recorded denoising step that it rebuilds; for
      a mask of the objective's own it means nothing.
    weight: float32 [...], of the visit in the loss, with all denominators; it
      may be negative. A unit whose weights are all 0 is not run.
    scale: float32 [...], what multiplies a visit's log-probabilities where an
      objective makes one value of several visits, such as 1 / mask ratio; None
      where it makes none.
    is_prompt_masked: bool [..., P], positions of the prompt that hold [MASK],
      the same in all states of a unit; None where prompts are whole.
  """

  is_masked: jax.Array
  offset: jax.Array
  block: jax.Array
  denoise_step: jax.Array
  weight: jax.Array
  scale: Any = None
  is_prompt_masked: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Restarts:
  """Which states of a completion get a value, and how it is estimated.

  Attributes:
    blocks: the states in which these begin, ascending, none of them 0: the
      first state is that of the whole group, whose rewards tell its value.
    num: completions that are drawn anew from each.
  """

  blocks: tuple[int, ...]
  num: int


class Factors(flax.struct.PyTreeNode):
  """Log-probabilities that a visit reads.

  Attributes:
    logprob: float32 [..., F].
    is_factor: bool [..., F], which of them this visit has.
  """

  logprob: jax.Array
  is_factor: jax.Array


class Terms(flax.struct.PyTreeNode):
  """A loss and its metrics as sums, so that parts of a batch can be added up.

  Attributes:
    loss: float32.
    num_factors: float32, log-probabilities that entered.
    ratio: float32, sum of their policy ratios.
    ratio_deviation: float32, largest |policy ratio - 1|.
    clip_low, clip_high: float32, factors whose clipping stopped the gradient.
    kl: float32, sum of the KL estimates (0 without a reference).
  """

  loss: jax.Array
  num_factors: jax.Array
  ratio: jax.Array
  ratio_deviation: jax.Array
  clip_low: jax.Array
  clip_high: jax.Array
  kl: jax.Array

  def __add__(self, other: "Terms") -> "Terms":
    largest = jnp.maximum(self.ratio_deviation, other.ratio_deviation)
    total = jax.tree.map(jnp.add, self, other)
    return total.replace(ratio_deviation=largest)

  def total(self) -> "Terms":
    """Returns the terms of all entries of the leading axis in one."""
    total = jax.tree.map(lambda x: x.sum(axis=0), self)
    return total.replace(ratio_deviation=self.ratio_deviation.max())

  @classmethod
  def zeros(cls) -> "Terms":
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: jnp.zeros(()) for name in names})


def advantage_at(advantage_B: jax.Array, block_BxQ: jax.Array) -> jax.Array:
  """Returns float32 [B, Q], completions' advantages in some of their blocks.

  Args:
    advantage_B: float32 [B], or [B, num_blocks] where they differ by block.
    block_BxQ: int32.
  """
  if advantage_B.ndim == 1:
    return jnp.broadcast_to(advantage_B[:, None], block_BxQ.shape)
  return jnp.take_along_axis(advantage_B, block_BxQ, axis=1)


def stratified(key: jax.Array, num: int) -> jax.Array:
  """float32 [num] in [0, 1), each uniform: one in each of `num` equal slices.

  Shuffled, so that each by itself is uniform.
  """
  order_key, offset_key = jax.random.split(key)
  stratum = jax.random.permutation(order_key, num)
  return below_one((stratum + jax.random.uniform(offset_key, (num,))) / num)


def below_one(uniform: jax.Array) -> jax.Array:
  """Rounding lifts the last stratum's largest values to 1; not a uniform."""
  return jnp.minimum(uniform, 1 - jnp.finfo(jnp.float32).epsneg)


def executed(unmask_step_C: jax.Array, num_steps: int) -> jax.Array:
  """bool [K], the denoising steps of one completion that unmasked something."""
  # Dropped is K, which positions have that no step unmasked; -1, which those of
  # the prompt have, would be the last.
  none_K = jnp.zeros((num_steps,), bool)
  step_C = jnp.where(unmask_step_C < 0, num_steps, unmask_step_C)
  return none_K.at[step_C].set(True, mode="drop")


def problems_of(settings: object, **legal: tuple[bool, str]) -> list[str]:
  """Returns a sentence for each setting that is not fine.

  Args:
    settings: an objective's.
    **legal: by name, whether the value is fine, and what it must be.
  """
  return [
    f"{name}={getattr(settings, name)!r} must be {words}"
    for name, (is_fine, words) in legal.items()
    if not is_fine
  ]


def one_of(settings: object, **choices: Collection[str]) -> list[str]:
  """Returns a sentence for each setting that is none of its choices."""
  return problems_of(
    settings,
    **{
      name: (getattr(settings, name) in known, f"one of {', '.join(known)}")
      for name, known in choices.items()
    },
  )


def at_least(least: float, settings: object, *names: str) -> list[str]:
  """Returns a sentence for each setting that is smaller, or not finite."""
  return problems_of(
    settings,
    **{
      name: (
        least <= getattr(settings, name) < math.inf,
        f"at least {least} and finite",
      )
      for name in names
    },
  )


def positive(settings: object, *names: str) -> list[str]:
  """Returns a sentence for each setting that is not, or not finite."""
  return problems_of(
    settings,
    **{
      name: (0 < getattr(settings, name) < math.inf, "positive and finite")
      for name in names
    },
  )
