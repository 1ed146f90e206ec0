"""Statistics of a comparison, against what is worked out by hand."""

import math

import numpy as np
import pytest

from agrpo_jax.lab import compare


def outcome(grades, **changes):
  """A comparison with grades [S, N] by objective."""
  runs = [
    compare.Run(
      objective=word,
      learning_rate=1e-3,
      seed=seed,
      num_steps=10,
      passes=99.0 + seed,
      seconds=5.0,
      grade_N=np.array(grade_N, float),
      curve=(
        compare.Point(5, 50.0, 2.5, 0.25),
        compare.Point(10, 100.0, 5.0, 0.5),
      ),
    )
    for word, grade_SxN in grades.items()
    for seed, grade_N in enumerate(grade_SxN)
  ]
  values = dict(
    runs=runs,
    rates=[],
    before_N=np.zeros(4),
    before_curve=0.1,
    budget="100 passes",
    unit="passes",
    amount=100.0,
    notes=["A note."],
    command="python -m agrpo_jax.lab train",
  )
  return compare.Outcome(**values | changes)


def test_half_width_is_that_of_students_t():
  # 4.303 is the quantile for two degrees of freedom, sem 1 / sqrt(3).
  assert compare.half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(
    4.3027 / math.sqrt(3), rel=1e-4
  )
  assert math.isnan(compare.half_width(np.array([1.0])))


@pytest.mark.parametrize(
  "ps,adjusted",
  [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.02, 0.01], [0.02, 0.02]),
    ([0.9, 0.8], [1.0, 1.0]),
    ([], []),
  ],
)
def test_holm(ps, adjusted):
  assert compare.holm(ps) == pytest.approx(adjusted)


class TestPairs:
  def pair(self, difference_SxN):
    difference = np.array(difference_SxN, float)
    (found,) = compare.pairs({"a": difference, "b": np.zeros_like(difference)})
    return found

  def test_what_never_varies_is_certain(self):
    found = self.pair(np.ones((3, 5)))
    assert (found.first, found.second) == ("a", "b")
    assert found.difference == found.low == found.high == found.won == 1
    assert found.low_seeds == found.high_seeds == 1
    assert found.p == pytest.approx(2 / 10_001)
    assert found.differs and found.excludes_zero

  def test_equals_do_not_differ(self):
    found = self.pair(np.zeros((3, 5)))
    assert found.difference == 0 and found.won == 0.5 and found.p == 1
    assert not found.differs and not found.excludes_zero

  def test_the_better_one_stands_first(self):
    found = self.pair([[-1.0, 0.0], [0.0, 0.0]])
    assert found.first == "b" and found.difference == 0.25

  def test_seeds_and_prompts_are_resampled(self):
    # Alone one seed on one prompt differs. Each is in a resample of two with
    # probability 3/4, and twice with 1/4: the mean is positive in 9/16 of all
    # and 1 in 1/16.
    found = self.pair([[1.0, 0.0], [0.0, 0.0]])
    assert found.won == pytest.approx(9 / 16 + 7 / 32, abs=0.02)
    assert found.p == pytest.approx(2 * 7 / 16, abs=0.03)
    assert (found.low, found.high) == (0, 1)

  def test_seeds_share_the_choice_of_prompts(self):
    # One prompt makes all of the difference, whatever the seed: it is missing
    # in 1/4 of the resamples, and in 1/16 if each seed had its own choice.
    found = self.pair([[1.0, 0.0], [1.0, 0.0]])
    assert found.won == pytest.approx(3 / 4 + 1 / 8, abs=0.02)

  def test_the_interval_over_seeds_is_paired(self):
    base = np.array([[0.1] * 4, [0.9] * 4])
    (found,) = compare.pairs({"a": base + 0.05, "b": base})
    assert found.low_seeds == pytest.approx(0.05)
    assert found.high_seeds == pytest.approx(0.05)

  def test_many_pairs_raise_p(self):
    rng = np.random.default_rng(0)
    grades = {str(i): rng.integers(0, 2, (3, 20)).astype(float) for i in "abcd"}
    found = compare.pairs(grades, num_resamples=500)
    assert len(found) == 6
    assert all(pair.p <= pair.p_holm <= 1 for pair in found)
    assert found == compare.pairs(grades, num_resamples=500)


def test_a_few_seeds_that_agree_prove_little():
  """Two differ by chance: drawn again and again, both are always ahead."""
  ones = np.zeros((2, 200))
  ones[0, :60], ones[1, :5] = 1, 1
  (pair,) = compare.pairs({"a": ones, "b": np.zeros((2, 200))}, 1000)
  assert pair.low > 0 and pair.low_seeds < 0
  # t = 0.1625 / 0.1375 with one degree of freedom.
  assert pair.p == pytest.approx(1 - 2 / math.pi * math.atan(0.1625 / 0.1375))
  assert not pair.excludes_zero and not pair.differs


def test_the_best_learning_rate_is_chosen():
  assert compare.choose({1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.3}) == 1e-3
  assert compare.choose({1e-2: 0.5, 1e-3: 0.5, 1e-4: 0.3}) == 1e-3


class TestReport:
  def test_it_ranks_and_says_who_differs(self):
    good, bad = np.ones((2, 40)), np.zeros((2, 40))
    found = outcome({"bad": bad, "good": good, "same": good})
    text = compare.report(found, found.pairs())
    assert text.index("| `good`") < text.index("| `bad`")
    assert "Of 3 pairs 2 differ" in text
    assert "* `good` over `bad`: +100.0 points (100.0 to 100.0 by" in text
    assert "No difference was found between `good` and `same`." in text
    assert "99.0 % to 100.0 % of the budget" in text

  def test_it_tells_chance_among_many(self):
    pair = compare.Pair("a", "b", 0.1, 0.01, 0.2, 0.98, 0.04, 0.4, 0.01, 0.3)
    lines = "\n".join(compare._verdicts([pair]))
    assert "Of 1 pairs 0 differ" in lines
    assert "may be chance:\n\n* `a` over `b`: +10.0 points" in lines

  def test_it_shows_learning_rates_and_their_edge(self):
    rates = [
      compare.Rate("a", 1e-4, 0.25, False, True),
      compare.Rate("a", 1e-3, 0.5, True, True),
      compare.Rate("b", 1e-4, 0.25, True, True),
      compare.Rate("b", 1e-3, math.nan, False, True),
    ]
    grades = {"a": np.ones((2, 2)), "b": np.zeros((2, 2))}
    found = outcome(grades, rates=rates)
    text = compare.report(found, found.pairs())
    assert "| `a` | 0.001 (edge) | 10 | 99.5 | 5.0 | 100.0 % ± 0.0 |" in text
    assert "| `a` | 25.0 % | **50.0 %** |" in text
    assert "| `b` | **25.0 %** | not finite |" in text

  def test_train_steps_are_no_equal_compute(self):
    grades = {"a": np.ones((2, 2)), "b": np.zeros((2, 2))}
    found = outcome(grades, unit="steps", budget="10 train steps")
    assert "is not equal" in compare.report(found, found.pairs())


def test_files(tmp_path):
  rng = np.random.default_rng(0)
  grades = {w: rng.integers(0, 2, (2, 9)).astype(float) for w in ("a", "b/c=1")}
  compare.write(outcome(grades), tmp_path / "new")
  lines = (tmp_path / "new" / "train.csv").read_text().splitlines()
  assert lines[0] == (
    "objective,learning_rate,seed,num_steps,passes,seconds,accuracy"
  )
  assert len(lines) == 5
  curves = (tmp_path / "new" / "curves.csv").read_text().splitlines()
  assert curves[1] == "a,0,5,50.0,2.5,0.25" and len(curves) == 9
  assert len((tmp_path / "new" / "pairs.csv").read_text().splitlines()) == 2
  assert (tmp_path / "new" / "train.png").stat().st_size > 1000
