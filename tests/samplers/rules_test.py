"""Which positions a step unmasks, and the likelihood of its choice."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.samplers import rules


def test_ranks_order_masked_positions_by_score_then_position():
  score = jnp.array([0.3, 0.9, 0.9, -jnp.inf, 0.5])
  is_masked = jnp.array([True, False, True, True, True])
  rank = rules.ranks(score, is_masked)
  assert np.asarray(rank).tolist() == [2, 4, 0, 3, 1]
  tied = rules.ranks(jnp.zeros(4), jnp.ones(4, bool))
  assert np.asarray(tied).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_targets", [1, 2])
def test_order_logprob_of_confidence_by_enumerating_every_draw(num_targets):
  """Including draws of equal confidence, which count by position."""
  prob = np.array([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
  total: dict = {}
  for draws in itertools.product(range(3), repeat=3):
    confidence = prob[np.arange(3), draws]
    order = sorted(range(3), key=lambda i: (-confidence[i], i))
    chosen = tuple(sorted(order[:num_targets]))
    kept = (chosen, tuple(draws[i] for i in chosen))
    total[kept] = total.get(kept, 0.0) + confidence.prod()
  for (chosen, tokens), expected in total.items():
    drawn = np.zeros(3)
    drawn[list(chosen)] = prob[list(chosen), list(tokens)]
    is_target = np.isin(np.arange(3), chosen)
    order = rules.order_logprob(
      jnp.log(jnp.asarray(prob)),
      jnp.asarray(prob),
      rules.Confidence().bar(jnp.asarray(drawn), jnp.asarray(is_target)),
      jnp.asarray(~is_target),
    )
    likelihood = np.exp(float(order)) * drawn[list(chosen)].prod()
    np.testing.assert_allclose(likelihood, expected, rtol=1e-5)
  np.testing.assert_allclose(sum(total.values()), 1.0)


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.45, 0.5, 0.6])
def test_order_logprob_of_threshold_by_enumerating_every_draw(threshold):
  """Where all, some or none reach it; confidences equal to it pass."""
  prob = np.array([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
  rule = rules.Threshold(threshold)
  total: dict = {}
  for draws in itertools.product(range(3), repeat=3):
    confidence = prob[np.arange(3), draws]
    best = min(range(3), key=lambda i: (-confidence[i], i))
    chosen = tuple(
      i for i in range(3) if confidence[i] >= threshold or i == best
    )
    ours = rule.choose(
      jnp.log(jnp.asarray(confidence)),
      jnp.zeros(3),
      jnp.ones(3, bool),
      jnp.int32(1),
    )
    assert np.flatnonzero(ours).tolist() == list(chosen)
    kept = (chosen, tuple(draws[i] for i in chosen))
    total[kept] = total.get(kept, 0.0) + confidence.prod()
  for (chosen, tokens), expected in total.items():
    drawn = np.full(3, 0.99)
    drawn[list(chosen)] = prob[list(chosen), list(tokens)]
    is_target = np.isin(np.arange(3), chosen)
    order = rules.order_logprob(
      jnp.log(jnp.asarray(prob)),
      jnp.log(jnp.asarray(prob)),
      rule.bar(jnp.log(jnp.asarray(drawn)), jnp.asarray(is_target)),
      jnp.asarray(~is_target),
    )
    likelihood = np.exp(float(order)) * drawn[list(chosen)].prod()
    np.testing.assert_allclose(likelihood, expected, rtol=1e-5)
