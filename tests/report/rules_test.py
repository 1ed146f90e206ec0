"""Each warning, on a log that calls for it and on one that almost does."""

import copy
import dataclasses
import math

import pytest

from agrpo_jax.report import rules
from fixtures import run_logs


def found(name, **metrics) -> rules.Found | None:
  log = run_logs.log(**metrics)
  return next((one for one in rules.find(log) if one.name == name), None)


def evaluated(*accuracies, reward=0.5):
  """A run that evaluates every tenth step, each with an error of 1 point."""
  log = run_logs.log(10 * len(accuracies), reward=reward)
  for index, accuracy in enumerate(accuracies):
    log.records[10 * index + 9].update(
      {"eval/accuracy": accuracy, "eval/accuracy_standard_error": 0.01}
    )
  return log


def names(log) -> set[str]:
  return {one.name for one in rules.find(log)}


# name: (a log that calls for it, one that does not, words of the first).
CASES = {
  "not_finite": (
    dict(num_steps=3, loss=[1.0, 1.0, math.nan]),
    dict(num_steps=3, loss=[1.0, math.nan, 1.0]),
    "loss of train step 3",
  ),
  "no_spread": (
    dict(num_steps=31, frac_reward_zero_std=[0.5] + [1.0] * 30),
    dict(num_steps=30, frac_reward_zero_std=[0.5] + [1.0] * 29),
    "No group has had spread for 30 train steps",
  ),
  "little_spread": (
    dict(num_steps=30, frac_reward_zero_std=0.9),
    dict(num_steps=30, frac_reward_zero_std=0.7),
    "90 %",
  ),
  "ratios_off": (
    dict(num_steps=4, policy_ratio__max_deviation=[0, 0.3, 0, 2e-3]),
    dict(num_steps=4, policy_ratio__max_deviation=5e-4),
    "by up to 0.3 (in 2 of 4 train steps): numerics",
  ),
  "no_update": (
    dict(num_steps=11, grad_norm=[1.0] + [0.0] * 10),
    dict(num_steps=11, grad_norm=[0.0] * 10 + [1.0]),
    "zero for 10 train steps",
  ),
  "large_gradient": (
    dict(num_steps=20, grad_norm=40.0),
    dict(num_steps=20, grad_norm=10.0),
    "40 times what it is clipped to",
  ),
  "cut": (
    dict(num_steps=10, completions__clipped_ratio=0.95, accuracy=0.02),
    # More are right than end by themselves: the limit fails nobody.
    dict(num_steps=10, completions__clipped_ratio=0.95, accuracy=0.5),
    "Nearly all completions (95 %) are cut at the limit of 16 tokens",
  ),
  "entropy_gone": (
    dict(
      num_steps=30,
      entropy=[1.0] * 10 + [0.01] * 20,
      frac_reward_zero_std=0.6,
    ),
    dict(
      num_steps=30,
      entropy=[1.0] * 10 + [0.01] * 20,
      frac_reward_zero_std=0.2,
    ),
    "fell from 1 to 0.01 nats",
  ),
  "kl": (dict(num_steps=10, kl=0.9), dict(num_steps=10, kl=0.1), "is 0.9: the"),
  "clipped": (
    dict(num_steps=20, clip_ratio__region_mean=0.4),
    dict(num_steps=20, clip_ratio__region_mean=0.2),
    "40 % of the factors",
  ),
  "none_graded": (
    dict(
      num_steps=60,
      grading__num_failed=[0.0] * 10 + [6.0] * 50,
      grading__num_timed_out=2.0,
    ),
    dict(num_steps=3, grading__num_failed=[8.0, 8.0, 7.0]),
    "No completion of the last 50 train steps could be graded",
  ),
  "grading_failed": (
    dict(num_steps=10, grading__num_failed=1.0),
    dict(num_steps=20, grading__num_failed=[1.0] + [0.0] * 19),
    "Grading failed for 12.5 %",
  ),
  "grading_timed_out": (
    dict(num_steps=10, grading__num_timed_out=2.0),
    dict(num_steps=10, grading__num_timed_out=0.0),
    "Grading ran out of time for 25.0 %",
  ),
  "slow_grading": (
    dict(num_steps=21, seconds__rollout=1.0, seconds__grade=1.0),
    dict(num_steps=21, seconds__rollout=1.0, seconds__grade=0.1),
    "50 % of the time",
  ),
  "slow_evaluation": (
    dict(num_steps=51, seconds__rollout=1.0, seconds__evaluate=3.0),
    dict(num_steps=51, seconds__rollout=1.0, seconds__evaluate=0.5),
    "Evaluation takes 75 %",
  ),
  "waiting": (
    dict(num_steps=10, slot_occupancy=0.3),
    dict(num_steps=10, slot_occupancy=0.8),
    "30 %",
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_when_it_should_and_only_then(name):
  bad, good, words = CASES[name]
  assert words in found(name, **bad).words
  assert found(name, **good) is None


def test_every_rule_has_a_case():
  others = {"below_best", "below_start", "reward_only"}
  assert {rule.name for rule in rules.RULES} == CASES.keys() | others


def test_nothing_is_said_of_a_run_that_has_just_begun():
  assert not rules.find(run_logs.log())
  assert not rules.find(run_logs.log(1, frac_reward_zero_std=1.0, grad_norm=0))


def test_below_the_best_by_more_than_chance():
  assert "below_best" in names(evaluated(0.2, 0.5, 0.4))
  # Two standard errors of a difference are 2.8 points here.
  assert "below_best" not in names(evaluated(0.2, 0.5, 0.48))
  assert "below_best" not in names(evaluated(0.2, 0.4, 0.5))


def test_below_what_it_was_before_training():
  """No checkpoint is the best one then."""
  log = dataclasses.replace(
    evaluated(0.5, 0.4),
    before={"accuracy": 0.6, "accuracy_standard_error": 0.01},
  )
  (found,) = rules.find(log)
  assert found.name == "below_start"
  assert "below its best of 60.0 % before training" in found.words
  assert ":best" not in found.remedy


def test_what_was_never_graded_stops():
  log = run_logs.log(3, grading__num_failed=8.0)
  assert [(one.name, one.level) for one in rules.find(log)] == [
    ("none_graded", "stop")
  ]


def test_a_reward_that_pays_for_something_else():
  rising = [0.01 * step for step in range(30)]
  assert "reward_only" in names(evaluated(0.5, 0.4, 0.3, reward=rising))
  assert "reward_only" not in names(evaluated(0.3, 0.4, 0.5, reward=rising))
  assert "reward_only" not in names(evaluated(0.5, 0.4, 0.3, reward=0.5))


def test_bfloat16_rounds_more():
  config = copy.deepcopy(run_logs.CONFIG)
  config["model"]["dtype"] = "bfloat16"
  log = run_logs.log(4, config=config, policy_ratio__max_deviation=2e-2)
  assert "ratios_off" not in names(log)
  assert found("ratios_off", num_steps=4, policy_ratio__max_deviation=2e-2)


def test_what_stops_learning_comes_first():
  log = run_logs.log(
    40, frac_reward_zero_std=0.9, policy_ratio__max_deviation=0.3
  )
  found = rules.find(log)
  assert [one.name for one in found] == ["ratios_off", "little_spread"]
  assert [one.level for one in found] == ["stop", "look"]
