"""Every cache, unmask rule and step rule: the estimator's expected gradient.

    python -m pytest tests/objectives/cached_estimator_proof.py

Minutes; the suite has a part of it, `cached_estimator_test.py`.
"""

import pytest

from agrpo_jax.objectives import mc_steps
from fixtures import cached_gradients
from fixtures import enumeration

TOYS = [
  *cached_gradients.TOYS,
  *cached_gradients.SHORT,
  "short_block",
  *cached_gradients.LED,
]


@pytest.mark.parametrize(
  "toy, rule",
  [
    (toy, rule)
    for toy in TOYS
    for rule in enumeration.RULES
    # Whose steps may leave out a position that leads.
    if not (toy in cached_gradients.LED and rule == "origin")
  ],
)
def test_every_step_rule_gives_the_enumerated_gradient(toy, rule):
  truth = cached_gradients.enumerated(toy, rule)[2]
  for step_rule in mc_steps.STEP_RULES:
    found, deviation = cached_gradients.estimate(toy, rule, step_rule)
    assert cached_gradients.error(found, truth) < 1e-9, step_rule
    assert deviation < 1e-9, step_rule
