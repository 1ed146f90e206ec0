"""Statistics of verdicts against enumeration and against hand."""

import itertools

import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax.evaluation import statistics


def subsets(num_samples: int, k: int) -> list[tuple[int, ...]]:
  return list(itertools.combinations(range(num_samples), k))


def vote(answers: list[str], grade_n: np.ndarray) -> float:
  """The plain definition, for one choice of voters."""
  votes = [answer for answer in answers if answer]
  if not votes:
    return 0.0
  most = max(votes.count(answer) for answer in votes)
  winners = [a for a in dict.fromkeys(votes) if votes.count(a) == most]
  return np.mean(
    [
      np.mean([g for a, g in zip(answers, grade_n, strict=True) if a == winner])
      for winner in winners
    ]
  )


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_mean_over_all_choices(k):
  rng = np.random.default_rng(k)
  for grade_n in (
    rng.integers(0, 2, 6).astype(float),
    rng.random(6),
    np.zeros(6),
  ):
    expected = np.mean([grade_n[list(s)].max() for s in subsets(6, k)])
    np.testing.assert_allclose(statistics.pass_at_k(grade_n, k), expected)


def test_pass_at_k_of_verdicts_by_hand():
  grade_n = np.array([1.0, 0.0, 0.0, 0.0])
  # 1 - C(3, 2) / C(4, 2)
  np.testing.assert_allclose(statistics.pass_at_k(grade_n, 2), 0.5)


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize(
  "answers",
  [
    ["a", "b", "a", "c", "", "b", "a"],
    ["a", "b", "c", "d", "e", "f", "g"],
    ["a", "a", "b", "b", "c", "c", ""],
    ["", "", "", "", "", "a", ""],
    [""] * 7,
    ["a"] * 7,
  ],
)
def test_majority_at_k_is_the_mean_over_all_choices(answers, k):
  # The grades of one answer may differ: the strict verdict sees more than it.
  grade_n = np.random.default_rng(0).random(7)
  expected = np.mean(
    [vote([answers[i] for i in s], grade_n[list(s)]) for s in subsets(7, k)]
  )
  np.testing.assert_allclose(
    statistics.majority_at_k(answers, grade_n, k), expected
  )


def test_majority_of_many_samples_is_fast():
  rng = np.random.default_rng(0)
  answers = [str(n) for n in rng.integers(0, 40, 64)]
  for k in (1, 16, 64):
    value = statistics.majority_at_k(answers, np.ones(64), k)
    np.testing.assert_allclose(value, 1.0)


@pytest.mark.parametrize("ks", [[0], [1, 5], [-1]])
def test_k_larger_than_the_samples_is_refused(ks):
  with pytest.raises(errors.UserError, match=r"samples drawn .*num_samples=4"):
    statistics.check_k(ks, 4)


def test_standard_error_by_hand():
  # Variance 0.25 with three degrees of freedom, over four prompts.
  score_N = np.array([1.0, 0.0, 1.0, 1.0])
  np.testing.assert_allclose(statistics.standard_error(score_N), 0.25)
  assert np.isnan(statistics.standard_error(score_N[:1]))


def test_bootstrap_interval():
  score_N = (np.arange(400) < 100).astype(float)
  low, high = statistics.bootstrap_interval(score_N)
  assert (low, high) == statistics.bootstrap_interval(score_N)
  error = statistics.standard_error(score_N)
  np.testing.assert_allclose(
    [low, high], 0.25 + 1.96 * error * np.r_[-1, 1], atol=0.1 * error
  )
  assert statistics.bootstrap_interval(np.ones(5)) == (1.0, 1.0)
  # One prompt tells nothing of the choice of prompts.
  assert np.isnan(statistics.bootstrap_interval(np.ones(1))).all()


def test_bootstrap_interval_by_hand():
  """Of two prompts: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
  score_N = np.array([0.0, 1.0])
  assert statistics.bootstrap_interval(score_N) == (0.0, 1.0)
  assert statistics.bootstrap_interval(score_N, level=0.4) == (0.5, 0.5)


def record(accuracy: float, tolerant: float, answer: str, num_tokens: int):
  return {
    "grades": {"accuracy": accuracy, "accuracy_tolerant": tolerant},
    "answer": answer,
    "num_tokens": num_tokens,
    "num_executed_steps": 4,
    "num_whole_passes": 4,
  }


def test_result_by_hand():
  result = statistics.Result(
    [
      record(1, 1, "2", 3),
      record(0, 1, "2", 5),
      record(0, 0, "", 0),
      {
        "grades": {},
        "answer": "",
        "num_tokens": 4,
        "num_executed_steps": 8,
        "num_whole_passes": 2,
      },
    ],
    num_samples=2,
    seconds=6.0,
  )
  np.testing.assert_array_equal(result.grades["accuracy"], [0.5, 0.0])
  np.testing.assert_array_equal(result.grades["accuracy_tolerant"], [1.0, 0.0])
  assert result.num_disagree == 1
  found = result.scalars("eval/")
  assert found["eval/accuracy"] == 0.25
  assert found["eval/accuracy_standard_error"] == 0.25
  assert found["eval/mean_length"] == 3.0
  assert found["eval/mean_whole_passes"] == 3.5
  assert found["eval/mean_denoise_steps"] == 5.0
  assert found["eval/tokens_per_second"] == 2.0
  assert result.at_k([1, 2]) == {
    "accuracy/pass_at_1": 0.25,
    "accuracy/majority_at_1": 0.25,
    "accuracy/pass_at_2": 0.5,
    "accuracy/majority_at_2": 0.25,
    "accuracy_tolerant/pass_at_1": 0.5,
    "accuracy_tolerant/majority_at_1": 0.5,
    "accuracy_tolerant/pass_at_2": 0.5,
    "accuracy_tolerant/majority_at_2": 0.5,
  }


def test_one_prompt_has_no_standard_error():
  result = statistics.Result([record(1, 1, "", 3)], num_samples=1, seconds=1.0)
  found = result.scalars()
  assert "accuracy_standard_error" not in found
  assert np.isfinite(list(found.values())).all()
  # No answers are known: no majority.
  assert set(result.at_k([1])) == {
    "accuracy/pass_at_1",
    "accuracy_tolerant/pass_at_1",
  }


def test_cells_over_the_set():
  one = {"accuracy": 0, "num_right": 1, "num_blanks": 1}
  other = {"accuracy": 0, "num_right": 1, "num_blanks": 3}
  result = statistics.Result(
    [{**record(0, 0, "", 1), "grades": grades} for grades in (one, other)],
    num_samples=1,
    seconds=1.0,
  )
  assert result.scalars()["cells_micro"] == 0.5
