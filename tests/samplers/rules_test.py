"""Which positions a step unmasks, and the likelihood of its choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.samplers import rules

# Draws of equal confidence are among them, at one position and between two.
PROB = np.array([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])


def no_chance() -> rules.Chance:
  raise AssertionError("nothing is left to chance")


def seen(drawn, prob=PROB, is_masked=None) -> rules.Seen:
  """A block whose draws have these probabilities."""
  prob, drawn = np.asarray(prob), np.asarray(drawn)
  entropy = -(prob * np.log(prob)).sum(axis=1)
  if is_masked is None:
    is_masked = np.ones(len(prob), bool)
  return rules.Seen(
    is_masked=jnp.asarray(is_masked),
    logprob=jnp.log(jnp.asarray(prob)),
    confidence=jnp.log(prob) - jnp.log1p(-prob),
    drawn=jnp.log(drawn) - jnp.log1p(-drawn),
    entropy=jnp.asarray(entropy),
  )


def chosen_by(rule, block: rules.Seen, count=1) -> list[int]:
  chosen = rule.choose(block, jnp.int32(count), no_chance)
  return np.flatnonzero(chosen).tolist()


def test_ranks_order_masked_positions_by_score_then_position():
  score = jnp.array([0.3, 0.9, 0.9, -jnp.inf, 0.5])
  is_masked = jnp.array([True, False, True, True, True])
  rank = rules.ranks(score, is_masked)
  assert np.asarray(rank).tolist() == [2, 4, 0, 3, 1]
  tied = rules.ranks(jnp.zeros(4), jnp.ones(4, bool))
  assert np.asarray(tied).tolist() == [0, 1, 2, 3]


def by_rank(confidence) -> list[int]:
  return sorted(range(3), key=lambda i: (-confidence[i], i))


def confidence_of(count):
  return rules.Confidence(), count, lambda c: by_rank(c)[:count]


def threshold_of(tau):
  def expected(c):
    return [i for i in range(3) if c[i] >= tau] or by_rank(c)[:1]

  return rules.Threshold(tau), 1, expected


def dynamic_of(tau, count):
  def expected(c):
    above = [i for i in range(3) if c[i] > tau]
    return above if len(above) >= count else by_rank(c)[:count]

  return rules.Dynamic(tau), count, expected


def factor_of(factor):
  def expected(c):
    order = by_rank(c)
    num = 1
    for n in (2, 3):
      if c[order[n - 1]] >= 1 - factor / (n + 1):
        num = n
    # As released: one that would be left alone goes too.
    return order[: 3 if num == 2 else num]

  return rules.Factor(factor), 1, expected


@pytest.mark.parametrize(
  "rule,count,expected",
  [
    *map(confidence_of, (1, 2, 3)),
    # Where all, some or none reach it, and confidences equal to it.
    *map(threshold_of, (0.2, 0.3, 0.45, 0.5, 0.6)),
    *itertools.starmap(
      dynamic_of, itertools.product((0.2, 0.25, 0.3, 0.5, 0.6), (1, 2, 3))
    ),
    # Its levels for two and for three at once are 0.5, 0.625; 0.33, 0.5; 0.25,
    # 0.44; 0.17, 0.375; and below zero.
    *map(factor_of, (1.5, 2.0, 2.25, 2.5, 5.0)),
  ],
)
def test_order_logprob_by_enumerating_every_draw(rule, count, expected):
  """Including draws of equal confidence, which count by position."""
  total: dict = {}
  for draws in itertools.product(range(3), repeat=3):
    confidence = PROB[np.arange(3), draws]
    chosen = tuple(sorted(expected(confidence)))
    assert chosen_by(rule, seen(confidence), count) == [*chosen]
    kept = (chosen, tuple(draws[i] for i in chosen))
    total[kept] = total.get(kept, 0.0) + confidence.prod()
  for (chosen, tokens), probability in total.items():
    drawn = np.full(3, 0.01)  # must not be read
    drawn[list(chosen)] = PROB[list(chosen), list(tokens)]
    is_target = jnp.asarray(np.isin(np.arange(3), chosen))
    order = rule.order_logprob(seen(drawn), is_target)
    likelihood = np.exp(float(order)) * drawn[list(chosen)].prod()
    np.testing.assert_allclose(likelihood, probability, rtol=1e-5)
  np.testing.assert_allclose(sum(total.values()), 1.0)


@pytest.mark.parametrize("others", [1e-2, 1e-6, 1e-12, 1e-25])
def test_log_odds_are_exact_where_probabilities_are_rounding(others):
  logit = jnp.array([0.0, np.log(others / 4), np.log(others * 3 / 4)])
  found = rules.log_odds(jax.nn.log_softmax(logit))
  rest = np.array([others, 1 + others * 3 / 4, 1 + others / 4])
  expected = np.log(np.array([1, others / 4, others * 3 / 4]) / rest)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # Rounding of what is next to 1 ranks nothing.
  moved = rules.log_odds(jax.nn.log_softmax(logit + 1e-6))
  np.testing.assert_allclose(moved, found, atol=1e-5)


def test_log_odds_of_what_is_certain_and_of_what_is_cut():
  certain, cut = rules.log_odds(jnp.array([0.0, -jnp.inf]))
  assert 60 < certain < np.inf and cut == -np.inf
  gradient = jax.grad(lambda x: rules.log_odds(x)[0])(jnp.zeros(1))
  assert np.isfinite(gradient).all()


def test_margin_is_of_the_two_most_probable():
  prob = [[0.5, 0.4, 0.1], [0.4, 0.2, 0.4], [0.45, 0.1, 0.45], [0.3, 0.5, 0.2]]
  block = seen([0.1] * 4, prob)
  np.testing.assert_allclose(
    rules.Margin().score(block), [0.1, 0.0, 0.0, 0.2], atol=1e-6
  )
  assert chosen_by(rules.Margin(), block, 3) == [0, 1, 3]  # ties by position


def test_entropy_bounded_by_hand():
  """Entropies 0.1, 0.2, 0.3 and 0.4; the greatest of a stretch is free."""
  block = rules.Seen(
    is_masked=jnp.array([True, True, True, True, False]),
    logprob=jnp.zeros((5, 1)),
    confidence=jnp.zeros((5, 1)),
    drawn=jnp.zeros(5),
    entropy=jnp.array([0.3, 0.1, 0.4, 0.2, 0.0]),
  )
  for gamma, expected in (
    (0.0, [1]),
    (0.09, [1]),
    (0.15, [1, 3]),
    (0.35, [0, 1, 3]),
    (0.65, [0, 1, 2, 3]),
  ):
    rule = rules.EntropyBounded(gamma)
    chosen = rule.choose(block, jnp.int32(1), no_chance)
    assert np.flatnonzero(chosen).tolist() == expected, gamma


SOFT = rules.SoftThreshold(threshold=0.5, soft_width=0.5)


def test_a_soft_threshold_by_hand():
  """Odds of 4, 1 and 1/4, to the power of 2: 16/17, 1/2 and 1/17 pass."""
  block = seen([0.8, 0.5, 0.2])
  passes = jnp.array([0.94, 0.51, 0.06])
  for uniform, expected in (
    (passes, [0]),
    (passes.at[1].set(0.49), [0, 1]),
    (passes + 0.002, [2]),  # none passes: the largest Gumbel, all else equal
  ):
    chance = rules.Chance(uniform, jnp.array([0.0, 0.0, 9.0]))
    chosen = SOFT.choose(block, jnp.int32(1), lambda chance=chance: chance)
    assert np.flatnonzero(chosen).tolist() == expected
  # The fallback is drawn from the distributions alone: odds 1, 1, 9.
  prob = [[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.05, 0.05, 0.9]]
  block = seen([0.2] * 3, prob)
  np.testing.assert_allclose(
    jnp.exp(SOFT._fallback_logprob(block)), np.array([1, 1, 81]) / 83, rtol=1e-4
  )


def test_a_soft_threshold_stays_finite_at_the_ends():
  """Certain tokens, cut candidates, positions that are not masked."""
  logprob = jnp.log(jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
  for is_masked in ([True] * 3, [False] * 3, [True, False, True]):

    def value(logprob, is_masked=is_masked):
      block = rules.Seen(
        is_masked=jnp.array(is_masked),
        logprob=logprob,
        confidence=jax.vmap(rules.log_odds)(logprob),
        drawn=jnp.array([jnp.inf, -jnp.inf, -jnp.inf]),
        entropy=jnp.zeros(3),
      )
      is_target = jnp.array([True, False, False]) & jnp.array(is_masked)
      return SOFT.order_logprob(block, is_target)

    found, gradient = jax.value_and_grad(value)(logprob)
    assert np.isfinite(found) and np.isfinite(gradient).all()
    assert any(is_masked) or found == 0.0
