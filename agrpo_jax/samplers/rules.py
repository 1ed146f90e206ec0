"""Unmask rules: which positions a denoising step keeps, and how likely that is.

Everything here is about one block of one completion; callers `vmap`.

A denoising step draws a token at each masked position of the active block and
unmasks some of them; which, says the rule. What the rule looks at decides what
the likelihood of a step is made of:

  * nothing (`random`): positions are chosen before there are logits;
  * the distributions (`entropy`): least entropy first. In both cases the
    likelihood is the product over the tokens that were unmasked;
  * the drawn tokens (`confidence`, `threshold`): there is a further factor for
    every position that stayed masked: the probability that what was drawn
    there would not be unmasked. One formula holds for all such rules
    (`order_logprob`); they differ in the `Bar` alone.
"""

import dataclasses
from typing import ClassVar
from typing import Literal
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# Floor of a probability whose logarithm is taken: under a policy that has moved
# since the rollout, what happened may have become impossible.
_TINY = 1e-30


class Bar(NamedTuple):
  """The bar that a drawn token has to reach for its position to be unmasked.

  Attributes:
    level: float32 scalar, a log-probability: a confidence below it loses.
    last: int32 scalar: a confidence equal to it loses at the positions of the
      block after this one.
  """

  level: jax.Array
  last: jax.Array


@dataclasses.dataclass(frozen=True)
class UnmaskRule:
  """A rule with its settings; a new one is a subclass and a line in `RULES`.

  Attributes:
    looks_at: what the choice depends on.
    is_scheduled: whether a step unmasks as many positions as the schedule says
      (`sampling.step_counts`); else at least one and up to all of the block.
  """

  looks_at: ClassVar[Literal["nothing", "distributions", "draws"]]
  is_scheduled: ClassVar[bool] = True

  def score(self, confidence_T: jax.Array, entropy_T: jax.Array) -> jax.Array:
    """Returns float32 [T]: the greatest is unmasked first, ties by position.

    Args:
      confidence_T: float32, confidence of the token drawn at each position.
      entropy_T: float32, in nats, of the distribution it was drawn from.
    """
    raise TypeError(f"{self} does not look at draws or distributions")

  def choose(
    self,
    confidence_T: jax.Array,
    entropy_T: jax.Array,
    is_masked_T: jax.Array,
    count: jax.Array,
  ) -> jax.Array:
    """Returns bool [T], the masked positions that this step unmasks.

    Args:
      confidence_T: see `score`.
      entropy_T: see `score`.
      is_masked_T: bool, masked before this step.
      count: int32, how many positions the schedule unmasks.
    """
    score_T = self.score(confidence_T, entropy_T)
    return is_masked_T & (ranks(score_T, is_masked_T) < count)

  def bar(self, confidence_T: jax.Array, is_target_T: jax.Array) -> Bar:
    """Returns what the positions that stayed masked did not reach.

    Args:
      confidence_T: float32, confidence of the tokens that were unmasked; other
        positions are not read.
      is_target_T: bool, unmasked by this step.

    Raises:
      TypeError: the rule does not look at draws, so its order has no factor.
    """
    raise TypeError(f"{self} does not look at draws")


class Random(UnmaskRule):
  """Any masked position, each as likely; needs logits only where it unmasks."""

  looks_at = "nothing"


class Entropy(UnmaskRule):
  """Those whose distribution has the least entropy."""

  looks_at = "distributions"

  def score(self, confidence_T: jax.Array, entropy_T: jax.Array) -> jax.Array:
    del confidence_T
    return -entropy_T


class Confidence(UnmaskRule):
  """Those whose drawn token has the largest log-probability."""

  looks_at = "draws"

  def score(self, confidence_T: jax.Array, entropy_T: jax.Array) -> jax.Array:
    del entropy_T
    return confidence_T

  def bar(self, confidence_T: jax.Array, is_target_T: jax.Array) -> Bar:
    """The lowest confidence that was kept, and the last position with it."""
    lowest = jnp.where(is_target_T, confidence_T, jnp.inf).min()
    is_lowest_T = is_target_T & (confidence_T == lowest)
    position_T = jnp.arange(confidence_T.size)
    return Bar(lowest, jnp.where(is_lowest_T, position_T, -1).max())


@dataclasses.dataclass(frozen=True)
class Threshold(Confidence):
  """All as probable as a threshold, and the most confident one in any case.

  Fast-dLLM's parallel decoding (arXiv:2505.22618).

  Attributes:
    threshold: probability in (0, 1].
  """

  is_scheduled = False
  threshold: float

  def choose(
    self,
    confidence_T: jax.Array,
    entropy_T: jax.Array,
    is_masked_T: jax.Array,
    count: jax.Array,
  ) -> jax.Array:
    is_first_T = super().choose(
      confidence_T, entropy_T, is_masked_T, jnp.ones_like(count)
    )
    is_sure_T = confidence_T >= jnp.log(self.threshold)
    return is_first_T | (is_masked_T & is_sure_T)

  def bar(self, confidence_T: jax.Array, is_target_T: jax.Array) -> Bar:
    """The threshold, unless what was kept is below it: then that."""
    lowest = super().bar(confidence_T, is_target_T)
    level = jnp.log(self.threshold)
    is_below = lowest.level < level
    # One that equals the threshold would have been unmasked: no position is
    # after the block's end.
    return Bar(
      jnp.where(is_below, lowest.level, level),
      jnp.where(is_below, lowest.last, confidence_T.size),
    )


def ranks(score_T: jax.Array, is_masked_T: jax.Array) -> jax.Array:
  """Returns int32 [T], each position's rank in the order of unmasking, from 0.

  The masked positions come first, by descending score, ties by position.
  """
  order_T = jnp.argsort(
    jnp.where(is_masked_T, score_T, -jnp.inf), descending=True, stable=True
  )
  # A score of minus infinity must not put a masked position behind another
  # that is not masked, so the two sort keys are kept apart.
  order_T = order_T[jnp.argsort(~is_masked_T[order_T], stable=True)]
  rank_T = jnp.arange(score_T.shape[0], dtype=jnp.int32)
  return jnp.zeros_like(rank_T).at[order_T].set(rank_T)


def order_logprob(
  logprob_TxS: jax.Array,
  confidence_TxS: jax.Array,
  bar: Bar,
  is_other_T: jax.Array,
) -> jax.Array:
  """Log-probability that nothing else of the block reached the bar.

  A position j that stayed masked must have drawn a token that loses, which has
  probability

    F_j(bar) = sum_v pi_j(v) 1[conf_j(v) < bar]

  and the draws are independent, so the result is sum_j log F_j(bar). The
  product of the targets' probabilities and of these is the exact likelihood of
  the step. The indicators are piecewise constant in the parameters and carry no
  gradient. Equal confidences count by position, the rule of `ranks`.

  Args:
    logprob_TxS: float32 [T, S], log pi of the candidates at each position.
    confidence_TxS: float32 [T, S], what they rank by.
    bar: what a draw must reach to be unmasked.
    is_other_T: bool [T], masked before this step and after it.

  Returns:
    A float32 scalar <= 0.
  """
  chex.assert_equal_shape([logprob_TxS, confidence_TxS])
  position_T = jnp.arange(is_other_T.shape[0])
  loses_TxS = (confidence_TxS < bar.level) | (
    (confidence_TxS == bar.level) & (position_T > bar.last)[:, None]
  )
  prob_TxS = jnp.where(
    jax.lax.stop_gradient(loses_TxS), jnp.exp(logprob_TxS), 0.0
  )
  # Rounding may lift the sum of a whole distribution above 1.
  prob_T = jnp.clip(prob_TxS.sum(axis=1), _TINY, 1.0)
  return jnp.where(is_other_T, jnp.log(prob_T), 0.0).sum()
