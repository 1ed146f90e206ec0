"""Unmask rules: which positions a denoising step keeps, and how likely that is.

Everything here is about one block of one completion; callers `vmap`.

A denoising step draws a token at each masked position of the active block and
unmasks some of them; which, says the rule. What the rule looks at decides what
the likelihood of a step is made of:

  * nothing (`random`, `sequential`, `origin`): they are chosen before there
    are logits;
  * the distributions (`entropy`, `margin`, `entropy_bounded`): in both cases
    the likelihood is the product over the tokens that were unmasked;
  * the drawn tokens (`confidence`, `threshold`, `dynamic`, `factor`): there is
    a further factor for every position that stayed masked: the probability that
    what was drawn there would not be unmasked. One formula holds for all such
    rules (`UnmaskRule.order_logprob`); they differ in the `Bar` alone;
  * the drawn tokens and chance (`soft_threshold`): the formula is its own, and
    has a gradient where a bar has a jump.

Sampler and objective ask the same method how likely a choice is.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar
from typing import Literal
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# Floor of a probability whose logarithm is taken: under a policy that has moved
# since the rollout, what happened may have become impossible.
_TINY = 1e-30
# Log-odds between which a soft threshold tells confidences apart; a threshold
# of 1, and a token that truncation cuts, have infinite ones.
_LEAST, _MOST = -1e4, 9.21024  # that of 1 - 1e-4


class Seen(NamedTuple):
  """What a denoising step sees of its block.

  Attributes:
    is_masked: bool [T], masked before the step, and a candidate
      (`candidates`).
    logprob: float32 [T, S], log pi of the candidates at each position, minus
      infinity where truncation cut them.
    confidence: float32 [T, S], what each candidate ranks by if it is drawn:
      `log_odds`.
    drawn: float32 [T], the confidence of the token that was drawn. When a
      record is scored it is known of the tokens that were unmasked, and means
      nothing at other positions.
    entropy: float32 [T], in nats, of the distributions.
  """

  is_masked: jax.Array
  logprob: jax.Array
  confidence: jax.Array
  drawn: jax.Array
  entropy: jax.Array


class Chance(NamedTuple):
  """What a rule may draw of its own, besides the tokens.

  Attributes:
    passes: float32 [T], uniform in [0, 1).
    fallback: float32 [T], standard Gumbel.
  """

  passes: jax.Array
  fallback: jax.Array


class Bar(NamedTuple):
  """The bar that a drawn token has to reach for its position to be unmasked.

  Attributes:
    level: float32 scalar, log-odds: a confidence below it loses.
    last: int32 scalar: a confidence equal to it loses at the positions of the
      block after this one.
  """

  level: jax.Array
  last: jax.Array

  def loses(self, confidence: jax.Array, position: jax.Array) -> jax.Array:
    """Returns bool, where a confidence at a position does not reach the bar."""
    return (confidence < self.level) | (
      (confidence == self.level) & (position > self.last)
    )


def lower(one: Bar, other: Bar) -> Bar:
  """Returns the bar that what loses at both has not reached."""
  is_one = (one.level < other.level) | (
    (one.level == other.level) & (one.last > other.last)
  )
  return Bar(
    jnp.where(is_one, one.level, other.level),
    jnp.where(is_one, one.last, other.last),
  )


@dataclasses.dataclass(frozen=True)
class UnmaskRule:
  """A rule with its settings; a new one is a subclass and a line in `RULES`.

  Its fields are settings of `Sampling` with the same names.

  Attributes:
    looks_at: what the choice depends on.
    schedule: how many positions a step unmasks: `exact`: as many as the
      schedule says (`sampling.step_counts`); `share`: each position with the
      chance that it says (`sampling.step_shares`); `least`: at least as many;
      `none`: at least one. At most all of the block.
    has_chance: whether it draws something besides the tokens.
  """

  looks_at: ClassVar[Literal["nothing", "distributions", "draws"]]
  schedule: ClassVar[Literal["exact", "share", "least", "none"]] = "exact"
  has_chance: ClassVar[bool] = False

  def score(self, seen: Seen) -> jax.Array:
    """Returns float32 [T]: the greatest is unmasked first, ties by position."""
    raise TypeError(f"{self} does not look at draws or distributions")

  def choose_before(
    self, order_T: jax.Array, is_masked_T: jax.Array, amount: jax.Array
  ) -> jax.Array:
    """Returns bool [T], what a rule that looks at nothing unmasks.

    Args:
      order_T: float32, uniform in [0, 1).
      is_masked_T: bool, masked before the step.
      amount: what the schedule says, see `schedule`.
    """
    raise TypeError(f"{self} looks at draws or distributions")

  def choose(
    self, seen: Seen, count: jax.Array, chance: Callable[[], Chance]
  ) -> jax.Array:
    """Returns bool [T], the masked positions that this step unmasks.

    Args:
      seen: of the block, with what was drawn.
      count: int32, how many positions the schedule unmasks; 1 without one.
      chance: draws what a rule that `has_chance` draws of its own.
    """
    del chance
    rank_T = ranks(self.score(seen), seen.is_masked)
    return seen.is_masked & (rank_T < count)

  def bar(self, seen: Seen, is_target_T: jax.Array) -> Bar:
    """Returns what the positions that stayed masked did not reach.

    Args:
      seen: of the block; of `drawn`, what was unmasked is read.
      is_target_T: bool, unmasked by this step.

    Raises:
      TypeError: the rule does not look at draws, so its order has no factor.
    """
    raise TypeError(f"{self} does not look at draws")

  def order_logprob(self, seen: Seen, is_target_T: jax.Array) -> jax.Array:
    """Log-probability that just these were unmasked, given their tokens.

    A position j that stayed masked must have drawn a token that loses, which
    has probability

      F_j(bar) = sum_v pi_j(v) 1[conf_j(v) < bar]

    and the draws are independent, so the result is sum_j log F_j(bar). The
    product of the targets' probabilities and of these is the exact likelihood
    of the step. The indicators are piecewise constant in the parameters and
    carry no gradient. Equal confidences count by position, as `ranks` has it.

    Args:
      seen: see `bar`.
      is_target_T: bool, unmasked by this step.

    Returns:
      A float32 scalar, 0 where nothing was masked.
    """
    chex.assert_equal_shape([seen.logprob, seen.confidence])
    position_T = jnp.arange(is_target_T.shape[0])
    loses_TxS = self.bar(seen, is_target_T).loses(
      seen.confidence, position_T[:, None]
    )
    prob_TxS = jnp.where(
      jax.lax.stop_gradient(loses_TxS), jnp.exp(seen.logprob), 0.0
    )
    # Rounding may lift the sum of a whole distribution above 1.
    prob_T = jnp.clip(prob_TxS.sum(axis=1), _TINY, 1.0)
    is_other_T = seen.is_masked & ~is_target_T
    return jnp.where(is_other_T, jnp.log(prob_T), 0.0).sum()


class Random(UnmaskRule):
  """Any masked position, each as likely; needs logits only where it unmasks."""

  looks_at = "nothing"
  has_chance = True

  def choose_before(
    self, order_T: jax.Array, is_masked_T: jax.Array, amount: jax.Array
  ) -> jax.Array:
    return is_masked_T & (ranks(order_T, is_masked_T) < amount)


class Sequential(UnmaskRule):
  """From left to right (SDAR, arXiv:2510.06303)."""

  looks_at = "nothing"

  def choose_before(
    self, order_T: jax.Array, is_masked_T: jax.Array, amount: jax.Array
  ) -> jax.Array:
    del order_T
    return is_masked_T & (jnp.cumsum(is_masked_T) <= amount)


class Origin(UnmaskRule):
  """Each masked position by itself, by chance alone: Dream's `origin`.

  A step may unmask none; what is left goes in the block's last.
  """

  looks_at = "nothing"
  schedule = "share"
  has_chance = True

  def choose_before(
    self, order_T: jax.Array, is_masked_T: jax.Array, amount: jax.Array
  ) -> jax.Array:
    return is_masked_T & (order_T < amount)


class Entropy(UnmaskRule):
  """Those whose distribution has the least entropy."""

  looks_at = "distributions"

  def score(self, seen: Seen) -> jax.Array:
    return -seen.entropy


class Margin(UnmaskRule):
  """Those whose two most probable tokens differ most in probability."""

  looks_at = "distributions"

  def score(self, seen: Seen) -> jax.Array:
    first_T = seen.logprob.max(axis=1)
    # Without a sort: of a split vocabulary no device has all.
    first_id_T = seen.logprob.argmax(axis=1)
    candidate_S = jnp.arange(seen.logprob.shape[1])
    is_first_TxS = candidate_S[None, :] == first_id_T[:, None]
    second_T = jnp.where(is_first_TxS, -jnp.inf, seen.logprob).max(axis=1)
    return jnp.exp(first_T) - jnp.exp(second_T)


@dataclasses.dataclass(frozen=True)
class EntropyBounded(Entropy):
  """As many, least entropy first, as have little entropy together.

  The EB-sampler (arXiv:2505.24857): the most positions whose entropies, all but
  the greatest of them, add up to no more than a bound.

  Attributes:
    gamma: the bound in nats, 0 or more.
  """

  schedule = "none"
  gamma: float

  def choose(
    self, seen: Seen, count: jax.Array, chance: Callable[[], Chance]
  ) -> jax.Array:
    del count, chance
    rank_T = ranks(self.score(seen), seen.is_masked)
    # The greatest entropy of a stretch is that of its last position.
    is_before_TxT = rank_T[None, :] < rank_T[:, None]
    before_T = jnp.where(is_before_TxT, seen.entropy[None, :], 0.0).sum(axis=1)
    return seen.is_masked & (before_T <= self.gamma)


class Confidence(UnmaskRule):
  """Those whose drawn token is the most probable."""

  looks_at = "draws"

  def score(self, seen: Seen) -> jax.Array:
    return seen.drawn

  def bar(self, seen: Seen, is_target_T: jax.Array) -> Bar:
    """The lowest confidence that was kept, and the last position with it."""
    lowest = jnp.where(is_target_T, seen.drawn, jnp.inf).min()
    is_lowest_T = is_target_T & (seen.drawn == lowest)
    position_T = jnp.arange(seen.drawn.size)
    return Bar(lowest, jnp.where(is_lowest_T, position_T, -1).max())


class Levelled(Confidence):
  """The most confident ones, and with them all that reach a level."""

  def level(self, rank: jax.Array, size: int) -> Bar:
    """Returns what the draw of a rank must reach to be unmasked for that alone.

    Args:
      rank: int32, how many masked positions of the block are more confident.
      size: T.
    """
    raise TypeError(f"{self} has no level")

  def choose(
    self, seen: Seen, count: jax.Array, chance: Callable[[], Chance]
  ) -> jax.Array:
    del chance
    rank_T = ranks(seen.drawn, seen.is_masked)
    size = seen.drawn.size
    is_below_T = self.level(rank_T, size).loses(seen.drawn, jnp.arange(size))
    return seen.is_masked & ((rank_T < count) | ~is_below_T)

  def bar(self, seen: Seen, is_target_T: jax.Array) -> Bar:
    """The level of the next one, unless what was kept is below it: then that.

    What stayed masked was less confident than all that was kept, and below the
    level that the best of it would have had to reach. That it was kept because
    of the count, or because of the level, makes no difference.
    """
    level = self.level(is_target_T.sum(), seen.drawn.size)
    return lower(super().bar(seen, is_target_T), level)


@dataclasses.dataclass(frozen=True)
class Threshold(Levelled):
  """All as probable as a threshold, and the most confident one in any case.

  Fast-dLLM's parallel decoding (arXiv:2505.22618).

  Attributes:
    threshold: probability in (0, 1].
  """

  schedule = "none"
  threshold: float

  def level(self, rank: jax.Array, size: int) -> Bar:
    del rank
    # One that equals the threshold is unmasked: no position is after the end.
    return Bar(_log_odds_of(self.threshold), jnp.int32(size))


@dataclasses.dataclass(frozen=True)
class Dynamic(Levelled):
  """All above a threshold, or the most confident ones if these are too few.

  SDAR's and TraDo's dynamic decoding; too few are less than the schedule says.

  Attributes:
    threshold: probability in (0, 1].
  """

  schedule = "least"
  threshold: float

  def level(self, rank: jax.Array, size: int) -> Bar:
    del rank, size
    # One that equals the threshold is not above it, wherever it is.
    return Bar(_log_odds_of(self.threshold), jnp.int32(-1))


@dataclasses.dataclass(frozen=True)
class Factor(Levelled):
  """The more at once, the more probable they have to be.

  Fast-dLLM's factor (arXiv:2505.22618): the greatest n for which the n-th most
  confident one is at least as probable as 1 - factor / (n + 1), but at least 1.
  If that leaves a single position masked it goes too, as released: then all of
  the block is unmasked, and there is none left of which the order could tell.

  Attributes:
    factor: positive; the greater, the more positions at once.
  """

  schedule = "none"
  factor: float

  def choose(
    self, seen: Seen, count: jax.Array, chance: Callable[[], Chance]
  ) -> jax.Array:
    is_chosen_T = super().choose(seen, count, chance)
    leaves_one = (seen.is_masked & ~is_chosen_T).sum() == 1
    return jnp.where(leaves_one, seen.is_masked, is_chosen_T)

  def level(self, rank: jax.Array, size: int) -> Bar:
    least = jnp.maximum(1 - self.factor / (rank + 2), 0.0)  # n is rank + 1
    return Bar(_log_odds_of(least), jnp.int32(size))


@dataclasses.dataclass(frozen=True)
class SoftThreshold(UnmaskRule):
  """Each by chance, the more confident the likelier: a threshold with a slope.

  Where a confidence crosses a hard threshold the expected reward jumps, and no
  gradient sees that. Here each masked position passes by itself, with
  probability

    g = sigmoid((logit conf - logit threshold) / soft_width)

  of the confidence of its drawn token. Where none passes, one position i keeps
  its token, drawn from the distributions alone: with the odds of its most
  probable token, to the power of 1 / soft_width, among those of the others. As
  the width goes to zero this becomes a threshold, whose fallback is the
  position with the most probable token, drawn or not.

  A probability above 1 - 1e-4 counts as that here.

  Attributes:
    threshold: probability in (0, 1] that passes every second time.
    soft_width: positive, in units of log-odds.
  """

  looks_at = "draws"
  schedule = "none"
  has_chance = True
  threshold: float
  soft_width: float

  def _height(self, confidence: jax.Array) -> jax.Array:
    """The argument of the sigmoid."""
    level = jnp.clip(_log_odds_of(self.threshold), _LEAST, _MOST)
    return (jnp.clip(confidence, _LEAST, _MOST) - level) / self.soft_width

  def _fallback_logprob(self, seen: Seen) -> jax.Array:
    """float32 [T], of being the one that stays if none passes."""
    height_T = self._height(seen.confidence.max(axis=1))
    # Finite where nothing is masked any more.
    is_open_T = seen.is_masked | ~seen.is_masked.any()
    return jax.nn.log_softmax(jnp.where(is_open_T, height_T, -jnp.inf))

  def choose(
    self, seen: Seen, count: jax.Array, chance: Callable[[], Chance]
  ) -> jax.Array:
    del count
    drawn = chance()
    prob_T = jax.nn.sigmoid(self._height(seen.drawn))
    passes_T = seen.is_masked & (drawn.passes < prob_T)
    only = jnp.argmax(self._fallback_logprob(seen) + drawn.fallback)
    is_only_T = seen.is_masked & (jnp.arange(prob_T.size) == only)
    return jnp.where(passes_T.any(), passes_T, is_only_T)

  def order_logprob(self, seen: Seen, is_target_T: jax.Array) -> jax.Array:
    """Log-probability that just these were unmasked, given their tokens.

    With G_j = sum_v pi_j(v) (1 - g(conf_j(v))), which a position that stayed
    masked has drawn and missed, and q the fallback's distribution,

      several targets:  sum_i log g_i + sum_j log G_j
      one target i:     log [g_i + q_i (1 - g_i)] + sum_j log G_j

    i over the targets, j over the other masked positions: one that is alone
    passed, or did not and was the one that stays. The gradient goes through pi,
    g and q.
    """
    stays_TxS = seen.logprob + jax.nn.log_sigmoid(
      -self._height(seen.confidence)
    )
    stays_T = jax.nn.logsumexp(stays_TxS, axis=1)
    # Elsewhere the confidence means nothing, and may be minus infinity.
    height_T = self._height(jnp.where(is_target_T, seen.drawn, -1.0))
    passed_T = jax.nn.log_sigmoid(height_T)
    fallback_T = jnp.where(is_target_T, self._fallback_logprob(seen), 0.0)
    alone_T = jnp.logaddexp(
      passed_T, fallback_T + jax.nn.log_sigmoid(-height_T)
    )
    kept_T = jnp.where(is_target_T.sum() == 1, alone_T, passed_T)
    is_other_T = seen.is_masked & ~is_target_T
    return (
      jnp.where(is_target_T, kept_T, 0.0) + jnp.where(is_other_T, stays_T, 0.0)
    ).sum()


def log_odds(logprob_S: jax.Array) -> jax.Array:
  """Returns float32 [S], log p / (1 - p), by which confidences are compared.

  Near 1 a float32 log-probability is mostly rounding, which differs from one
  compiled program to the next: sampler and objective would rank differently.
  What is missing to 1 is therefore the sum of the others.

  Args:
    logprob_S: float32, log-probabilities of a whole distribution.
  """
  candidate_S = jnp.arange(logprob_S.shape[0])
  is_first_S = candidate_S == jnp.argmax(logprob_S)
  others = jnp.where(is_first_S, 0.0, jnp.exp(logprob_S)).sum()
  # No other one is above a half; and NaN of 1 - 1 must not enter a gradient.
  prob_S = jnp.exp(jnp.where(is_first_S, -1.0, logprob_S))
  return logprob_S - jnp.where(
    is_first_S, jnp.log(jnp.maximum(others, _TINY)), jnp.log1p(-prob_S)
  )


def _log_odds_of(prob: jax.Array | float) -> jax.Array:
  """The log-odds of a level, infinite where it is 0 or 1."""
  return jnp.log(prob) - jnp.log1p(-prob)


def candidates(
  is_masked_T: jax.Array, position_T: jax.Array, lead_every: int
) -> jax.Array:
  """Returns bool [T], those masked positions that the next step may unmask.

  All, or those that lead, if any of them does (`Sampling.lead_every`).

  Args:
    is_masked_T: bool, what is masked.
    position_T: int32, where it stands in the completion.
    lead_every: positions from one that leads to the next; 0: none does.
  """
  if not lead_every:
    return is_masked_T
  leads_T = is_masked_T & (position_T % lead_every == 0)
  return jnp.where(leads_T.any(), leads_T, is_masked_T)


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
